"""Every kind of folder that convert.py and --load take, spoiled file by file in every way: refused in one line.

What is spoiled so that it means nothing must be refused; what may still mean something (a flipped bit
of a weight, an optional key) may go through.  Nothing ever ends as a fault of ours.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch

from megatron_lite.cli import convert, generate
from megatron_lite.data.tokenizers.training import SentencePieceSettings, train_sentencepiece
from tests.checkpoint import deepspeed_writer
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import tokenizer_files, tool
from tests.support.places import ROOT

needs("transformers")
needs("sentencepiece")


def _nanogpt(folder: Path) -> None:
    torch.manual_seed(0)
    h, rows = 24, 40
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (rows, h), "transformer.wpe.weight": (16, h),
        "transformer.ln_f.weight": (h,), "transformer.ln_f.bias": (h,),
    }  # fmt: skip
    for name, shape in {
        "ln_1": (h,), "ln_2": (h,), "attn.c_attn": (3 * h, h), "attn.c_proj": (h, h),
        "mlp.c_fc": (4 * h, h), "mlp.c_proj": (h, 4 * h),
    }.items():  # fmt: skip
        shapes[f"transformer.h.0.{name}.weight"] = shape
        shapes[f"transformer.h.0.{name}.bias"] = shape[:1]
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": h, "block_size": 16, "bias": True,
             "vocab_size": rows, "dropout": 0.0}  # fmt: skip
    folder.mkdir()
    torch.save({"model": state, "model_args": sizes, "iter_num": 3}, folder / "ckpt.pt")


def _with_bpe(folder: Path) -> None:
    tiny("llama").save_pretrained(folder, max_shard_size="30KB")
    tokenizer_files(folder, "vocab.json", "merges.txt")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )


def _with_sentencepiece(folder: Path) -> None:
    tiny("llama", vocab_size=340, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    settings = SentencePieceSettings(kind="bpe", vocab_size=330)
    texts = ["the other thing they think, 3 things", "tab\tand é,  two"]
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(texts * 20, settings))


def _run(folder: Path) -> None:
    theirs = folder.with_name("theirs")
    _with_bpe(theirs)
    with pytest.MonkeyPatch.context() as patch:
        assert tool(convert.main, patch, theirs, folder) == 0


def _megatron(folder: Path) -> None:
    shutil.copytree(ROOT / "tests/fixtures/megatron_core_0.16.1/llama", folder)
    (folder / "logits.pt").unlink()


def _deepspeed(pipeline: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        deepspeed_writer.write(folder, "llama", 1, pipeline=pipeline)

    return make


KINDS: dict[str, Callable[[Path], None]] = {
    "hugging face, bpe": _with_bpe, "hugging face, sentencepiece": _with_sentencepiece, "run": _run,
    "nanogpt": _nanogpt, "torch_dist": _megatron, "deepspeed, layers": _deepspeed(True),
    "deepspeed, ranks": _deepspeed(False),
}  # fmt: skip

Spoil = Callable[[Path, Random], object]


def _replaced(make: Callable[[Path], object]) -> Spoil:
    def spoil(path: Path, random: Random) -> None:
        path.unlink()
        make(path)

    return spoil


def _written(make: Callable[[bytes, Random], bytes]) -> Spoil:
    return lambda path, random: path.write_bytes(make(path.read_bytes(), random))


DESTROYED: dict[str, Spoil] = {
    "empty": lambda path, random: os.truncate(path, 0),
    "a folder": _replaced(lambda path: path.mkdir()),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "a link to nothing": _replaced(lambda path: path.symlink_to("nothing")),
    "a pipe": _replaced(lambda path: os.mkfifo(path)),
    "zeros": _written(lambda data, random: bytes(len(data))),
    "noise": _written(lambda data, random: random.randbytes(len(data))),
    "a pickle that would run": _written(lambda data, random: b"cos\nsystem\n(S'touch ran'\ntR."),
    "deep": _written(lambda data, random: b"[" * 100_000),
}  # fmt: skip
"""Nothing is left of what the file was."""


def _cut(data: bytes, random: Random) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes, random: Random) -> bytes:
    found = bytearray(data)
    for _ in range(3):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


HURT: dict[str, Spoil] = {
    "cut in half": _written(_cut),
    "a byte less": _written(lambda data, random: data[:-1]),
    "a byte more": _written(lambda data, random: data + b"\xff"),
    **{f"flipped {n}": _written(_flipped) for n in range(3)},
    "missing": lambda path, random: path.unlink(),
}
"""Something of it is left."""

VALUES = [None, True, -1, 0, 10**30, 1e308, "", "x" * 5000, [], {}, [[1]], {"a": "b"}]


def _said(path: Path) -> Iterator[tuple[str, bytes]]:
    """A JSON file with one value after the other of another kind, and as something else in whole."""
    found = json.loads(path.read_bytes())
    for whole in ([], 3, "x", None, [found]):
        yield f"{path.name} as {str(whole)[:9]}", json.dumps(whole).encode()
    keys = list(found)[:40] if isinstance(found, dict) else []
    for number, key in enumerate(keys):
        for value in VALUES[number % 3 :: 3]:
            yield f"{key} = {str(value)[:20]}", json.dumps(found | {key: value}).encode()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folders")
    for kind, make in KINDS.items():
        (place / kind).mkdir()
        make(place / kind / "good")
    return {kind: place / kind / "good" for kind in KINDS}


FREE = (
    "latest_checkpointed_iteration.txt", "latest", "config.yaml", "generation_config.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    "iter_0000007/metadata.json", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
"""Files without which a folder is still what it is: pointers, what only training reads, hints."""


class Reader:
    """Reads a folder, good or spoiled, by the tools that take its kind."""

    def __init__(self, kind: str, good: Path, tmp_path: Path, patch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
        self.good, self.place, self.target = good, tmp_path / "place", tmp_path / "out"
        self.patch, self.capsys = patch, capsys
        self.tools: list[tuple[Callable[[], int], tuple[object, ...]]] = [
            (convert.main, (self.place, self.target))
        ]
        if kind.startswith(("hugging", "run")):
            words = ("--prompt", "the", "--max-new-tokens", "1", "--use-cpu", "--seed", "1")
            self.tools.append((generate.main, ("--load", self.place, *words)))

    def codes(self, what: str, spoil: Callable[[Path], object]) -> list[int]:
        """The tools' exit codes; what may never be is a failure of the test."""
        shutil.copytree(self.good, self.place)
        spoil(self.place)
        found = []
        for main, words in self.tools:
            signal.alarm(60)  # a file that is waited for
            code = tool(main, self.patch, *words)
            signal.alarm(0)
            err = self.capsys.readouterr().err
            fatal = [line for line in err.splitlines() if line.startswith("FATAL[")]
            assert code in (0, 3, 4), (what, code, err)
            assert "Traceback" not in err and len(fatal) == (code != 0), (what, err)
            assert code == 0 or str(self.place) in fatal[0], (what, err)
            assert (main is convert.main and code == 0) == self.target.exists(), what
            shutil.rmtree(self.target, ignore_errors=True)
            found.append(code)
        shutil.rmtree(self.place)
        return found


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def one_of_each(files: list[str]) -> list[str]:
    """Without those that differ from another only by a number."""
    return list({re.sub(r"[0-9]+", "#", file): file for file in files}.values())


@pytest.fixture
def reader(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Reader:  # fmt: skip
    made = Reader(kind, folders[kind], tmp_path, monkeypatch, capsys)
    assert set(made.codes("nothing", lambda folder: None)) == {0}
    return made


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.slow if kind == "run" else pytest.mark.ci) for kind in KINDS
])  # fmt: skip
def test_a_spoiled_file_is_refused_in_one_line_and_nothing_is_made(
    reader: Reader, folders: dict[str, Path], kind: str
) -> None:
    for file in one_of_each(files_of(folders[kind])):
        for name, spoil in (DESTROYED | HURT).items():
            what = f"{file}, {name}"
            codes = reader.codes(what, partial(_spoil, file=file, spoil=spoil, seed=what))
            optional = name in ("missing", "a link to nothing")  # and so is a tokenizer
            if name in DESTROYED and not file.endswith(FREE):
                first = codes[:1] if not (optional and _is_tokenizer(file)) else []
                assert set(first) <= {4}, (what, codes)
            assert 3 not in codes or optional, (what, codes)


def _spoil(folder: Path, file: str, spoil: Spoil, seed: str) -> None:
    spoil(folder / file, Random(seed))


def _write(folder: Path, file: str, data: bytes) -> None:
    (folder / file).write_bytes(data)


def _is_tokenizer(file: str) -> bool:
    return Path(file).name in ("vocab.json", "merges.txt", "tokenizer.model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("hugging", "run"))])
def test_another_kind_of_value_in_json_is_refused_or_means_something(
    reader: Reader, folders: dict[str, Path], kind: str
) -> None:
    for file in files_of(folders[kind]):
        if file.endswith(".json"):
            for what, data in _said(folders[kind] / file):
                codes = reader.codes(what, partial(_write, file=file, data=data))
                assert set(codes) <= {0, 4}, (what, codes)
