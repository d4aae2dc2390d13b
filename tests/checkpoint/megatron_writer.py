"""A program of its own: Megatron core writes a torch_dist checkpoint over two ranks, and its logits beside it.

python -m tests.checkpoint.megatron_writer gpt|llama|parts FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

LAYERS, HIDDEN, HEADS, GROUPS, FFN, ROWS, POSITIONS = 2, 24, 6, 2, 40, 56, 16

BASE = {
    "gpt": 10000,
    "llama": 10000,
    "parts": 500000,
}  # slow enough for llama3's scaling to be felt
PARTS: dict[str, Any] = {"qk_layernorm": True, "add_qkv_bias": True, "window_size": (5, 0)}


def arguments(kind: str) -> argparse.Namespace:
    """What Megatron-LM's training would keep of its command line, and things that are none of ours."""
    llama = kind != "gpt"
    return argparse.Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=FFN,
        group_query_attention=llama, num_query_groups=GROUPS if llama else 1, kv_channels=HIDDEN // HEADS,
        max_position_embeddings=POSITIONS, padded_vocab_size=ROWS, norm_epsilon=1e-5,
        position_embedding_type="rope" if llama else "learned_absolute", rotary_base=BASE[kind],
        rotary_percent=1.0, normalization="RMSNorm" if llama else "LayerNorm", swiglu=llama,
        add_bias_linear=not llama, bias_gelu_fusion=not llama, hidden_dropout=0.0,
        untie_embeddings_and_output_weights=kind == "llama", attention_dropout=0.0, init_method_std=0.02,
        use_rope_scaling=kind == "parts", rope_scaling_factor=4.0, **(PARTS if kind == "parts" else {}),
        params_dtype=torch.float32, save=Path("/somewhere"), world_size=2,
    )  # fmt: skip


def model_of(kind: str) -> Any:
    """Megatron core's model of these sizes, on a CPU."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    args, llama = arguments(kind), kind != "gpt"
    shapes = {
        "num_query_groups": GROUPS, "gated_linear_unit": True, "add_bias_linear": False,
        "activation_func": torch.nn.functional.silu, "normalization": "RMSNorm",
    } if llama else {"bias_activation_fusion": True}  # fmt: skip
    shapes |= PARTS if kind == "parts" else {}
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=FFN,
        use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=2, init_method_std=0.3, **shapes,
    )  # fmt: skip
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=config.qk_layernorm),
        vocab_size=ROWS, max_sequence_length=POSITIONS, parallel_output=False,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=kind != "llama", rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling, rope_scaling_factor=args.rope_scaling_factor,
    ).eval()  # fmt: skip


class OnCpu(TorchFunctionMode):
    """Its mask of a window is made on a GPU by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = {"device": "cpu"} if (kwargs or {}).get("device") == "cuda" else {}
        return func(*args, **{**(kwargs or {}), **here})


def write(rank: int, kind: str, folder: str, store: str) -> None:
    """One of two ranks."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # its writer asks a GPU to wait, and psutil how much memory it takes: neither is here
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._process_memory = lambda: 0
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    parallel_state.initialize_model_parallel(2)
    torch.manual_seed(5)
    model = model_of(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros show nothing
            values = torch.randn(2, *parameter.shape)[rank if "fc1" in name or "qkv" in name else 0]
            parameter.data.copy_(values)
    tokens = torch.randint(0, ROWS, (2, POSITIONS), generator=torch.Generator().manual_seed(3))
    at = torch.arange(POSITIONS).expand(2, -1)
    unseen = torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.bool).triu(1)
    with torch.no_grad(), OnCpu():
        logits = model(tokens, at, unseen)
    state = {"args": arguments(kind), "iteration": 7, "checkpoint_version": 3.0,
             "model": model.sharded_state_dict()}  # fmt: skip
    inside = Path(folder) / "iter_0000007"
    if rank == 0:
        inside.mkdir(parents=True)
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")
        torch.save({"tokens": tokens, "logits": logits}, Path(folder) / "logits.pt")
    dist.barrier()
    dist_checkpointing.save(state, str(inside))
    dist.destroy_process_group()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(
            write, args=(sys.argv[1], sys.argv[2], f"{scratch}/store"), nprocs=2
        )
