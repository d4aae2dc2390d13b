"""How ranks talk: the axes of the rank grid, collectives and their autograd pairs.

Imports config and blueprint; floors 2 to 4 may import it.
Begin with context.py: a ParallelContext is made once and passed to all code that communicates.
"""
