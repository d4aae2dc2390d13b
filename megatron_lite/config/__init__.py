"""What was asked: frozen, typed sections, the flags made from them, and the rules they must obey.

sections/ holds the fields, flags/ turns a command line into them, deepspeed/ lays a ds.json beside it, rules/
refuses what cannot be; the files here are what those share: errors, exit codes, streams, and the small
languages of some flags.
Imports nothing else of the package and no torch; everyone may import it but takes only its own section.
Begin with sections/run.py (one field per section), then flags/parser.py and rules/table.py.
"""
