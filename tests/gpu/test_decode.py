"""Decode steps as CUDA graphs say what they say kernel by kernel (CPU twin: tests/inference/test_replay.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.bench_decode import random_model
from megatron_lite.blueprint.devices import short_name
from megatron_lite.inference import generate as generating
from megatron_lite.inference import replay
from megatron_lite.inference.bound import memory_bound
from megatron_lite.inference.generate import Generation, GenerationSpeed, TextRequest
from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner.hardware import DEVICES
from tests.inference.continuing import FAMILIES, cached, loaded, write_family
from tests.support.extras import needs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_say_what_kernels_say(tmp_path: Path, monkeypatch, capsys, name: str) -> None:
    needs("transformers")
    ctx = ParallelContext.serial(torch.device("cuda"))
    model = loaded(write_family(tmp_path, name), ctx)
    speed = GenerationSpeed()
    replayed = cached(model, speed=speed)
    assert speed.graphs > 0 and "cannot be recorded" not in capsys.readouterr().err
    monkeypatch.setattr(replay, "LEAST_SLOTS", 4)
    assert cached(model, rows=1) == replayed
    monkeypatch.setattr(generating, "recorder", lambda model: None)
    assert cached(model) == replayed


def test_drawing_waits_for_nothing() -> None:
    logits = torch.randn(1, 100, device="cuda")
    sampler = Sampler(Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01), 100)
    expected = sampler(logits, [1, 2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sampler(logits, [1, 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_decode_reaches_most_of_the_memory_bound(capsys) -> None:
    """Of one text at a time, on a card whose bandwidth is known; it prints the bound on any."""
    model = random_model("llama2-7b", torch.device("cuda"), torch.bfloat16)
    generation = Generation(model)
    sampler = Sampler(Sampling(temperature=0.0), model.context.vocab_size)
    for new in (32, 256):
        generation.speed = GenerationSpeed()
        list(generation.run([TextRequest([1, 2, 3], new, sampler)]))
    bound = memory_bound(model, generation.speed)
    name = torch.cuda.get_device_name()
    device = DEVICES.get(short_name(name) or "")
    with capsys.disabled():
        print(bound.describe(device and device.bandwidth_gb_s, name))
    if device is not None:
        most = device.bandwidth_gb_s * 1e9 / (bound.weight_bytes + bound.cache_bytes)
        assert bound.rate > 0.6 * most
