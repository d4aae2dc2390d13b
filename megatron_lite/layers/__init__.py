"""The parts of a model: parallel linears, embedding, norms, attention, MLP, cross entropy.

Imports config, parallel, kernels; models, inference and train may import it.
Begin with contexts.py (what every layer is built with), then linear.py (where the sharding is in the open).
"""
