"""The command itself: plans without torch, trains in one process, and whole public flag lists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.blueprint import draw_up
from megatron_lite.blueprint.schedules.actions import Lowered, Op
from megatron_lite.config.errors import ConfigError, DistributedError
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, byte_characters
from tests.support.places import ROOT
from tests.train.runs import alone, argv, run_main

TOOL = ROOT / "tools/pretrain_gpt.py"

MEGATRON_LM = """
--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048
--max-position-embeddings 2048 --attention-backend auto --micro-batch-size 1
--global-batch-size 1536 --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
--init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6
--lr-warmup-fraction .001 --lr-decay-iters 430000 --tensor-model-parallel-size 8
--pipeline-model-parallel-size 16 --data-path d --vocab-file v --merge-file m --split 949,50,1
--log-interval 100 --save-interval 10000 --eval-interval 1000 --save c --load c --eval-iters 10
--tensorboard-dir t
"""
MEGATRON_DEEPSPEED = """
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96
--hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
--micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375
--train-samples 146484375 --lr-decay-samples 126953125 --lr-warmup-samples 183105 --lr 6.0e-5
--min-lr 6.0e-6 --lr-decay-style cosine --log-interval 10 --eval-iters 40 --eval-interval 1000
--data-path 0.2 a 0.3 b 0.5 c --vocab-file v --merge-file m --save-interval 1000 --save s --load s
--split 98,2,0 --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
--init-method-std 0.006 --tensorboard-dir t --fp16
"""
RAMP = "--rampup-batch-size 16 16 5859375"
STEPS = "--step-batch-size-schedule 0:16,2.4B:320,4.8B:624,7.2B:928,9.6B:1232,12B:1536"


def tool(*words: str, python: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, str(TOOL), *words], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "words",
    [MEGATRON_LM, f"{MEGATRON_LM} {RAMP}", f"{MEGATRON_LM} {STEPS}", MEGATRON_DEEPSPEED,
     f"{MEGATRON_DEEPSPEED} --sequence-parallel --data-impl mmap --distributed-backend nccl"],
    ids=["megatron-lm", "with-ramp-up", "with-step-schedule", "megatron-deepspeed", "with-mp"],
)  # fmt: skip
def test_the_public_175b_scripts_flags_are_a_plan(words: str) -> None:
    done = tool(*words.split(), "--dry-run", "--world-size", "128")
    assert done.returncode == 0, done.stderr
    assert "tp 8 x cp 1 x dp 1 x pp 16 = 128 ranks" in done.stdout
    assert "174,615,846,912 in all" in done.stdout
    assert "dry run: every rule holds; nothing was started" in done.stdout


def imported(stderr: str) -> set[str]:
    """Top-level packages of `python -X importtime`."""
    return set(re.findall(r"^import time: .*\| +(\w+)", stderr, re.MULTILINE))


def test_a_dry_run_imports_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    save = ["--save", str(tmp_path / "run"), "--save-interval", "5", "--mock-data"]
    done = tool(*argv(*save), "--dry-run", python=["-X", "importtime"])
    assert done.returncode == 0, done.stderr
    assert "megatron_lite" in imported(done.stderr)
    assert "torch" not in imported(done.stderr)
    assert list(tmp_path.iterdir()) == []
    help_text = tool("--help", python=["-X", "importtime"])
    assert "--micro-batch-size" in help_text.stdout
    assert "torch" not in imported(help_text.stderr)


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    words = ["--mock-data", "--save", str(tmp_path / "run"), "--save-interval", "4"]
    done = tool(*argv(*words))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["train"] * 4 + ["save"]
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_the_saved_config_starts_the_same_run(tmp_path: Path) -> None:
    save = ["--save", str(tmp_path / "run"), "--save-interval", "4"]
    first = alone("--mock-data", *save)
    again = run_main(
        "--config", str(tmp_path / "run" / "config.yaml"), "--save", str(tmp_path / "b")
    )
    assert again.rc == 0, again.err
    assert again.state_hash == first.state_hash


def test_a_world_size_that_is_not_there_is_refused() -> None:
    done = alone("--mock-data", "--world-size", "4")
    assert done.rc == ConfigError.exit_code
    assert "--world-size 4, but 1 processes were started" in done.err
    assert done.err.startswith("FATAL[2] rank=0 step=-: ")


@pytest.mark.parametrize("only", ["--dry-run", "--rehearse"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr-restarts 7", "cycles of 1.5 samples"),
        (
            "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
            "they are 0.2 and 0.1",
        ),
    ],
    ids=["restarts", "decay"],
)
def test_what_is_only_planned_or_rehearsed_has_curves_too(only, words, said) -> None:
    with pytest.raises(ConfigError, match=said):
        alone("--mock-data", only, *words.split())


LAYOUT = ("--world-size", "4", "--pipeline-model-parallel-size", "2", "--global-batch-size", "16")


def test_a_rehearsal_is_one_process_without_data_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = alone("--rehearse", "--all-ranks", *LAYOUT, "--save", "run", "--save-interval", "5")
    assert done.rc == 0
    assert "rehearsing 4 of 4 ranks on 4 of 4 micro batches" in done.out
    assert "4 ranks fit together" in done.out
    assert "rehearsal: the ranks fit together; nothing was started" in done.out
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_whose_ranks_do_not_fit_ends_with_code_6_and_names_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = draw_up._training

    def with_two_swapped_sends(*asked: Any) -> Lowered:
        first, second = sound(*asked)
        sends = [n for n, group in enumerate(first) if group[0].op is Op.SEND_F]
        moved = list(first)
        moved.insert(sends[1] + 1, moved[sends[0]])
        del moved[sends[0]]
        return tuple(moved), second

    monkeypatch.setattr(draw_up, "_training", with_two_swapped_sends)
    with pytest.raises(DistributedError) as caught:
        alone("--rehearse", *LAYOUT)
    assert caught.value.exit_code == 6
    line = "message 1 from rank 0 to rank 2 does not fit - rank 0, training step, action "
    assert line in str(caught.value)
    assert "micro batch 1) [16, 2, 32] float32" in str(caught.value)


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> list[str]:
    """GPT-2's tokenizer without merges: 256 bytes and the end of a document."""
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    tokens = [*byte_characters(), GPT2_EOD]
    vocab.write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    return ["--vocab-file", str(vocab), "--merge-file", str(merges)]


def plan_tool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), "--hardware", "cpu", "--json", *words],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


VOCABULARIES = [
    # tokenizer and --vocab-size, ids of the model
    pytest.param("NullTokenizer", ["--vocab-size", "63"], 64, marks=pytest.mark.ci),
    pytest.param("NullTokenizer", ["--vocab-size", "64"], 65, marks=pytest.mark.ci),
    pytest.param("GPT2BPETokenizer", [], 256 + 1, marks=pytest.mark.ci),
    ("GPT2BPETokenizer", ["--vocab-size", "300"], 300),
    pytest.param("GPT2BPETokenizer", ["--vocab-size", "100"], 256 + 1, marks=pytest.mark.ci),
]


@pytest.mark.parametrize(("kind", "given", "ids"), VOCABULARIES)
def test_dry_run_rehearsal_plan_and_run_have_the_same_vocabulary(
    kind: str, given: list[str], ids: int, byte_tokenizer: list[str]
) -> None:
    """NullTokenizer's end of document is one id more than --vocab-size, and a tile more at 64."""
    padded = -(-ids // 64) * 64
    files = byte_tokenizer if kind == "GPT2BPETokenizer" else []
    words = argv(
        "--tokenizer-type", kind, *given, *files, "--make-vocab-size-divisible-by", "64",
        "--mock-data", "--train-iters", "2",
        without=() if given else ("--vocab-size",),
    )  # fmt: skip
    said = f"vocabulary {ids:,} padded to {padded:,},"
    assert said in run_main(*words, "--dry-run").out
    rows = re.compile(rf"padded vocab \(size: {ids}\) to {padded}\b")
    assert rows.search(run_main(*words).out)
    plan = json.loads(plan_tool(*words).stdout)
    assert plan["model"]["padded_vocab_size"] == padded
    assert f"{plan['model']['num_parameters']:,} in all" in run_main(*words, "--dry-run").out
    assert "the ranks fit together" in run_main(*words, "--rehearse").out


def refusal(*words: str) -> str:
    """Why a run, or what stands for it, is not begun: exit code 2."""
    try:
        done = run_main(*words)
    except ConfigError as error:
        return str(error)
    assert done.rc == ConfigError.exit_code, done
    return done.err


@pytest.mark.ci
def test_an_unknown_tokenizer_is_refused_by_all_four() -> None:
    for wrong, said in (
        (argv("--tokenizer-type", "NoSuchTokenizer", "--mock-data"),
         "--tokenizer-type takes one of GPT2BPETokenizer, "),
        (argv("--mock-data", without=("--vocab-size",)),
         "--tokenizer-type NullTokenizer needs --vocab-size"),
    ):  # fmt: skip
        for how in (["--dry-run"], ["--rehearse"], []):
            assert said in refusal(*wrong, *how)
        planned = plan_tool(*wrong)
        assert planned.returncode == 2 and said in planned.stderr
