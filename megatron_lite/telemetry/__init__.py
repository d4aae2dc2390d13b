"""What happened: one typed record per event, and every output made from it.

Imports config, blueprint and storage, never torch: numbers come in, text and files go out.
Begin with record.py, then console.py for the line everybody reads.
"""
