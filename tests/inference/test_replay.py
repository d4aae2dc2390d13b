"""A recorded decode step computes what the eager one does, bit for bit, whatever rows do meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_lite.inference import generate as generating
from megatron_lite.inference import replay
from megatron_lite.inference.bound import MemoryBound, memory_bound
from megatron_lite.inference.generate import Generation, GenerationSpeed, TextRequest
from megatron_lite.inference.replay import RecordStep, recorder, slots_for
from megatron_lite.inference.stages import CachedRows
from megatron_lite.models.decoder import Decoder
from tests.inference.continuing import FAMILIES, cached, loaded, write_family
from tests.support.decoding import likeliest
from tests.support.extras import needs
from tests.support.recording import record

needs("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    made: dict[str, Decoder] = {}

    def model(name: str) -> Decoder:
        if name not in made:
            made[name] = loaded(write_family(tmp_path_factory.mktemp(name), name))
        return made[name]

    return model


STEPS: list[list[list[int]]] = [
    [[3, 1, 4, 1, 5], [97]], [[9], [2]], [[6], []], [[], [7]], [[5], [3]], [[8], [9]], [[1], [4]], [[2], [6]],
]  # fmt: skip
"""Tokens of two rows, forward by forward; some bring none."""


def logits(
    model: Decoder, capacity: int, start: int | None, by: RecordStep | None
) -> list[torch.Tensor]:
    """Of each forward, those of rows that brought a token."""
    rows = CachedRows(model, 2, capacity, start=start, record=by)
    rows.free(0, 12), rows.free(1, 9)
    found = []
    for new in STEPS:
        most = max(rows.length(row) + len(tokens) for row, tokens in enumerate(new))
        assert start is not None or most <= capacity
        whole = rows.forward(new)
        assert whole is not None
        found += [whole[row].clone() for row, tokens in enumerate(new) if tokens]
    assert (rows.recorded > 0) == (by is not None)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replayed_step_is_the_eager_one(monkeypatch, models, name: str) -> None:
    """Bit for bit where it reads as many slots: one more that is masked moves a sum's last bit."""
    monkeypatch.setattr(replay, "slots_for", lambda tokens, capacity: min(tokens, capacity))
    windows = [(16, None)] if name == "gpt2" else [(16, None), (6, 2)]
    for capacity, start in windows:
        eager = logits(models(name), capacity, start, None)
        replayed = logits(models(name), capacity, start, record)
        for one, other in zip(eager, replayed, strict=True):
            assert torch.equal(one, other), (capacity, start)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_neox-in-turn"])
def test_slots_that_hold_nothing_change_no_token(monkeypatch, models, name: str) -> None:
    """Three requests share two rows, so that texts of other lengths come into recorded graphs."""
    eager = cached(models(name))
    monkeypatch.setattr(generating, "recorder", lambda model: record)
    for least, rows, graphs in ((256, 2, 1), (4, 1, 3)):
        monkeypatch.setattr(replay, "LEAST_SLOTS", least)
        speed = GenerationSpeed()
        assert cached(models(name), rows=rows, speed=speed) == eager
        assert speed.graphs == graphs and speed.new_tokens > 5


def test_rows_that_grow_are_recorded_anew(monkeypatch, models) -> None:
    model = models("llama-tied")

    def texts(by: RecordStep | None) -> list[list[int]]:
        monkeypatch.setattr(generating, "recorder", lambda model: by)
        generation, found = Generation(model, remember=True), []
        for prompt in ([3, 1, 4], [3, 1, 4, 1, 5, 9, 2, 6], [97]):
            found.append([t.id for t in generation.run([TextRequest(prompt, 6, likeliest)])])
        return found

    assert texts(record) == texts(None)


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch, capsys, models) -> None:
    model, tries = models("llama"), []
    expected = cached(model)

    def broken(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        tries.append(run)
        raise RuntimeError("operation not permitted when stream is capturing\nand more of it")

    monkeypatch.setattr(generating, "recorder", lambda model: broken)
    assert cached(model) == expected
    assert len(tries) == 1
    assert capsys.readouterr().err.endswith(
        "WARNING: decode steps cannot be recorded (RuntimeError: operation not permitted when stream is "
        "capturing): they run kernel by kernel, which costs speed alone\n"
    )


def test_an_op_that_waits_for_the_device_is_found() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"):
        record(lambda: torch.ones(1) * torch.ones(1).item())


def test_few_numbers_of_slots_are_recorded() -> None:
    assert [slots_for(n, 5000) for n in (1, 256, 257, 1024, 4097)] == [256, 256, 512, 1024, 5000]
    assert slots_for(3, 20) == 20


def test_on_a_cpu_nothing_is_recorded(models) -> None:
    assert recorder(models("llama")) is None


# -- how fast it could be -----------------------------------------------------------------------


def test_a_step_reads_all_weights_but_those_that_are_looked_up(models) -> None:
    for name, unread in (("gpt2", ["positions"]), ("llama", ["tokens"]), ("qwen2", [])):
        model = models(name)
        read = sum(
            weight.numel() * 4
            for key, weight in model.named_parameters()
            if not any(f"embedding.{table}" in key for table in unread)
        )
        speed = GenerationSpeed(new_tokens=20, new_seconds=0.5, new_steps=10, new_seen=300)
        bound = memory_bound(model, speed)
        config = model.context.model
        kept = (
            2 * 2 * config.num_kv_heads * config.head_size * 4
        )  # keys and values of two layers, fp32
        assert bound == MemoryBound(read, 30 * kept, 2.0, 40.0)
    assert memory_bound(models("gpt2"), GenerationSpeed(prompt_tokens=3)) is None


def test_the_bound_and_the_share_of_it_are_told() -> None:
    bound = MemoryBound(weight_bytes=249_000_000, cache_bytes=1_000_000, tokens=2.0, rate=60.0)
    assert bound.describe(25.0, "a card") == (
        "memory bound of decode: 249.0 MB of weights and 1.0 MB of cache a step at 25 GB/s (a card) are "
        "200.0 tokens/s, of which 0.30 were reached"
    )
    assert bound.describe(None, "this CPU").endswith(
        "a step; this CPU's bandwidth is not known: --memory-bandwidth says it"
    )
