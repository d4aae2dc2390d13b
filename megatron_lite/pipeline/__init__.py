"""Carrying out a schedule: one executor for every list of actions, PP = 1 included.

Imports blueprint and parallel; train and inference may import it.
Begin with executor.py (the loop over actions), then stage.py and mail.py.
"""
