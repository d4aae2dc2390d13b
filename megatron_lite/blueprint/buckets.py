"""How large a gradient bucket is, and how many of them are in flight at once."""

from __future__ import annotations

from megatron_lite.config.sections.parallel import ParallelConfig

IN_FLIGHT = 2
"""Sharded buckets in flight, each as a packed copy; one more waits for the oldest.

Without a limit the last backward would end with a second copy of all gradients, and the first
forward begin with one of all parameters.
"""

HOST_PORTION = 1 << 24
"""Elements that the host updates at a time: fp32 gradients of 64 MiB, milliseconds of a link or of cores."""


def bucket_elements(parallel: ParallelConfig, replicas: int) -> int:
    """Elements of a bucket that so many ranks reduce: --ddp-bucket-size, or Megatron's default."""
    return parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * replicas)
