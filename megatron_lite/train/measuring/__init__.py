"""What a run measures and logs about itself: timers, the ranks' own times, memory, profiles, a timeline.

Imports parallel and telemetry; nothing of the loop.
Begin with timing.py (the spans of a run), then reports.py (over all ranks) and log.py.
"""
