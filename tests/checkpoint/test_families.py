"""Families of Hugging Face's: read, trained, written; what none can say is refused; one of a user's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_lite.checkpoint.huggingface.conversion import Conversion, conversions
from megatron_lite.checkpoint.huggingface.families import FAMILIES, family_for
from megatron_lite.checkpoint.huggingface.gpt2 import GPT2
from megatron_lite.checkpoint.huggingface.llama import LLAMA
from megatron_lite.checkpoint.huggingface.names import FusedPart, Names
from megatron_lite.cli import convert, generate
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.rules.model_identity import COMPARED
from megatron_lite.config.sections.model import ModelConfig
from tests.support.extras import needs
from tests.support.huggingface import (
    Change,
    our_logits,
    random_tokens,
    setting,
    tensors,
    their_logits,
    tokenizer_files,
    tool,
    weights,
)
from tests.support.llama import llama
from tests.train.runs import run_main, steps

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of transformers' in several files, with a tokenizer of one id less than it has rows."""
    needs("transformers")
    path = tmp_path / "llama"
    llama().save_pretrained(path, max_shard_size="30KB")
    tokenizer_files(path, "vocab.json", "merges.txt")
    return path


# -- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tied", [False, pytest.param(True, marks=pytest.mark.ci)], ids=["untied", "tied"]
)
def test_a_family_is_read_trained_written_and_read_back(
    tmp_path: Path, monkeypatch, folder: Path, tied: bool
) -> None:
    if tied:
        shutil.rmtree(folder)
        llama(tie_word_embeddings=True).save_pretrained(folder)
        tokenizer_files(folder, "vocab.json", "merges.txt")
    ours, run, out, back = (tmp_path / name for name in ("ours", "run", "out", "back"))
    assert (len(list(folder.glob("*.safetensors"))) > 1) != tied
    assert tool(convert.main, monkeypatch, folder, ours) == 0
    tokens = random_tokens(263)
    expected = their_logits(folder, tokens)
    for path in (ours, folder):
        difference = (our_logits(path, tokens) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5, difference

    done = run_main(
        "--config", str(ours / "config.yaml"), "--load", str(ours), "--finetune", "--save", str(run),
        "--save-interval", "2", "--use-cpu", "--mock-data", "--train-iters", "2", "--eval-iters", "0",
        "--micro-batch-size", "2", "--global-batch-size", "2", "--lr", "1e-3", "--num-workers", "0",
    )  # fmt: skip
    assert done.rc == 0 and len(steps(run)) == 2, done.err

    assert tool(convert.main, monkeypatch, run, out, "--max-shard-size", "30KB") == 0
    before, after = tensors(folder), tensors(out)
    assert after.keys() == before.keys() and ("lm_head.weight" in after) != tied
    assert not all(torch.equal(after[name], before[name]) for name in before)
    difference = (their_logits(out, tokens) - our_logits(run, tokens)).abs().max()
    assert difference / expected.abs().max() < 1e-5, difference

    assert tool(convert.main, monkeypatch, out, back) == 0
    assert tool(convert.main, monkeypatch, back, tmp_path / "again") == 0
    again = tensors(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)
    names = ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json")
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_a_run_says_names_the_family(
    tmp_path: Path, monkeypatch, folder: Path, capsys: Capture
) -> None:
    ours = tmp_path / "ours"
    assert tool(convert.main, monkeypatch, folder, ours) == 0
    assert "the model has 263 rows, the tokenizer gives 262 ids" in capsys.readouterr().out
    assert tool(convert.main, monkeypatch, ours, tmp_path / "out") == 0
    assert "transformers.LlamaForCausalLM.from_pretrained" in capsys.readouterr().out
    assert tool(convert.main, monkeypatch, ours, tmp_path / "no", "--family", "gpt2") == 4
    err = capsys.readouterr().err
    assert "GPT-2 has no --num-query-groups 2" in err and "--swiglu" in err and "Llama" not in err
    assert tool(convert.main, monkeypatch, ours, tmp_path / "no", "--family", "t5") == 2
    assert tool(convert.main, monkeypatch, folder, tmp_path / "no", "--family", "llama") == 2
    assert "--family is for the other direction" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_family_is_plugged_in_by_the_file_of_a_user(
    tmp_path: Path, monkeypatch, capsys: Capture
) -> None:
    transformers = needs("transformers")
    folder = tmp_path / "phi3"
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(
        vocab_size=263, max_position_embeddings=24, original_max_position_embeddings=24,
        hidden_size=48, intermediate_size=53, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, bos_token_id=261, eos_token_id=261, pad_token_id=261,
    ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer_files(folder, "vocab.json", "merges.txt")
    assert tool(convert.main, monkeypatch, folder, tmp_path / "ours") == 4
    known = ", ".join(FAMILIES)
    assert f"model_type 'phi3'; those that can be read are {known}\n" in capsys.readouterr().err
    monkeypatch.setitem(
        FAMILIES, "phi3", LLAMA
    )  # taken back at the end, whatever --extend makes of it
    mine = ["--extend", ROOT / "tests" / "extending" / "family.py"]
    words = ["--load", folder, "--prompt", "the", "--max-new-tokens", 2, "--use-cpu"]
    assert tool(generate.main, monkeypatch, *words, *mine) == 0
    assert tool(convert.main, monkeypatch, *mine, folder, tmp_path / "ours") == 0
    tokens = random_tokens(263)
    difference = (our_logits(tmp_path / "ours", tokens) - their_logits(folder, tokens)).abs().max()
    assert difference < 1e-5, difference
    out = ["--family", "phi3", *mine]
    assert tool(convert.main, monkeypatch, tmp_path / "ours", tmp_path / "out", *out) == 0
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tool(convert.main, monkeypatch, "--extend", folder, folder, tmp_path / "no") == 2


# -- refusals -----------------------------------------------------------------------------------


def one_file(folder: Path) -> None:
    found = tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(found, folder / "model.safetensors")


def in_one(change: Any) -> Change:
    return lambda folder: (one_file(folder), weights(change)(folder))


STRETCHED = {"rope_type": "su", "rope_theta": 1e4, "factor": 4.0}
REFUSED: dict[str, tuple[Change, list[str]]] = {
    "an unknown family": (setting(model_type="t5"), ["model_type 't5'", "gpt2, llama"]),
    "no family": (setting(model_type=["llama"]), ["model_type ['llama']", "gpt2, llama"]),
    "an option that is not known": (
        setting(logit_scale=2.0, attention_multiplier=0, nothing=None),
        ["logit_scale '2.0': not known here", "attention_multiplier '0'"],
    ),
    "stretched positions": (
        setting(rope_parameters=STRETCHED),
        ["rope_type 'su': only default, linear, dynamic, yarn, llama3, longrope are known",
         "rope_parameters.factor '4.0'"],
    ),
    "no factor": (
        setting(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        ["rope_parameters.factor is missing, which rope_type 'linear' needs"],
    ),
    "two ways to turn": (
        setting(rope_scaling={"type": "linear", "factor": 2.0}), ["say different things"]
    ),
    "no object": (setting(rope_parameters="yarn"), ["rope_parameters 'yarn': no JSON object"]),
    "biases": (setting(attention_bias=True), ["attention_bias True and mlp_bias False"]),
    "packed weights": (setting(quantization_config={"bits": 4}), ["quantization_config"]),
    "keys that do not come out even": (
        setting(num_key_value_heads=4), ["no such model is built here", "--num-query-groups 4"],
    ),
    "neither true nor false": (setting(tie_word_embeddings="no"), ["tie_word_embeddings 'no'"]),
    "a missing file": (lambda f: min(f.glob("*.safetensors")).unlink(), ["model-00001-of"]),
    "a missing tensor": (
        in_one(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), ["up_proj.weight: missing"]
    ),
    "a missing head": (in_one(lambda t: t.pop("lm_head.weight")), ["lm_head.weight: missing"]),
    "a bias too many": (
        in_one(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})),
        ["q_proj.bias: no tensor of Llama"],
    ),
    "a transposed matrix": (
        in_one(lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(53, 48)})),
        ["down_proj.weight: [53, 48] in model.safetensors, [48, 53] by config.json"],
    ),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_model_is_refused_by_name(
    tmp_path: Path, monkeypatch, folder: Path, capsys: Capture, name: str
) -> None:
    change, words = REFUSED[name]
    change(folder)
    assert tool(convert.main, monkeypatch, folder, tmp_path / "ours") == 4
    said = capsys.readouterr().err
    assert said.startswith("FATAL[4] ") and "Traceback" not in said
    for word in words:
        assert word in said, said
    assert not (tmp_path / "ours").exists()


def test_constants_and_a_prefix_that_is_left_out_do_not_matter(
    tmp_path: Path, folder: Path
) -> None:
    expected = our_logits(folder, random_tokens(263))

    def older(found: dict[str, torch.Tensor]) -> None:
        for name in [*found]:
            found[name.removeprefix("model.")] = found.pop(name)
        found["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    in_one(older)(folder)
    assert torch.equal(our_logits(folder, random_tokens(263)), expected)


# -- what a family cannot say -------------------------------------------------------------------

GPT = ModelConfig(
    num_layers=2, hidden_size=48, num_attention_heads=6, seq_length=24, vocab_size=263,
    max_position_embeddings=24,
)  # fmt: skip
LIKE_LLAMA = dataclasses.replace(
    GPT, position_embedding_type="rope", normalization="RMSNorm", swiglu=True, add_bias_linear=False,
    group_query_attention=True, num_query_groups=2, untie_embeddings_and_output_weights=True,
)  # fmt: skip
LLAMA31, YARN = {"rope_scaling_type": "llama3"}, {"rope_scaling_type": "yarn"}
LONGROPE = {
    "rope_scaling_type": "longrope",
    "rope_short_factors": "1.0,1.0,1.0,1.0",
    "rope_long_factors": "1.0,2.0,3.0,4.0",
}
CLEX = {"rope_scaling_type": "clex"}
OTHERWISE: dict[str, list[dict[str, Any]]] = {
    "num_layers": [{"num_layers": 3}],
    "hidden_size": [{"hidden_size": 96}],
    "num_attention_heads": [{"num_attention_heads": 12}],
    "kv_channels": [{"kv_channels": 16}],
    "num_query_groups": [
        {"group_query_attention": True, "num_query_groups": 3}, {"group_query_attention": False},
    ],
    "ffn_hidden_size": [{"ffn_hidden_size": 53}],
    "seq_length": [{"seq_length": 12}],
    "max_position_embeddings": [{"max_position_embeddings": 48}],
    "position_embedding_type": [
        {"position_embedding_type": kind} for kind in ("rope", "learned_absolute", "none")
    ],
    "rotary_base": [{"rotary_base": 5e5}],
    "rotary_percent": [{"rotary_percent": 0.5}],
    "rotary_interleaved": [{"rotary_interleaved": True}],
    "rope_scaling_type": [
        {"rope_scaling_type": kind} for kind in ("linear", "ntk", "dynamic", "yarn", "llama3")
    ] + [LONGROPE, CLEX],
    "rope_scaling_factor": [LLAMA31 | {"rope_scaling_factor": 32.0}],
    "rope_original_length": [
        kind | {"rope_original_length": 12} for kind in (LLAMA31, YARN, {"rope_scaling_type": "dynamic"})
    ],
    "rope_beta_fast": [YARN | {"rope_beta_fast": 16.0}],
    "rope_beta_slow": [YARN | {"rope_beta_slow": 2.0}],
    "rope_whole_channels": [YARN | {"rope_whole_channels": False}],
    "rope_attention_factor": [
        YARN | {"rope_attention_factor": 1.5}, LONGROPE | {"rope_attention_factor": 0.5},
    ],
    "rope_short_factors": [LONGROPE | {"rope_short_factors": "1.0,1.0,1.0,2.0"}],
    "rope_clex_width": [CLEX | {"rope_clex_width": 2}],
    "rope_long_factors": [LONGROPE | {"rope_long_factors": "1.0,2.0,3.0,5.0"}],
    "rope_low_freq_factor": [LLAMA31 | {"rope_low_freq_factor": 2.0}],
    "rope_high_freq_factor": [LLAMA31 | {"rope_high_freq_factor": 5.0}],
    "normalization": [{"normalization": "LayerNorm"}, {"normalization": "RMSNorm"}],
    "norm_epsilon": [{"norm_epsilon": 3e-6}],
    "apply_layernorm_1p": [{"apply_layernorm_1p": True}],
    "layernorm_bias": [{"layernorm_bias": False}],
    "swiglu": [{"swiglu": True}, {"swiglu": False}],
    "gelu": [{"gelu": "erf"}],
    "add_bias_linear": [{"add_bias_linear": True}, {"add_bias_linear": False}],
    "window_size": [{"window_size": "6,0"}],
    "qk_layernorm": [{"qk_layernorm": True}],
    "parallel_residual": [{"parallel_residual": True}],
    "add_qkv_bias": [{"add_bias_linear": False, "add_qkv_bias": True}],
    "untie_embeddings_and_output_weights": [
        {"untie_embeddings_and_output_weights": untied} for untied in (True, False)
    ],
}  # fmt: skip


@pytest.mark.parametrize("trait", [trait.name for trait in COMPARED])
@pytest.mark.parametrize(
    ("family", "base"), [(GPT2, GPT), (LLAMA, LIKE_LLAMA)], ids=["gpt2", "llama"]
)
def test_what_makes_another_model_comes_back_or_is_refused_by_its_flag(
    family: Any, base: ModelConfig, trait: str
) -> None:
    assert family.lacks(base) == []
    (of,) = (one.of for one in COMPARED if one.name == trait)
    for change in OTHERWISE[trait]:
        model = dataclasses.replace(base, **change)
        said = family.config_out(model, eod=None, dtype="float32")
        lacks = family.lacks(model)
        if lacks:
            # where no type has words for it, the type is what is named
            word = "clex" if trait == "rope_clex_width" else trait.split("_")[-1]
            assert any(word in flag.replace("-", "_") for flag in lacks), lacks
        elif of(model) is not None and trait != "seq_length":
            back, _ = family.read(json.loads(json.dumps(said)), Path("config.json"))
            assert of(back) == of(model)
            assert [c.theirs for c in conversions(family.names, model)]


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"position_embedding_type": "rope"}, ["--position-embedding-type rope"]),
        ({"normalization": "RMSNorm"}, ["--normalization RMSNorm"]),
        ({"layernorm_bias": False}, ["--no-layernorm-bias"]),
        ({"apply_layernorm_1p": True}, ["--apply-layernorm-1p"]),
        ({"swiglu": True}, ["--swiglu"]),
        ({"add_bias_linear": False}, ["--disable-bias-linear"]),
        ({"group_query_attention": True, "num_query_groups": 2}, ["--num-query-groups 2"]),
        ({"kv_channels": 16}, ["--kv-channels 16"]),
        ({"num_attention_heads": 7, "kv_channels": 8},
         ["such sizes (n_embd 48 cannot be split over n_head 7)"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_gpt2_lacks(changes: dict[str, Any], flags: list[str]) -> None:
    assert GPT2.lacks(dataclasses.replace(GPT, **changes)) == flags


def test_the_first_family_that_can_say_all_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert family_for(LIKE_LLAMA, None, "here") is LLAMA and family_for(GPT, None, "here") is GPT2
    neither = dataclasses.replace(LIKE_LLAMA, position_embedding_type="learned_absolute")
    with pytest.raises(CheckpointError) as caught:
        family_for(neither, None, "here")
    said = str(caught.value)
    assert "GPT-2 has no --num-query-groups 2, " in said
    assert "Llama has no --position-embedding-type learned_absolute" in said
    twin = dataclasses.replace(LLAMA, title="Llama's twin")
    monkeypatch.setitem(FAMILIES, "twin", twin)
    assert family_for(LIKE_LLAMA, None, "here") is LLAMA
    assert family_for(LIKE_LLAMA, "twin", "here") is twin


def test_a_row_is_called_what_its_config_says_and_has_a_place_for_every_tensor() -> None:
    windowed = dataclasses.replace(LIKE_LLAMA, window_size="6,0")
    likes = [
        GPT,
        LIKE_LLAMA,
        windowed,
        dataclasses.replace(LIKE_LLAMA, add_qkv_bias=True),
        dataclasses.replace(LIKE_LLAMA, qk_layernorm=True),
        dataclasses.replace(GPT, position_embedding_type="rope", parallel_residual=True),
    ]
    for kind, family in FAMILIES.items():
        model = next(m for m in likes if not family.lacks(m))
        assert family.config_out(model, eod=7, dtype="bfloat16")["model_type"] == kind
        wanted = conversions(family.names, model)
        assert sum(torch.Size(c.shape).numel() for c in wanted) == sum(
            torch.Size(shape).numel() for c in wanted for shape in c.ours.values()
        )


def test_gpt2_says_which_keys_it_leaves_out() -> None:
    said = GPT2.config_out(GPT, eod=None, dtype="float32")
    odd = {
        "n_ctx": 24,
        "summary_type": "mean",
        "mup_width_scale": 0.5,
        "rotary": None,
        "prefix": "x",
    }
    _, notices = GPT2.read(said | odd, Path("config.json"))
    assert notices == ["config.json: mup_width_scale is not known here and left out"]


# -- fused tensors ------------------------------------------------------------------------------

NEOX = Names(
    prefix="gpt_neox.",
    outside={"embedding.tokens": "embed_in", "final_norm": "final_layer_norm", "head": "embed_out"},
    layer="layers.{}.",
    block={
        "attention.q": FusedPart("attention.query_key_value", 0, by_head=True),
        "attention.k": FusedPart("attention.query_key_value", 1, by_head=True),
        "attention.v": FusedPart("attention.query_key_value", 2, by_head=True),
        "attention.output": "attention.dense",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": FusedPart("mlp.gate_up_proj", 0),
        "mlp.up": FusedPart("mlp.gate_up_proj", 1),
        "mlp.down": "mlp.dense_4h_to_h",
    },
)


def fused(name: str, **changes: Any) -> Conversion:
    model = dataclasses.replace(
        LIKE_LLAMA, hidden_size=12, num_attention_heads=3, group_query_attention=False,
        ffn_hidden_size=5, **changes,
    )  # fmt: skip
    (found,) = (c for c in conversions(NEOX, model) if c.theirs == name)
    return found


def joined(conversion: Conversion, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    def fill(wanted: Any) -> None:
        for name, into in wanted:
            into.copy_(parts[name])

    return conversion.join(torch.float64, fill)


def test_gates_lie_above_what_they_gate() -> None:
    found = fused("gpt_neox.layers.1.mlp.gate_up_proj.weight")
    whole = torch.arange(120.0, dtype=torch.float64).view(10, 12)
    parts = dict(found.parts(whole))
    assert torch.equal(parts["blocks.1.mlp.gate.weight"], whole[:5])
    assert torch.equal(parts["blocks.1.mlp.up.weight"], whole[5:])
    assert torch.equal(joined(found, parts), whole)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_queries_keys_and_values_may_lie_head_by_head(leaf: str) -> None:
    """GPT-NeoX: of each of 3 heads 4 rows of q, 4 of k, 4 of v."""
    found = fused(f"gpt_neox.layers.0.attention.query_key_value.{leaf}", add_bias_linear=True)
    whole = torch.arange(36.0 * 12, dtype=torch.float64).view(36, 12)
    whole = whole if leaf == "weight" else whole[:, 0].contiguous()
    parts = dict(found.parts(whole))
    for number, part in enumerate("qkv"):
        rows = [12 * head + 4 * number + row for head in range(3) for row in range(4)]
        assert torch.equal(parts[f"blocks.0.attention.{part}.{leaf}"], whole[rows])
    assert torch.equal(joined(found, parts), whole)
