"""The trainer's own code as any rank of a world, alone: no peers, and tensors without memory.

Imports train and what is below it; only cli and tests may import it.
Begin with rehearse.py, then process_group.py (makes no call) and meta_tensors.py (shapes and bytes only).
"""
