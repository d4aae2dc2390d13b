"""What follows from a Config before any process starts: grid, stages, schedule, parameters, FLOPs.

Pure functions and frozen data; imports config only, never torch; every floor above may import it.
Begin with draw_up.py (Config -> Blueprint), then grid.py and schedules/ (who does what, and when).
"""
