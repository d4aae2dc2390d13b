"""GGUF out: transformers and gguf's own reader find the numbers, sizes and tokens that went in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lite.cli import convert
from megatron_lite.config.sections.model import ModelConfig
from tests.support.extras import needs
from tests.support.families import TINY, tiny
from tests.support.huggingface import gpt2, random_tokens, tokenizer_files, tool

gguf = needs("gguf")
needs("accelerate")  # transformers reads GGUF with it
transformers = needs("transformers")
Capture = pytest.CaptureFixture[str]

ROWS = 262
SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 24,
    "bos_token_id": 261, "eos_token_id": 261, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip


def random_model(kind: str) -> Any:
    """A tiny model of a family, with random weights in all of it."""
    if kind == "gpt2":
        return gpt2(n_positions=1024)  # transformers takes its default, whatever the file says
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def exported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: object, model: Any = None
) -> Any:
    """The model, and the folder with its model.gguf."""
    model = model or random_model(kind)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer_files(tmp_path / "theirs", "vocab.json", "merges.txt")
    assert tool(convert.main, monkeypatch, tmp_path / "theirs", tmp_path / "ours") == 0
    out = tmp_path / "out"
    assert tool(convert.main, monkeypatch, tmp_path / "ours", out, "--to", "gguf", *words) == 0
    return model, out


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_it_back_with_equal_logits_and_greedy_tokens(
    tmp_path: Path, monkeypatch, kind: str
) -> None:
    model, out = exported(kind, tmp_path, monkeypatch)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    tokens = random_tokens(ROWS)
    with torch.no_grad():
        expected, found = model(tokens).logits, back(tokens).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    start = tokens[:, :8]
    assert torch.equal(model.generate(start, **greedy), back.generate(start, **greedy))


class NeoX:
    """A GPT-NeoX as llama.cpp computes it, of nothing but what a file says: sizes, and tensors by name."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.said = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
        assert self.said["general.architecture"] == "gptneox"

    def size(self, name: str) -> Any:
        return self.said[f"gptneox.{name}"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        tensors = self.tensors
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (self.tensors[f"{name}.{leaf}"] for leaf in ("weight", "bias"))
        epsilon = self.size("attention.layer_norm_epsilon")
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, n, d]: the first channels of a head, each with the one half of them further on."""
        turned = self.size("rope.dimension_count")
        speeds = self.size("rope.freq_base") ** (-torch.arange(0, turned, 2) / turned)
        angles = torch.arange(x.shape[1])[:, None, None] * speeds
        a, b, rest = x.split([turned // 2, turned // 2, x.shape[-1] - turned], -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def attention(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        heads = self.size("attention.head_count")
        q, k, v = self.linear(f"{layer}.attn_qkv", x).unflatten(-1, (3, heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (self.turn(q), self.turn(k), v))
        attend = torch.nn.functional.scaled_dot_product_attention
        seen = attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.linear(f"{layer}.attn_output", seen)

    def mlp(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(
            f"{layer}.ffn_down",
            torch.nn.functional.gelu(self.linear(f"{layer}.ffn_up", x)),
        )

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tensors["token_embd.weight"][tokens]
        for n in range(self.size("block_count")):
            layer = f"blk.{n}"
            seen = self.attention(layer, self.norm(f"{layer}.attn_norm", x))
            before = x if self.size("use_parallel_residual") else x + seen
            x = x + seen + self.mlp(layer, self.norm(f"{layer}.ffn_norm", before))
        return self.linear("output", self.norm("output_norm", x))


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox-in-turn"])
def test_gpt_neox_is_computed_from_what_the_file_says(
    tmp_path: Path, monkeypatch, capsys: Capture, name: str
) -> None:
    """transformers reads no such GGUF: gguf's reader and a forward of our own do."""
    scaled = TINY[name][1]["rope_parameters"]
    unscaled = {key: scaled[key] for key in ("rope_theta", "partial_rotary_factor")}
    model = tiny(name, rope_parameters={"rope_type": "default", **unscaled})
    model, out = exported("gpt_neox", tmp_path, monkeypatch, model=model)
    assert "llama.cpp computes GELU by tanh" in capsys.readouterr().out
    found = NeoX(out / "model.gguf")
    tokens = random_tokens(263)
    with torch.no_grad():
        expected = model(tokens).logits
        assert (found(tokens) - expected).abs().max() / expected.abs().max() < 1e-5
        text = tokens[:, :8]
        for _ in range(8):
            text = torch.cat([text, found(text)[:, -1:].argmax(-1)], 1)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(tokens[:, :8], **greedy), text)


def frequencies(path: Path) -> torch.Tensor:
    """As llama.cpp computes them of what a file says (its ggml_rope_yarn_corr_dims for YaRN)."""
    reader = gguf.GGUFReader(path)
    said = {name.split(".", 1)[1]: f.contents() for name, f in reader.fields.items() if "." in name}
    channels, base = said["rope.dimension_count"], said["rope.freq_base"]
    pair = torch.arange(channels // 2, dtype=torch.float64)
    found = base ** (-2.0 * pair / channels)
    divisors = [torch.tensor(t.data) for t in reader.tensors if t.name == "rope_freqs.weight"]
    if divisors:
        return found / divisors[0]
    factor = said.get("rope.scaling.factor", 1.0)
    if said.get("rope.scaling.type") != "yarn":
        return found / factor

    def turning(beta: float) -> float:
        wavelength = said["rope.scaling.original_context_length"] / (beta * 2 * math.pi)
        return channels * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(turning(said["rope.scaling.yarn_beta_fast"])), 0)
    high = min(math.ceil(turning(said["rope.scaling.yarn_beta_slow"])), channels - 1)
    kept = 1.0 - ((pair - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    return found * kept + found / factor * (1.0 - kept)


@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "qwen2"])
def test_scaled_positions_turn_as_the_model_turns_them(
    tmp_path: Path, monkeypatch, name: str
) -> None:
    """llama3, linear and yarn; never loaded by llama.cpp itself."""
    model, out = exported("", tmp_path, monkeypatch, model=tiny(name))
    expected = model.model.rotary_emb.inv_freq
    found = frequencies(out / "model.gguf")
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("name", "said"), [("qwen3", "longrope"), ("gpt_neox-in-turn", "dynamic")])
def test_scalings_without_words_there_are_refused(
    tmp_path: Path, monkeypatch, capsys: Capture, name: str, said: str
) -> None:
    with pytest.raises(AssertionError, match="assert 4 == 0"):
        exported("", tmp_path, monkeypatch, model=tiny(name))
    assert f"--rope-scaling-type {said} is not written to GGUF: GGUF has" in capsys.readouterr().err


def test_its_tokens_cut_a_text_as_the_tokenizer_did(tmp_path: Path, monkeypatch) -> None:
    exported("gpt2", tmp_path, monkeypatch)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    field = {name: field.contents() for name, field in reader.fields.items()}
    assert field["tokenizer.ggml.model"] == "gpt2" and field["tokenizer.ggml.pre"] == "gpt-2"
    assert (
        len(field["tokenizer.ggml.tokens"]) == ROWS and field["tokenizer.ggml.eos_token_id"] == 261
    )
    assert field["tokenizer.ggml.add_bos_token"] is False  # its texts begin with nothing
    assert field["tokenizer.ggml.token_type"][261] == 3 and "t h" in field["tokenizer.ggml.merges"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    own = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "theirs")
    text = "the other, thin 3 things\n"
    assert theirs(text)["input_ids"] == own(text)["input_ids"]


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 5e-3)])
def test_shorter_formats_are_near_and_norms_stay_exact(
    tmp_path: Path, monkeypatch, dtype: str, bound: float
) -> None:
    model, out = exported("llama", tmp_path, monkeypatch, "--dtype", dtype)
    found = {t.name: t for t in gguf.GGUFReader(out / "model.gguf").tensors}
    state = model.state_dict()
    down = found["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == ("F16" if dtype == "q8_0" else dtype.upper())  # 80 is no 32s
    table = found["token_embd.weight"]
    values = gguf.quants.dequantize(table.data, table.tensor_type)
    expected = state["model.embed_tokens.weight"].numpy()
    assert 0 < np.abs(values - expected).max() / np.abs(expected).max() < bound
    norm = found["blk.0.attn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    assert np.array_equal(norm.data, state["model.layers.0.input_layernorm.weight"].numpy())


def test_rows_without_a_token_get_a_name(tmp_path: Path, monkeypatch) -> None:
    gpt2(vocab_size=270).save_pretrained(tmp_path / "theirs")
    tokenizer_files(tmp_path / "theirs", "vocab.json", "merges.txt")
    assert tool(convert.main, monkeypatch, tmp_path / "theirs", tmp_path / "ours") == 0
    assert tool(convert.main, monkeypatch, tmp_path / "ours", tmp_path / "out", "--to", "gguf") == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD269]"
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == 5


def test_what_cannot_be_said_is_refused(tmp_path: Path, monkeypatch, capsys: Capture) -> None:
    exported("gpt2", tmp_path, monkeypatch)
    ours, no = tmp_path / "ours", tmp_path / "no"
    for words, code, said in (
        (("--to", "llama2c"), 4, "llama2.c does not compute the family GPT-2"),
        (("--to", "llama2c", "--dtype", "f16"), 2, "no format of --to llama2c"),
        (("--dtype", "q8_0"), 2, "no format of --to huggingface"),
        (("--to", "gguf", "--family", "llama"), 4, "Llama has no"),
    ):
        assert tool(convert.main, monkeypatch, ours, no, *words) == code
        assert said in capsys.readouterr().err and not no.exists()
    assert tool(convert.main, monkeypatch, tmp_path / "theirs", no, "--to", "gguf") == 2
    assert tool(convert.main, monkeypatch, ours, no, "--to", "gguf", "--dry-run") == 0
    assert "blk.1.attn_qkv.weight [144, 48]" in capsys.readouterr().out and not no.exists()
    assert ModelConfig().vocab_size is None
