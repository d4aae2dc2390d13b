"""How a run ends and starts again: stop requests, failures with their one line, restarts, faults on purpose.

Imports config, rendezvous, storage and checkpoint; of the loop nothing but Run, which is what ends.
Begin with stop.py (when a run stops), then failures.py (how a rank ends badly) and restart.py.
"""
