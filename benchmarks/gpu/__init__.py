"""What `make bench-gpu` measures: contestants.py (who runs), cases.py (what), turns.py (how)."""
