"""How ops run: every op in plain PyTorch (reference.py) and its faster twins, chosen from one table.

Imports nothing of ours; layers, models, optim, engines and tools may import it.
Begin with table.py: op -> implementations, and why one is chosen.
"""
