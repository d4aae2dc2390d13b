"""Files that are whole or absent: the one place through which the program writes to disk.

Imports config.errors only, no torch; data, checkpoint, train and tools may import it.
Begin with disk.py; faults.py holds the disks that record, fail or crash for tests.
"""
