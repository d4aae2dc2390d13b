"""Conversations become token ids, for whoever talks with a model or trains one to talk.

May import config, storage and data's tokenizers; sandbox.py imports nothing of ours.
Begin with conversation.py (messages to ids), then formats.py (the built-in ones), templates.py (those
that come with a model), sandbox.py (where these run) and pieces.py (what they wrote).  lessons.py says
what of it is learned.
"""
