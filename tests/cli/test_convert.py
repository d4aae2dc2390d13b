"""tools/convert.py: GPT-2 of Hugging Face in and out; bits, logits, tokenizer, memory, refusals, crashes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_lite.cli import convert, generate
from megatron_lite.config.errors import MegatronLiteError
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, GPT2BPETokenizer
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from tests.support.extras import needs
from tests.support.folders import contents
from tests.support.huggingface import (
    gpt2,
    index,
    our_logits,
    random_tokens,
    setting,
    tensors,
    their_logits,
    tokenizer_files,
    tool,
    weights,
)
from tests.support.places import ROOT
from tests.train.runs import alone, on_ranks, run_main, steps

transformers = needs("transformers")


@pytest.mark.parametrize("shard", ["5GB", "30KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_in_and_out_is_equal_to_the_bit(tmp_path, monkeypatch, shard, dtype, tied):
    first, ours, second = tmp_path / "first", tmp_path / "ours", tmp_path / "second"
    reference = gpt2(tie_word_embeddings=tied, n_inner=80).to(dtype)
    reference.save_pretrained(first, max_shard_size=shard)
    tokenizer_files(first, "vocab.json", "merges.txt")
    assert (len(list(first.glob("*.safetensors"))) > 1) == (shard == "30KB")
    for pair in ((first, ours), (ours, second)):
        assert tool(convert.main, monkeypatch, *pair, "--max-shard-size", shard) == 0
    before, after = tensors(first), tensors(second)
    assert before.keys() == after.keys() and (len(list(second.glob("*.safetensors"))) > 1) == (
        shard == "30KB"
    )
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype and torch.equal(tensor, after[name]), name
    for name in ("vocab.json", "merges.txt"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    shutil.move(ours, ours := tmp_path / "moved")  # the checkpoint keeps the tokenizer itself
    shutil.rmtree(ours / "tokenizer")
    assert tool(convert.main, monkeypatch, ours, tmp_path / "third") == 0
    assert (tmp_path / "third" / "vocab.json").read_bytes() == (first / "vocab.json").read_bytes()
    tokens = random_tokens()
    expected = their_logits(first, tokens)
    assert torch.equal(their_logits(second, tokens), expected)
    difference = (our_logits(ours, tokens) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, difference


def test_names_of_old_files_and_their_masks_are_understood(tmp_path, monkeypatch, folder, capsys):
    """The hub's gpt2: no `transformer.`, the causal masks beside the weights, the tied head once more."""
    old = tmp_path / "old"
    found = {n.removeprefix("transformer."): t for n, t in tensors(folder).items()}
    for layer in range(2):
        found[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
        found[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    found["lm_head.weight"] = found["wte.weight"].clone()
    old.mkdir()
    save_file(found, old / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", old)
    assert tool(convert.main, monkeypatch, old, tmp_path / "ours") == 0
    assert "lm_head.weight is left out" in capsys.readouterr().out
    tokens = random_tokens()
    torch.testing.assert_close(our_logits(tmp_path / "ours", tokens), their_logits(folder, tokens),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_trained_run_goes_out_and_comes_in_to_be_trained_on(tmp_path, monkeypatch):
    """bf16 over two ranks: what goes out are the fp32 masters; what comes in trains like the run itself."""
    vocab, merges = tokenizer_files(tmp_path / "vocab", "gpt2-vocab.json", "gpt2-merges.txt")
    run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    words = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(vocab), "--merge-file",
             str(merges), "--vocab-size", "262", "--mock-data", "--train-iters", "2"]  # fmt: skip
    trained = on_ranks(2, *words, "--bf16", "--tensor-model-parallel-size", "2",
                       "--save", str(run), "--save-interval", "2")  # fmt: skip
    assert trained.rc == 0, trained.err
    assert tool(convert.main, monkeypatch, run, out) == 0
    assert all(tensor.dtype == torch.float32 for tensor in tensors(out).values())
    tokens = random_tokens()[:, :16]
    torch.testing.assert_close(their_logits(out, tokens), our_logits(run, tokens),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    text = "the the thin other, 3 things<|endoftext|>\n"
    library = transformers.AutoTokenizer.from_pretrained(out)
    ids = GPT2BPETokenizer(str(vocab), str(merges)).encode(text.replace(GPT2_EOD, ""))
    assert library(text.replace(GPT2_EOD, ""))["input_ids"] == ids
    assert library.eos_token_id == 261 and library.decode(ids) == text.replace(GPT2_EOD, "")
    assert tool(convert.main, monkeypatch, out, back) == 0
    losses = {}
    for name, source in (("run", run), ("back", back)):
        tuned = alone(*words, "--load", str(source), "--finetune", "--save",
                      str(tmp_path / f"tuned-{name}"), "--save-interval", "2")  # fmt: skip
        assert tuned.rc == 0 and "weights only" in tuned.out, tuned.err
        losses[name] = [record.loss for record in steps(tmp_path / f"tuned-{name}")]
    assert losses["run"] == losses["back"] and len(losses["run"]) == 2
    # the file it comes with says sizes and tokenizer, so that no flag has to
    short = ["--config", str(back / "config.yaml"), "--load", str(back), "--finetune", "--use-cpu",
             "--mock-data", "--train-iters", "1", "--micro-batch-size", "2", "--global-batch-size",
             "2", "--lr", "1e-3", "--eval-iters", "0"]  # fmt: skip
    done = run_main(*short)
    assert done.rc == 0 and "successfully loaded" in done.out, done.err


def test_generating_continues_as_transformers_does(tmp_path, monkeypatch, folder, capsys):
    ours = tmp_path / "ours"
    assert tool(convert.main, monkeypatch, folder, ours) == 0
    capsys.readouterr()
    words = ["--load", ours, "--prompt", "the thin", "--temperature", 0, "--max-new-tokens", 8]
    assert tool(generate.main, monkeypatch, *words, "--use-cpu") == 0
    said = capsys.readouterr().out
    tokenizer = GPT2BPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ids = tokenizer.encode("the thin")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        answer = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False,
                                pad_token_id=261)[0].tolist()  # fmt: skip
    expected = tokenizer.decode(answer).removesuffix(GPT2_EOD)
    assert said.rstrip("\n").removesuffix(GPT2_EOD) == expected.rstrip("\n")


@pytest.mark.parametrize("out", [False, True], ids=["in", "out"])
def test_a_dry_run_lists_every_tensor_and_writes_nothing(
    tmp_path, monkeypatch, folder, capsys, out
):
    source = folder
    if out:
        source = tmp_path / "ours"
        assert tool(convert.main, monkeypatch, folder, source) == 0
        capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert tool(convert.main, monkeypatch, source, tmp_path / "new", "--dry-run") == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for name, tensor in tensors(folder).items():
        assert f"{name} {list(tensor.shape)}" in said
    fused = "transformer.h.1.attn.c_attn.weight [48, 144]"
    parts = ", ".join(f"blocks.1.attention.{part}.weight [48, 48]" for part in "qkv")
    assert (f"{parts} -> {fused}" if out else f"{fused} -> {parts}") in said
    total = sum(t.numel() * 4 for t in tensors(folder).values())
    assert f"{total} bytes" in said and "nothing was written" in said


# -- refusals -----------------------------------------------------------------------------------


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def only_pickles(folder: Path) -> None:
    os.remove(folder / "model.safetensors")
    torch.save({"wte.weight": Canary(folder.parent / "canary")}, folder / "pytorch_model.bin")


def pickle_under_the_right_name(folder: Path) -> None:
    torch.save({"wte.weight": Canary(folder.parent / "canary")}, folder / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "another model": (setting(model_type="t5"), ["model_type 't5'", "gpt2"]),
    "relu": (setting(activation_function="relu"), ["activation_function 'relu'", "gelu_new"]),
    "scores by layer": (
        setting(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx True"]
    ),
    "scores not scaled": (setting(scale_attn_weights=False), ["scale_attn_weights False"]),
    "cross attention": (setting(add_cross_attention=True), ["add_cross_attention True"]),
    "heads": (setting(n_head=5), ["n_embd 48", "n_head 5"]),
    "a size that is no number": (setting(n_embd="48"), ["n_embd '48'"]),
    "a huge number of layers": (setting(n_layer=1 << 30), ["1073741824 layers", "28 tensors"]),
    "a negative size": (setting(n_positions=-1), ["n_positions -1"]),
    "a rate that is no rate": (setting(resid_pdrop=float("nan")), ["resid_pdrop nan"]),
    "an epsilon of 0": (setting(layer_norm_epsilon=0), ["layer_norm_epsilon 0: must be above 0"]),
    "packed weights": (setting(quantization_config={"bits": 4}), ["quantization_config"]),
    "another width": (setting(n_embd=96), ["[262, 48]", "[262, 96]"]),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "no JSON"]),
    "a missing tensor": (
        weights(lambda t: t.pop("transformer.h.1.ln_2.bias")), ["h.1.ln_2.bias: missing"]
    ),
    "an unknown tensor": (
        weights(lambda t: t.update({"transformer.h.0.lora": torch.ones(2)})), ["h.0.lora: no tensor"]
    ),
    "another shape": (
        weights(lambda t: t.update({"transformer.ln_f.bias": torch.ones(7)})),
        ["ln_f.bias: [7] in model.safetensors, [48] by config.json"],
    ),
    "whole numbers": (
        weights(lambda t: t.update({"transformer.ln_f.bias": torch.ones(48, dtype=torch.int32)})),
        ["ln_f.bias has the format I32"],
    ),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 9999), ["model.safetensors is damaged"]),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), ["model.safetensors is damaged"]),
    "no weights": (lambda f: os.remove(f / "model.safetensors"), ["copy the whole folder"]),
    "pickles": (only_pickles, ["pytorch_model.bin", "never opened", "safe_serialization=True"]),
    "a pickle in disguise": (pickle_under_the_right_name, ["model.safetensors is damaged"]),
    "a way out of the folder": (
        index(**{"wte.weight": "../gpt2/model.safetensors"}), ["'../gpt2/model.safetensors': refused"]
    ),
    "a pickle in the index": (index(**{"wte.weight": "a.bin"}), ["'a.bin': refused"]),
    "a file that is missing": (index(**{"a": "b.safetensors"}), ["b.safetensors"]),
    "an index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"), ["must hold one JSON object"]
    ),
    "an index of another model": (
        index(**{"wte.weight": "model.safetensors"}), ["a mix of two"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gpt2_is_refused_by_name(tmp_path, monkeypatch, folder, capsys, name):
    change, words = REFUSED[name]
    change(folder)
    assert tool(convert.main, monkeypatch, folder, tmp_path / "ours") == 4
    said = capsys.readouterr().err
    assert said.startswith("FATAL[4] ") and "Traceback" not in said
    for word in words:
        assert word in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2"]


@pytest.mark.parametrize(
    "flags",
    [["--position-embedding-type", "rope"], ["--normalization", "RMSNorm"], ["--swiglu"],
     ["--disable-bias-linear"], ["--group-query-attention", "--num-query-groups", "2"]],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_what_gpt2_cannot_express_is_refused_by_its_flag(tmp_path, monkeypatch, capsys, flags):
    run = tmp_path / "run"
    assert alone(*flags, "--mock-data", "--train-iters", "2", "--save", str(run),
                 "--save-interval", "2").rc == 0  # fmt: skip
    capsys.readouterr()
    assert tool(convert.main, monkeypatch, run, tmp_path / "out", "--family", "gpt2") == 4
    said = capsys.readouterr().err
    assert f"GPT-2 has no {flags[-2] if len(flags) > 1 else flags[0]}" in said, said
    assert not (tmp_path / "out").exists()


def test_the_command_line_is_checked(tmp_path, monkeypatch, folder, capsys):
    nowhere, new = tmp_path / "nowhere", tmp_path / "new"
    for code, word, *words in (
        (4, "neither config.json nor iter_*", nowhere, new),
        (2, "nothing is overwritten", folder, folder),
        (2, "--max-shard-size 5XB", folder, new, "--max-shard-size", "5XB"),
        (2, "--max-shard-size 0", folder, new, "--max-shard-size", "0"),
        (2, "--ckpt-step is for the other direction", folder, new, "--ckpt-step", "1"),
    ):
        assert tool(convert.main, monkeypatch, *words) == code
        assert word in capsys.readouterr().err
    assert not new.exists()


# -- storage ------------------------------------------------------------------------------------


def conversion(source: Path, target: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "Disk", lambda: disk)
    monkeypatch.setattr(sys, "argv", ["convert.py", str(source), str(target)])
    convert.main()


@pytest.mark.ci
@pytest.mark.parametrize("out", [False, True], ids=["in", "out"])
def test_a_crash_or_a_full_disk_at_any_operation_leaves_nothing_or_all(
    tmp_path, monkeypatch, folder, out
):
    source, target = folder, tmp_path / "target"
    if out:
        source = tmp_path / "ours"
        conversion(folder, source, Disk(), monkeypatch)
    # hundreds of conversions need not reach the device
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    recording = RecordingDisk()
    conversion(source, target, recording, monkeypatch)
    whole, count = contents(target), len(recording.operations)
    assert count > 20
    for number in range(count):
        shutil.rmtree(target)
        with pytest.raises(SimulatedCrash):
            disk = FaultyDisk(fail_at=number, crash="raise", tear=True)
            conversion(source, target, disk, monkeypatch)
        assert not target.exists() or contents(target) == whole, number
        target.mkdir(exist_ok=True)
        if not any(target.iterdir()):
            conversion(source, target, Disk(), monkeypatch)  # past what the crash left
            assert contents(target) == whole and not list(tmp_path.glob(".*"))
        shutil.rmtree(target)
        target.mkdir()
        with pytest.raises(MegatronLiteError) as caught:
            disk = FaultyDisk(fail_at=number, error=errno.ENOSPC, lasting=True)
            conversion(source, target, disk, monkeypatch)
        assert caught.value.exit_code == 5
        assert not list(tmp_path.glob(".*")) or recording.operations[number].kind == "sync_folder"
        assert not any(target.iterdir()) or contents(target) == whole


MEASURE = """
import re, sys
sys.path.insert(0, {root!r})
from megatron_lite.cli import convert
def peak():  # of this program: ru_maxrss would begin with what the starting process held
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
peaks = []
pairs = list(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
for source, target in pairs:
    sys.argv = ["convert.py", source, target, "--max-shard-size", "60MB"]
    convert.main()
    peaks.append(peak())
from safetensors.torch import load_file
whole = {{name: t + 0 for name, t in load_file(pairs[2][0] + "/model.safetensors").items()}}
peaks.append(peak())
print(*peaks)
"""


@pytest.mark.ci
def test_the_peak_of_memory_is_a_few_tensors_not_the_model(tmp_path):
    """A model of 330 MB, its largest tensor 8.4 MB: each way needs less than half of it.

    Pages of the mapped file count, too, and blocks that wait to be hashed.
    """
    small, big = tmp_path / "small", tmp_path / "big"
    gpt2(n_layer=2).save_pretrained(small)
    gpt2(n_layer=26, n_embd=512, n_head=8).save_pretrained(big)
    size = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    assert size > 320e6
    # the small model first: its peak holds Python, torch and all buffers of a fixed size
    pairs = [small, tmp_path / "a", tmp_path / "a", tmp_path / "b",
             big, tmp_path / "c", tmp_path / "c", tmp_path / "d"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(root=str(ROOT)), *map(str, pairs)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, start, peak_in, peak_out, whole = map(int, done.stdout.splitlines()[-1].split())
    print(f"model {size / 1e6:.0f} MB; in +{(peak_in - start) / 1e6:.0f} MB, "
          f"out +{(peak_out - start) / 1e6:.0f} MB, whole +{(whole - start) / 1e6:.0f} MB")  # fmt: skip
    assert whole - start > size / 2, "the whole model in memory would have been seen"
    assert peak_in - start < size / 2 and peak_out - start < size / 2
    assert tensors(big).keys() == tensors(tmp_path / "d").keys()
