"""How a run ends and restarts: stop requests, failures with their one line, restarts, injected faults.

Imports config, rendezvous, storage and checkpoint; of the loop nothing but Run.
Begin with stop.py (when a run stops), then failures.py (how a rank ends badly) and restart.py.
"""
