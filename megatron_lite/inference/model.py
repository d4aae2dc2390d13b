"""A trained model and its tokenizer, from wherever they lie, in the number format they are kept in.

    run folder, iter_N folder ─▶ CheckpointSource ┐
                                                  ├─▶ build_model ─▶ Decoder
    folder of Hugging Face's  ─▶ FolderSource     ┘

`load_model` does it all; a tool that wants to speak in between takes the steps one by one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_lite.blueprint.batches import padded_vocab_size
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.checkpoint.choice import iterations, names_in
from megatron_lite.checkpoint.description import saved_model, saved_section
from megatron_lite.checkpoint.huggingface.folder import (
    CONFIG,
    HuggingFaceFolder,
    fill_from_folder,
    open_folder,
)
from megatron_lite.checkpoint.manifest import NAME, TOKENIZER, Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.checkpoint.tensor_file import TORCH_DTYPES
from megatron_lite.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    all_together,
)
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.data.provenance import MadeWith, made_with
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.build import asked_vocab_size, build_tokenizer
from megatron_lite.data.tokenizers.exchange import files_beside_model
from megatron_lite.data.tokenizers.kept import from_kept
from megatron_lite.data.vocabulary import check_vocabulary, folder_tokenizer, part_of_model
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import TOKEN_TABLE, local_parameters
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice, exact_slices, weight_slices

PRECISIONS = {
    torch.float32: PrecisionConfig(),
    torch.float16: PrecisionConfig(fp16=True),
    torch.bfloat16: PrecisionConfig(bf16=True),
}
"""The number formats in which a model computes."""


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
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer's files lie, and those that say how it is spoken with."""
        ...

    def tokenizer(
        self, vocab_file: str | None = None, merge_file: str | None = None, *, allowed: bool = False
    ) -> tuple[Tokenizer, list[str]]:
        """Its own tokenizer, or GPT-2's of other files, and what to say about it.

        allowed: one may be used that the model was not trained with.  Raises CheckpointError for a
        tokenizer that does not fit, DataError where there is none.
        """
        ...

    def fill(self, wanted: Sequence[NamedSlice]) -> None:
        """Copy the stored weights into slices of them, in place, converting their format."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A verified checkpoint of a run folder."""

    store: Store
    manifest: Manifest
    config: ModelConfig
    notices: Sequence[str]

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
        table = self.manifest.tensors.get(TOKEN_TABLE)
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
        return tokenizer, said

    def fill(self, wanted: Sequence[NamedSlice]) -> None:
        """From the fp32 masters, where there are any.  Collective over the store's ranks."""
        self.store.load(self.manifest, exact_slices(wanted, self.manifest.tensors))


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder of Hugging Face's, read as it is."""

    found: HuggingFaceFolder

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

    def fill(self, wanted: Sequence[NamedSlice]) -> None:
        """One Hugging Face tensor at a time."""
        fill_from_folder(self.found, wanted)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be used, its tokenizer, and what there was to say about them."""

    model: Decoder
    tokenizer: Tokenizer
    notices: tuple[str, ...]


def load_model(
    path: Path,
    ctx: ParallelContext | None = None,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """The model of a run folder, of one iter_N folder of it, or of a folder of Hugging Face's.

    ctx: whose tp and pp ranks share the model, this process on a CPU by default.  step: that iteration
    of a run, the newest by default.  dtype: a key of PRECISIONS, by default the format in which the
    folder holds its weights.  Raises CheckpointError for what is no such folder or damaged.
    """
    ctx = ctx or ParallelContext.serial()
    source = find_model(path, ctx, step=step)
    tokenizer, said = source.tokenizer()
    return LoadedModel(build_model(source, ctx, dtype=dtype), tokenizer, (*source.notices, *said))


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


def find_model(path: Path, ctx: ParallelContext, *, step: int | None = None) -> ModelSource:
    """Look through a folder of either kind; raises CheckpointError where it is none, or not whole."""
    if not is_huggingface(path):
        return find_checkpoint(path, ctx, step=step)
    if step is not None:
        raise ConfigError(f"--ckpt-step {step} is for run folders: {path} is one of Hugging Face's")
    return FolderSource(open_folder(path))


def find_checkpoint(
    path: Path, ctx: ParallelContext, *, step: int | None = None
) -> CheckpointSource:
    """The newest intact checkpoint of a run folder, that of a step, or the one that path is.

    Collective over ctx, whose ranks verify it together.
    """
    root, step = _run_folder(path, step)
    store = Store(root, ctx)
    manifest, notices = store.newest_intact(step)
    if manifest is None:
        raise CheckpointError(f"{path} holds no checkpoint: check the path")
    model = saved_model(manifest, store.folder(manifest.iteration))
    return CheckpointSource(store, manifest, model, notices)


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


def build_model(
    source: ModelSource, ctx: ParallelContext, *, dtype: torch.dtype | None = None
) -> Decoder:
    """This rank's stage of a model, all of it where there is no pipeline, in that format, or the source's own.

    Peak: the stage, and one tensor of a file.  The ranks of ctx.tp share each matrix, those of ctx.pp
    the layers.  Raises NumericsError for a value that is not finite.
    """
    if dtype not in (None, *PRECISIONS):
        raise ConfigError(f"{dtype}: a model computes in {', '.join(map(str, PRECISIONS))}")
    config = source.config
    assert config.vocab_size is not None
    require_layout(config, ctx.tp.size, ctx.pp.size)
    placed = cut_stages(_even_counts(config.num_layers, ctx.pp.size))[ctx.pp.rank]
    stage = StageContext(
        config,
        ctx,
        padded_vocab_size=padded_vocab_size(
            config.vocab_size, config.make_vocab_size_divisible_by, ctx.tp.size
        ),
        vocab_size=config.vocab_size,
        # formats in which nothing computes (fp64) are rounded
        precision=PRECISIONS.get(dtype or source.dtype, PRECISIONS[torch.float32]),
    )
    model = Decoder(
        stage, placed.layers, has_embedding=placed.has_embedding, has_head=placed.has_head
    )
    slices = list(weight_slices(local_parameters(model), ctx, owned=False))
    source.fill(slices)
    for piece in slices:
        # the extremes of values with a NaN are NaN; isfinite of all would make two copies
        if piece.data.numel() and not all(edge.isfinite() for edge in piece.data.aminmax()):
            raise NumericsError(
                f"{source.where}: {piece.name} holds values that are not finite - take another copy, "
                "or an older checkpoint with --ckpt-step"
            )
    return model.eval()


def require_layout(config: ModelConfig, tp: int, pp: int) -> None:
    """ConfigError where the model's heads and layers cannot be shared by so many ranks."""
    problems = [
        f"{what} {number} cannot be split over --tensor-model-parallel-size {tp}: choose a divisor"
        for what, number in (
            ("attention heads", config.num_attention_heads),
            ("key and value heads", config.num_kv_heads),
            ("feed-forward features", config.ffn_size),
        )
        if number % tp
    ]
    if pp > config.num_layers:
        problems.append(
            f"--pipeline-model-parallel-size {pp}: the model has {config.num_layers} layers, and "
            "every stage wants one"
        )
    if problems:
        raise all_together(problems, "with the layout")


def _even_counts(layers: int, stages: int) -> list[int]:
    """Layers of each stage; those in the middle take what is over, as the ends have the vocabulary."""
    whole, over = divmod(layers, stages)
    first = (stages - over) // 2
    return [whole + (first <= stage < first + over) for stage in range(stages)]
