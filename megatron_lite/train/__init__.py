"""The loop: Config and Blueprint become a Run, which trains, evaluates, logs, saves and stops.

Imports everything below; only tools and tests may import it.
Begin with step.py (one optimizer step on one screen), then assemble.py (where everything meets) and loop.py.
"""
