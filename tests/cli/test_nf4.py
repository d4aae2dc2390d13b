"""Tools use the base of a run in 4 bits as training did, merged and unmerged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.cli import convert
from megatron_lite.inference.generate import generate as decode
from megatron_lite.inference.model import build_model, find_model, load_model
from megatron_lite.kernels import nf4
from megatron_lite.models.packing import packed_weights
from megatron_lite.parallel.context import ParallelContext
from tests.cli.adapters import LORA, llama_words, spoken, trained
from tests.support.decoding import likeliest
from tests.support.huggingface import tool
from tests.support.spawn import spawn

WIDE = ["--hidden-size", "128", "--num-attention-heads", "4", "--ffn-hidden-size", "128", "--bf16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """base/, run/ of adapters of some matrices beside it in 4 bits, and what tools/convert.py makes of both."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*llama_words(folder), *WIDE]
    trained(words, "--save", folder / "base", "--lr", "0.02")
    beside = ["--lora-base", "nf4", "--lora-targets", "q_proj", "down_proj"]
    begin = ["--load", folder / "base", "--finetune", "--save", folder / "run"]
    trained(words, *LORA, *beside, *begin)
    as_fp32 = ["--dtype", "f32"]
    with pytest.MonkeyPatch.context() as patch:
        for source, target, asked in (
            ("base", "whole", as_fp32),
            ("run", "peft", []),
            ("run", "merged", ["--merge", *as_fp32]),
            ("base", "on-original", ["--merge", "--adapter", folder / "peft", *as_fp32]),
        ):
            assert tool(convert.main, patch, folder / source, folder / target, *asked) == 0
    return folder


def test_merged_says_what_the_run_says(runs, monkeypatch, capsys) -> None:
    expected = spoken(monkeypatch, capsys, "--load", runs / "run")
    assert spoken(monkeypatch, capsys, "--load", runs / "base") != expected
    for asked in (
        ["--load", runs / "base", "--adapter", runs / "run"],
        ["--load", runs / "merged"],
    ):
        assert spoken(monkeypatch, capsys, *asked) == expected, asked


def test_merging_adds_to_what_was_unpacked_and_rounds_once(runs) -> None:
    """From the base's fp32 masters, of every matrix; the other way adds to the base as it is."""
    merged, whole, original = (
        load_file(runs / name / "model.safetensors") for name in ("merged", "whole", "on-original")
    )
    peft = load_file(runs / "peft" / "adapter_model.safetensors")
    assert peft
    pairs = nf4.quantile_pairs(torch.device("cpu"))
    for name, weight in whole.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        adapted = f"{module}.lora_A.weight" in peft
        packs = "layers" in name and "proj" in name
        assert not adapted or packs
        base = nf4.unpack(*nf4.pack(weight, 64), pairs, torch.float32) if packs else weight
        delta = torch.zeros(())
        if adapted:
            delta = 4.0 * peft[f"{module}.lora_B.weight"] @ peft[f"{module}.lora_A.weight"]
        torch.testing.assert_close(merged[name], base + delta, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(original[name], weight + delta, rtol=1e-6, atol=1e-6)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert (merged[q] - original[q]).abs().max() > 0.01 * whole[q].abs().max()


def test_a_model_in_use_holds_4_bits_of_the_most_exact_copy(runs) -> None:
    """The base is bf16 and has fp32 masters, which go out as fp32."""
    loaded = load_model(runs / "run").model
    down = loaded.blocks["0"].mlp.down
    exact = load_file(runs / "whole" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(exact, exact.bfloat16().float())
    for held, expected in zip(
        (down.weight.codes, down.weight.absmax), nf4.pack(exact, 64), strict=True
    ):
        assert torch.equal(held, expected)
    assert "blocks.0.mlp.down.weight" not in dict(loaded.named_parameters())


def bits_of(rank: int, ranks: int, tp: int, run: str) -> tuple[list[int], list[tuple]]:
    """The likeliest tokens behind a prompt of ranks that share the model, and each packed slice."""
    ctx = ParallelContext.serial()
    if ranks > 1:
        grid = RankGrid(tp=tp, pp=ranks // tp)
        ctx = ParallelContext.from_grid(grid, rank, torch.device("cpu"))
    model = build_model(find_model(Path(run), ctx), ctx, dtype=torch.float32)
    found = decode(model, [72, 5, 33, 8], max_new_tokens=12, pick=likeliest, eod=None)
    held = [piece for one in packed_weights(model) for piece in one.bits()]
    return list(found.ids), [
        (piece.name, piece.offset, piece.data.numpy().copy()) for piece in held
    ]


@pytest.mark.slow
def test_ranks_share_the_packed_model(runs) -> None:
    run = str(runs / "run")
    ids, held = bits_of(0, 1, 1, run)
    whole = {name: data for name, _, data in held}
    for tp in (1, 2):
        for theirs, slices in spawn(bits_of, 2, tp, run):
            assert theirs == ids
            for name, offset, data in slices:
                ends = zip(offset, data.shape, strict=True)
                assert (whole[name][tuple(slice(o, o + n) for o, n in ends)] == data).all()
