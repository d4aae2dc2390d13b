"""How ops run: every op in plain PyTorch (reference.py) and in faster ways, chosen from one table.

Imports no other folder of the package; layers, models, optim, engines and tools may import it.
Begin with table.py: op -> implementations, and why one is chosen.
"""
