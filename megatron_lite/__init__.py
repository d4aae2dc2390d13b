"""A 3D-parallel trainer for GPT-like language models, in four nouns: Config, Blueprint, Run, Progress.

    tools/  examples/                                      start it
    ──────────────────────────────────────────────────────────────────────────────
    5  cli/                                                parse, call, print (thin)
    4  train/ ──▶ rehearsal/    inference/                 what you run
    3  pipeline/  engines/  optim/  checkpoint/            how a step happens and is kept
    2  layers/ ──▶ models/                                 what is computed
    1  rendezvous/  parallel/  kernels/                    who is there; how ranks talk; how ops run
    0  config/ ──▶ blueprint/ ──▶ planner/                 what was asked; what follows      no torch
    ──────────────────────────────────────────────────────────────────────────────
    wings:  data/ (+ tokenizers/, preparing/)   no torch.distributed   telemetry/   numbers, not tensors
            storage/   files that are whole or absent           no torch

Config is what the user asked; Blueprint everything that follows before a process starts; Run the
Blueprint made real; Progress what a checkpoint must remember.  Imports point down only
(tests/architecture proves it).  Importing this package imports nothing else.
"""

__version__ = "0.1.0"
