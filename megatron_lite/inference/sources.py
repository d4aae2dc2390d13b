"""Where a trained model may lie, looked through but for its weights, with the adapters beside it.

run folder, iter_N folder ─▶ CheckpointSource      adapters: of the run itself, or of --adapter
folder of Hugging Face's  ─▶ FolderSource          adapters: of a folder of PEFT's
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_lite.checkpoint.adapters import AdapterSet, kept_adapters
from megatron_lite.checkpoint.base import base_of, open_base, require_base
from megatron_lite.checkpoint.choice import iterations, names_in
from megatron_lite.checkpoint.description import saved_adapters, saved_model, saved_section
from megatron_lite.checkpoint.huggingface.folder import (
    CONFIG,
    HuggingFaceFolder,
    fill_from_folder,
    open_folder,
)
from megatron_lite.checkpoint.huggingface.peft import ADAPTER_CONFIG, is_peft
from megatron_lite.checkpoint.huggingface.peft_reading import open_peft
from megatron_lite.checkpoint.manifest import NAME, TOKENIZER, Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.checkpoint.tensor_file import TORCH_DTYPES
from megatron_lite.config.errors import CheckpointError, ConfigError, DataError
from megatron_lite.config.rules.model_identity import model_differences
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.provenance import MadeWith, made_with
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import BEGINS
from megatron_lite.data.tokenizers.build import asked_vocab_size, build_tokenizer
from megatron_lite.data.tokenizers.exchange import files_beside_model
from megatron_lite.data.tokenizers.kept import from_kept
from megatron_lite.data.vocabulary import check_vocabulary, folder_tokenizer, part_of_model
from megatron_lite.models.parameters import TOKEN_TABLE
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice, exact_slices


class ModelSource(Protocol):
    """A trained model that was looked through; none of its weights has been read yet.

    notices: what is not as it should be, and does not keep it from being used.
    """

    @property
    def where(self) -> str:
        """For messages."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The model, vocab_size included."""
        ...

    @property
    def notices(self) -> Sequence[str]:
        """To be said."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """How its token table is stored, as the weights that training used are."""
        ...

    @property
    def adapters(self) -> AdapterSet | None:
        """What is trained beside its weights, where something is."""
        ...

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer's files lie, and those that say how it is spoken with."""
        ...

    def tokenizer(
        self, vocab_file: str | None = None, merge_file: str | None = None, *, allowed: bool = False
    ) -> tuple[Tokenizer, list[str]]:
        """Its own tokenizer, or GPT-2's of other files, and what to say about it; begins is the model's.

        allowed: one may be used that the model was not trained with.  Raises CheckpointError for a
        tokenizer that does not fit, DataError where there is none.
        """
        ...

    def fill(self, groups: Iterable[Sequence[NamedSlice]]) -> None:
        """Copy the stored weights into slices of them, in place, converting their format.

        The next group is asked for when one is filled.
        """
        ...


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A verified checkpoint of a run folder.

    adapters, base: where it holds adapters alone, these, and the checkpoint they were trained beside.
    """

    store: Store
    manifest: Manifest
    config: ModelConfig
    notices: Sequence[str]
    adapters: AdapterSet | None = None
    base: tuple[Store, Manifest] | None = None

    @property
    def weights(self) -> tuple[Store, Manifest]:
        """The checkpoint of the model itself."""
        return self.base or (self.store, self.manifest)

    @property
    def where(self) -> str:
        """Its iteration."""
        return f"checkpoint {self.manifest.iteration}"

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer's files lie, if it keeps any."""
        return self.store.folder(self.manifest.iteration) / TOKENIZER

    @property
    def dtype(self) -> torch.dtype:
        """Of the token table; fp32 masters beside it do not count."""
        table = self.weights[1].tensors.get(TOKEN_TABLE)
        return torch.float32 if table is None else TORCH_DTYPES[table.dtype]

    def data(self, vocab_file: str | None, merge_file: str | None) -> DataConfig:
        """The section that names its tokenizer; GPT-2's where other files are given."""
        folder = self.store.folder(self.manifest.iteration)
        kept = from_kept(
            saved_section(self.manifest, DataConfig, "data", folder), self.tokenizer_folder
        )
        return _with_files(kept, vocab_file, merge_file)

    def check_tokenizer(self, maker: MadeWith, *, foreign: bool, allowed: bool) -> list[str]:
        """What to say of a tokenizer beside this model; see check_vocabulary."""
        assert self.config.vocab_size is not None
        return check_vocabulary(
            self.manifest.tokenizer, self.config.vocab_size, maker,
            where=self.where, foreign=foreign, allowed=allowed,
        )  # fmt: skip

    def tokenizer(
        self, vocab_file: str | None = None, merge_file: str | None = None, *, allowed: bool = False
    ) -> tuple[Tokenizer, list[str]]:
        """The one it keeps; the run's own files where it is older than that."""
        foreign = _given(vocab_file, merge_file)
        data = self.data(vocab_file, merge_file)
        with nullcontext() if foreign else part_of_model():
            tokenizer = build_tokenizer(
                data, vocab_size=asked_vocab_size(data, self.config.vocab_size)
            )
        said = self.check_tokenizer(made_with(tokenizer, data), foreign=foreign, allowed=allowed)
        tokenizer.begins = () if foreign else tuple(self.manifest.tokenizer.get(BEGINS, ()))
        return tokenizer, said

    def fill(self, groups: Iterable[Sequence[NamedSlice]]) -> None:
        """From the fp32 masters, where there are any.  Collective over the store's ranks."""
        store, manifest = self.weights

        def exact() -> Iterator[Sequence[NamedSlice]]:
            for wanted in groups:
                own = _own(wanted, self.adapters)
                yield exact_slices(own, manifest.tensors)
                if self.adapters is not None:
                    self.adapters.check_base(own)

        store.load_in_turn(manifest, exact())


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder of Hugging Face's, read as it is."""

    found: HuggingFaceFolder
    adapters: AdapterSet | None = None

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.found.path)

    @property
    def tokenizer_folder(self) -> Path:
        """The same folder."""
        return self.found.path

    @property
    def config(self) -> ModelConfig:
        """As config.json says."""
        return self.found.model

    @property
    def notices(self) -> Sequence[str]:
        """What its family has to say about it."""
        return self.found.notices

    @property
    def dtype(self) -> torch.dtype:
        """Of the token table."""
        table = next(c for c in self.found.conversions if TOKEN_TABLE in c.ours)
        return self.found.form(table).dtype

    def tokenizer(
        self, vocab_file: str | None = None, merge_file: str | None = None, *, allowed: bool = False
    ) -> tuple[Tokenizer, list[str]]:
        """The one whose files lie beside the model."""
        path, rows = self.found.path, self.config.vocab_size
        assert rows is not None
        with part_of_model():
            own = folder_tokenizer(
                path, files_beside_model(path), self.found.config, rows=rows,
                positions=self.config.num_positions, default_ends=self.found.family.default_ends,
            )  # fmt: skip
        if _given(vocab_file, merge_file):
            data = _with_files(DataConfig(), vocab_file, merge_file)
            tokenizer = build_tokenizer(data)
            said = check_vocabulary(
                own.facts, rows, made_with(tokenizer, data),
                where=self.where, foreign=True, allowed=allowed,
            )  # fmt: skip
            return tokenizer, said
        if own.unseen is not None:
            raise own.unseen
        if own.tokenizer is None:
            raise DataError(f"{path} holds no tokenizer: give --vocab-file and --merge-file")
        return own.tokenizer, list(own.notices)

    def fill(self, groups: Iterable[Sequence[NamedSlice]]) -> None:
        """One Hugging Face tensor at a time."""
        for wanted in groups:
            own = _own(wanted, self.adapters)
            fill_from_folder(self.found, own)
            if self.adapters is not None:
                self.adapters.check_base(own)


def _own(wanted: Sequence[NamedSlice], adapters: AdapterSet | None) -> list[NamedSlice]:
    """Those of the model itself; the others are filled here."""
    if adapters is None:
        return list(wanted)
    adapters.fill(piece for piece in wanted if piece.name in adapters.tensors)
    return [piece for piece in wanted if piece.name not in adapters.tensors]


def is_huggingface(path: Path) -> bool:
    """Whether a folder is Hugging Face's and not a run folder; CheckpointError where it is neither."""
    names = names_in(path)
    theirs, ours = CONFIG in names, NAME in names or bool(iterations(path))
    if theirs == ours:
        what = "both config.json and" if ours else "neither config.json nor"
        raise CheckpointError(
            f"{path} holds {what} iter_* checkpoints: give the folder of one model of Hugging "
            "Face's, or a run folder; names on a hub are not downloaded"
        )
    return theirs


def find_model(
    path: Path, ctx: ParallelContext, *, step: int | None = None, adapter: Path | None = None
) -> ModelSource:
    """Look through a folder of either kind; raises CheckpointError where it is none, or not whole.

    adapter: a folder of adapters for it, PEFT's or a run's.
    """
    if not is_huggingface(path):
        found = find_checkpoint(path, ctx, step=step)
        return found if adapter is None else beside_checkpoint(found, adapter, ctx)
    if step is not None:
        raise ConfigError(f"--ckpt-step {step} is for run folders: {path} is one of Hugging Face's")
    source = FolderSource(open_folder(path))
    if adapter is None:
        return source
    if is_peft(adapter):
        return dataclasses.replace(source, adapters=open_peft(adapter, source.config))
    raise CheckpointError(
        f"--adapter {adapter} has no {ADAPTER_CONFIG}: beside a folder of Hugging Face's it is one of PEFT's; "
        "adapters of a run are found with the run itself, --load RUN"
    )


def beside_checkpoint(
    found: CheckpointSource, adapter: Path, ctx: ParallelContext
) -> CheckpointSource:
    """A model of ours with the adapters of a folder, PEFT's or another run's.  Collective over ctx."""
    if found.adapters is not None:
        raise CheckpointError(
            f"--adapter {adapter}: {found.adapters.where} holds adapters already: leave it out, or give "
            "the model they were trained beside"
        )
    if is_peft(adapter):
        return dataclasses.replace(found, adapters=open_peft(adapter, found.config))
    others = find_checkpoint(adapter, ctx, beside=found)
    if others.adapters is None:
        raise CheckpointError(f"--adapter {adapter} holds a whole model: give it with --load")
    if differ := model_differences(found.config, others.config):
        raise CheckpointError(
            f"--adapter {adapter} is of another model: {'; '.join(map(str, differ))}"
        )
    return dataclasses.replace(others, base=found.weights)


def find_checkpoint(
    path: Path,
    ctx: ParallelContext,
    *,
    step: int | None = None,
    beside: CheckpointSource | None = None,
) -> CheckpointSource:
    """The newest intact checkpoint of a run folder, that of a step, or the one that path is.

    beside: what adapters are to be used with, where that is not found by what they say.
    Collective over ctx, whose ranks verify it together.
    """
    root, step = _run_folder(path, step)
    store = Store(root, ctx)
    manifest, notices = store.newest_intact(step)
    if manifest is None:
        raise CheckpointError(f"{path} holds no checkpoint: check the path")
    folder = store.folder(manifest.iteration)
    model = saved_model(manifest, folder)
    if not saved_adapters(manifest, folder).on:
        return CheckpointSource(store, manifest, model, notices)
    said = base_of(manifest, folder)
    if beside is not None:
        require_base(said, beside.store.root, beside.manifest, root)
        base = beside.weights
    else:
        base = open_base(said, root, ctx)
    adapters = kept_adapters(store, manifest, model)
    return CheckpointSource(store, manifest, model, notices, adapters, base)


def _run_folder(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The run folder and the iteration that a path means."""
    if not (path / NAME).is_file():
        return path, step
    match = re.fullmatch(r"iter_(\d{7,})", path.resolve().name)
    if match is None:
        raise CheckpointError(
            f"{path} is one checkpoint under another name than iter_NNNNNNN, which says its "
            "iteration: give it its name back"
        )
    if step not in (None, int(match[1])):
        raise ConfigError(f"{path} is iteration {int(match[1])}, --ckpt-step says {step}")
    return path.resolve().parent, int(match[1])


def _given(*files: str | None) -> bool:
    return any(file is not None for file in files)


def _with_files(data: DataConfig, vocab_file: str | None, merge_file: str | None) -> DataConfig:
    if not _given(vocab_file, merge_file):
        return data
    return dataclasses.replace(
        data, tokenizer_type="GPT2BPETokenizer",
        vocab_file=vocab_file or data.vocab_file, merge_file=merge_file or data.merge_file,
    )  # fmt: skip
