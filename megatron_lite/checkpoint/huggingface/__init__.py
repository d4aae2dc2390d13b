"""Folders of Hugging Face, in and out, of every family that has a row in families.py.

    config.json ─▶ FAMILIES[model_type] ─▶ ModelConfig, names ─▶ conversions ─▶ tensors one by one

Imports what its house checkpoint/ may; inference and cli may import it.  Begin with family.py (what
a family says), then gpt2.py (one that says it; each has its file), folder.py (reading), exporting.py.
"""
