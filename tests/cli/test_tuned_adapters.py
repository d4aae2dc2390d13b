"""Answers taught to adapters beside a base in 4 bits: every tool speaks as was taught, merged or not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from megatron_lite.cli import chat as terminal
from megatron_lite.cli import convert, serve
from megatron_lite.cli.speaking.model import load_speaker
from megatron_lite.inference.generate import Generation
from megatron_lite.parallel.context import ParallelContext
from tests.inference.served import serving
from tests.support.extras import needs
from tests.support.huggingface import tool
from tests.support.talks import talk, tuned
from tests.train.runs import alone, steps

pytestmark = pytest.mark.ci

ASKED = ["the first", "the other"]
ANSWERS = ["one", "two"]
STEPS = ["--split", "1,0,0", "--train-iters", "40", "--lr-warmup-iters", "2"]
MODEL = [
    "--hidden-size", "64", "--num-attention-heads", "4", "--ffn-hidden-size", "64", "--swiglu",
    "--normalization", "RMSNorm", "--disable-bias-linear", "--position-embedding-type", "rope",
    "--untie-embeddings-and-output-weights", "--seq-length", "96", "--max-position-embeddings", "96",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with other answers, run/ of adapters that learn these, and merged/ of both."""
    folder = tmp_path_factory.mktemp("tuned")
    for name, answers in (("before", ["two", "one"]), ("after", ANSWERS)):
        pairs = zip(ASKED, answers, strict=True)
        data, prefix = tuned(folder / name, [talk(*pair) for pair in pairs], template="chatml")
        words = [*MODEL, "--tokenizer-type", data.tokenizer_type, "--tokenizer-model",
                 str(data.tokenizer_model), "--objective", "sft", "--data-path", prefix]  # fmt: skip
        if name == "before":
            words += ["--lr", "0.02", "--save", str(folder / "base")]
        else:
            words += ["--lora-rank", "8", "--lora-base", "nf4", "--load", str(folder / "base"),
                      "--finetune", "--lr", "0.01", "--save", str(folder / "run")]  # fmt: skip
        done = alone(*words, *STEPS, without=["--vocab-size"])
        assert done.rc == 0, done.err
    with pytest.MonkeyPatch.context() as patch:
        merge = [folder / "run", folder / "merged", "--merge"]
        assert tool(convert.main, patch, *merge) == 0
    return folder


def loads(runs: Path) -> dict[str, list[object]]:
    """Each way to the same model."""
    return {
        "run": ["--load", runs / "run"],
        "adapter": ["--load", runs / "base", "--adapter", runs / "run"],
        "merged": ["--load", runs / "merged"],
    }


@pytest.fixture(scope="module")
def chatted(runs: Path) -> dict[str, tuple[list[str], list[list[int]]]]:
    """Way -> (answers, ids that the model was given for each)."""
    found = {}
    said = runs / "said.json"
    for way, load in loads(runs).items():
        with pytest.MonkeyPatch.context() as patch:
            answers, prompts = [], []
            run = Generation.run

            def noted(generation, requests, run=run, prompts=prompts):
                prompts.extend(list(request.prompt) for request in requests)
                yield from run(generation, requests)

            patch.setattr(Generation, "run", noted)
            for line in ASKED:
                patch.setattr("sys.stdin", io.StringIO(f"{line}\n/save {said}\n"))
                asked = [*load, "--use-cpu", "--temperature", 0, "--max-new-tokens", 8]
                assert tool(terminal.main, patch, *asked, "--dtype", "float32") == 0
                answers.append(json.loads(said.read_text())["messages"][-1]["content"])
        found[way] = answers, prompts
    return found


def test_it_learns(runs: Path) -> None:
    for name, least in (("base", 3.0), ("run", 0.5)):
        losses = [step.loss for step in steps(runs / name)]
        assert losses[-1] < 0.1 < least < losses[0], name


def test_the_terminal_answers_as_was_taught(chatted) -> None:
    for way, (answers, _) in chatted.items():
        assert answers == ANSWERS, way


def test_the_merged_template_gives_the_ids_of_the_unmerged(runs, chatted) -> None:
    """In the terminal, and by transformers of the merged folder."""
    transformers = needs("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(runs / "merged")
    expected = [
        loaded.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
        )
        for asked in ASKED
    ]
    for way, (_, prompts) in chatted.items():
        assert prompts == expected, way


def test_the_server_answers_likewise(runs) -> None:
    needs("fastapi")
    needs("uvicorn")
    words = [str(word) for word in loads(runs)["adapter"]]
    asked = serve._parse([*words, "--use-cpu", "--dtype", "float32"])
    template = serve._template(asked)
    speaker = load_speaker(asked, ParallelContext.serial(), template.look)
    with serving(speaker.model, speaker.tokenizer, chat=template.renderer) as server:
        for question, answer in zip(ASKED, ANSWERS, strict=True):
            body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
            status, reply = server.ask("/v1/chat/completions", body)
            assert (status, reply["choices"][0]["message"]["content"]) == (200, answer), reply
