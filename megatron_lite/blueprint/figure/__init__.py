"""What a model is made of, torch-free: a sequence of parts that everything about its shape is read from.

May import config only.  Begin with parts.py, then transformer.py.  The parameter table, FLOPs,
activations, traffic and the modules in layers/ are folds over a Figure, so that they cannot disagree.
"""
