#!/usr/bin/env python3
"""Starts megatron_lite/cli/chat.py."""

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    # without this folder: a file here would hide the package of its name
    sys.path[:] = [os.path.dirname(here), *(p for p in sys.path if os.path.realpath(p) != here)]
    from megatron_lite.cli.chat import start

    start()
