"""Measurements against named baselines in the same run; `make bench...` calls them, tests never do."""
