"""Imported once by the forkserver, so that ranks start with what they need already in memory.

Not torch._dynamo: it reads CXX while it is imported, and a rank may be given another.
"""

import gc

import numpy.random  # noqa: F401
import pytest  # noqa: F401  the files that checks lie in import it
import torch
import torch.distributed.tensor  # torch.testing imports it with the first comparison

# torch.autograd imports it, and all of sympy, with the first backward that is given a gradient
import torch.fx.experimental.symbolic_shapes
import torch.testing

import megatron_lite.checkpoint.store
import megatron_lite.rehearsal.footprint
import megatron_lite.train.assemble
import megatron_lite.train.resume
import megatron_lite.train.step  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # a rank's collector need neither look at all this nor copy its pages
