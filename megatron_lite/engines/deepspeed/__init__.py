"""What DeepSpeed's own engine (engines/deepspeed_zero.py) is told and what is found in it.

Imports what engines/ may, none of its files, and not the library.  Begin with partitions.py: what a rank
keeps of each parameter, by stage; fragments.py says which boxes of canonical tensors that is, holders.py
gives DeepSpeed's hooks our layers, written.py writes its configuration.
"""
