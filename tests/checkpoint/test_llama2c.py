"""llama2.c's model.bin out: a reader of our own that follows the format computes the same logits."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_lite.cli import convert
from megatron_lite.data.tokenizers.tokens import GGUFVocabulary, tokenizer_bin
from tests.support.extras import needs
from tests.support.huggingface import random_tokens, tool

transformers = needs("transformers")
Array = Any


class Sizes(NamedTuple):
    """The seven numbers of the header."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    rows: int
    positions: int


def order(sizes: Sizes, *, first: bool) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, how many, shape), as run.c and runq.c walk through the file."""
    dim, hidden, layers, heads, kv_heads, rows, _ = sizes
    kv = dim // heads * kv_heads
    rows = abs(rows)
    matrices = {"wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}
    mlp = {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
    norms = [("attention_norm", layers, (dim,)), ("ffn_norm", layers, (dim,))]
    table = [("table", 1, (rows, dim))]
    every = [[(name, layers, shape) for name, shape in part.items()] for part in (matrices, mlp)]
    if first:
        return [*table, norms[0], *every[0], norms[1], *every[1], ("norm", 1, (dim,))]
    return [*norms, ("norm", 1, (dim,)), *table, *every[0], *every[1]]


def read_first(data: bytes) -> tuple[Sizes, dict[str, Array]]:
    """As run.c reads it."""
    sizes = Sizes(*struct.unpack_from("<7i", data))
    numbers, at, found = np.frombuffer(data, "<f4", offset=28), 0, {}
    for name, count, shape in order(sizes, first=True):
        size = count * int(np.prod(shape))
        found[name] = numbers[at : at + size].reshape(count, *shape)
        at += size
    at += sizes.positions * (sizes.dim // sizes.heads)  # two tables of half as many angles
    found["head"] = found["table"]
    if sizes.rows < 0:
        found["head"] = numbers[at : at - sizes.rows * sizes.dim].reshape(1, -sizes.rows, sizes.dim)
        at -= sizes.rows * sizes.dim
    assert at == len(numbers)
    return sizes, found


def read_second(data: bytes) -> tuple[Sizes, dict[str, Array]]:
    """As runq.c reads it."""
    assert struct.unpack_from("<Ii", data) == (0x616B3432, 2)
    sizes, (tied, group) = (
        Sizes(*struct.unpack_from("<7i", data, 8)),
        struct.unpack_from("<Bi", data, 36),
    )
    at, found = 256, {}
    listed = order(sizes, first=False)
    if not tied:
        listed.append(("head", 1, (sizes.rows, sizes.dim)))
    for name, count, shape in listed:
        size, parts = int(np.prod(shape)), []
        for _ in range(count):
            if len(shape) == 1:
                parts.append(np.frombuffer(data, "<f4", size, at))
                at += 4 * size
                continue
            packed = np.frombuffer(data, np.int8, size, at).astype(np.float32).reshape(-1, group)
            scale = np.frombuffer(data, "<f4", size // group, at + size)
            parts.append((packed * scale[:, None]).reshape(shape))
            at += size + 4 * (size // group)
        found[name] = np.stack(parts)
    assert at == len(data)
    return sizes, {"head": found["table"], **found}


def norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x: Array, head_size: int) -> Array:
    """x: [s, n, d]; neighbours turn together."""
    at = np.arange(len(x))[:, None] * 10000.0 ** -(np.arange(0, head_size, 2) / head_size)
    cos, sin = np.cos(at)[:, None], np.sin(at)[:, None]
    out = np.empty_like(x)
    out[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., ::2] * sin + x[..., 1::2] * cos
    return out


def logits_of(sizes: Sizes, w: dict[str, Array], tokens: Array) -> Array:
    """What run.c computes, for all positions at once."""
    d = sizes.dim // sizes.heads
    x = w["table"][0][tokens].astype(np.float64)
    unseen = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for n in range(sizes.layers):
        y = norm(x, w["attention_norm"][n])
        q, k, v = ((y @ w[name][n].T).reshape(len(tokens), -1, d) for name in ("wq", "wk", "wv"))
        q, k = turned(q, d), turned(k, d)
        k, v = (np.repeat(part, sizes.heads // sizes.kv_heads, 1) for part in (k, v))
        scores = np.einsum("qnd,knd->nqk", q, k) / np.sqrt(d) + unseen
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("nqk,knd->qnd", shares, v).reshape(len(tokens), -1) @ w["wo"][n].T
        y = norm(x, w["ffn_norm"][n])
        gate = y @ w["w1"][n].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][n].T)) @ w["w2"][n].T
    return norm(x, w["norm"][0]) @ w["head"][0].T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-5), ("q8_0", 0.05)])
def test_a_reader_that_follows_the_format_computes_the_same_logits(
    tmp_path: Path, monkeypatch, tied: bool, dtype: str, bound: float
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "out"
    assert tool(convert.main, monkeypatch, tmp_path / "theirs", tmp_path / "ours") == 0
    words = ("--to", "llama2c", "--dtype", dtype)
    assert tool(convert.main, monkeypatch, tmp_path / "ours", out, *words) == 0
    read = read_first if dtype == "f32" else read_second
    sizes, weights = read((out / "model.bin").read_bytes())
    assert abs(sizes.rows) == 97 and sizes.positions == 24 and sizes.kv_heads == 2
    tokens = random_tokens(97)[:1]
    with torch.no_grad():
        expected = model(tokens).logits[0].double().numpy()
    difference = np.abs(logits_of(sizes, weights, tokens[0].numpy()) - expected).max()
    assert difference / np.abs(expected).max() < bound, difference


def test_tokenizer_bin_has_a_score_a_length_and_the_bytes_of_every_row() -> None:
    words = GGUFVocabulary("llama", ["<unk>", "<s>", "</s>", "\u2581the", "é"], [2, 3, 3, 1, 1],
                           scores=[0.0, 0.0, 0.0, -1.5, -2.0])  # fmt: skip
    data = tokenizer_bin(words, rows=6)
    longest, at, found = struct.unpack_from("<i", data)[0], 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        found.append((score, data[at + 8 : at + 8 + length].decode()))
        at += 8 + length
    assert [text for _, text in found] == [
        "<unk>",
        "\n<s>\n",
        "\n</s>\n",
        " the",
        "é",
        "<unused 5>",
    ]
    assert found[3][0] == -1.5 and found[5][0] < -1e8 and longest == len("<unused 5>")
