"""The trainer's own code as any rank of a world, alone: nobody answers, and tensors have no memory.

Imports train and what is below it; only cli and tests may import it.
Begin with rehearse.py, then process_group.py (talks to nobody) and meta_tensors.py (shapes and bytes only).
"""
