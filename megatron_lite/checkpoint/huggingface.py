"""GPT-2 folders of Hugging Face, in and out, one tensor at a time; names by the table in models/gpt.py.

in    their files ─▶ one tensor of theirs ─▶ its one or three of ours ─▶ iter_0000000/, the pointer
out   our pieces ─▶ one tensor of theirs, filled part by part ─▶ model-00001-of-00002.safetensors, index
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.blueprint.parameters import parameter_table
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.checkpoint.boxes import check_fit
from megatron_lite.checkpoint.huggingface_config import config_of, model_of
from megatron_lite.checkpoint.manifest import NAME, TOKENIZER, Manifest, StoredPiece, StoredTensor
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import POINTER, Store
from megatron_lite.checkpoint.tensor_file import (
    SAFETENSORS_NAMES,
    TORCH_DTYPES,
    TensorForm,
    Written,
    write_bytes,
    write_stream,
)
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.models.gpt import huggingface_source
from megatron_lite.parallel.shard import MASTER, NamedSlice
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.reading import read_plain

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_BELOW = "transformer."
_HEAD = "lm_head.weight"
_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that old files keep beside the weights
_SHOWN = 20
_LARGEST_JSON = 1 << 28  # bytes


@dataclass(frozen=True, slots=True)
class Conversion:
    """One tensor of theirs and the one, or three fused, of ours that it is.

    shape: of theirs, [in, out] where transposed; ours: name -> shape, in the order of the parts.
    """

    theirs: str
    shape: tuple[int, ...]
    transposed: bool
    ours: Mapping[str, tuple[int, ...]]

    def parts(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Ours by name, as views of theirs."""
        turned = whole.t() if self.transposed else whole
        return zip(self.ours, turned.split([shape[0] for shape in self.ours.values()]), strict=True)


def conversions(model: ModelConfig) -> list[Conversion]:
    """Every tensor of the model, in the order of its definition."""
    assert model.vocab_size is not None
    table = parameter_table(
        model, cut_stages([model.num_layers]), padded_vocab_size=model.vocab_size
    )
    members: dict[str, list[tuple[int, str, tuple[int, ...], bool]]] = {}
    for spec in table:
        source = huggingface_source(spec.name)
        theirs = source.name if source.name == _HEAD else _BELOW + source.name
        member = (source.part or 0, spec.name, spec.shape, source.transposed)
        members.setdefault(theirs, []).append(member)
    found = []
    for theirs, parts in members.items():
        ours = {name: shape for _, name, shape, _ in sorted(parts)}
        _, _, (_, *columns), transposed = parts[0]
        shape = (sum(rows for rows, *_ in ours.values()), *columns)
        found.append(Conversion(theirs, shape[::-1] if transposed else shape, transposed, ours))
    return found


class Place(NamedTuple):
    """Where a tensor of theirs lies, and as what."""

    file: Path
    name: str
    form: TensorForm


@dataclass(frozen=True, slots=True)
class HuggingFaceFolder:
    """A folder that was read but for its tensors, and fits our GPT-2 whole.

    places: by their full names (older files leave out `transformer.`).
    notices: what differs and does not matter; config: what config.json says.
    """

    path: Path
    config: Mapping[str, Any]
    model: ModelConfig
    conversions: Sequence[Conversion]
    places: Mapping[str, Place]
    notices: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.places[c.theirs].form.bytes for c in self.conversions)


def open_folder(path: Path) -> HuggingFaceFolder:
    """Look through a GPT-2 folder.

    Raises CheckpointError naming the setting that our GPT-2 does not have, or listing the tensors
    that are missing, too many or of another shape.  Nothing is ever unpickled.
    """
    places = _places(path)
    config = _read_json(path / CONFIG)
    model, notices = model_of(config, path / CONFIG)
    # before a table is made of what config.json claims
    if model.num_layers > len(places):
        raise CheckpointError(
            f"{path / CONFIG} says n_layer {model.num_layers}, but the folder's files hold only "
            f"{len(places)} tensors: it belongs to another model, or a file is missing"
        )
    wanted = conversions(model)
    names = {conversion.theirs for conversion in wanted}
    wrong = []
    for conversion in wanted:
        place = places.get(conversion.theirs)
        if place is None:
            wrong.append(f"{conversion.theirs}: missing")
        elif place.form.shape != conversion.shape:
            wrong.append(
                f"{conversion.theirs}: {list(place.form.shape)} in {place.file.name}, "
                f"{list(conversion.shape)} by {CONFIG}"
            )
    strangers = [name for name in places if name not in names and not name.endswith(_MASKS)]
    if _HEAD in strangers:  # the tied head once more; transformers does not read it either
        strangers.remove(_HEAD)
        notices.append(f"{_HEAD} is left out: {CONFIG} ties it to wte.weight")
    wrong += [f"{name}: no tensor of GPT-2" for name in strangers]
    if wrong:
        more = f"\n  ... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = "\n  ".join(wrong[:_SHOWN])
        raise CheckpointError(
            f"{path} is no GPT-2 of its own {CONFIG} ({len(wrong)} tensors): take it from where it "
            f"came once more\n  {listed}{more}"
        )
    return HuggingFaceFolder(path, config, model, wanted, places, tuple(notices))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_plain(path, _LARGEST_JSON))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror} - check the path") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    return found


def _places(folder: Path) -> dict[str, Place]:
    """Every tensor of the folder's safetensors files by its full name."""
    index, one = folder / INDEX, folder / ONE_FILE
    if index.is_file():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise CheckpointError(f"{index} has no weight_map of names to files")
        for name in set(listed.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names the file {name!r}: refused, only a plain "
                                      "*.safetensors of its own folder is read")  # fmt: skip
        files = sorted(set(listed.values()))
    elif one.is_file():
        listed, files = None, [ONE_FILE]
    else:
        raise CheckpointError(_no_safetensors(folder))
    found: dict[str, Place] = {}
    for file in files:
        for name, form in _forms(folder / file).items():
            if listed is not None and listed.get(name) != file:
                raise CheckpointError(f"{folder / file} holds {name}, which {INDEX} places in "
                                      f"{listed.get(name)}: the folder is a mix of two")  # fmt: skip
            whole = name if name == _HEAD or name.startswith(_BELOW) else _BELOW + name
            if whole in found:
                raise CheckpointError(f"{folder / file} holds {name} twice")
            found[whole] = Place(folder / file, name, form)
    missing = sorted(set(listed or ()) - {place.name for place in found.values()})
    if missing:
        raise CheckpointError(f"{index} lists {missing[0]}, which its file does not hold")
    return found


def _no_safetensors(folder: Path) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin")) or sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if not pickled:
        return f"{folder} has neither {ONE_FILE} nor {INDEX}: copy the whole folder"
    return (
        f"{folder} holds its weights as {pickled[0]}, a pickle, which could run any program and is "
        f"never opened: convert it where you trust it, with transformers: "
        f"GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
    )


def _forms(path: Path) -> dict[str, TensorForm]:
    """The header of a file; the library checks it against the file's size."""
    found = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                piece = file.get_slice(name)
                dtype = TORCH_DTYPES.get(piece.get_dtype())
                if dtype is None or not dtype.is_floating_point:
                    raise CheckpointError(
                        f"{path}: {name} has the format {piece.get_dtype()}; weights are read in "
                        f"{', '.join(name for name, one in TORCH_DTYPES.items() if one.is_floating_point)}"
                    )
                found[name] = TensorForm(dtype, tuple(piece.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    return found


def _read(place: Place) -> Tensor:
    """One tensor; the file is closed again, so that its pages do not add up."""
    try:
        with safe_open(place.file, framework="pt", device="cpu") as file:
            return file.get_tensor(place.name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{place.file}: {place.name} cannot be read: {error}") from error


def import_folder(
    source: HuggingFaceFolder,
    root: Path,
    *,
    data: dict[str, Any],
    tokenizer: Mapping[str, bytes],
    facts: Mapping[str, Any],
    shard_bytes: int,
    disk: Disk,
) -> None:
    """Write iteration 0 and the pointer into a new folder of checkpoints.

    data: the data section, which names the tokenizer; tokenizer: its files, which are kept; facts:
    what the manifest says of it.
    root must not be looked for by anybody yet: the caller gives it its name when all is written.
    The peak is one tensor of theirs and one of ours.
    """
    folder = root / "iter_0000000"
    disk.make_folder(folder)
    groups = _groups(source.conversions, lambda c: source.places[c.theirs].form.bytes, shard_bytes)
    files: dict[str, Written] = {}
    tensors: dict[str, StoredTensor] = {}
    for number, group in enumerate(groups):
        name = f"weights-{number:05d}.safetensors"
        forms = {
            ours: TensorForm(source.places[c.theirs].form.dtype, shape)
            for c in group
            for ours, shape in c.ours.items()
        }
        parts = (part for c in group for _, part in c.parts(_read(source.places[c.theirs])))
        files[name] = write_stream(folder / name, forms, parts, disk)
        for ours, form in forms.items():
            piece = StoredPiece(name, ours, (0,) * len(form.shape), form.shape)
            tensors[ours] = StoredTensor(form.shape, SAFETENSORS_NAMES[form.dtype], (piece,))
    if tokenizer:
        disk.make_folder(folder / TOKENIZER)
    for name, content in tokenizer.items():
        files[f"{TOKENIZER}/{name}"] = write_bytes(folder / TOKENIZER / name, content, disk)
    if tokenizer:
        disk.sync_folder(folder / TOKENIZER)
    config = {"model": asdict(source.model), "data": data}
    manifest = Manifest(0, Progress(), config, files, tensors, dict(facts)).to_bytes()
    write_bytes(folder / NAME, manifest, disk)
    disk.sync_folder(folder)
    write_bytes(root / POINTER, b"0\n", disk)


@dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint of ours that GPT-2 can express, and what it will be.

    stored: our name -> the name of its most exact copy (the fp32 master, where there is one).
    """

    store: Store
    manifest: Manifest
    model: ModelConfig
    conversions: Sequence[Conversion]
    stored: Mapping[str, str]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.form(conversion).bytes for conversion in self.conversions)

    def form(self, conversion: Conversion) -> TensorForm:
        """How a tensor of theirs is written."""
        return TensorForm(self.dtype, conversion.shape)

    def tensor(self, conversion: Conversion) -> Tensor:
        """One tensor of theirs, put together from our pieces."""
        whole = torch.empty(conversion.shape, dtype=self.dtype)
        self.store.load(self.manifest, [
            _slice(self.stored[name], part) for name, part in conversion.parts(whole)
        ])  # fmt: skip
        return whole


def _slice(stored: str, data: Tensor) -> NamedSlice:
    return NamedSlice(stored, tuple(data.shape), (0,) * data.dim(), data)


def plan_export(
    store: Store, manifest: Manifest, model: ModelConfig, dtype: torch.dtype | None
) -> Export:
    """What an export of a verified checkpoint writes; dtype: as stored if None.

    Raises CheckpointError naming every flag that Hugging Face's GPT-2 cannot express.
    """
    folder = store.folder(manifest.iteration)
    config_of(model, torch.float32, eod=None, where=str(folder))
    wanted = conversions(model)
    stored = {
        name: MASTER + name if MASTER + name in manifest.tensors else name
        for conversion in wanted
        for name in conversion.ours
    }
    shapes = {name: shape for c in wanted for name, shape in c.ours.items()}
    check_fit(
        [_slice(stored[name], torch.empty(shape, device="meta")) for name, shape in shapes.items()],
        manifest, folder,
    )  # fmt: skip
    if dtype is None:
        dtype = TORCH_DTYPES[manifest.tensors[next(iter(stored.values()))].dtype]
    return Export(store, manifest, model, wanted, stored, dtype)


def export_folder(
    export: Export, folder: Path, *, eod: int | None, shard_bytes: int, disk: Disk
) -> list[str]:
    """Write config.json and the safetensors files into an empty folder; the names of the files.

    eod: the id of the end-of-document token.  The peak is one tensor of theirs and a piece of ours.
    """
    groups = _groups(export.conversions, lambda c: export.form(c).bytes, shard_bytes)
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        names = [ONE_FILE]
    for name, group in zip(names, groups, strict=True):
        write_stream(
            folder / name,
            {c.theirs: export.form(c) for c in group},
            (export.tensor(c) for c in group),
            disk,
            metadata={"format": "pt"},  # without it transformers refuses the file
        )
    if count > 1:
        places = {c.theirs: n for n, group in zip(names, groups, strict=True) for c in group}
        index = {"metadata": {"total_size": export.bytes}, "weight_map": places}
        write_bytes(folder / INDEX, json.dumps(index, indent=2).encode(), disk)
    config = config_of(export.model, export.dtype, eod=eod, where=str(export.store.root))
    write_bytes(folder / CONFIG, json.dumps(config, indent=2).encode(), disk)
    return names


def _groups(
    wanted: Iterable[Conversion], size: Callable[[Conversion], int], shard_bytes: int
) -> list[list[Conversion]]:
    """In order, each of at most so many bytes; one that is larger by itself stands alone."""
    groups: list[list[Conversion]] = [[]]
    held = 0
    for conversion in wanted:
        needed = size(conversion)
        if groups[-1] and held + needed > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(conversion)
        held += needed
    return groups
