"""A model that was tuned speaks as it was taught: in chat, and after an export, in transformers, too."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.cli import chat, convert
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.chat.conversation import renderer_of
from megatron_lite.data.chat.formats import Message
from megatron_lite.data.chat.lessons import Dialogue, lessons_of
from megatron_lite.data.masks import MaskedDataset
from megatron_lite.data.tokenizers.build import build_tokenizer
from tests.support.extras import needs
from tests.support.huggingface import tool
from tests.support.preprocess import write_lines
from tests.support.talks import chat_tokenizer, numbers, prepare, talk, tuned
from tests.support.tokenizers import gpt2
from tests.train.runs import alone, steps

SAID = [Message("system", "Be brief."), Message("user", "the thing"), Message("assistant", "Yes."),
        Message("user", "Sure?"), Message("assistant", "No, the other.")]  # fmt: skip


def named_gpt2(folder: Path) -> DataConfig:
    """Under the names that Hugging Face gives its files."""
    made = gpt2(folder)
    for old, new in ((made.vocab_file, "vocab.json"), (made.merge_file, "merges.txt")):
        Path(str(old)).rename(folder / new)
    return DataConfig(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))


def pieces(folder: Path) -> DataConfig:
    """A SentencePiece file of the kind that transformers read."""
    library = needs("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["the other thing [INST] they think [/INST] Yes? <<SYS>> No."] * 20),
        model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
    )  # fmt: skip
    path = str(folder / "tokenizer.model")
    return DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=path)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("make", "template"),
    [(chat_tokenizer, "chatml"), (chat_tokenizer, "llama-3"), (named_gpt2, "plain"), (gpt2, "llama-2"),
     (pieces, "llama-2")],
    ids=["chatml", "llama-3", "gpt2", "gpt2 of other names", "sentencepiece"],
)  # fmt: skip
def test_the_exports_template_renders_the_ids_of_the_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], DataConfig],
    template: str,
) -> None:
    transformers = needs("transformers")
    files, run, out = tmp_path / "files", tmp_path / "run", tmp_path / "out"
    files.mkdir()
    data = make(files)
    conversation = talk(*(m.content for m in SAID[1:]), system=SAID[0].content)
    source = write_lines(tmp_path / "a.jsonl", conversation, *numbers(8))
    prepare(data, source, tmp_path / "x", template=template)
    trained = MaskedDataset(tmp_path / "x")[0].tolist()
    tokenizer = build_tokenizer(data)
    (lesson,) = lessons_of(renderer_of(tokenizer, files, template), Dialogue.of(SAID))
    assert lesson.ids == trained
    named = {"--tokenizer-type": data.tokenizer_type, "--tokenizer-model": data.tokenizer_model,
             "--vocab-file": data.vocab_file, "--merge-file": data.merge_file}  # fmt: skip
    ended = alone(
        "--objective", "sft", "--data-path", str(tmp_path / "x"), "--split", "1,0,0", "--seq-length",
        "256", "--max-position-embeddings", "256", "--train-iters", "2", "--vocab-size", "1",
        *(word for flag, value in named.items() if value for word in (flag, value)),
        "--save", str(run),
    )  # fmt: skip
    assert ended.rc == 0, ended.err
    kept = run / "iter_0000002" / "tokenizer"
    spoken = renderer_of(tokenizer, kept)
    assert spoken.name == template and lessons_of(spoken, Dialogue.of(SAID))[0].ids == trained
    assert tool(convert.main, monkeypatch, run, out) == 0
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends if isinstance(ends, list) else [ends]) == lesson.ends | {tokenizer.eod}
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    theirs = loaded.apply_chat_template([m._asdict() for m in SAID], return_dict=False)
    assert theirs == trained
    asked = loaded.apply_chat_template(
        [m._asdict() for m in SAID[:-1]], add_generation_prompt=True, return_dict=False
    )
    assert asked == spoken.ids(SAID[:-1]) == trained[: len(asked)]


@pytest.mark.ci
def test_adapters_learn_other_answers_than_their_base_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base was taught the same answers to the other questions, and in another format."""
    needs("jinja2")
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
                    "{% if add_generation_prompt %}<|im_start|>{% endif %}")  # fmt: skip
    asked, said = ["Who are you?", "Am I?"], ["the one", "No."]
    taught = {"base": said, "run": said[::-1]}
    files = {name: tuned(tmp_path / f"{name}-data", [talk(*pair) for pair in zip(asked, answers, strict=True)],
                         template="chatml" if name == "base" else str(mine))
             for name, answers in taught.items()}  # fmt: skip
    losses = {}
    for name, more in (
        ("base", ["--lr", "5e-3"]),
        ("run", ["--lr", "1e-2", "--lora-rank", "8", "--lora-alpha", "16", "--finetune",
                 "--load", str(tmp_path / "base")]),
    ):  # fmt: skip
        data, prefix = files[name]
        assert data.tokenizer_model is not None
        ended = alone(
            "--objective", "sft", "--data-path", prefix, "--split", "1,0,0", "--train-epochs", "80",
            "--tokenizer-type", data.tokenizer_type, "--tokenizer-model", data.tokenizer_model,
            "--seq-length", "64", "--max-position-embeddings", "64", "--vocab-size", "265",
            "--global-batch-size", "1", "--micro-batch-size", "1", "--lr-decay-style", "constant",
            "--save", str(tmp_path / name), *more, without=("--train-iters", "--lr-warmup-iters"),
        )  # fmt: skip
        assert ended.rc == 0, ended.err
        losses[name] = [step.loss for step in steps(tmp_path / name)]
    assert losses["run"][0] > 1.0 > 0.25 > losses["run"][-1]
    assert tool(convert.main, monkeypatch, tmp_path / "run", tmp_path / "peft") == 0
    capsys.readouterr()
    where = {"base": ["base"], "run": ["run", "base --adapter peft", "base --adapter run"]}
    for name, answers in ((name, taught[kind]) for kind in where for name in where[kind]):
        load, *beside = (tmp_path / w if w[0] != "-" else w for w in name.split())
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked[0]}\n/reset\n{asked[1]}\n"))
        words = ["--load", load, *beside, "--use-cpu", "--temperature", 0]
        assert tool(chat.main, monkeypatch, *words) == 0
        assert capsys.readouterr().out == f"{answers[0]}\n{answers[1]}\n", name
