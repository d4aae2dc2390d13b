"""Adapters beside a base in 4 bits: it is the rounded model in every layout, and nothing else is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules.table import check_config
from megatron_lite.kernels import nf4
from megatron_lite.train.health.replay import Watched
from megatron_lite.train.health.state_hash import state_hash
from megatron_lite.train.step import train_step
from tests.support.axes import PP, TP
from tests.support.checkpoints import assembled
from tests.support.engines import named
from tests.support.sizes import with_flags
from tests.support.spawn import spawn
from tests.support.tiny import make_batches
from tests.train.runs import FOUR_STEPS, Outcome, alone, curve, manifest, on_ranks, steps

WIDE = ["--hidden-size", "128", "--num-attention-heads", "4", "--ffn-hidden-size", "128"]
LLAMA = [
    *WIDE, "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear",
    "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights",
]  # fmt: skip
RANK = ["--lora-rank", "4", "--lora-alpha", "8"]
NF4 = [*RANK, "--lora-base", "nf4"]
SIZES = {
    "model__hidden_size": 128, "model__num_attention_heads": 4, "model__ffn_hidden_size": 128,
    "model__num_layers": 2, "lora__lora_rank": 2,
}  # fmt: skip
PACKED = SIZES | {"lora__lora_base": "nf4"}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return nf4.unpack(*nf4.pack(weight, 64), nf4.quantile_pairs(weight.device), weight.dtype)


def is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "blocks" in name and "norm" not in name


@pytest.mark.parametrize(
    "more", [{}, {"lora__lora_variant": "dora"}, {"lora__lora_targets": ["q_proj"]}], ids=str
)
def test_it_trains_as_a_base_that_was_rounded_by_hand(more) -> None:
    """Losses and adapters to the bit; what no adapter stands beside is rounded, too."""
    config, blueprint, run = assembled(0, 1, PACKED | more)
    whole = assembled(0, 1, SIZES | more)[2]
    with torch.no_grad():
        for piece in whole.engine.weights(owned=True):
            if is_matrix(piece.name):
                piece.data.copy_(rounded(piece.data))
    magnitudes = named(run.engine.weights(owned=True))
    for piece in whole.engine.weights(owned=True):
        if piece.name.endswith("magnitude"):
            piece.data.copy_(magnitudes[piece.name])
    names = {piece.name for piece in run.engine.weights(owned=True)}
    assert not any(is_matrix(name) for name in names), "the matrices themselves are gone"
    for step in range(3):
        batches = make_batches(config, blueprint, 0, step)
        losses = [train_step(r, batches, lr=1e-2, weight_decay=0.1).loss for r in (run, whole)]
        assert torch.equal(*losses), step
    trained = named(whole.engine.weights(owned=True))
    assert any("lora_B" in name and data.any() for name, data in trained.items())
    for piece in run.engine.weights(owned=True):
        assert torch.equal(piece.data, trained[piece.name]), piece.name


def hashed(rank: int, ranks: int, changes: dict) -> str:
    return state_hash(assembled(rank, ranks, PACKED | changes)[2])


@pytest.mark.parametrize("changes", [{TP: 2}, {PP: 2}], ids=["tp2", "pp2"])
def test_its_bits_are_the_same_in_every_layout(changes) -> None:
    same = {"model__make_vocab_size_divisible_by": 8}
    (alone_by_one,) = {hashed(0, 1, same), *spawn(hashed, 2, same | changes)}
    assert alone_by_one != hashed(0, 1, same | {"train__seed": 7})


def test_a_scale_that_is_not_finite_is_named_and_a_flipped_code_found() -> None:
    run = assembled(0, 1, PACKED)[2]
    watched, before = Watched(run), state_hash(run)
    watched.look_at_weights()
    assert watched.first is None
    down = run.packed[-1].weight
    down.codes[3, 5] ^= 1
    assert state_hash(run) != before
    down.absmax[0, 0] = float("nan")
    watched.look_at_weights()
    assert watched.first is not None and "blocks.1.mlp.down.weight.absmax" in watched.first.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora-base", "nf4"], "--lora-base needs --lora-rank"),
        ([*NF4, "--hidden-size", "96"], "--hidden-size 96 is no multiple of 64"),
        ([*NF4, "--tensor-model-parallel-size", "4", "--ffn-hidden-size", "128"],
         "--ffn-hidden-size 128 over --tensor-model-parallel-size 4 is no multiple of 64, the numbers that "
         "share a scale; choose tp from [1, 2]"),
    ],
    ids=["alone", "hidden", "tp"],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused(words, said) -> None:
    argv = [
        "--mock-data",
        "--train-iters",
        "1",
        "--load",
        "base",
        "--finetune",
        "--lr",
        "0.1",
        *LLAMA,
    ]
    with pytest.raises(ConfigError) as refused:
        check_config(parse(with_flags([*FOUR_STEPS, *argv], *words)).config, 4)
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def base(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a whole model in bf16, so that its masters are more exact than its weights."""
    folder = tmp_path_factory.mktemp("base") / "run"
    done = alone(*data, *LLAMA, "--bf16", "--save", str(folder), "--exit-interval", "2")
    assert done.rc == 0, done.err
    return folder


def tuned(data: list[str], base: Path, folder: Path, *words: str, ranks: int = 1) -> Outcome:
    """Four steps of adapters beside it, saved every two."""
    begin = ["--load", str(base), "--finetune", "--save", str(folder), "--save-interval", "2"]
    return on_ranks(ranks, *data, *LLAMA, *NF4, *begin, *words)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ""),
        pytest.param(2, "--tensor-model-parallel-size 2 --sequence-parallel --bf16",
                     id="tp2 sp bf16", marks=pytest.mark.ci),
        pytest.param(2, "--pipeline-model-parallel-size 2 --lora-variant dora", id="pp2 dora",
                     marks=pytest.mark.slow),
        pytest.param(2, "--micro-batch-size 1 --zero-stage 3 --recompute-granularity full "
                     "--recompute-method uniform --recompute-num-layers 1", id="dp2 again",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_two_steps_and_two_more_are_four(data, base, tmp_path, ranks, words) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    straight = tuned(data, base, once, *words.split(), ranks=ranks)
    assert straight.rc == 0, straight.err
    assert "beside matrices of 4 bits (nf4)" in straight.out
    assert {name.rpartition(".")[2] for name in manifest(once, 4).tensors} <= {
        "lora_A", "lora_B", "lora_magnitude",
    }  # fmt: skip
    resumed = on_ranks(
        ranks, *data, *LLAMA, *NF4, *words.split(), "--load", str(once), "--ckpt-step", "2",
        "--save", str(again),
    )  # fmt: skip
    assert resumed.rc == 0, resumed.err
    assert curve(steps(again)) == curve(steps(once)[2:])
    assert resumed.state_hash == straight.state_hash


def test_adapters_go_on_beside_a_base_kept_otherwise_and_it_is_said(data, base, tmp_path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    assert tuned(data, base, once).rc == 0
    resumed = alone(
        *data, *LLAMA, *RANK, "--load", str(once), "--ckpt-step", "2", "--save", str(again)
    )
    assert resumed.rc == 0, resumed.err
    assert "--lora-base: nf4 -> bf16: the adapters go on beside the same weights" in resumed.out
    loss, other = steps(once)[2].loss, steps(again)[0].loss
    assert other != loss and other == pytest.approx(loss, rel=0.1)
