"""What a config must obey: all rules run, and what they find is reported together.

table.py lists them; ranges.py bounds single numbers, layout.py is about sizes over ranks, training.py
about all else.  model_identity.py says which settings a trained model may change.
Imports sections/ and flags/.
"""
