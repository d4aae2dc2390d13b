"""Which GPU a local rank takes."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.config.errors import ConfigError
from megatron_lite.rendezvous.launch import Launch, choose_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)


def chosen(local_rank: int) -> torch.device:
    return choose_device(Launch(local_rank=local_rank), use_cpu=False, backend=None)


def test_every_local_rank_has_a_gpu_of_its_own(two_gpus: None) -> None:
    assert [chosen(rank).index for rank in range(2)] == [0, 1]
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this node has 2"):
        chosen(2)


def test_ranks_share_gpus_where_nccl_was_told_to(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert [chosen(rank).index for rank in range(4)] == [0, 1, 0, 1]
