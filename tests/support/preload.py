"""Imported once by the forkserver, so that ranks start with the package already in memory."""

import torch

import megatron_lite.train.assemble
import megatron_lite.train.step  # noqa: F401

torch.set_num_threads(1)
