"""Whether a step and the state may be trusted: guards, a step run again, copies compared, one hash of all.

Imports parallel, pipeline, engines and checkpoint; nothing of the loop, which asks these questions.
Begin with guards.py (what looks at a step before its update), then replay.py and replicas.py.
"""
