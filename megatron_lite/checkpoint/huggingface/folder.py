"""A folder of Hugging Face's, looked through but for its tensors, of whichever family.

    config.json ─▶ family, model ─▶ every tensor that it must hold ─▶ where it lies, of which shape

Nothing is ever unpickled, and nothing that the folder brings along is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.checkpoint.huggingface.conversion import Conversion, conversions
from megatron_lite.checkpoint.huggingface.families import family_of
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.tensor_file import TORCH_DTYPES, TensorForm
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.rules.table import model_problems
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.storage.reading import open_plain, read_plain, require_plain

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHOWN = 20
_ROWS = 4096  # of a table, compared at once
_LARGEST_JSON = 1 << 28  # bytes


class Place(NamedTuple):
    """Where a tensor of the folder lies, and its format."""

    file: Path
    name: str
    form: TensorForm


@dataclass(frozen=True, slots=True)
class HuggingFaceFolder:
    """A folder that was read but for its tensors, and fits its family's model whole.

    places: by their full names (some files leave out the prefix).
    notices: what differs and does not matter; config: what config.json says.
    """

    path: Path
    family: Family
    config: Mapping[str, Any]
    model: ModelConfig
    conversions: Sequence[Conversion]
    places: Mapping[str, Place]
    notices: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.form(conversion).bytes for conversion in self.conversions)

    def form(self, conversion: Conversion) -> TensorForm:
        """How a tensor of the folder is stored."""
        return self.places[conversion.theirs].form

    def parts(self, conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors by name, from one tensor of the folder that is read for them."""
        return conversion.parts(_read(self.places[conversion.theirs]))


def open_folder(path: Path) -> HuggingFaceFolder:
    """Look through a folder of a family that FAMILIES has.

    Raises CheckpointError naming the setting that we do not have, or listing the tensors that are
    missing, too many or of another shape.
    """
    config = read_config_file(path / CONFIG)
    family = family_of(config, path / CONFIG)
    model, notices = family.read(config, path / CONFIG)
    places = _places(path, family)
    # before a table is made of what config.json claims
    if model.num_layers > len(places):
        raise CheckpointError(
            f"{path / CONFIG} says {model.num_layers} layers, but the folder's files hold only "
            f"{len(places)} tensors: it belongs to another model, or a file is missing"
        )
    if problems := model_problems(model):
        raise CheckpointError(
            f"{path / CONFIG}: no such model is built here: {'; '.join(problems)}"
        )
    wanted = conversions(family.names, model)
    _require_fit(path, family, wanted, places, notices)
    return HuggingFaceFolder(path, family, config, model, wanted, places, tuple(notices))


def _require_fit(
    path: Path,
    family: Family,
    wanted: Sequence[Conversion],
    places: Mapping[str, Place],
    notices: list[str],
) -> None:
    """Every tensor of the model is there in its shape, and no other; none is ever made up."""
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
    known, names = {conversion.theirs for conversion in wanted}, family.names
    strangers = [
        name for name in places if name not in known and not name.endswith(names.constants)
    ]
    if names.head in strangers:
        strangers.remove(names.head)
        tokens = f"{names.prefix}{names.outside['embedding.tokens']}.weight"
        if tokens in places and not _equal(places[names.head], places[tokens]):
            # transformers 5 computes with both of them, older ones with the table alone
            wrong.append(f"{names.head}: other values than {tokens}, to which {CONFIG} ties it; "
                         "tie_word_embeddings false keeps both")  # fmt: skip
        notices.append(f"{names.head} is left out: {CONFIG} ties it to {tokens}")
    wrong += [f"{name}: no tensor of {family.title}" for name in strangers]
    if wrong:
        more = f"\n  ... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = "\n  ".join(wrong[:_SHOWN])
        raise CheckpointError(
            f"{path} is no {family.title} of its own {CONFIG} ({len(wrong)} tensors): take it from "
            f"where it came once more\n  {listed}{more}"
        )


def read_config_file(path: Path) -> dict[str, Any]:
    """The object of a JSON file; CheckpointError where it is none."""
    try:
        found = json.loads(read_plain(path, _LARGEST_JSON))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror} - check the path") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    return found


def _places(folder: Path, family: Family) -> dict[str, Place]:
    """Every tensor of the folder's safetensors files by its full name."""
    index, one = folder / INDEX, folder / ONE_FILE
    if index.is_file():
        listed = read_config_file(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise CheckpointError(f"{index} has no weight_map of names to files")
        for name in set(listed.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names the file {name!r}: refused, only a plain "
                                      "*.safetensors of its own folder is read")  # fmt: skip
        files = sorted(set(listed.values()))
        if files and one.is_file() and ONE_FILE not in files:  # transformers reads that one
            raise CheckpointError(f"{folder} holds {ONE_FILE} and a {INDEX} of {files[0]}: "
                                  "which of them is the model? Remove the other")  # fmt: skip
    elif one.is_file():
        listed, files = None, [ONE_FILE]
    else:
        raise CheckpointError(_no_safetensors(folder, family))
    found: dict[str, Place] = {}
    for file in files:
        for name, form in _forms(folder / file).items():
            if listed is not None and listed.get(name) != file:
                raise CheckpointError(f"{folder / file} holds {name}, which {INDEX} places in "
                                      f"{listed.get(name)}: the folder is a mix of two")  # fmt: skip
            whole = family.names.full(name)
            if whole in found:
                raise CheckpointError(f"{folder / file} holds {name} twice")
            found[whole] = Place(folder / file, name, form)
    missing = sorted(set(listed or ()) - {place.name for place in found.values()})
    if missing:
        raise CheckpointError(f"{index} lists {missing[0]}, which its file does not hold")
    return found


def _no_safetensors(folder: Path, family: Family) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin")) or sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if not pickled:
        return f"{folder} has neither {ONE_FILE} nor {INDEX}: copy the whole folder"
    return (
        f"{folder} holds its weights as {pickled[0]}, a pickle, which could run any program and is "
        f"never opened: convert it where you trust it, with transformers: {family.architecture}."
        "from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
    )


def _forms(path: Path) -> dict[str, TensorForm]:
    """The header of a file; the library checks it against the file's size."""
    found = {}
    try:
        require_plain(path, path.stat())  # a named pipe would be waited for
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


def _equal(one: Place, other: Place) -> bool:
    """Whether two tables hold the same; some rows at a time are in memory."""
    if one.form.shape != other.form.shape or len(one.form.shape) != 2:
        return False
    with (
        safe_open(one.file, framework="pt", device="cpu") as first,
        safe_open(other.file, framework="pt", device="cpu") as second,
    ):
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        starts = range(0, one.form.shape[0], _ROWS)
        return all(
            torch.equal(a[at : at + _ROWS].double(), b[at : at + _ROWS].double()) for at in starts
        )


@torch.no_grad()
def fill_from_folder(source: HuggingFaceFolder, wanted: Iterable[NamedSlice]) -> None:
    """Copy the folder's tensors into this model's slices, one at a time; formats are converted.

    Every slice must be of one of the model's tensors; each of these is read once.
    """
    slices = {piece.name: piece for piece in wanted}
    for conversion in source.conversions:
        if not slices.keys() & conversion.ours.keys():
            continue
        for name, part in source.parts(conversion):
            piece = slices.pop(name, None)
            if piece is not None:
                box = tuple(
                    slice(start, start + length)
                    for start, length in zip(piece.offset, piece.data.shape, strict=True)
                )
                piece.data.copy_(part[box])
    assert not slices, f"no tensors of this model: {sorted(slices)}"


def read_tensors(path: Path, at_most: int, *, instead: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file of at most so many bytes; instead: what to do where it is missing."""
    try:
        open_plain(path, at_most).close()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {instead}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return {name: _read(Place(path, name, form)) for name, form in _forms(path).items()}
