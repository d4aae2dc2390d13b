"""Megatron-LM's torch_dist: .metadata (a pickle), *.distcp (tensors one after the other), common.pt (args).

    .metadata   state_dict_metadata   name -> format, global size, boxes
                storage_data          (name, box) -> file, offset, length
    *.distcp    at an offset: one tensor as torch.save writes it

Layers are one tensor with the layer as its first dim, or one each with its number in the name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.checkpoint.choice import POINTER
from megatron_lite.checkpoint.foreign.megatron_args import args_of, model_of
from megatron_lite.checkpoint.foreign.megatron_names import megatron_names
from megatron_lite.checkpoint.foreign.model import ForeignModel, ForeignTensor, fit_model
from megatron_lite.checkpoint.foreign.pickle_reader import PickleError, read_pickle
from megatron_lite.checkpoint.foreign.records import DTYPES_NAMED, Named, Record, UnreadTensor
from megatron_lite.checkpoint.foreign.torch_file import LARGEST_PICKLE, open_torch_file
from megatron_lite.checkpoint.manifest import NAME as MANIFEST
from megatron_lite.checkpoint.tensor_file import TensorForm
from megatron_lite.config.errors import CheckpointError
from megatron_lite.storage.reading import read_plain

_METADATA, _COMMON, _BACKEND = ".metadata", "common.pt", "metadata.json"
_TITLE = "Megatron-LM"
_OURS = ("embedding.", "decoder.", "output_layer.")
_LEFT_OUT = re.compile(
    r"(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state_machine|iteration|args)\b"
)
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_SAME = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
"""A norm that is fused with the matrix behind it -> the same norm by itself."""


class _Box(NamedTuple):
    """A box of a global tensor, and where it lies."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int


class _Global(NamedTuple):
    """A tensor of the whole model."""

    name: str
    form: TensorForm
    boxes: Sequence[_Box]


def torch_dist_folder(path: Path) -> Path | None:
    """The folder of one iteration that a path means: itself, or the one that the tracker file names."""
    if _is_theirs(path):
        return path
    try:
        said = read_plain(path / POINTER, 100).decode("ascii", "replace").strip()
    except (OSError, CheckpointError):
        return None
    inside = path / (
        f"iter_{int(said):07d}" if re.fullmatch(r"\d{1,12}", said, re.A) else "release"
    )
    return inside if _is_theirs(inside) else None


def _is_theirs(folder: Path) -> bool:
    """A checkpoint of ours is ours, whatever else was put beside it."""
    ours = (folder / MANIFEST).exists() or any(folder.glob(f"iter_*/{MANIFEST}"))
    return (folder / _METADATA).is_file() and not ours


def is_torch_dist(path: Path) -> bool:
    """Whether it is such a folder, or a folder of them."""
    return path.is_dir() and torch_dist_folder(path) is not None


def open_torch_dist(path: Path, *, vocab_size: int | None = None) -> ForeignModel:
    """Look through a checkpoint; vocab_size: keep so many rows of the token table.

    Raises CheckpointError for one that is none, damaged, or of a model that we do not have.
    """
    folder = torch_dist_folder(path)
    assert folder is not None, path
    _check_backend(folder)
    common = open_torch_file(folder / _COMMON).value
    if not isinstance(common, dict):
        raise CheckpointError(f"{folder / _COMMON} holds no table by name")
    model = model_of(args_of(common.get("args"), folder / _COMMON))
    tensors: dict[str, ForeignTensor] = {}
    for whole in _globals(folder):
        tensors |= _by_layer(whole, model.num_layers)
    return fit_model(
        folder, _TITLE, model, megatron_names(model), tensors,
        iteration=common.get("iteration"), vocab_size=vocab_size,
    )  # fmt: skip


def _check_backend(folder: Path) -> None:
    if not (folder / _BACKEND).is_file():
        return
    try:
        said = json.loads(read_plain(folder / _BACKEND, 1 << 20))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / _BACKEND} cannot be read: {error}") from None
    if said != "torch_dist":
        raise CheckpointError(
            f"{folder} is of the format {str(said)[:40]!r}: only torch_dist is read"
        )


# -- metadata -----------------------------------------------------------------------------------


def _globals(folder: Path) -> list[_Global]:
    """Every tensor of the model; CheckpointError where the metadata do not say where all of it lies."""
    path = folder / _METADATA
    try:
        root = read_pickle(read_plain(path, LARGEST_PICKLE)).value
        values = root.values if isinstance(root, Record) else {}
        stored, described = values["storage_data"], values["state_dict_metadata"]
        places = {_key(key): value for key, value in stored.items() if isinstance(key, Record)}
        found = []
        for name, record in described.items():
            if "chunks" not in record.values or _LEFT_OUT.match(name):
                continue  # bytes: Transformer Engine's extra state, and what belongs to the training
            if not name.startswith(_OURS):
                raise CheckpointError(
                    f"{path}: {name[:120]}: no tensor of a GPT or Llama of {_TITLE}"
                )
            found.append(_global(folder, name, record, places))
        return found
    except PickleError as error:
        raise CheckpointError(f"{path} is damaged or no pickle of torch's: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} does not say of every tensor where it lies ({type(error).__name__}: "
            f"{str(error)[:100]}): take it from where it came once more"
        ) from None


def _key(index: Record) -> tuple[str, tuple[int, ...] | None]:
    offset = index.values.get("offset")
    return index.values["fqn"], None if offset is None else _sizes(offset)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{str(value)[:60]} are no sizes")
    return value


def _global(folder: Path, name: str, record: Record, places: Mapping[Any, Any]) -> _Global:
    said = record.values
    shape, boxes = _sizes(said["size"]), []
    for chunk in said["chunks"]:
        offset, size = _sizes(chunk.values["offsets"]), _sizes(chunk.values["sizes"])
        place = places[name, offset].values
        file = place["relative_path"]
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".distcp"):
            raise CheckpointError(f"{folder / _METADATA} names the file {str(file)[:60]!r}: refused, only "
                                  "a plain *.distcp of its own folder is read")  # fmt: skip
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{folder / _METADATA}: {name} is packed "
                                  f"({str(place['transform_descriptors'])[:40]})")  # fmt: skip
        if not all(a + n <= whole for a, n, whole in zip(offset, size, shape, strict=True)):
            raise ValueError(f"a box of {name[:60]} reaches beyond it")
        start, length = _sizes((place["offset"], place["length"]))
        boxes.append(_Box(offset, size, folder / file, start, length))
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        raise ValueError(f"the boxes of {name[:60]} are not the whole of it")
    return _Global(name, TensorForm(_dtype(said["properties"]), shape), boxes)


def _dtype(properties: Record) -> torch.dtype:
    """TensorProperties puts down a tuple that begins with it, or attributes by name."""
    state = properties.state[0]
    said = properties.values.get("dtype") if isinstance(state, dict) else state[0]
    if not isinstance(said, Named):
        raise TypeError("a tensor without a number format")
    return DTYPES_NAMED[said.name]


# -- tensors ------------------------------------------------------------------------------------


def _by_layer(whole: _Global, layers: int) -> dict[str, ForeignTensor]:
    """The tensors of our figure that one of the checkpoint is: one for each layer where they are stacked."""
    stacked = _STACKED.fullmatch(whole.name)
    shape = whole.form.shape
    if stacked is None:
        head, _, tail = whole.name.partition("decoder.layers.")
        layer, _, module = tail.partition(".")
        name = (
            f"decoder.layers.{layer}.{_SAME.get(module, module)}"
            if tail and not head
            else whole.name
        )
        return {name: ForeignTensor(whole.form, lambda: _read(whole, (0,) * len(shape), shape))}
    if not shape or shape[0] != layers:
        raise CheckpointError(
            f"{whole.boxes[0].file.parent}: {whole.name} is {list(shape)}, args.num_layers is {layers}"
        )
    module = _SAME.get(stacked[1], stacked[1])
    return {
        f"decoder.layers.{n}.{module}": ForeignTensor(
            TensorForm(whole.form.dtype, shape[1:]), _layer_reader(whole, n)
        )
        for n in range(layers)
    }


def _layer_reader(whole: _Global, layer: int) -> Any:
    rest = whole.form.shape[1:]
    return lambda: _read(whole, (layer, *(0,) * len(rest)), (1, *rest))[0]


def _read(whole: _Global, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A box of a global tensor, from all those in the files that meet it."""
    found = torch.empty(shape, dtype=whole.form.dtype)
    seen = torch.zeros(shape, dtype=torch.bool)
    for box in whole.boxes:
        low = [max(a, b) for a, b in zip(offset, box.offset, strict=True)]
        high = [
            min(a + n, b + m)
            for a, n, b, m in zip(offset, shape, box.offset, box.shape, strict=True)
        ]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
        there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, box.offset, strict=True))
        found[here] = _box(whole, box)[there]
        seen[here] = True
    if not seen.all():
        raise CheckpointError(
            f"{whole.boxes[0].file.parent}: the boxes of {whole.name} leave some of it out"
        )
    return found


def _box(whole: _Global, box: _Box) -> Tensor:
    file = open_torch_file(box.file, start=box.start, length=box.length)
    value = file.value
    if (
        not isinstance(value, UnreadTensor)
        or value.shape != box.shape
        or value.dtype != whole.form.dtype
    ):
        raise CheckpointError(
            f"{box.file}: at byte {box.start} lies not the box {list(box.shape)} of {whole.name} that "
            f"{_METADATA} says: the folder is a mix of two"
        )
    return file.read(value)
