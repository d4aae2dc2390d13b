"""Checkpoints of older commits load to the same bits, and training goes on to the losses it had then."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.older import ADAM, EXPECTED, FOLDER
from tests.train.runs import Outcome, alone, on_ranks, steps

SIZES = (
    "--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--tokenizer-type",
    "--vocab-size", "--make-vocab-size-divisible-by",
)  # fmt: skip


def gpt2_words(tmp_path: Path) -> list[str]:
    """The command line of a fine-tuning; where the tokenizer's files lie is this checkout's business."""
    return [
        "--config", str(FOLDER / "gpt2" / "config.yaml"), "--load", str(FOLDER / "gpt2"),
        "--vocab-file", str(FOLDER / "gpt2" / "tokenizer" / "vocab.json"),
        "--merge-file", str(FOLDER / "gpt2" / "tokenizer" / "merges.txt"), "--finetune",
        "--data-path", str(FOLDER / "text_text_document"), "--split", "1,0,0",
        "--train-iters", "5", "--save", str(tmp_path), "--save-interval", "100",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are split over threads; the recorded ones were not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def machine() -> list[str]:
    """What the last bit of a sum depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return [torch.__version__, model]


def require(ended: Outcome, folder: Path, name: str) -> None:
    """The five losses and, where this is the machine they were computed on, the last state's hash."""
    assert ended.rc == 0, ended.err
    expected = EXPECTED[name]
    losses = [step.loss for step in steps(folder)]
    assert losses == pytest.approx(expected["losses"], rel=0, abs=1e-6)
    if machine() == EXPECTED["machine"]:
        assert losses == expected["losses"]
        assert ended.state_hash == expected["hash_after_five_steps"]


@pytest.mark.parametrize("name", ["adam", "gpt2"])
def test_an_older_checkpoint_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    words = [*ADAM, "--save", str(tmp_path)] if name == "adam" else gpt2_words(tmp_path)
    ended = alone(*words, "--skip-train", without=SIZES if name == "gpt2" else ())
    assert ended.rc == 0, ended.err
    assert ended.state_hash == EXPECTED[name]["hash"]


def test_training_goes_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    require(alone(*ADAM, "--save", str(tmp_path)), tmp_path, "adam")


def test_fine_tuning_starts_from_an_older_import(tmp_path: Path) -> None:
    require(alone(*gpt2_words(tmp_path), without=SIZES), tmp_path, "gpt2")


@pytest.mark.ci
def test_training_goes_on_in_the_layout_it_was_saved_in(tmp_path: Path) -> None:
    layout = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    words = [*ADAM, *layout, "--sequence-parallel", "--save", str(tmp_path)]
    require(on_ranks(4, *words), tmp_path, "adam on four ranks")
