"""A checkpoint becomes a folder of Hugging Face's, one tensor at a time.

our pieces ─▶ one Hugging Face tensor, filled part by part ─▶ model-00001-of-00002.safetensors, index
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.adapters import AdapterSet
from megatron_lite.checkpoint.boxes import check_fit
from megatron_lite.checkpoint.huggingface.conversion import Conversion, conversions, in_files
from megatron_lite.checkpoint.huggingface.families import family_for
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.folder import CONFIG, INDEX, ONE_FILE
from megatron_lite.checkpoint.huggingface.names import Names
from megatron_lite.checkpoint.huggingface.pairs import by_halves, core_of, with_halves
from megatron_lite.checkpoint.huggingface.rotary_keys import with_plain_base
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.checkpoint.tensor_file import TORCH_DTYPES, TensorForm, write_bytes, write_stream
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.parallel.shard import MASTER, NamedSlice
from megatron_lite.storage.disk import Disk


@dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint that a family can express, and what it will be.

    trained: the model of the checkpoint; model: the same as it is written, see pairs.py.
    stored: our name -> the name of its most exact copy (the fp32 master, where there is one).
    adapters: what is merged into the weights.
    """

    store: Store
    manifest: Manifest
    family: Family
    trained: ModelConfig
    model: ModelConfig
    conversions: Sequence[Conversion]
    stored: Mapping[str, str]
    dtype: torch.dtype
    adapters: AdapterSet | None = None

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.form(conversion).bytes for conversion in self.conversions)

    def form(self, conversion: Conversion) -> TensorForm:
        """How a Hugging Face tensor is written."""
        return TensorForm(self.dtype, conversion.shape)

    def tensor(self, conversion: Conversion) -> Tensor:
        """One Hugging Face tensor, put together from the checkpoint's pieces."""
        core = core_of(self.trained)

        def fill(parts: Sequence[tuple[str, Tensor]]) -> None:
            slices = [_slice(self.stored[name], part) for name, part in parts]
            self.store.load(self.manifest, slices)
            for name, part in parts:
                if self.adapters is not None:
                    self.adapters.merge(name, part)
                by_halves(name, part, core)

        # sums are made in fp32 and rounded once
        made_in = self.dtype if self.adapters is None else torch.float32
        return conversion.join(made_in, fill).to(self.dtype)


def _slice(stored: str, data: Tensor) -> NamedSlice:
    return NamedSlice(stored, tuple(data.shape), (0,) * data.dim(), data)


def plan_export(
    store: Store,
    manifest: Manifest,
    model: ModelConfig,
    dtype: torch.dtype | None,
    *,
    family: str | None = None,
    names: Names | None = None,
    adapters: AdapterSet | None = None,
) -> Export:
    """What an export of a verified checkpoint writes; dtype: as stored if None.

    adapters: to be merged into it.

    family: a key of FAMILIES, the first that can express the model if None; names: those of another
    program instead of its own.
    Raises CheckpointError naming every flag that none of them can express.
    """
    folder, trained = store.folder(manifest.iteration), model
    model = with_plain_base(with_halves(model))
    chosen = family_for(model, family, str(folder))
    wanted = conversions(names or chosen.names, model)
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
    return Export(store, manifest, chosen, trained, model, wanted, stored, dtype, adapters)


def export_folder(
    export: Export,
    folder: Path,
    *,
    eod: int | None,
    bos: int | None = None,
    shard_bytes: int,
    disk: Disk,
) -> list[str]:
    """Write config.json and the safetensors files into an empty folder; the names of the files.

    eod: the id of the end-of-document token; bos: of the one that a text begins with, where the
    tokenizer names one.  The peak is one tensor and a piece of the checkpoint.
    """
    groups = in_files(export.conversions, lambda c: export.form(c).bytes, shard_bytes)
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
    dtype = str(export.dtype).removeprefix("torch.")
    config = export.family.config_out(export.model, eod=eod, dtype=dtype)
    config |= {} if bos is None else {"bos_token_id": bos}
    write_bytes(folder / CONFIG, json.dumps(config, indent=2).encode(), disk)
    return names
