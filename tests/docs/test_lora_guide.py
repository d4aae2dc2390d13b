"""The commands of the guide on adapters, run as they are printed, in this process."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from megatron_lite.cli import convert, generate, plan, preprocess_data
from tests.docs.walking import blocks, read
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files, tool
from tests.train.runs import run_main

TEXT = "the thing in other words then er is in the thin inner hint that this ether tin"


@pytest.mark.ci
def test_the_guide_goes_as_printed(tmp_path, monkeypatch, capsys) -> None:
    transformers, peft = needs("transformers"), needs("peft")
    gpt2(n_head=4).save_pretrained(tmp_path / "model")
    tokenizer_files(tmp_path / "model", "vocab.json", "merges.txt")
    (tmp_path / "corpus.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n" * 40)
    monkeypatch.chdir(tmp_path)
    mains = {f"tools/{main.__name__.rpartition('.')[2]}.py": main for main in (
        convert, generate, preprocess_data)}  # fmt: skip
    code, _ = (code for language, code in blocks(read("lora")) if language == "bash")
    lines = code.replace("\\\n", " ").splitlines()
    assert len(lines) == 6, "as the guide says"
    for line in lines:
        python, script, *words = shlex.split(line, comments=True)
        assert python == "python"
        if script == "tools/pretrain_gpt.py":
            done = run_main(*words, "--use-cpu")
            assert done.rc == 0, done.err
            assert "adapters of rank 8 on linear, scale 2" in done.out
        else:
            assert tool(mains[script].main, monkeypatch, *words) == 0, capsys.readouterr().err
    model = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        beside = peft.PeftModel.from_pretrained(model, "adapter").eval()(tokens).logits
        torch.testing.assert_close(beside, merged(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_plan_is_the_one_of_the_table(monkeypatch, capsys) -> None:
    """A 7B in 4 bits and as it is, in GiB."""
    _, code = (code for language, code in blocks(read("lora")) if language == "bash")
    python, script, *words = shlex.split(code.replace("\\\n", " "))
    assert (python, script) == ("python", "tools/plan.py")
    again = words.index("--recompute-granularity")
    every_layer = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    table = [line.split("|")[2:4] for line in read("lora").splitlines() if line.endswith("GiB |")]
    assert len(table) == 3
    for recomputed, row in zip(([], words[again:], every_layer.split()), table, strict=True):
        for base, cell in zip(("bf16", "nf4"), row, strict=True):
            asked = [base if word == "nf4" else word for word in words[:again]]
            assert tool(plan.main, monkeypatch, *asked, *recomputed, "--json") == 0
            (rank,) = json.loads(capsys.readouterr().out)["stages"]
            assert f"{rank['total_bytes'] / 2**30:.1f} GiB" == cell.strip()


def test_both_languages_print_the_same_commands() -> None:
    assert blocks(read("lora")) == blocks(read("lora.zh-CN"))
