"""generation_config.json and the chat template: they go through with a model, and the end of a text counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.checkpoint.huggingface.generation import generation_config
from megatron_lite.cli import convert
from megatron_lite.config.errors import CheckpointError
from megatron_lite.data.tokenizers.exchange import section_for
from tests.support.extras import needs
from tests.support.huggingface import tokenizer_files, tool
from tests.support.llama import llama
from tests.train.runs import run_main


def test_an_export_says_with_which_id_a_text_ends() -> None:
    assert json.loads(generation_config(None, eod=7, bos=1)) == {
        "bos_token_id": 1, "eos_token_id": 7,
    }  # fmt: skip


@pytest.mark.parametrize("eod", [None, 7])
def test_what_came_with_a_model_stays_to_the_byte(eod: int | None) -> None:
    given = b'{"eos_token_id": [7, 9],  "bos_token_id": 3, "temperature": 0.6}'
    assert generation_config(given, eod=eod, bos=1) == given


def test_the_end_of_documents_that_were_trained_counts() -> None:
    given = b'{"eos_token_id": [7, 9], "bos_token_id": 3, "temperature": 0.6}'
    found = json.loads(generation_config(given, eod=8, bos=1))
    assert found == {"eos_token_id": 8, "bos_token_id": 3, "temperature": 0.6}


def test_ends_that_only_config_json_lists_go_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("transformers")
    folder, ours, out = (tmp_path / name for name in ("llama", "ours", "out"))
    llama(bos_token_id=260, eos_token_id=[261, 262]).save_pretrained(folder)
    tokenizer_files(folder, "vocab.json", "merges.txt")
    (folder / "generation_config.json").unlink()
    for source, target in ((folder, ours), (ours, out)):
        assert tool(convert.main, monkeypatch, source, target) == 0
    found = json.loads((out / "generation_config.json").read_bytes())
    assert found == {"bos_token_id": 260, "eos_token_id": [261, 262]}


@pytest.mark.parametrize("given", [b"{", b"[]"])
def test_what_is_no_such_file_is_refused(given: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_config(given, eod=7, bos=None)


QWEN = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}, "model": {}}
TWO = {"vocab.json": b"{}", "merges.txt": b""}


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({}, "GPT2BPETokenizer"),
        ({"tokenizer.json": {"pre_tokenizer": {"type": "ByteLevel"}}}, "GPT2BPETokenizer"),
        ({"tokenizer.json": QWEN}, "HuggingFaceTokenizer"),
        ({"tokenizer.json": {"normalizer": {"type": "NFC"}}}, "HuggingFaceTokenizer"),
        ({"tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast"}}, "GPT2BPETokenizer"),
        ({"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, "refused"),
    ],
)
def test_two_files_of_gpt2s_names_are_gpt2s_only_where_they_cut_as_it_does(
    tmp_path: Path, more: dict[str, Any], kind: str
) -> None:
    files = TWO | {name: json.dumps(content).encode() for name, content in more.items()}
    if kind == "refused":
        with pytest.raises(Exception, match="another class than GPT-2's"):
            section_for(files, tmp_path)
    else:
        assert section_for(files, tmp_path)["tokenizer_type"] == kind


@pytest.mark.ci
def test_the_files_beside_a_model_come_out_of_a_run_that_trained_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer.json with a beginning and an end of its own, a template and two ends of a text."""
    transformers, tokenizers = needs("transformers"), needs("tokenizers")
    folder, ours, run, out = (tmp_path / name for name in ("llama", "ours", "run", "out"))
    llama(bos_token_id=260, eos_token_id=[261, 262]).save_pretrained(folder)
    vocab, merges = tokenizer_files(tmp_path / "files", "vocab.json", "merges.txt")
    model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|eot|>"])
    library = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", bos_token="the",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )  # fmt: skip
    library.save_pretrained(folder)
    template = (folder / "chat_template.jinja").read_bytes()
    before = json.loads((folder / "generation_config.json").read_bytes())
    assert before["eos_token_id"] == [261, 262]
    assert tool(convert.main, monkeypatch, folder, ours) == 0
    done = run_main(
        "--config", str(ours / "config.yaml"), "--load", str(ours), "--finetune", "--save", str(run),
        "--save-interval", "1", "--use-cpu", "--mock-data", "--train-iters", "1", "--eval-iters", "0",
        "--micro-batch-size", "1", "--global-batch-size", "1", "--lr", "1e-3", "--num-workers", "0",
    )  # fmt: skip
    assert done.rc == 0, done.err
    assert tool(convert.main, monkeypatch, run, out, "--dtype", "bf16") == 0
    assert (out / "chat_template.jinja").read_bytes() == template
    assert json.loads((out / "generation_config.json").read_bytes()) == before
    config = json.loads((out / "config.json").read_bytes())
    assert config["bos_token_id"] == 257 and config["eos_token_id"] == 261
    read = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert read.generation_config.eos_token_id == [261, 262] and read.dtype.itemsize == 2
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again.chat_template == library.chat_template and again.eos_token_id == 261
