"""What the mains that let a model speak have in common: flags, prompts, ranks.

May import every floor; the mains in cli/ may import it.  Begin with model.py.
"""
