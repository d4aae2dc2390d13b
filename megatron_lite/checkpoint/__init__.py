"""What is kept: named slices of global tensors in safetensors files, made valid by a manifest.

Imports config, blueprint, parallel, models and storage; train, inference and tools may import it.
Begin with store.py (save and load), then manifest.py (the format and its checks); huggingface/ is the
room of folders of Hugging Face's.
"""
