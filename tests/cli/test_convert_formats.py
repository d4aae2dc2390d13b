"""Every spelling of --dtype in every format, and one tensor in memory at a time whatever the family."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import hashing
from megatron_lite.cli import convert
from megatron_lite.rehearsal.footprint import Footprint
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import gpt2, tensors, tool

needs("transformers")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
"""What q8_0 packs by 32, and llama2.c computes."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a Llama."""
    folder = tmp_path_factory.mktemp("formats")
    tiny("llama", **SIZES).save_pretrained(folder / "theirs")
    with pytest.MonkeyPatch.context() as patch:
        assert tool(convert.main, patch, folder / "theirs", folder / "ours") == 0
    return folder / "ours"


WORDS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_folder_has_the_format_of_each_word(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    assert tool(convert.main, monkeypatch, ours, tmp_path / "out", "--dtype", word) == 0
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {WORDS[word]}
    said = json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"]
    assert getattr(torch, said) is WORDS[word]


PACKED = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "f32": "F32", "f16": "F16",
    "bf16": "BF16", "q8_0": "Q8_0",
}  # fmt: skip


@pytest.mark.parametrize("word", PACKED)
def test_a_gguf_has_the_format_of_each_word(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Matrices have it; norms stay in fp32, as llama.cpp wants them."""
    gguf = needs("gguf")
    out = tmp_path / "out"
    assert tool(convert.main, monkeypatch, ours, out, "--to", "gguf", "--dtype", word) == 0
    found = gguf.GGUFReader(out / "model.gguf").tensors
    kinds = {(len(one.shape) > 1, one.tensor_type.name) for one in found}
    assert kinds == {(True, PACKED[word]), (False, "F32")}


@pytest.mark.parametrize(("word", "group"), [("float32", 0), ("f32", 0), ("q8_0", 32)])
def test_a_llama2c_file_has_the_format_of_each_word(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, group: int
) -> None:
    out = tmp_path / "out"
    assert tool(convert.main, monkeypatch, ours, out, "--to", "llama2c", "--dtype", word) == 0
    data = (out / "model.bin").read_bytes()
    second = struct.unpack_from("<Ii", data) == (0x616B3432, 2)
    assert second == bool(group)
    if second:
        assert struct.unpack_from("<i", data, 37) == (group,)


@pytest.mark.parametrize(
    ("to", "word"),
    [("huggingface", "q8_0"), *(("llama2c", word) for word in WORDS if WORDS[word].itemsize == 2)],
)
def test_a_word_of_another_format_is_refused_with_those_it_has(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, to: str, word: str
) -> None:
    assert tool(convert.main, monkeypatch, ours, tmp_path / "out", "--to", to, "--dtype", word) == 2
    assert f"--dtype {word} is no format of --to {to}: choose from f" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LAYERS = 10
MANY = {
    "gpt2": lambda: gpt2(n_layer=LAYERS),
    **{
        name: lambda name=name: tiny(name, num_hidden_layers=LAYERS, tie_word_embeddings=False)
        for name in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
    },
}


@pytest.mark.parametrize("name", MANY)
def test_tensors_go_through_memory_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is allocated at once is a few of the largest tensor, and a small part of the model.

    Blocks that wait to be hashed are of 4 MiB and would hold all of it.
    """
    monkeypatch.setitem(hashing.HASH_KINDS, hashing.BLOCKS, 4096)
    theirs, run, out = tmp_path / "theirs", tmp_path / "run", tmp_path / "out"
    MANY[name]().save_pretrained(theirs)
    sizes = [tensor.nbytes for tensor in tensors(theirs).values()]
    most = {}
    for source, target, words in (
        (theirs, run, []), (run, out, ["--dtype", "f32"]), (run, tmp_path / "half", ["--dtype", "bf16"]),
    ):  # fmt: skip
        with Footprint("cpu") as allocated:
            assert tool(convert.main, monkeypatch, source, target, *words) == 0
        most[target.name] = allocated.peak
    assert min(most.values()) > 0 and max(most.values()) <= 3 * max(sizes) < sum(sizes) / 2, most
