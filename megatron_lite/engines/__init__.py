"""Gradients and state across dp: accumulate, reduce, clip, scale, update.

Imports config, blueprint, parallel, optim, kernels; only train may import it.
Begin with zero.py (our engine), then clip.py and loss_scale.py which it uses.
"""
