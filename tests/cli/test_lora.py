"""Every tool finds the adapters of a run, or those of --adapter; merged and unmerged say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.cli import convert, evaluate, generate
from megatron_lite.inference.generate import generate as decode
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.parallel.context import ParallelContext
from tests.cli.adapters import LORA, llama_words, spoken, trained
from tests.support.decoding import likeliest
from tests.support.extras import needs
from tests.support.huggingface import tool
from tests.support.spawn import spawn
from tests.train.runs import alone, steps


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return llama_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def runs(words, tmp_path_factory) -> Path:
    """base/, and run/ of adapters beside it."""
    folder = tmp_path_factory.mktemp("runs")
    trained(words, "--save", folder / "base", "--lr", "0.02")
    trained(words, *LORA, "--load", folder / "base", "--finetune", "--save", folder / "run")
    return folder


@pytest.fixture(scope="module")
def converted(runs) -> Path:
    """peft/ and merged/ of the adapters, whole/ of the base, by tools/convert.py."""
    with pytest.MonkeyPatch.context() as patch:
        assert tool(convert.main, patch, runs / "base", runs / "whole") == 0
        assert tool(convert.main, patch, runs / "run", runs / "peft") == 0
        assert tool(convert.main, patch, runs / "run", runs / "merged", "--merge") == 0
    return runs


def test_greedy_tokens_are_the_same_however_the_adapters_come(
    converted, monkeypatch, capsys
) -> None:
    base, run, peft = (converted / name for name in ("base", "run", "peft"))
    expected = spoken(monkeypatch, capsys, "--load", run)
    assert expected != spoken(monkeypatch, capsys, "--load", base), "adapters say something else"
    for asked in (
        ["--load", base, "--adapter", run],
        ["--load", base, "--adapter", peft],
        ["--load", converted / "whole", "--adapter", peft],
        ["--load", converted / "merged"],
    ):
        assert spoken(monkeypatch, capsys, *asked) == expected, asked
    assert sorted(path.name for path in peft.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["llama2c", "gguf"])
def test_one_file_holds_the_merged_weights(converted, tmp_path, monkeypatch, to) -> None:
    """The same bytes by way of the merged folder of Hugging Face's, which knows of no adapters."""
    asked = ["--to", to, "--no-tokenizer"]
    assert (
        tool(convert.main, monkeypatch, converted / "run", tmp_path / "at-once", "--merge", *asked)
        == 0
    )
    back, later = tmp_path / "back", tmp_path / "later"
    assert tool(convert.main, monkeypatch, converted / "merged", back, "--no-tokenizer") == 0
    assert tool(convert.main, monkeypatch, back, later, *asked) == 0
    (name,) = (path.name for path in later.iterdir())
    assert (tmp_path / "at-once" / name).read_bytes() == (later / name).read_bytes()


def test_peft_and_transformers_say_the_same(converted) -> None:
    transformers, peft = needs("transformers"), needs("peft")
    prompt = torch.tensor([[72, 5, 33, 8]])

    def greedy(model) -> list[int]:
        return model.eval().generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()

    def whole(name: str):
        return transformers.AutoModelForCausalLM.from_pretrained(converted / name)

    beside = peft.PeftModel.from_pretrained(whole("whole"), str(converted / "peft"))
    assert greedy(beside) == greedy(whole("merged"))


def test_evaluation_finds_them_too(converted, tmp_path, monkeypatch) -> None:
    text, found = tmp_path / "text.txt", {}
    text.write_text("the thin hat of the cat is in the hall, then the other one")
    for name in ("base", "run", "merged"):
        json_file = tmp_path / f"{name}.json"
        asked = ["--load", converted / name, "--text", text, "--json", json_file, "--use-cpu"]
        assert tool(evaluate.main, monkeypatch, *asked, "--dtype", "float32") == 0
        (result,) = json.loads(json_file.read_text())["results"]
        found[name] = result["rows"][0]["perplexity"] if "rows" in result else result["perplexity"]
    assert found["run"] == pytest.approx(found["merged"], rel=1e-5)
    assert found["run"] != pytest.approx(found["base"], rel=1e-3)


def test_a_run_begins_with_a_folder_of_pefts(converted, words, tmp_path) -> None:
    begin = ["--load", converted / "base", "--finetune", "--lora-load", converted / "peft"]
    trained(words, *LORA, *begin, "--save", tmp_path / "loaded", "--exit-interval", "1")
    resumed = ["--load", converted / "run", "--finetune", "--save", tmp_path / "resumed"]
    trained(words, *LORA, *resumed, "--exit-interval", "1")
    assert steps(tmp_path / "loaded")[0].loss == steps(tmp_path / "resumed")[0].loss
    plain = ["--load", converted / "base", "--finetune", "--save", tmp_path / "plain"]
    trained(words, *LORA, *plain, "--exit-interval", "1")
    assert steps(tmp_path / "plain")[0].loss != steps(tmp_path / "loaded")[0].loss
    done = alone(*words, *LORA, "--lora-alpha", "17", *map(str, begin), without=["--vocab-size"])
    assert done.rc == 4 and "--lora-alpha: 16.0 -> 17.0" in done.err


def test_what_makes_no_sense_is_refused(converted, words, tmp_path, monkeypatch, capsys) -> None:
    def refused(rc: int, reason: str, main, *asked: object) -> None:
        assert tool(main, monkeypatch, *asked) == rc
        assert reason in capsys.readouterr().err

    base, run, peft = (converted / name for name in ("base", "run", "peft"))
    refused(2, "holds a whole model", convert.main, base, tmp_path / "new", "--merge")
    refused(2, "add --merge", convert.main, base, tmp_path / "new", "--adapter", peft)
    refused(2, "is for whole models", convert.main, run, tmp_path / "new", "--to", "gguf")
    speak = ["--use-cpu", "--prompt", "the", "--load"]
    refused(4, "holds adapters already", generate.main, *speak, run, "--adapter", peft)
    refused(4, "holds a whole model", generate.main, *speak, base, "--adapter", base)
    other = tmp_path / "other"
    trained(words, "--save", other, "--seed", "7", "--exit-interval", "1")
    refused(4, "another checkpoint than", generate.main, *speak, other, "--adapter", run)


def spoken_by_ranks(rank: int, ranks: int, tp: int, base: str, adapter: str) -> list[int]:
    """The likeliest tokens behind a prompt, of a model that the ranks share."""
    grid = RankGrid(tp=tp, pp=ranks // tp)
    ctx = ParallelContext.serial()
    if ranks > 1:
        ctx = ParallelContext.from_grid(grid, rank, torch.device("cpu"))
    model = build_model(find_model(Path(base), ctx, adapter=Path(adapter)), ctx)
    found = decode(model, [72, 5, 33, 8], max_new_tokens=12, pick=likeliest, eod=None)
    return list(found.ids)


@pytest.mark.ci
def test_ranks_share_the_adapters(converted) -> None:
    base, adapter = str(converted / "base"), str(converted / "peft")
    (alone_by_one,) = spawn(spoken_by_ranks, 1, 1, base, adapter)
    for tp in (1, 2):
        assert spawn(spoken_by_ranks, 2, tp, base, adapter) == [alone_by_one] * 2
