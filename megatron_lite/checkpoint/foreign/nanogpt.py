"""nanoGPT's ckpt.pt: model, model_args, optimizer, iter_num, best_val_loss, config in one torch.save.

Names are GPT-2's of Hugging Face, its matrices [out, in]; torch.compile adds `_orig_mod.` in front.
Its LayerNorm has the epsilon 1e-5, its GELU is the exact one, its head the token table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.foreign.model import ForeignModel, ForeignTensor, fit_model
from megatron_lite.checkpoint.foreign.records import UnreadTensor
from megatron_lite.checkpoint.foreign.torch_file import TorchFile, open_torch_file
from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.gpt2 import GPT2
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig

_FILE = "ckpt.pt"
TITLE = "nanoGPT"
_COMPILED = "_orig_mod."
_NAMES = dataclasses.replace(GPT2.names, transposed=False)
_HEAD, _TABLE = "lm_head.weight", "transformer.wte.weight"


def is_nanogpt(path: Path) -> bool:
    """Whether it is such a file, or a folder that holds one."""
    return path.suffix == ".pt" if path.is_file() else (path / _FILE).is_file()


def open_nanogpt(path: Path, *, vocab_size: int | None = None) -> ForeignModel:
    """Look through a ckpt.pt; vocab_size: keep so many rows of the token table.

    Raises CheckpointError for one that is none, damaged, or of a model that we do not have.
    """
    path = path / _FILE if path.is_dir() else path
    file = open_torch_file(path)
    if not isinstance(file.value, dict) or not {"model", "model_args"} <= file.value.keys():
        raise CheckpointError(
            f"{path} is no checkpoint of {TITLE}: its object has no model and model_args"
        )
    args, weights = file.value["model_args"], file.value["model"]
    if not isinstance(args, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{path}: model_args and model are no tables by name")
    args = {name: value for name, value in args.items() if isinstance(name, str)}
    tensors = _tensors(file, weights)
    untied = not _is_tied(tensors, weights, file)
    model = _model(ConfigFile(args, path, TITLE, inside="model_args."), untied=untied)
    if not untied:
        del tensors[_HEAD]
    notices = [
        "GELU is the exact one, as in today's nanoGPT; for a file of its first months, whose GELU was the "
        "tanh form, write `gelu: tanh` in the new config.yaml",
    ]
    return fit_model(
        path, TITLE, model, _NAMES, tensors,
        iteration=file.value.get("iter_num"), vocab_size=vocab_size, notices=notices,
    )  # fmt: skip


def _tensors(file: TorchFile, weights: Mapping[Any, Any]) -> dict[str, ForeignTensor]:
    found: dict[str, ForeignTensor] = {}
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, UnreadTensor):
            raise CheckpointError(f"{file.path}: model holds {str(key)[:60]!r}, which is no tensor")
        name = key.removeprefix(_COMPILED)
        if name in found:
            raise CheckpointError(f"{file.path}: model holds {name[:60]} twice")
        found[name] = ForeignTensor.stored(file, value)
    return found


def _is_tied(
    tensors: Mapping[str, ForeignTensor], weights: Mapping[Any, Any], file: TorchFile
) -> bool:
    """Whether the head is the token table: the same storage, or the same numbers."""
    if not {_HEAD, _TABLE} <= tensors.keys():
        raise CheckpointError(f"{file.path}: model lacks {_HEAD} or {_TABLE}: not nanoGPT's")
    head, table = (weights.get(name, weights.get(_COMPILED + name)) for name in (_HEAD, _TABLE))
    if head == table:
        return True
    if tensors[_HEAD].form != tensors[_TABLE].form:
        return False
    return torch.equal(tensors[_HEAD].read(), tensors[_TABLE].read())


def _model(args: ConfigFile, *, untied: bool) -> ModelConfig:
    bias, dropout = args.flag("bias", default=True), args.share("dropout", 0.0)
    layers, h, heads, positions, rows = map(
        args.size, ("n_layer", "n_embd", "n_head", "block_size", "vocab_size")
    )
    args.refuse_unknown()
    args.require_sound()
    return ModelConfig(
        num_layers=layers,
        hidden_size=h,
        num_attention_heads=heads,
        seq_length=positions,
        max_position_embeddings=positions,
        vocab_size=rows,
        layernorm_bias=bias,
        add_bias_linear=bias,
        gelu="erf",
        hidden_dropout=dropout,
        attention_dropout=dropout,
        untie_embeddings_and_output_weights=untied,
    )
