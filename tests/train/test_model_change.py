"""Weights are taken up by the model they are of, or by one whose changes were asked for by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megatron_lite.checkpoint.description import saved_model
from megatron_lite.checkpoint.manifest import NAME, read_manifest
from megatron_lite.cli import convert
from megatron_lite.config.errors import CheckpointError
from tests.support.huggingface import tool
from tests.train.runs import Outcome, alone, steps

ROPE = ["--position-embedding-type", "rope"]


@pytest.fixture(scope="module")
def trained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with rotary positions."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = alone(*data, *ROPE, "--save", str(folder), "--exit-interval", "2")
    assert done.rc == 0, done.err
    return folder


def resumed(data: list[str], folder: Path, *words: str) -> Outcome:
    return alone(*data, *ROPE, "--load", str(folder), "--exit-interval", "3", *words)


def rewrite(folder: Path, change) -> Path:
    """Change the manifest's body and make its hash true again."""
    path = folder / "iter_0000002" / NAME
    body = json.loads(path.read_bytes())["body"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "body": body}))
    return path.parent


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("learning_rate", "style", "zigzag"),
        ("weight_decay", "samples", [1]),
        ("learning_rate", "max_lr", None),
    ],
)
def test_a_learning_rate_that_is_none_is_no_reason_to_take_the_flags(
    section: str, name: str, value: object, data: list[str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    rewrite(
        tmp_path / "copy", lambda body: body["config"]["schedules"][section].update({name: value})
    )
    done = resumed(data, tmp_path / "copy")
    assert done.rc == CheckpointError.exit_code and f"schedules.{section}.{name} is" in done.err


CHANGED = {
    "heads": (["--num-attention-heads", "8"], "--num-attention-heads: 4 -> 8"),
    "base": (["--rotary-base", "500000"], "--rotary-base: 10000 -> 500000"),
    "epsilon": (["--norm-epsilon", "1e-6"], "--norm-epsilon: 1e-05 -> 1e-06"),
    "norm": (["--normalization", "RMSNorm"], "--normalization: LayerNorm -> RMSNorm"),
    "bias": (["--disable-bias-linear", "--gelu", "tanh"], "--add-bias-linear: True -> False"),
    "width": (["--ffn-hidden-size", "64"], "--ffn-hidden-size: 128 -> 64"),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "") for name in CHANGED), ("heads", "--finetune"), ("base", "--skip-train")],
)
def test_another_model_is_refused_by_name_with_both_values(
    name: str, way: str, data: list[str], trained: Path
) -> None:
    words, told = CHANGED[name]
    done = resumed(data, trained, *words, *way.split())
    assert done.rc == CheckpointError.exit_code, done.err
    assert told in done.err and "iter_0000002" in done.err
    assert ("can never be changed" in done.err) != ("--allow-model-change" in done.err)


def test_changes_that_were_asked_for_are_told_and_others_still_refused(
    data: list[str], trained: Path, tmp_path: Path
) -> None:
    changed = ["--rotary-base", "500000", "--norm-epsilon", "1e-6"]
    asked = ["--allow-model-change", "rotary_base,norm-epsilon,seq_length"]
    out = tmp_path / "again"
    done = resumed(data, trained, *changed, *asked, "--save", str(out))
    assert done.rc == 0, done.err
    assert "--allow-model-change: --rotary-base: 10000 -> 500000: " in done.out
    assert "--norm-epsilon: 1e-05 -> 1e-06" in done.out
    assert [step.iteration for step in steps(out)] == [3]
    once_more = resumed(data, out, *changed, "--train-iters", "4")
    assert once_more.rc == 0, "what was changed is the checkpoint's own now"
    done = resumed(data, trained, *changed, "--allow-model-change", "rotary_base")
    assert done.rc == CheckpointError.exit_code and "--rotary-base" not in done.err
    assert "--norm-epsilon: 1e-05 -> 1e-06" in done.err


@pytest.mark.ci
def test_what_clex_learns_starts_anew_goes_on_exactly_and_stays_here(
    data: list[str], trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clex = [
        "--rope-scaling-type",
        "clex",
        "--rope-scaling-factor",
        "4",
        "--rope-original-length",
        "16",
    ]
    asked = ["--allow-model-change", "rope_scaling_type"]
    refused = resumed(data, trained, *clex)
    assert refused.rc == CheckpointError.exit_code
    assert "--rope-scaling-type: none -> clex" in refused.err
    once = resumed(
        data, trained, *clex, *asked, "--exit-interval", "4", "--save", str(tmp_path / "once")
    )
    assert once.rc == 0, once.err
    assert (
        "--rope-scaling-type clex: what it learns starts anew, which is no other than ntk"
        in once.out
    )
    parts = str(tmp_path / "parts")
    assert resumed(data, trained, *clex, *asked, "--save", parts).rc == 0
    later = resumed(data, Path(parts), *clex, "--exit-interval", "4", "--save", parts)
    assert later.rc == 0, later.err
    assert "starts anew" not in later.out and later.state_hash == once.state_hash
    manifest = read_manifest(tmp_path / "parts" / "iter_0000004")
    assert {"rotary.up", "rotary.down", "exp_avg.rotary.down"} <= manifest.tensors.keys()
    back = resumed(data, Path(parts), "--allow-model-change", "rope_scaling_type")
    assert back.rc == 0, "what was learned of frequencies is left out"
    out = tmp_path / "out"
    assert (
        tool(convert.main, monkeypatch, parts, out, "--no-tokenizer") == CheckpointError.exit_code
    )
    assert "has no --rope-scaling-type clex" in capsys.readouterr().err


def test_a_field_that_an_older_checkpoint_lacks_is_its_version_s_default(
    data: list[str], trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(trained, folder)

    def forget(body):
        for name in ("rotary_base", "norm_epsilon", "attention_softmax_in_fp32"):
            del body["config"]["model"][name]

    rewrite(folder, forget)
    assert resumed(data, folder).rc == 0
    done = resumed(data, folder, *CHANGED["base"][0])
    assert done.rc == CheckpointError.exit_code and CHANGED["base"][1] in done.err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("hidden_size"), "does not say its model's hidden_size"),
        (lambda m: m.update(new_kind_of_norm=True), "new_kind_of_norm True, which this program"),
        (lambda m: m.update(hidden_size=1 << 40), "--hidden-size 1099511627776 must be at least 1"),
        (lambda m: m.update(hidden_size=64), "embedding.tokens.weight is stored as .61, 32."),
        (lambda m: m.update(num_layers=10**9), "--num-layers 1000000000 must be"),
        (lambda m: m.update(num_layers=99_999), "num_layers 99999, but .* tensors are stored"),
        (lambda m: m.update(num_layers=1), "blocks.1.* is stored, which the model does not have"),
        (lambda m: m.update(num_layers=2.5), "model.num_layers takes a whole number"),
        (lambda m: m.update(num_attention_heads=5), "does not divide into --num-attention-heads 5"),
        (lambda m: m.update(normalization="Norm"), "takes one of LayerNorm, RMSNorm"),
        (lambda m: m.update(swiglu=True), "blocks.0.mlp.gate.weight is not stored"),
        (lambda m: m.update(vocab_size=None), "does not say its model's vocab_size"),
        (lambda m: m.update(rotary_base=float("nan")), "model.rotary_base takes a finite number"),
    ],
)
def test_a_manifest_that_describes_no_model_of_its_tensors_is_refused(
    change, told: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    folder = rewrite(tmp_path / "copy", lambda body: change(body["config"]["model"]))
    with pytest.raises(CheckpointError, match=told):
        saved_model(read_manifest(folder), folder)


def test_a_run_that_is_only_evaluated_needs_no_curve(data: list[str], trained: Path) -> None:
    """Another length is another decay of the learning rate, which no step follows here."""
    done = resumed(data, trained, "--skip-train", "--train-iters", "9")
    assert done.rc == 0, done.err
    assert resumed(data, trained, "--train-iters", "9").rc == CheckpointError.exit_code
