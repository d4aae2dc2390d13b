"""What was asked: frozen, typed sections, the flags made from them, and the rules they must obey.

Imports nothing of ours and no torch; everyone may import it but takes only its own section.
Begin with run.py (one field per section), then flags.py (how a command line becomes a RunConfig).
"""
