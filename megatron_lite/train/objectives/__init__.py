"""What is optimised: weight(batch) before a step, loss(outputs, batch) at the end of a forward.

Imports data, layers, parallel and pipeline; train/assemble.py builds the one that --objective names.
Begin with base.py, then language_model.py; table.py names them all.
"""
