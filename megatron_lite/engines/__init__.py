"""Gradients and state across dp: accumulate, reduce, clip, scale, update.

Imports config, blueprint, parallel, optim, kernels; only train may import it.
Begin with base.py (what every engine must do), then zero.py (the default) with clip.py and loss_scale.py;
table.py names all engines; deepspeed_zero.py is DeepSpeed's own, behind the same protocol;
matrices.py gathers what tp cuts and a rule must see whole.
"""
