"""A model is loaded from wherever it lies, in the number format it is kept in, with its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.cli import convert, generate
from megatron_lite.config.errors import CheckpointError, ConfigError
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megatron_lite.inference.model import build_model, find_model, load_model
from megatron_lite.parallel.context import ParallelContext
from tests.support.extras import needs
from tests.support.huggingface import (
    gpt2,
    our_logits,
    random_tokens,
    setting,
    tokenizer_files,
    tool,
    weights,
)
from tests.support.memory import Alive
from tests.support.spawn import spawn

needs("transformers")
Capture = pytest.CaptureFixture[str]
GREEDY = ["--prompt", "the thin", "--temperature", 0, "--max-new-tokens", 8, "--use-cpu"]


def write(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A GPT-2 folder with its tokenizer, in this number format."""
    gpt2().to(dtype).save_pretrained(path)
    tokenizer_files(path, "vocab.json", "merges.txt")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "gpt2")


@pytest.mark.parametrize("imported", [False, True], ids=["folder", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_takes_the_bytes_of_its_own_format(
    tmp_path: Path, monkeypatch, dtype: torch.dtype, imported: bool
) -> None:
    """Weights are as many bytes as in the file, and no more than one tensor stands beside them."""
    path = write(tmp_path / "gpt2", dtype)
    if imported:
        assert tool(convert.main, monkeypatch, path, tmp_path / "run") == 0
        path = tmp_path / "run"
    ctx = ParallelContext.serial()
    source = find_model(path, ctx)
    with Alive() as alive:
        model = build_model(source, ctx)
    built = list(model.parameters())
    assert {one.dtype for one in built} == {dtype} == {source.dtype}
    total = sum(one.numel() for one in built) * dtype.itemsize
    assert total == sum(one.untyped_storage().nbytes() for one in built)
    largest = max(one.numel() for one in built)
    assert total <= alive.peak <= total + 4 * largest, (total, alive.peak)
    exact = build_model(source, ctx, dtype=torch.float32)
    for one, other in zip(built, exact.parameters(), strict=True):
        assert other.dtype is torch.float32 and torch.equal(one.float(), other)


def test_a_folder_speaks_as_its_import_and_as_transformers_do(
    tmp_path: Path, monkeypatch, folder: Path, capsys: Capture
) -> None:
    assert tool(convert.main, monkeypatch, folder, tmp_path / "run") == 0
    said = []
    for path in (folder, tmp_path / "run", tmp_path / "run" / "iter_0000000"):
        capsys.readouterr()
        assert tool(generate.main, monkeypatch, "--load", path, *GREEDY) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    loaded = load_model(folder)
    assert isinstance(loaded.tokenizer, GPT2BPETokenizer) and loaded.notices == ()
    ids = loaded.tokenizer.encode("the thin")
    answer = gpt2().generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=261
    )
    expected = loaded.tokenizer.decode([n for n in answer[0].tolist() if n != 261])
    assert said[0].rstrip("\n") == expected.rstrip("\n")


def test_a_checkpoint_is_exported_from_its_own_folder(tmp_path: Path, monkeypatch, folder) -> None:
    assert tool(convert.main, monkeypatch, folder, tmp_path / "run") == 0
    one = tmp_path / "run" / "iter_0000000"
    assert tool(convert.main, monkeypatch, one, tmp_path / "out") == 0
    assert torch.equal(
        our_logits(tmp_path / "out", random_tokens()), our_logits(folder, random_tokens())
    )


def both(folder: Path) -> list[object]:
    (folder / "iter_0000001").mkdir()
    return []


def no_tokenizer(folder: Path) -> list[object]:
    (folder / "vocab.json").unlink()
    return []


def another_vocabulary(folder: Path) -> list[object]:
    vocab, merges = tokenizer_files(folder / "other", "vocab.json", "merges.txt")
    ids = json.loads(vocab.read_text())
    vocab.write_text(json.dumps({name: len(ids) - 1 - n for name, n in ids.items()}))
    return ["--vocab-file", vocab, "--merge-file", merges]


def not_finite(folder: Path) -> list[object]:
    weights(lambda t: t["transformer.wte.weight"][3].fill_(float("nan")))(folder)
    return []


def overflows(folder: Path) -> list[object]:
    weights(lambda t: t["transformer.wpe.weight"][9].fill_(3e38))(folder)
    return []


def a_pickle(folder: Path) -> list[object]:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return []


def incomplete(folder: Path) -> list[object]:
    weights(lambda t: t.pop("transformer.h.1.ln_2.bias"))(folder)
    return []


def unknown(folder: Path) -> list[object]:
    setting(model_type="t5")(folder)
    return []


def contradicted(folder: Path) -> list[object]:
    setting(eos_token_id=5)(folder)
    return []


def empty(folder: Path) -> list[object]:
    shutil.rmtree(folder)
    folder.mkdir()
    return []


@pytest.mark.parametrize(
    ("spoil", "code", "word"),
    [
        (empty, 4, "neither config.json nor iter_*"),
        (both, 4, "both config.json and iter_*"),
        (unknown, 4, "model_type 't5'; those that can be read are gpt2"),
        (incomplete, 4, "transformer.h.1.ln_2.bias: missing"),
        (a_pickle, 4, "pytorch_model.bin, a pickle"),
        (another_vocabulary, 4, "was trained with GPT2BPETokenizer"),
        (no_tokenizer, 3, "holds no tokenizer: give --vocab-file and --merge-file"),
        (contradicted, 4, "end with id 5 by config.json"),
        (lambda folder: ["--ckpt-step", 1], 2, "--ckpt-step 1 is for run folders"),
        (overflows, 7, "logits are not finite after 10 tokens of a text, in torch.float32: try"),
        (not_finite, 7, "embedding.tokens.weight holds values that are not finite"),
    ],
    ids=lambda value: value.__name__.strip("<>") if callable(value) else "",
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_code(
    monkeypatch, folder: Path, capsys: Capture,
    spoil: Callable[[Path], list[object]], code: int, word: str,
) -> None:  # fmt: skip
    words = ["--load", folder, *GREEDY, *spoil(folder)]
    assert tool(generate.main, monkeypatch, *words) == code
    out, err = capsys.readouterr()
    assert err.startswith(f"FATAL[{code}] ") and word in err and "Traceback" not in err and not out
    if spoil is another_vocabulary:
        assert tool(generate.main, monkeypatch, *words, "--allow-tokenizer-mismatch") == 0


def test_a_name_on_a_hub_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="names on a hub are not downloaded"):
        load_model(Path("openai-community/gpt2"))


def test_a_format_in_which_nothing_computes_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="torch.float64: a model computes in torch.float32, "):
        load_model(folder, dtype=torch.float64)


def held(path: str, ctx: ParallelContext) -> dict[str, torch.Tensor]:
    model = build_model(find_model(Path(path), ctx), ctx)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_shares(rank: int, ranks: int, *paths: str) -> list[dict[str, np.ndarray]]:
    ctx = ParallelContext.from_grid(RankGrid(tp=ranks), rank, torch.device("cpu"))
    # arrays go through the pipe whole; a tensor would be gone with its process
    return [{name: t.numpy() for name, t in held(path, ctx).items()} for path in paths]


@pytest.mark.ci
def test_tensor_parallel_ranks_share_the_matrices(tmp_path, monkeypatch) -> None:
    path, run = tmp_path / "gpt2", tmp_path / "run"
    gpt2(n_head=4).save_pretrained(path)  # heads that two ranks can share
    tokenizer_files(path, "vocab.json", "merges.txt")
    assert tool(convert.main, monkeypatch, path, run) == 0
    shares = spawn(check_shares, 2, str(path), str(run))
    whole = held(str(path), ParallelContext.serial())
    for first, second in zip(*shares, strict=True):
        for name, expected in whole.items():
            pair = torch.from_numpy(first[name]), torch.from_numpy(second[name])
            if "qkv" in name:  # each third is cut by itself
                thirds = zip(*(one.chunk(3) for one in pair), strict=True)
                joined = torch.cat([torch.cat(third) for third in thirds])
            elif pair[0].shape == expected.shape:
                assert torch.equal(*pair)
                joined = pair[0]
            else:
                joined = torch.cat(pair, dim=0 if pair[0].shape[1:] == expected.shape[1:] else 1)
            rows = min(len(joined), len(expected))  # a vocabulary's padding goes by the ranks
            assert torch.equal(joined[:rows], expected[:rows]) and rows >= min(262, len(expected))
