"""What is read: token files, samples in Megatron's order, blends, batches, tokenizers.

Imports config and storage, no torch; ranks arrive as two integers, so a dataset can be inspected
anywhere.  Begin with build.py (a DataConfig becomes datasets), then indices.py (the order);
preparing/ makes the token files.
"""
