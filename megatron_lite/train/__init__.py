"""The loop: Config and Blueprint become a Run, which trains, evaluates, logs, saves and stops.

Imports everything below; only rehearsal, cli and tests may import it.
Begin with step.py (one optimizer step on one screen), then assemble.py (where everything meets),
session.py (opens a Run and everything around it) and loop.py.
"""
