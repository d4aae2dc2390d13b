"""Imported once by the forkserver, so that ranks start with the package already in memory."""

import torch

torch.set_num_threads(1)
