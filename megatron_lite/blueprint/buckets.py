"""How large a gradient bucket is, and how many of them are under way at once."""

from __future__ import annotations

from megatron_lite.config.sections.parallel import ParallelConfig

UNDER_WAY = 2
"""Sharded buckets that are under way in a packed copy; one more waits for the oldest.

Without a limit the last backward would end with a second copy of all gradients.
"""


def bucket_elements(parallel: ParallelConfig, replicas: int) -> int:
    """Elements of a bucket that so many ranks reduce: --ddp-bucket-size, or Megatron's default."""
    return parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * replicas)
