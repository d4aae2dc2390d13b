"""Whether a step and the state can be trusted: guards, replay, comparison of replicas, a hash of the state.

Imports parallel, pipeline, engines and checkpoint; of the loop nothing but Run.
Begin with guards.py (what looks at a step before its update), then replay.py and replicas.py.
"""
