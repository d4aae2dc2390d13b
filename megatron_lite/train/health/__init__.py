"""Whether a step and the state may be trusted: guards, a step run again, copies compared, one hash of all.

Imports parallel, pipeline, engines and checkpoint; of the loop nothing but Run, whom the questions are about.
Begin with guards.py (what looks at a step before its update), then replay.py and replicas.py.
"""
