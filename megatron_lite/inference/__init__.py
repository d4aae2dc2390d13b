"""Using a trained model: sampling, KV cache and generation; what it is worth in evaluating/.

Imports all above but engines, optim and planner; train and tools may import it.
Begin with generate.py (prefill and decode), then stages.py (one forward over tp and pp), cache.py,
fixed.py and replay.py (a decode step as a CUDA graph), sampling.py (pure functions of logits), and
texts.py (tokens become text).
"""
