"""Folders of PEFT's: what peft saves gives equal logits here, what is saved here gives equal logits there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lite.checkpoint.adapters import AdapterSet, adapter_shapes
from megatron_lite.checkpoint.huggingface.folder import open_folder
from megatron_lite.checkpoint.huggingface.peft import ADAPTER_CONFIG
from megatron_lite.checkpoint.huggingface.peft_reading import open_peft
from megatron_lite.checkpoint.huggingface.peft_writing import peft_config, peft_tensors, write_peft
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.models.adapters import merge_adapters, unmerge_adapters
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import gpt2, random_tokens, require_equal

needs("transformers")
peft = needs("peft")

TOKENS = random_tokens(262)


def saved(folder: Path, name: str) -> Path:
    """A folder of Hugging Face's."""
    model = gpt2() if name == "gpt2" else tiny(name)
    model.save_pretrained(folder / name)
    return folder / name


def their_model(folder: Path):
    """The same by transformers."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def our_model(folder: Path, adapter: Path | None) -> Decoder:
    ctx = ParallelContext.serial()
    return build_model(find_model(folder, ctx, adapter=adapter), ctx, dtype=torch.float32)


def logits(model: Decoder) -> torch.Tensor:
    """[b, s, v] of TOKENS."""
    at = ForwardContext(samples=torch.arange(len(TOKENS)), index=torch.arange(TOKENS.shape[1]))
    with torch.no_grad():
        return model(TOKENS.t(), at).transpose(0, 1)[..., : model.context.vocab_size]


def randomised(model) -> None:
    """Both factors of every adapter have something to show, as after training."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


BY_PEFT = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "llama rslora table": ("llama", {"target_modules": ["embed_tokens", "o_proj"], "use_rslora": True}),
    "ranks and alphas": ("qwen3", {"target_modules": ["q_proj", "up_proj"],
                         "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 3}}),
    "fused": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "fused by heads": ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "use_dora": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_PEFT)
def test_what_peft_saves_gives_equal_logits_here(tmp_path, case) -> None:
    name, asked = BY_PEFT[case]
    base = saved(tmp_path, name)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **asked)
    model = peft.get_peft_model(their_model(base), config).eval()
    randomised(model)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        theirs = model(TOKENS).logits
    require_equal(logits(our_model(base, tmp_path / "adapter")), theirs, "logits")
    assert (theirs - logits(our_model(base, None))).abs().max() > 0.1, "adapters change something"


def test_a_table_that_lies_with_the_adapters_must_be_the_bases(tmp_path) -> None:
    base = saved(tmp_path, "llama")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    peft.get_peft_model(their_model(base), config).save_pretrained(tmp_path / "adapter")
    assert our_model(base, tmp_path / "adapter")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    held(lambda t: t[name].add_(1e-3))(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="another embedding.tokens.weight than the model"):
        our_model(base, tmp_path / "adapter")


OURS = {
    "llama": ("llama", LoraConfig(lora_rank=3, lora_alpha=5.0)),
    "llama some rslora": ("llama", LoraConfig(
        lora_rank=4, lora_targets=["q_proj", "gate_proj"], lora_variant="rslora")),
    "llama all": ("llama", LoraConfig(lora_rank=3, lora_targets=["all"])),
    "qwen3 dora": ("qwen3", LoraConfig(lora_rank=3, lora_variant="dora")),
    "fused": ("gpt2", LoraConfig(lora_rank=3)),
    "a part of fused": ("gpt2", LoraConfig(
        lora_rank=4, lora_targets=["q_proj", "v_proj", "mlp.down"], lora_variant="rslora")),
    "fused by heads": ("gpt_neox", LoraConfig(lora_rank=3, lora_variant="dora")),
}  # fmt: skip


def random_set(lora: LoraConfig, model) -> AdapterSet:
    torch.manual_seed(2)
    shapes = adapter_shapes(lora, model)
    return AdapterSet("here", lora, {
        name: torch.rand(shape) + 0.5 if "magnitude" in name else torch.randn(shape) * 0.1
        for name, shape in shapes.items()
    })  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_what_is_saved_here_gives_equal_logits_there_and_comes_back(tmp_path, case) -> None:
    name, lora = OURS[case]
    base = saved(tmp_path, name)
    model = open_folder(base).model
    adapters = random_set(lora, model)
    tensors, folder = peft_tensors(adapters, model), tmp_path / "adapter"
    folder.mkdir()
    files = {ADAPTER_CONFIG: peft_config(adapters, model, str(base), tensors)}
    write_peft(folder, files, tensors, Disk())
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(their_model(base), str(folder)).eval()
        state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
        expected = theirs(TOKENS).logits
    back = open_peft(folder, model)
    assert back.lora.scale == pytest.approx(lora.scale) and back.lora.lora_rank == lora.lora_rank
    assert back.tensors.keys() == adapters.tensors.keys()
    assert all(torch.equal(back.tensors[n], t) for n, t in adapters.tensors.items())
    ours = our_model(base, folder)
    require_equal(logits(ours), expected, "logits")
    before = {n: p.clone() for n, p in ours.named_parameters()}
    merge_adapters(ours)
    require_equal(logits(ours), expected, "merged logits")
    assert not torch.equal(
        ours.blocks["0"].mlp.down.weight, before["blocks.0.mlp.down.weight"]
    ) or ("gate_proj" in lora.lora_targets)
    unmerge_adapters(ours)
    for n, p in ours.named_parameters():
        torch.testing.assert_close(p, before[n], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, Path]:
    """(base, adapter) that fit."""
    folder = tmp_path_factory.mktemp("sound")
    base = saved(folder, "llama")
    model = open_folder(base).model
    adapters = random_set(LoraConfig(lora_rank=3, lora_targets=["q_proj", "v_proj"]), model)
    tensors = peft_tensors(adapters, model)
    (folder / "adapter").mkdir()
    files = {ADAPTER_CONFIG: peft_config(adapters, model, None, tensors)}
    write_peft(folder / "adapter", files, tensors, Disk())
    return base, folder / "adapter"


def said(**changes):
    """adapter_config.json says something else."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def held(change):
    """adapter_model.safetensors holds something else."""

    def make(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return make


Q = "base_model.model.model.layers.1.self_attn.q_proj."


def as_pipe(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


WRONG = {
    "missing B": (held(lambda t: t.pop(Q + "lora_B.weight")), "layers.1.self_attn.q_proj: lora_B is missing"),
    "missing layer": (
        held(lambda t: [t.pop(Q + f"lora_{x}.weight") for x in "AB"]), "blocks.1.attention.q has no adapter"),
    "stranger": (held(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})), "no adapter of"),
    "shape": (held(lambda t: t.update({Q + "lora_A.weight": torch.ones(3, 9)})), "is [3, 9], not [3, 48]"),
    "rank": (said(r=5), "rank 3, adapter_config.json says 5"),
    "not finite": (held(lambda t: t[Q + "lora_A.weight"].fill_(float("nan"))), "not finite"),
    "target": (said(target_modules=["q_proj", "v_proj", "k_proj"]), "'k_proj': it has no tensor"),
    "kind": (said(peft_type="IA3"), "peft_type 'IA3'"),
    "bias": (said(bias="all"), "bias 'all'"),
    "whole modules": (said(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (said(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "magnitudes": (said(use_dora=True), "lora_magnitude is missing"),
    "a huge rank": (said(r=1 << 40), "r 1099511627776"),
    "a pattern that never ends": (said(rank_pattern={"(a+)+$": 3}), "is not read here"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("["), "is no JSON"),
    "pipe": (as_pipe, "a named pipe"),
    "pickle": (as_pickle, "never opened"),
    "cut": (lambda f: os.truncate(f / "adapter_model.safetensors", 100), "damaged"),
    "none": (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_does_not_fit_is_refused_with_the_reason(sound, tmp_path, case) -> None:
    base, adapter = sound
    change, reason = WRONG[case]
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert open_peft(folder, open_folder(base).model).lora.lora_targets == [
        "attention.q",
        "attention.v",
    ]
    change(folder)
    with pytest.raises(CheckpointError) as refused:
        open_peft(folder, open_folder(base).model)
    assert reason in str(refused.value) and str(folder) in str(refused.value)
    assert refused.value.exit_code == 4
