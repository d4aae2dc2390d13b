"""Models: which parts they consist of and how those are wired, without collectives or ranks.

Imports config, parallel, kernels and layers; train, inference, checkpoint and tests may import it.
Begin with gpt.py (the block, as in the paper's figure), then decoder.py (a stage).
"""
