"""How a run ends and starts again: stop requests, failures with their one line, restarts, faults on purpose.

Imports config, rendezvous, storage and checkpoint; nothing of the loop, which is what ends.
Begin with stop.py (when a run stops), then failures.py (how a rank ends badly) and restart.py.
"""
