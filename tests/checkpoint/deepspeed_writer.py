"""Writes what Megatron-DeepSpeed's ranks save, of random tensors; no such program is here."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

LAYERS, H, HEADS, GROUPS, F, ROWS, POSITIONS = 2, 24, 6, 2, 40, 56, 16
D = H // HEADS
Tensors = dict[str, torch.Tensor]


def args_of(kind: str, tp: int) -> argparse.Namespace:
    """What Megatron-DeepSpeed keeps of its command line."""
    llama = kind != "gpt"
    parts: dict[str, object] = {"qk_layernorm": True, "add_qkv_bias": True, "window_size": [5, 0]}
    return argparse.Namespace(
        num_layers=LAYERS, hidden_size=H, num_attention_heads=HEADS, ffn_hidden_size=F,
        num_key_value_heads=GROUPS if llama else HEADS, max_position_embeddings=POSITIONS,
        padded_vocab_size=ROWS, layernorm_epsilon=1e-5, use_rotary_position_embeddings=llama,
        normalization="rmsnorm" if llama else "layernorm", swiglu=llama, add_bias_linear=not llama,
        bias_gelu_fusion=not llama, untie_embeddings_and_output_weights=llama, hidden_dropout=0.0,
        attention_dropout=0.0, init_method_std=0.02, tensor_model_parallel_size=tp, num_experts=[1],
        use_rope_scaling=kind == "parts", **(parts if kind == "parts" else {}),
    )  # fmt: skip


def canonical(kind: str) -> Tensors:
    """A model's tensors by our names."""
    torch.manual_seed(2)
    llama = kind != "gpt"
    kv = D * (GROUPS if llama else HEADS)
    shapes: dict[str, tuple[int, ...]] = {"embedding.tokens.weight": (ROWS, H)}
    if not llama:
        shapes["embedding.positions.weight"] = (POSITIONS, H)
    matrices = {"attention.q": (H, H), "attention.k": (kv, H), "attention.v": (kv, H),
                "attention.output": (H, H), "mlp.up": (F, H), "mlp.down": (H, F)}  # fmt: skip
    if llama:
        matrices["mlp.gate"] = (F, H)
    norms = [f"blocks.{n}.{name}" for n in range(LAYERS) for name in ("attention_norm", "mlp_norm")]
    for name in (*norms, "final_norm"):
        shapes |= {
            f"{name}.{leaf}": (H,) for leaf in (("weight",) if llama else ("weight", "bias"))
        }
    for n in range(LAYERS):
        for name, shape in matrices.items():
            shapes[f"blocks.{n}.{name}.weight"] = shape
            if not llama or (kind == "parts" and name[-2:] in (".q", ".k", ".v")):
                shapes[f"blocks.{n}.{name}.bias"] = shape[:1]
        if kind == "parts":
            shapes |= {f"blocks.{n}.attention.{name}_norm.weight": (D,) for name in "qk"}
    if llama:
        shapes["head.weight"] = (ROWS, H)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def layer_of(ours: Tensors, layer: int, rank: int, tp: int, kind: str) -> Tensors:
    """One layer's file of one rank, head by head and half by half."""
    get = {n.removeprefix(f"blocks.{layer}."): t for n, t in ours.items()}
    groups = HEADS if kind == "gpt" else GROUPS
    found = {}
    for leaf in ("weight", "bias"):
        if f"attention.q.{leaf}" not in get:
            continue
        parts = (get[f"attention.{p}.{leaf}"] for p in "qkv")
        grouped = torch.cat([p.unflatten(0, (groups, -1)) for p in parts], 1)
        found[f"self_attention.query_key_value.{leaf}"] = grouped.chunk(tp)[rank].flatten(0, 1)
        up = [
            get[f"mlp.{p}.{leaf}"].chunk(tp)[rank]
            for p in ("gate", "up")
            if f"mlp.{p}.{leaf}" in get
        ]
        if up:
            found[f"mlp.dense_h_to_4h.{leaf}"] = torch.cat(up)
    for theirs, name in (
        ("self_attention.dense", "attention.output"),
        ("mlp.dense_4h_to_h", "mlp.down"),
    ):
        found[f"{theirs}.weight"] = get[f"{name}.weight"].chunk(tp, 1)[rank].contiguous()
        if f"{name}.bias" in get:
            found[f"{theirs}.bias"] = get[f"{name}.bias"]
    for theirs, name in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("self_attention.q_layernorm", "attention.q_norm"),
        ("self_attention.k_layernorm", "attention.k_norm"),
    ):
        found |= {f"{theirs}.{leaf}": get[f"{name}.{leaf}"] for leaf in ("weight", "bias")
                  if f"{name}.{leaf}" in get}  # fmt: skip
    return {name: tensor.clone() for name, tensor in found.items()}


def write(folder: Path, kind: str, tp: int, *, pipeline: bool, args: object = None) -> Tensors:
    """A checkpoint of so many ranks; the tensors that it is of."""
    ours, inside = canonical(kind), folder / "global_step20"
    inside.mkdir(parents=True)
    (folder / "latest").write_text("global_step20")
    for rank in range(tp):
        table = {"word_embeddings.weight": ours["embedding.tokens.weight"].chunk(tp)[rank].clone()}
        if kind == "gpt":
            table["position_embeddings.weight"] = ours["embedding.positions.weight"]
        norm = {
            n.removeprefix("final_norm."): t for n, t in ours.items() if n.startswith("final_norm.")
        }
        head = ours.get("head.weight", ours["embedding.tokens.weight"]).chunk(tp)[rank]
        layers = [layer_of(ours, n, rank, tp, kind) for n in range(LAYERS)]
        state = {"args": args or args_of(kind, tp), "iteration": 20, "module": None}
        if pipeline:
            key = "lm_head.weight" if kind != "gpt" else "word_embeddings.weight"
            files = {1: table, **{3 + n: layer for n, layer in enumerate(layers)},
                     4 + LAYERS: norm, 5 + LAYERS: {key: head.clone()}}  # fmt: skip
            for number, content in files.items():
                torch.save(content, inside / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        else:
            embedding = {name.split(".")[0]: {"weight": t} for name, t in table.items()}
            encoder = {
                f"layers.{n}.{name}": t
                for n, layer in enumerate(layers)
                for name, t in layer.items()
            }
            encoder |= {f"final_layernorm.{leaf}": t for leaf, t in norm.items()}
            model = {"embedding": embedding, "encoder": encoder}
            if kind != "gpt":
                model["output_layer"] = {"weight": head.clone()}
            state["module"] = {"language_model": model}
        torch.save(state, inside / f"mp_rank_{rank:02d}_model_states.pt")
    return ours
