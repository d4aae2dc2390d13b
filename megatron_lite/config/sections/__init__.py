"""The fields a user may set, one frozen dataclass per section, each field with its docstring.

run.py puts the sections together; a part of the program is handed its own section only.
Imports nothing else of the package: a section says what was asked, and nothing is worked out here.
"""
