"""Megatron-DeepSpeed's files of each rank: global_stepN/ with one file of torch.save for each, or each layer.

    mp_rank_TP_model_states.pt                 args, iteration; without a pipeline the whole model, nested
    layer_NN-model_TP-model_states.pt          with a pipeline: embedding, each layer, the norm, the head

Each tensor parallel rank keeps its rows (or columns) of a matrix; with a gate it keeps its rows of the gate
above its rows of what is gated.  Layers are known by what they hold: their numbers begin where they begin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.foreign.megatron_args import args_of, model_of
from megatron_lite.checkpoint.foreign.megatron_names import is_gated, megatron_names
from megatron_lite.checkpoint.foreign.model import ForeignModel, ForeignTensor, fit_model
from megatron_lite.checkpoint.foreign.records import UnreadTensor
from megatron_lite.checkpoint.foreign.torch_file import TorchFile, open_torch_file
from megatron_lite.checkpoint.tensor_file import TensorForm
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.storage.reading import read_plain

_TITLE = "Megatron-DeepSpeed"
_STATES = re.compile(r"mp_rank_(\d{2,5})_model_states\.pt", re.ASCII)
_LAYER = re.compile(r"layer_(\d{2,5})-model_(\d{2,5})-model_states\.pt", re.ASCII)
_DEEPEST = 8
_MODULES = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
"""Its modules -> Megatron core's, where they are called otherwise."""
_OUTSIDE = {
    "word_embeddings.weight": "embedding.word_embeddings.weight",
    "position_embeddings.weight": "embedding.position_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "output_layer.weight": "output_layer.weight",
    "final_layernorm.weight": "decoder.final_layernorm.weight",
    "final_layernorm.bias": "decoder.final_layernorm.bias",
}
_WHOLE_MODEL = re.compile(
    r"(?:language_model\.)?(?:embedding\.|(?:encoder|transformer|decoder)\.)?"
    r"(?:layers\.(\d{1,5})\.)?(.+)", re.ASCII
)  # fmt: skip
_BY_ROWS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias",
            "word_embeddings.weight", "output_layer.weight")  # fmt: skip
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_NONE_OF_OURS = (".rotary_emb.inv_freq", "_extra_state")

Shards = dict[str, list[tuple[TorchFile, UnreadTensor]]]
"""Megatron core's name -> the share of each tensor parallel rank."""


def deepspeed_folder(path: Path) -> Path | None:
    """The global_stepN folder that a path means: itself, or the one that `latest` names."""
    if path.is_dir() and any(_STATES.fullmatch(file.name) for file in path.iterdir()):
        return path
    try:
        said = read_plain(path / "latest", 100).decode("ascii", "replace").strip()
    except (OSError, CheckpointError):
        return None
    if re.fullmatch(r"global_step\d{1,12}", said, re.ASCII) is None:
        return None
    inside = path / said
    known = inside.is_dir() and any(_STATES.fullmatch(file.name) for file in inside.iterdir())
    return inside if known else None


def is_deepspeed(path: Path) -> bool:
    """Whether it is such a folder, or a folder of them."""
    return path.is_dir() and deepspeed_folder(path) is not None


def open_deepspeed(path: Path, *, vocab_size: int | None = None) -> ForeignModel:
    """Look through a checkpoint; vocab_size: keep so many rows of the token table.

    Raises CheckpointError for one that is none, damaged, or of a model that we do not have.
    """
    folder = deepspeed_folder(path)
    assert folder is not None, path
    states = {
        int(match[1]): file
        for file in folder.iterdir()
        if (match := _STATES.fullmatch(file.name)) is not None
    }
    first = open_torch_file(states[min(states)])
    said = first.value if isinstance(first.value, dict) else {}
    args = args_of(said.get("args"), first.path)
    model = model_of(args)
    tp = args.size("tensor_model_parallel_size", 1)
    if tp > 4096:
        raise CheckpointError(f"{first.path}: args.tensor_model_parallel_size {tp}: no such model")
    layers = any(_LAYER.fullmatch(file.name) for file in folder.iterdir())
    shards = _from_layers(folder, tp) if layers else _from_ranks(states, tp, folder)
    tensors = {name: _joined(name, shares, tp, model) for name, shares in shards.items()}
    _tie(tensors, model, folder)
    return fit_model(
        folder, _TITLE, model, megatron_names(model), tensors,
        iteration=said.get("iteration"), vocab_size=vocab_size,
    )  # fmt: skip


# -- files --------------------------------------------------------------------------------------


def _from_layers(folder: Path, tp: int) -> Shards:
    """A file for each layer and rank, in the order of the computation."""
    files: dict[int, dict[int, Path]] = {}
    for file in folder.iterdir():
        if (match := _LAYER.fullmatch(file.name)) is not None:
            files.setdefault(int(match[1]), {})[int(match[2])] = file
    found: Shards = {}
    layer = 0
    for number in sorted(files):
        if sorted(files[number]) != list(range(tp)):
            raise CheckpointError(
                f"{folder}: of layer_{number:02d} there are the files of the ranks "
                f"{sorted(files[number])}, args say {tp}: copy all of it"
            )
        inside = [_table(open_torch_file(files[number][rank])) for rank in range(tp)]
        is_layer = any(name.startswith("self_attention.") for name in inside[0][1])
        for name in inside[0][1]:
            whole = f"decoder.layers.{layer}.{_module(name)}" if is_layer else _outside(name)
            if name.endswith(_NONE_OF_OURS):
                continue
            shares = _shares(name, inside)
            if whole in found and whole == "embedding.word_embeddings.weight":
                continue  # the tied head's copy
            if whole in found:
                raise CheckpointError(f"{folder}: layer_{number:02d} holds {whole} once more")
            found[whole] = shares
        layer += is_layer
    return found


def _from_ranks(states: Mapping[int, Path], tp: int, folder: Path) -> Shards:
    """Every rank's whole model in its one file."""
    if sorted(states) != list(range(tp)):
        raise CheckpointError(
            f"{folder} has the files mp_rank_* of the ranks {sorted(states)}, args say {tp} tensor parallel "
            "ranks: with pipeline stages there must be layer_* files; copy all of it"
        )
    inside = []
    for rank in range(tp):
        file = open_torch_file(states[rank])
        value = file.value.get("module") if isinstance(file.value, dict) else None
        inside.append((file, dict(_flat(value, file.path, ""))))
    found: Shards = {}
    for name in inside[0][1]:
        if name.endswith(_NONE_OF_OURS):
            continue
        match = _WHOLE_MODEL.fullmatch(name.removeprefix("word_embeddings_for_head."))
        assert match is not None, name
        inner = match[2]
        whole = (
            _outside(inner)
            if match[1] is None
            else f"decoder.layers.{int(match[1])}.{_module(inner)}"
        )
        if name.startswith("word_embeddings_for_head."):
            whole = "output_layer.weight"
        if whole in found:
            raise CheckpointError(f"{folder}: {whole} is there twice")
        found[whole] = _shares(name, inside)
    return found


def _flat(value: Any, path: Path, before: str) -> Any:
    """Nested tables as names with dots."""
    if not isinstance(value, dict) or before.count(".") > _DEEPEST:
        raise CheckpointError(
            f"{path}: module holds {before[:60] or 'nothing'}, which is no table of tensors"
        )
    for key, inner in value.items():
        name = f"{before}{key}"
        if isinstance(inner, UnreadTensor):
            yield name, inner
        elif inner is not None:
            yield from _flat(inner, path, f"{name}.")


def _table(file: TorchFile) -> tuple[TorchFile, dict[str, UnreadTensor]]:
    return file, dict(_flat(file.value, file.path, ""))


def _shares(
    name: str, inside: Sequence[tuple[TorchFile, Mapping[str, UnreadTensor]]]
) -> list[tuple[TorchFile, UnreadTensor]]:
    for file, table in inside:
        if name not in table:
            raise CheckpointError(
                f"{file.path} lacks {name[:80]}, which another rank has: copy all of it"
            )
    return [(file, table[name]) for file, table in inside]


def _module(name: str) -> str:
    """A module of a layer by Megatron core's name."""
    module, _, leaf = name.rpartition(".")
    return f"{_MODULES.get(module, module)}.{leaf}"


def _outside(name: str) -> str:
    """What is in no layer; a file of the norm alone has nothing but weight and bias."""
    if name in ("weight", "bias"):
        return f"decoder.final_layernorm.{name}"
    return _OUTSIDE.get(name, name)


# -- tensors ------------------------------------------------------------------------------------


def _joined(
    name: str, shares: Sequence[tuple[TorchFile, UnreadTensor]], tp: int, model: ModelConfig
) -> ForeignTensor:
    """The tensor of all ranks; what each has whole is the first one's."""
    file, tensor = shares[0]
    form = TensorForm(tensor.dtype, tensor.shape)
    if tp == 1 or not name.endswith((*_BY_ROWS, *_BY_COLUMNS)):
        return ForeignTensor(form, lambda: file.read(tensor))
    for other, share in shares:
        if (share.dtype, share.shape) != (tensor.dtype, tensor.shape) or not tensor.shape:
            raise CheckpointError(
                f"{other.path}: {name} is {list(share.shape)}, rank 0 has {list(tensor.shape)}"
            )
    dim = 1 if name.endswith(_BY_COLUMNS) else 0
    if len(tensor.shape) <= dim:
        raise CheckpointError(f"{file.path}: {name} is {list(tensor.shape)}, no matrix")
    shape = tuple(n * tp if d == dim else n for d, n in enumerate(tensor.shape))
    gated = is_gated(model) and "linear_fc1" in name
    return ForeignTensor(TensorForm(tensor.dtype, shape), _reader(shares, dim, gated=gated))


def _reader(
    shares: Sequence[tuple[TorchFile, UnreadTensor]], dim: int, *, gated: bool
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        parts = [file.read(tensor) for file, tensor in shares]
        if gated:
            halves = [part.chunk(2) for part in parts]
            return torch.cat([half[n] for n in (0, 1) for half in halves])
        return torch.cat(parts, dim)

    return read


def _tie(tensors: dict[str, ForeignTensor], model: ModelConfig, folder: Path) -> None:
    """A tied head's copy of the table is left out; it must be one."""
    head, table = (
        tensors.get("output_layer.weight"),
        tensors.get("embedding.word_embeddings.weight"),
    )
    if model.untie_embeddings_and_output_weights or head is None or table is None:
        return
    if head.form != table.form or not torch.equal(head.read(), table.read()):
        raise CheckpointError(
            f"{folder}: args tie the head to the token table, and the two differ: it is a mix of two"
        )
    del tensors["output_layer.weight"]
