"""Gradients and state across dp: accumulate, reduce, clip, scale, update.

Imports config, blueprint, parallel, optim, kernels; only train may import it.
Begin with base.py (what every engine is asked), then zero.py (ours) with clip.py and loss_scale.py;
table.py names all engines.
"""
