"""The ranks' calls to each other: recorded, and compared afterwards or before they are made.

Imports blueprint and the rest of parallel; sessions and the rehearsal use it.
Begin with log.py (a call log, and whether those of all ranks match), then recorder.py and checking.py.
"""
