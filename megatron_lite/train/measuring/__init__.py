"""What a run measures of itself and says: timers, the ranks' own times, memory, profiles, a timeline, the log.

Imports parallel and telemetry; nothing of the loop, which is what is measured.
Begin with timing.py (the spans of a run), then reports.py (over all ranks) and log.py.
"""
