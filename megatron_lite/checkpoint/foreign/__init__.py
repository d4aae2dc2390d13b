"""Checkpoints of other programs, in and out.

    in    a pickle ─▶ pickle_reader (nothing is run) ─▶ torch_file ─▶ nanogpt, torch_dist, deepspeed
    out   a checkpoint of ours ─▶ gguf, llama2c

Imports what its house checkpoint/ may; cli may import it.  Begin with formats.py (which there are),
then pickle_reader.py (what a pickle can and cannot become), then nanogpt.py, the smallest format.
"""
