"""Adapters beside a frozen base: they begin as the base, are saved alone, and go on to the last bit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.manifest import NAME
from tests.support.axes import BF16
from tests.support.checkpoints import assembled
from tests.train.runs import MLiteFault, Outcome, alone, curve, manifest, on_ranks, steps

LLAMA = [
    "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear",
    "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights",
]  # fmt: skip
RANK = ["--lora-rank", "4", "--lora-alpha", "8"]


@pytest.fixture(scope="module")
def base(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a whole model."""
    folder = tmp_path_factory.mktemp("base") / "run"
    done = alone(*data, *LLAMA, "--save", str(folder), "--exit-interval", "2")
    assert done.rc == 0, done.err
    return folder


def tuned(data: list[str], base: Path, folder: Path, *words: str, ranks: int = 1) -> Outcome:
    """Four steps of adapters beside it, saved every two."""
    begin = ["--load", str(base), "--finetune", "--save", str(folder), "--save-interval", "2"]
    return on_ranks(ranks, *data, *LLAMA, *RANK, *begin, *words)


@pytest.mark.parametrize(
    "words",
    [
        "--bf16 --lora-variant dora",
        pytest.param("--lora-targets all --lora-variant rslora", marks=pytest.mark.slow),
        pytest.param("--fp16 --initial-loss-scale 1024", marks=pytest.mark.slow),
    ],
)
def test_the_first_loss_is_the_bases_to_the_bit(data, base, tmp_path, words) -> None:
    whole, adapters = tmp_path / "whole", tmp_path / "adapters"
    numbers = ["--bf16"] if "--bf16" in words else ["--fp16"] if "--fp16" in words else []
    begin = ["--load", str(base), "--finetune", "--exit-interval", "1", "--save"]
    plain = alone(*data, *LLAMA, *numbers, *begin, str(whole))
    done = alone(*data, *LLAMA, *RANK, *words.split(), *begin, str(adapters))
    assert plain.rc == done.rc == 0, (plain.err, done.err)
    assert steps(adapters)[0].loss == steps(whole)[0].loss


def test_a_run_begins_as_its_base_and_saves_adapters_alone(data, base, tmp_path) -> None:
    whole, adapters = tmp_path / "whole", tmp_path / "adapters"
    plain = alone(*data, *LLAMA, "--load", str(base), "--finetune", "--save", str(whole))
    done = tuned(data, base, adapters)
    assert plain.rc == done.rc == 0, done.err
    assert steps(adapters)[0].loss == steps(whole)[0].loss, (
        "not a bit is changed by adapters of zero"
    )
    assert steps(adapters)[3].loss != steps(whole)[3].loss
    assert re.search(
        r"lora adapters of rank 4 on linear, scale 2: 4,352 of [\d,]+ parameters", done.out
    ), done.out
    found = manifest(adapters, 4)
    kinds = {name.rpartition(".")[2] for name in found.tensors}
    assert kinds == {"lora_A", "lora_B"}
    states = {name.split(".")[0] for name in found.tensors}
    assert states == {"blocks", "exp_avg", "exp_avg_sq"}
    assert found.config["base"]["iteration"] == 2
    size = sum(written.bytes for written in found.files.values())
    assert size < sum(written.bytes for written in manifest(whole, 4).files.values()) / 2


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ""),
        pytest.param(1, "--lora-variant dora --lora-dropout 0.1 --bf16", id="dora bf16"),
        pytest.param(
            2, "--tensor-model-parallel-size 2 --lora-targets all", id="tp2",
            marks=pytest.mark.ci,
        ),
        pytest.param(
            2, "--pipeline-model-parallel-size 2 --fp16 --initial-loss-scale 1e6", id="pp2 fp16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2, "--micro-batch-size 1 --zero-stage 3", id="dp2",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_two_steps_and_two_more_are_four(data, base, tmp_path, ranks, words) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    straight = tuned(data, base, once, *words.split(), ranks=ranks)
    assert straight.rc == 0, straight.err
    resumed = on_ranks(
        ranks, *data, *LLAMA, *RANK, *words.split(), "--load", str(once), "--ckpt-step", "2",
        "--save", str(again),
    )  # fmt: skip
    assert resumed.rc == 0, resumed.err
    assert curve(steps(again)) == curve(steps(once)[2:])
    assert resumed.state_hash == straight.state_hash
    assert manifest(again, 4).config["base"]["sha256"] == manifest(once, 2).config["base"]["sha256"]


@pytest.mark.ci
def test_another_layout_takes_them_up(data, base, tmp_path) -> None:
    once, moved = tmp_path / "once", tmp_path / "moved"
    assert tuned(data, base, once).rc == 0
    resumed = on_ranks(
        2, *data, *LLAMA, *RANK, "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--load", str(once), "--ckpt-step", "2", "--save", str(moved),
    )  # fmt: skip
    assert resumed.rc == 0, resumed.err
    assert [r.loss for r in steps(moved)] == pytest.approx(
        [r.loss for r in steps(once)[2:]], rel=1e-6
    )


@pytest.fixture(scope="module")
def adapters(data: list[str], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "run"
    assert tuned(data, base, folder, "--exit-interval", "2").rc == 0
    return folder


@pytest.mark.parametrize(
    ("words", "rc", "said"),
    [
        ([], 4, "holds adapters alone (--lora-rank 4)"),
        ([*RANK, "--lora-alpha", "9"], 4, "--lora-alpha: 8.0 -> 9.0"),
        ([*RANK, "--lora-targets", "q_proj", "v_proj"], 4, "--lora-targets: linear -> q_proj v_proj"),
        (["--lora-alpha", "8"], 2, "--lora-alpha needs --lora-rank"),
        ([*RANK, "--lora-targets", "q_prj"], 2, "--lora-targets q_prj: choose from linear, embedding"),
        ([*RANK, "--lora-rank", "0"], 2, "--lora-rank 0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_adapters_is_refused(data, adapters, words, rc, said) -> None:
    done = alone(*data, *LLAMA, *words, "--load", str(adapters))
    assert (done.rc, said in done.err) == (rc, True), done.err


@pytest.mark.parametrize(
    ("words", "rc", "said"),
    [
        (RANK, 4, "holds a whole model, and --lora-rank trains adapters beside it: add --finetune"),
        ([*RANK, "--finetune", "--keep-optim"], 4, "without --keep-optim"),
    ],
)
def test_a_base_is_no_run_to_go_on_with(data, base, words, rc, said) -> None:
    done = alone(*data, *LLAMA, *words, "--load", str(base))
    assert (done.rc, said in done.err) == (rc, True), done.err


def test_adapters_without_a_base_are_refused(data, tmp_path) -> None:
    done = alone(*data, *LLAMA, *RANK)
    assert done.rc == 2 and "give its run folder with --load" in done.err
    done = alone(*data, *LLAMA, *RANK, "--load", str(tmp_path / "nothing"))
    assert done.rc == 4 and "adapters are trained beside weights" in done.err


def test_the_base_is_found_again_or_named(data, base, tmp_path) -> None:
    """Both folders may move together; one that is gone, or another, is refused."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(base, before / "base")
    assert tuned(data, before / "base", before / "run", "--exit-interval", "2").rc == 0
    before.rename(after)
    words = [*data, *LLAMA, *RANK, "--load", str(after / "run")]
    assert alone(*words).rc == 0
    changed = after / "base" / "iter_0000002" / NAME
    text = changed.read_text()
    changed.write_text(text + "\n")
    done = alone(*words)
    assert done.rc == 4 and "another checkpoint than the one that the adapters" in done.err
    shutil.rmtree(after / "base")
    done = alone(*words)
    assert done.rc == 4 and str(after / "base") in done.err and str(before / "base") in done.err


def test_a_bad_gradient_of_an_adapter_is_named(data, base, tmp_path) -> None:
    """The guards look at what is trained, and say which tensor it was."""
    with MLiteFault("step2.gradient:0:nan=blocks.1.mlp.down.lora_A"):
        done = tuned(data, base, tmp_path / "run")
    assert done.rc == 7 and "blocks.1.mlp.down.lora_A" in done.err, done.err


def test_nothing_of_the_base_is_accumulated_or_doubled() -> None:
    """No gradients, masters or states but of adapters, also in 16 bits."""
    lora = {"lora__lora_rank": 2, BF16: True}
    _, _, run = assembled(0, 1, lora)
    names = run.adapters
    assert {one.name for one in run.engine.gradients(owned=False)} == names
    states = {one.name for one in run.engine.state(owned=False)}
    assert states == {
        f"{kind}{n}" for n in names for kind in ("master.", "exp_avg.", "exp_avg_sq.")
    }
    accumulated = {parameter for parameter, _ in run.engine.accumulators()}
    for local in run.parameters:
        learns = local.pieces[0].name in names
        assert local.parameter.requires_grad is learns is (local.parameter in accumulated)
    whole = assembled(0, 1, {BF16: True})[2]
    frozen = {w.name: w.data for w in run.engine.weights(owned=True)}
    for weight in whole.engine.weights(owned=True):
        assert torch.equal(weight.data, frozen[weight.name]), "the base's first values are its own"
