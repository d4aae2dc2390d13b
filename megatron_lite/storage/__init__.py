"""Files that are whole or absent: everything the program writes goes through here.

Imports config.errors only, no torch; data, checkpoint, train and tools may import it.
Begin with disk.py; faults.py holds the disks that record, fail or crash for tests.
"""
