"""Text to token ids and back: one tokenizer per file, imported when it is named.

Imports config only; libraries beyond numpy are optional extras.
Begin with base.py (the protocol), then build.py (a DataConfig becomes a tokenizer).
"""
