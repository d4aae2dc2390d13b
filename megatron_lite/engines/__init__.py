"""Gradients and state across dp: accumulate, reduce, clip, scale, update.

Imports config, blueprint, parallel, optim, kernels; only train may import it.
Begin with base.py (what every engine must do), then zero.py (the default) with clip.py and loss_scale.py;
bucket.py and buckets.py: where gradients lie and how they are reduced; whole.py: weights that are
shared, made whole where a layer reads them; holding.py: what of a parameter a rank holds;
table.py names all engines; deepspeed_zero.py is DeepSpeed's own, behind the same protocol;
matrices.py gathers what tp cuts and a rule must see whole.
"""
