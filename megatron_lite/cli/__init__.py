"""The mains: parse, call, print; what they call stands in the floors below.

One file per program; `python tools/<name>.py` starts it from a checkout, and so does
`python -m megatron_lite.cli.<name>` where the package is installed.
May import every floor; no module imports it.  Begin with pretrain_gpt.py, then launch.py.
"""
