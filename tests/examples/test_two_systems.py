"""Published systems: their own sizes in the plan, their commands as printed, the whole run in small."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shlex
import sys
from pathlib import Path

import pytest

from megatron_lite.blueprint.parameters import parameter_table, total_size
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.telemetry.record import StepRecord, read_metrics, record_json
from tests.examples.systems import block, carried_out, planned_step
from tests.support.ceval_toy import write_exam
from tests.support.extras import needs
from tests.support.places import ROOT
from tests.telemetry.records import STEP

SYSTEMS = ("macrogpt", "gpt_from_zero", "baby_llama")
WORDS = ["今天", "天气", "很好", "我们", "去", "公园", "散步", "系统", "文件", "使用", "软件包", "如果", "请",
         "安装", "命令", "参数", "用户", "目录"]  # fmt: skip


def full(system: str, tmp_path: Path) -> RunConfig:
    """What FULL=1 would train, by a stand-in for python that prints how it was called."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = carried_out(block(system)[1], PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[0].endswith("tools/plan.py") and words[1] == "--hardware"
    return parse(words[words.index("--gpus-per-node") + 2 :]).config


@pytest.mark.parametrize(
    ("system", "parameters"),
    [("macrogpt", 1_473_471_488), ("gpt_from_zero", 336_128_000), ("baby_llama", 58_479_616)],
)
def test_full_is_the_system_s_own_model(system: str, parameters: int, tmp_path: Path) -> None:
    config = full(system, tmp_path)
    model, train, rate = config.model, config.train, config.learning_rate
    assert model.vocab_size is not None
    stages = cut_stages([model.num_layers])
    found = total_size(parameter_table(model, stages, padded_vocab_size=model.vocab_size))
    assert found == parameters
    if system == "macrogpt":
        assert config.precision.fp16 and config.precision.initial_loss_scale == 65536
        optim = config.optim
        assert optim.optimizer == "adafactor" and not optim.adafactor_relative_step
        assert not optim.adafactor_scale_parameter and optim.adafactor_beta1 is None
        assert (train.micro_batch_size, train.global_batch_size, model.seq_length) == (4, 128, 2048)
        assert (rate.lr, rate.lr_decay_style, rate.lr_warmup_fraction) == (3e-4, "linear", 0.01)
        assert (config.checkpoint.save_interval, config.checkpoint.keep_last) == (384, 6)
    elif system == "baby_llama":
        assert config.precision.fp16 and (config.optim.adam_beta2, config.optim.weight_decay) == (
            0.95,
            0.1,
        )
        assert (train.micro_batch_size, train.global_batch_size, model.seq_length) == (32, 128, 512)
        assert (rate.lr, rate.min_lr, rate.lr_warmup_iters) == (3e-4, 1e-5, 1000)
    else:
        assert config.precision.bf16 and (config.optim.adam_beta2, config.optim.weight_decay) == (
            0.98,
            0.01,
        )
        assert (train.micro_batch_size, train.global_batch_size, model.seq_length) == (56, 560, 256)
        assert (rate.lr, rate.lr_decay_style, rate.lr_warmup_iters) == (4e-4, "cosine", 1500)
        assert (config.checkpoint.save_interval, config.checkpoint.keep_last) == (1000, 5)


@pytest.mark.parametrize(
    "system", ["baby_llama", *(pytest.param(s, marks=pytest.mark.ci) for s in SYSTEMS[:2])]
)
def test_the_printed_dry_run_says_memory_time_and_the_curve(system: str) -> None:
    done = carried_out(block(system)[1])
    assert done.returncode == 0, done.stderr
    fits = re.search(r"\s(\d+\.\d+)\s+fits$", done.stdout, re.MULTILINE)
    step = planned_step(done.stdout)
    assert fits
    for language in ("README.md", "README.zh-CN.md"):
        text = (ROOT / "examples" / system / language).read_text("utf-8")
        told = re.search(r"(\d+\.\d+) GiB\D+?(\d+\.\d+)", text)
        assert told is not None
        assert [float(n) for n in told.groups()] == pytest.approx([float(fits[1]), step], rel=0.25)
    assert re.search(r"^ +iteration +tokens +batch +learning rate$", done.stdout, re.MULTILINE)


@pytest.mark.ci
def test_gpt_from_zero_is_advised_as_printed() -> None:
    """Its README's numbers are the tool's; the rate that was "strange" gets a warning."""
    command = block("gpt_from_zero")[2]
    told = carried_out(command.replace("=--advise", "='--advise --exit-duration-in-mins 360'"))
    assert told.returncode == 0, told.stderr
    found = json.loads(carried_out(command.replace("=--advise", "='--advise --json'")).stdout)
    assert found["warnings"] == []
    (warning,) = re.findall("^warning: (.*)", told.stdout, re.MULTILINE)
    assert "never decays before --exit-duration-in-mins" in warning and "at 3.99e-04" in warning
    here, best = found["law"]["this_run"], found["law"]["compute_optimal"]
    numbers = [
        f"{here['learning_rate'] * 1e3:.1f}e-3", f"{here['batch_tokens'] / 256:,.0f}",
        f"{best['learning_rate'] * 1e3:.1f}e-3", f"{best['batch_tokens'] / 256:,.0f}",
    ]  # fmt: skip
    for language in ("README.md", "README.zh-CN.md"):
        text = (ROOT / "examples/gpt_from_zero" / language).read_text("utf-8")
        (row,) = [
            line
            for line in text.splitlines()
            if "4e-4" in line and "560" in line and "--advise" in line
        ]
        assert {number for number in numbers if number not in row} == set()


@pytest.mark.parametrize(
    ("system", "env", "said"),
    [
        ("macrogpt", {"FULL": "1"}, "TEXT=FOLDER with the shards"),
        ("macrogpt", {"FULL": "1", "TEXT": "."}, "TOKENIZER=tokenizer.model"),
        ("macrogpt", {"DRY_RUN": "1"}, "DRY_RUN=1 is for FULL=1"),
        ("macrogpt", {"TEXT": "/dev"}, "holds 0 *.json files"),
        ("baby_llama", {"FULL": "1"}, "TEXT=FOLDER with wiki.json"),
        ("baby_llama", {"FULL": "1", "TEXT": "."}, "CHATGLM=tokenizer.model (ChatGLM2"),
        ("baby_llama", {"CHATGLM": "/nowhere"}, "CHATGLM=/nowhere is no file"),
        ("baby_llama", {"TEXT": "/dev"}, "TEXT=/dev holds no wiki.json"),
        ("gpt_from_zero", {"FULL": "1"}, "TEXT=FOLDER with news, crawler, zhihu and en.jsonl"),
        ("gpt_from_zero", {"TEXT": "/dev"}, "TEXT=/dev holds no news.jsonl"),
        ("gpt_from_zero", {"STEPS": "7"}, "give an even number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_run_lacks_is_said_at_its_start(
    system: str, env: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = carried_out(f"examples/{system}/run.sh", OUT=str(tmp_path), **env)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.startswith("FATAL[2] rank=- step=-: ")


@pytest.mark.parametrize("system", SYSTEMS)
def test_without_a_network_and_a_text_both_are_named(system: str, tmp_path: Path) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text('#!/bin/sh\necho "E: Could not resolve a name" >&2\nexit 100\n')
    apt.chmod(0o755)
    places = {"OUT": str(tmp_path / "out"), "CACHE": str(tmp_path / "cache")}
    done = carried_out(block(system)[0], **places, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "manpages-zh 1.6.4.0-1" in done.stderr and "TEXT=FOLDER" in done.stderr


@pytest.mark.parametrize("system", [*SYSTEMS, "open_gpt"])
def test_every_variable_of_a_script_is_in_its_table(system: str) -> None:
    script = (ROOT / "examples" / system / "run.sh").read_text("utf-8")
    variables = set(re.findall(r"\$\{([A-Z][A-Z_]*):-", script))
    assert len(variables) >= 7
    for path in (ROOT / "examples" / system).glob("README*.md"):
        assert {name for name in variables if f"`{name}`" not in path.read_text("utf-8")} == set()


def step(iteration: int, loss: float) -> str:
    return record_json(
        dataclasses.replace(STEP, iteration=iteration, loss=loss, skipped_iterations=0)
    )


@pytest.mark.parametrize(
    ("first", "last", "code", "said"),
    [
        ([9 - n / 50 for n in range(200)], [5.2] * 100, 0, "0 of 300"),
        ([9 - n / 50 for n in range(200)], [5.2] * 50 + [float("nan")] * 50, 1, "no number"),
        ([9 - n / 50 for n in range(200)], [9.0] * 50 + [5.0] * 50, 1, "began anew"),
        ([9.0] * 200, [9.0] * 100, 1, "nothing was learnt"),
    ],
    ids=["as it should be", "nan", "anew", "nothing learnt"],
)
def test_the_verdict_on_fp16(
    first: list[float], last: list[float], code: int, said: str, tmp_path: Path
) -> None:
    for name, losses in (("first", first), ("last", last)):
        lines = [step(n, loss) for n, loss in enumerate(losses, 1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    verdict = shlex.join(
        [
            sys.executable,
            "examples/macrogpt/verdict.py",
            *map(str, (tmp_path / "first", tmp_path / "last")),
        ]
    )
    done = carried_out(verdict)
    assert done.returncode == code and said in done.stdout, done.stdout + done.stderr


def sentence(random_words: random.Random) -> str:
    return "".join(random_words.choices(WORDS, k=random_words.randint(5, 30))) + "。"


def write_texts(folder: Path) -> Path:
    """A few hundred sentences in the shapes of all systems."""
    folder.mkdir()
    chance = random.Random(5)
    for shard in (1, 2):
        records = [{"i": n, "a": sentence(chance)} for n in range(200)]
        text = json.dumps(records, ensure_ascii=False, indent=4)
        (folder / f"shard-{shard}.json").write_text(text, encoding="utf-8")
    shapes = {
        "news": lambda n: {"ID": n, "Content": sentence(chance)},
        "crawler": lambda n: {"段落": [{"内容": sentence(chance)}, {"内容": sentence(chance)}]},
        "zhihu": lambda n: {"问": sentence(chance), "答": sentence(chance)},
        "en": lambda n: {"text": f"the text number {n} of the other ones"},
        "held_out": lambda n: {"text": sentence(chance)},
        "baike": lambda n: {
            "title": str(n),
            "summary": sentence(chance),
            "sections": [{"title": "一", "content": sentence(chance)}],
        },
    }
    for name, make in shapes.items():
        lines = [json.dumps(make(n), ensure_ascii=False) + "\n" for n in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    records = {
        "wiki": [{"completion": sentence(chance), "source": "x"} for _ in range(200)],
        "alpaca": [
            {"instruction": sentence(chance), "input": "", "output": sentence(chance)}
            for _ in range(200)
        ],
    }
    for name, found in records.items():
        (folder / f"{name}.json").write_text(
            json.dumps(found, ensure_ascii=False), encoding="utf-8"
        )
    write_exam(folder / "ceval")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_whole_run_goes_as_printed(system: str, tmp_path: Path) -> None:
    needs("tokenizers")
    needs("sentencepiece")
    out = tmp_path / "out"
    env = {"OUT": str(out), "TEXT": str(write_texts(tmp_path / "text")), "STEPS": "40"}
    if system == "macrogpt":  # every *.json is a shard
        for other in ("wiki", "alpaca"):
            (tmp_path / "text" / f"{other}.json").unlink()
    if system == "baby_llama":
        env |= {"STEPS_SFT": "40", "STEPS_LORA": "30", "STEPS_LONG": "10"}
    done = carried_out(block(system)[0], **env, STEPS_NEXT="30")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{system} took " in done.stdout
    if system == "macrogpt":
        assert (
            "--finetune --keep-optim: weights, the optimizer's state after 40 updates and loss scale"
            in done.stdout
        )
        assert "losses that are no number: 0 of 70" in done.stdout
        assert list(out.glob("run-*/loss.png")) and "skipped after step 20: 0 of 20" in done.stdout
    elif system == "baby_llama":
        assert "conversations: 200 samples" in done.stdout and "(min, max) time" in done.stdout
        assert (
            done.stdout.count("chat template: plain") + done.stderr.count("chat template: plain")
            == 2
        )
        assert (out / "exported" / "model.safetensors").is_file()
        assert re.search("adapters +loss .* in 30 steps", done.stdout)
    else:
        assert "[stopped by --exit-interval] iteration 20" in done.stdout
        assert "exactly resumed" in done.stdout and "0 differ" in done.stdout
        assert "the law of arXiv:2401.02954" in done.stdout
        rates = [r.learning_rate for r in read_metrics(out / "whole/metrics.jsonl")
                 if isinstance(r, StepRecord)]  # fmt: skip
        assert rates[9] == rates[24] == 4e-3 and max(rates[23], rates[39]) < 1e-4
        assert re.search(r"^all +800 .* 1\.0000 +40,960 ", done.stdout, re.MULTILINE)
