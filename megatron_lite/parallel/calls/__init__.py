"""What the ranks ask of one another: each call written down, compared after the fact or before it is made.

Imports blueprint and the rest of parallel; sessions and the rehearsal use it.
Begin with transcript.py (a rank's calls, and whether the ranks' fit together), then tape.py and checking.py.
"""
