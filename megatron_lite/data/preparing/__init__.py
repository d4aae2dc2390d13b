"""What makes token files: corpora read, tokenized, written whole or not at all, checked, repaired.

Imports the formats of data/ above it, which import nothing of this; no torch.  Begin with
preprocess.py (a corpus becomes a pair), then inputs.py (what is read) and pair_writer.py.
"""
