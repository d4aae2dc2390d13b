"""What is optimised: loss(outputs, batch) -> sum, count, metrics on vocabulary-parallel logits.

Imports layers, parallel and pipeline; train/assemble.py chooses one by name.
Begin with language_model.py.
"""
