"""--use-precision-aware-optimizer: bf16 moments beside fp32 masters, trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules.table import check_config, notices
from megatron_lite.train.step import train_step
from tests.checkpoint import older
from tests.support.axes import BF16, BF16_MOMENTS, PP, TP, ZERO
from tests.support.checkpoints import assembled, load_and_save_again, train, train_and_save, whole
from tests.support.engines import OF_EVERY_LAYOUT
from tests.support.spawn import spawn
from tests.support.tiny import make_batches
from tests.train.runs import alone, steps

ASKED = ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
MOMENTS = ("exp_avg.", "exp_avg_sq.")
SMALL = {"model__num_layers": 1, "model__hidden_size": 16}


def state_of(run):
    return {piece.name: piece.data.clone() for piece in run.engine.state(owned=False)}


@pytest.mark.parametrize("engine", OF_EVERY_LAYOUT)
@pytest.mark.parametrize("low", [{}, {BF16: True}])
def test_every_engine_holds_them_beside_fp32_masters(engine, low) -> None:
    narrow, wide = (
        assembled(0, 1, SMALL | low | moments | {"parallel__engine": engine})
        for moments in (BF16_MOMENTS, {})
    )
    assert train(*narrow, 3) == pytest.approx(train(*wide, 3), rel=1e-3)
    kept = state_of(narrow[2])
    for name, tensor in kept.items():
        moment = name.startswith(MOMENTS)
        assert tensor.dtype == (torch.bfloat16 if moment else torch.float32), name
        assert tensor.abs().max() > 0, name
    assert {name.partition(".")[0] for name in kept} == (
        {"exp_avg", "exp_avg_sq", "master"} if low else {"exp_avg", "exp_avg_sq"}
    )


def moments_in(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint of one rank."""
    (path,) = folder.rglob("optimizer-*.safetensors")
    with safe_open(path, "pt") as file:
        return {
            key.partition(":")[2]: file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 - it is no mapping
            if key.partition(":")[2].startswith(MOMENTS)
        }


def test_older_moments_become_bf16_and_fp32_again_with_a_line_that_says_so(tmp_path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    ended = alone(*older.ADAM, "--save", str(there), "--save-interval", "4", *ASKED)
    assert ended.rc == 0, ended.err
    for name in ("exp_avg", "exp_avg_sq"):
        assert f"{name}: f32 in the checkpoint, bf16 here: rounded to nearest" in ended.out
    assert {str(t.dtype) for t in moments_in(there / "iter_0000004").values()} == {"torch.bfloat16"}
    losses = [step.loss for step in steps(there)]
    assert losses == pytest.approx(older.EXPECTED["adam"]["losses"], rel=1e-3)

    words = [*older.ADAM, "--load", str(there), "--save", str(back), "--train-iters", "8"]
    once_more = alone(*words, "--ckpt-step", "4")
    assert once_more.rc == 0, once_more.err
    assert "exp_avg: bf16 in the checkpoint, fp32 here: kept exactly" in once_more.out
    assert [step.loss for step in steps(back)] == pytest.approx(losses[-4:], rel=1e-3)


def test_a_run_with_bf16_moments_goes_on_bit_for_bit(tmp_path) -> None:
    went_on = train_and_save(0, 1, SMALL | BF16_MOMENTS, str(tmp_path / "a"), 2, 3)
    resumed = load_and_save_again(
        0, 1, SMALL | BF16_MOMENTS, str(tmp_path / "a"), str(tmp_path / "b"), 3
    )
    assert resumed == went_on and whole(tmp_path / "a") == whole(tmp_path / "b")
    (folder,) = (tmp_path / "a").glob("iter_*")
    stored = read_manifest(folder).tensors
    assert {t.dtype for name, t in stored.items() if name.startswith(MOMENTS)} == {"BF16"}
    exactly = load_and_save_again(0, 1, SMALL, str(tmp_path / "a"), str(tmp_path / "c"), 0)
    assert exactly == []
    wide, narrow = (moments_in(tmp_path / name) for name in ("c", "a"))
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in narrow.items())


@pytest.mark.ci
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param((2, {ZERO: 1}), (2, {TP: 2}), id="shared to tp"),
        pytest.param((4, {PP: 2, ZERO: 1, BF16: True}), (1, {BF16: True}), id="stages to one",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_they_are_saved_at_one_layout_and_loaded_at_another(tmp_path, saved, loaded) -> None:
    folder, again = str(tmp_path / "saved"), str(tmp_path / "again")
    (ranks, changes), (others, elsewhere) = saved, loaded
    went_on = spawn(train_and_save, ranks, BF16_MOMENTS | changes, folder, 2, 2)
    moved = spawn(load_and_save_again, others, BF16_MOMENTS | elsewhere, folder, again, 2)
    assert whole(tmp_path / "saved") == whole(tmp_path / "again")
    # sums in another order may decide how a moment rounds, which is worth 2^-8 of a step
    assert moved[0] == pytest.approx(went_on[0], rel=1e-3)


def learned(changes) -> list[float]:
    """Losses of 200 steps that read eight batches again and again."""
    config, blueprint, run = assembled(0, 1, SMALL | {"train__global_batch_size": 2} | changes)
    found = []
    for step in range(200):
        batches = make_batches(config, blueprint, 0, step % 8)
        found.append(train_step(run, batches, lr=3e-3, weight_decay=0.1).loss.item())
    return found


@pytest.mark.ci
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_the_loss_after_200_steps_is_that_of_fp32_moments(beta2) -> None:
    """Within 0.5 %, over the eight batches; what is learned is far more."""
    narrow, wide = (learned({"optim__adam_beta2": beta2} | m) for m in (BF16_MOMENTS, {}))
    ours, theirs = (sum(losses[-8:]) / 8 for losses in (narrow, wide))
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert narrow[0] == wide[0] > 1.2 * theirs
    assert narrow != wide


def problems(*words: str) -> str:
    config = parse(["--preset", "gpt3-125m", "--lr", "1e-3", "--train-iters", "1", "--mock-data",
                    "--vocab-size", "60", *words]).config  # fmt: skip
    try:
        check_config(config, 1)
    except ConfigError as error:
        return str(error)
    return "\n".join(notices(config, 1))


def test_what_makes_no_sense_is_said_at_the_start() -> None:
    said = problems("--exp-avg-dtype", "bf16")
    assert "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer; add it" in said
    said = problems(*ASKED, "--optimizer", "sgd")
    assert "--exp-avg-dtype bf16 is about a moment of --optimizer adam, lion, sophiag, and" in said
    assert "--exp-avg-sq-dtype bf16 is about a moment of --optimizer adam, and" in said
    assert "--optimizer sgd has none that can be" in said
    assert "--optimizer apex-adam has none" in problems(*ASKED, "--optimizer", "apex-adam")
    said = problems(*ASKED, "--optimizer", "lion")
    assert said.count("--optimizer lion has none") == 1 and "--exp-avg-sq-dtype bf16 is" in said
    assert problems(*ASKED[:3], "--optimizer", "lion") == ""
    said = problems("--use-precision-aware-optimizer")
    assert "--use-precision-aware-optimizer: changes nothing; moments are fp32 without" in said
    assert problems(*ASKED) == ""
    for flag in ("--exp-avg-dtype", "--exp-avg-sq-dtype"):
        with pytest.raises(ConfigError, match=f"{flag} takes one of fp32, bf16; got 'fp16'"):
            parse([flag, "fp16"])
    with pytest.raises(ConfigError, match="--main-params-dtype takes only fp32"):
        parse([*ASKED, "--main-params-dtype", "fp16"])
