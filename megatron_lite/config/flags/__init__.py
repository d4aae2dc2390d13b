"""From a command line, a YAML file, a preset or a flag of Megatron's to a RunConfig.

settings.py reads the sections, values.py and files.py what a user wrote, parser.py puts it together.
legacy.py lists Megatron's other flags: mapped, accepted or refused.
Imports sections/; whether the values fit together is asked by rules/.
"""
