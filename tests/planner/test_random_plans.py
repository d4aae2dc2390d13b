"""Plans drawn at random: each ends in numbers or in one ConfigError, never in a traceback."""

from __future__ import annotations

import json
import math
import random
import shlex
import sys
from collections import Counter

import pytest

from megatron_lite.cli import plan
from megatron_lite.config.errors import ConfigError

LLAMA_405B = (
    "--num-layers 126 --hidden-size 16384 --num-attention-heads 128 --ffn-hidden-size 53248 --seq-length 8192 "
    "--vocab-size 128256 --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--group-query-attention --num-query-groups 8 --untie-embeddings-and-output-weights --hidden-dropout 0 "
    "--attention-dropout 0 --bf16 --sequence-parallel --use-distributed-optimizer --overlap-param-gather "
    "--pipeline-model-parallel-size 8 --context-parallel-size 2 --num-virtual-stages-per-pipeline-rank 8 "
    "--micro-batch-size 1 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
)
"""A layer less on the first and the last of 64 stages; at pp 16 there are 128, and those two have none."""

PUBLISHED = {
    "gb200": (
        "--world-size 256 --gpus-per-node 72 --tensor-model-parallel-size 4 --global-batch-size 128"
    ),
    "h100": (
        "--world-size 512 --gpus-per-node 8 --tensor-model-parallel-size 8 --global-batch-size 256"
    ),
}
"""NVIDIA's Llama 3.1 405B recipes of its DGX Cloud benchmarks."""


def planned(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--json", *words])
    assert plan.main() == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("device", PUBLISHED)
def test_published_405b_layouts_plan(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fits on a GB200; does not on 512 H100, where the advice looks at stages without layers."""
    words = shlex.split(f"--hardware {device} {PUBLISHED[device]} {LLAMA_405B}")
    found = planned(words, monkeypatch, capsys)
    assert found["fits"] == (device == "gb200")
    assert (found["cheapest_change"] is None) == (device == "gb200")


def draw(rng: random.Random) -> list[str]:
    """A command line; layers are often such that an embedding or a loss counts as one."""
    tp, pp, dp = rng.choice([1, 1, 2, 4]), rng.choice([1, 2, 2, 4, 4, 8]), rng.choice([1, 2, 4])
    micro, chunks = rng.choice([1, 2, 4]), rng.choice([1, 1, 1, 2, 3]) if pp > 1 else 1
    schedule = rng.choice(["1f1b", "gpipe", "zb-h1", "zb-v"] if pp > 1 else ["1f1b", "gpipe"])
    slots = pp * chunks * (2 if schedule == "zb-v" and chunks == 1 else 1)
    ends = [
        f"--account-for-{end}-in-pipeline-split"
        for end in ("embedding", "loss")
        if pp > 1 and rng.random() < 0.6
    ]
    layers = max(slots * rng.choice([1, 1, 2, 3]) - len(ends), 1)
    hidden = rng.choice([512, 2048, 8192])
    words = [
        f"--hardware {rng.choice(['v100-32g', 'a100-80g', 'h100', 'gb200', 'mi300x', 'cpu'])}",
        f"--world-size {tp * pp * dp}",
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}",
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads 16 --vocab-size 50257",
        f"--seq-length {rng.choice([512, 4096, 32768])}",
        f"--micro-batch-size {micro} --global-batch-size {micro * dp * pp * rng.choice([1, 2, 5])}",
        f"--num-virtual-stages-per-pipeline-rank {chunks}"
        if chunks > 1
        else f"--pipeline-schedule {schedule}",
        *ends,
    ]  # fmt: skip
    words.append(rng.choice(_RECOMPUTE))
    words += [more for more in _MORE if rng.random() < 0.15]
    return shlex.split(" ".join(words))


_RECOMPUTE = (
    "", "", "--recompute-granularity selective",
    "--recompute-granularity selective --recompute-modules core_attn mlp layernorm",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
)  # fmt: skip

_MORE = (
    "--sequence-parallel", "--use-distributed-optimizer", "--bf16", "--bf16", "--fp16", "--swiglu",
    "--untie-embeddings-and-output-weights", "--position-embedding-type rope", "--num-query-groups 4",
    "--group-query-attention --num-query-groups 2", "--normalization RMSNorm", "--disable-bias-linear",
    "--hidden-dropout 0", "--attention-dropout 0", "--attention-backend unfused", "--lora-rank 8",
    "--optimizer sgd", "--optimizer muon", "--optimizer adafactor", "--optimizer adam8bit",
    "--optimizer sophiag", "--optimizer galore", "--no-accumulate-allreduce-grads-in-fp32",
    "--logits-chunk-mib 1", "--reset-attention-mask", "--tokens 2B", "--price-per-gpu-hour 2",
    "--context-parallel-size 2", "--distribute-saved-activations", "--gpus-per-node 4",
    "--decoder-first-pipeline-num-layers 1", "--train-iters 10", "--measured-seconds 3",
    "--pipeline-model-parallel-layout E|t|tL",
)  # fmt: skip


def ends_well(
    count: int, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Counter[str]:
    """Plan so many; how each ended, every number of a plan being one."""
    ends: Counter[str] = Counter()
    rng = random.Random(seed)
    for _ in range(count):
        words = draw(rng)
        try:
            found = planned(words, monkeypatch, capsys)
        except ConfigError as error:
            assert str(error)
            ends["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"tools/plan.py {shlex.join(words)}: {error!r}") from error
        seconds = found["time"]["step_seconds"]  # type: ignore[index, call-overload]
        assert math.isfinite(seconds) and seconds > 0, shlex.join(words)
        split = any(word.startswith("--account-for") for word in words)
        ends["fits" if found["fits"] else "too large"] += 1
        ends["too large, ends counted"] += split and not found["fits"]
    return ends


def test_plans_of_any_flags_end_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = ends_well(100, 1, monkeypatch, capsys)
    assert min(ends[how] for how in ("fits", "too large", "refused")) > 3, ends


@pytest.mark.slow
def test_two_thousand_plans_end_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = ends_well(2000, 2, monkeypatch, capsys)
    assert ends["too large, ends counted"] > 50, ends
