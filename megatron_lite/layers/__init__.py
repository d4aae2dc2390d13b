"""The parts of a model: parallel linears, embedding, norms, attention, MLP, cross entropy.

Imports config, parallel, kernels; models, inference and train may import it.
Begin with setting.py (what every layer is told), then linear.py (where the sharding is in the open).
"""
