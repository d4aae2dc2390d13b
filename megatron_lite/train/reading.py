"""What a run reads: datasets opened the same way on all ranks, from the checkpoint's position on.

A run ends where its flags say (blueprint/length.py), or where data that are read once do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_lite.blueprint.batches import BatchSchedule
from megatron_lite.blueprint.length import Length, SampleCounts, sample_counts
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.errors import DataError, MegatronLiteError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.data.build import Datasets
from megatron_lite.data.documents import DocumentEnds
from megatron_lite.data.identity import Identity, identity_of
from megatron_lite.data.loader import Loader
from megatron_lite.data.overview import overview
from megatron_lite.data.preparing.check import verify_blends
from megatron_lite.data.provenance import MadeWith
from megatron_lite.data.sampler import OrderKind
from megatron_lite.data.samples import Samples
from megatron_lite.data.sources import kind_for
from megatron_lite.parallel.collectives import MAX, all_reduce
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.launch import Launch, World, wait_for_all
from megatron_lite.train.compatibility import check_data
from megatron_lite.train.ending.faults import Fault, NoFaults
from megatron_lite.train.feed import permutation, pinned_on
from megatron_lite.train.measuring.log import Log
from megatron_lite.train.patience import told


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What training needs to know of the tokenizer.

    asked: what --vocab-size said, to which NullTokenizer adds its EOD.  made_with: itself, beside
    what the token files say; end_of_document: its eod in words; files: their content by name, to be
    kept with every checkpoint.
    """

    vocab_size: int
    eod: int | None
    asked: int | None = None
    made_with: MadeWith = dataclasses.field(default_factory=MadeWith)
    end_of_document: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Loaders:
    """This dp rank's readers; None where a split is not read."""

    train: Loader | None
    valid: Loader | None
    test: Loader | None

    def close(self) -> None:
        """Stop their threads."""
        for loader in (self.train, self.valid, self.test):
            if loader is not None:
                loader.close()


def open_datasets(
    config: RunConfig,
    launch: Launch,
    log: Log,
    tokens: TokenizerFacts,
    folder: Path,
    batches: BatchSchedule,
    progress: Progress,
    world: World,
    faults: Fault | NoFaults,
) -> Datasets:
    """Build or load what the run reads.  Collective over the world."""
    counts = sample_counts(config.train, batches, validation_samples=progress.validation_samples)
    cache = config.data.data_cache_path or folder / "index-cache"
    log.say(
        "> building train, validation, and test datasets ...",
        " > datasets target sizes (minimum size):",
        f"    train:      {counts['train_samples']}",
        f"    validation: {counts['valid_samples']}",
        f"    test:       {counts['test_samples']}",
    )

    kind = kind_for(config.train.objective)

    def build() -> Datasets:
        faults.at("data")
        if config.data.verify_data and launch.local_rank == 0:  # once per node
            log.say(*verify_blends(config.data, vocab_size=tokens.vocab_size))
        return kind.build(
            config.data,
            seq_length=config.model.seq_length,
            seed=config.train.seed,
            vocab_size=tokens.vocab_size,
            eod=tokens.eod,
            cache_folder=cache,
            tokenizer=tokens.made_with,
            **counts,
        )

    with told("opening the data", log.say):
        datasets = _in_turn(build, launch, log.ctx, world)
    log.say(*overview(datasets), *datasets.notices, *_read_again(datasets, counts))
    return datasets


def _read_again(datasets: Datasets, counts: SampleCounts) -> list[str]:
    """A line for each evaluation whose data, every one of them once, are fewer than it reads."""
    asked = {
        "validation": (datasets.valid, counts["valid_samples"]),
        "test": (datasets.test, counts["test_samples"]),
    }
    return [
        f" > {split}: {len(dataset)} samples are there and {count} are read: from the first again "
        "after the last"
        for split, (dataset, count) in asked.items()
        if dataset is not None and len(dataset) < count
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Reach:
    """Where the training ends: after what was asked, or before, where data that are read once do.

    there: samples of the training data.
    """

    asked: Length
    length: Length
    there: int

    @classmethod
    def of(cls, length: Length, batches: BatchSchedule, datasets: Datasets, order: str) -> Reach:
        """Raises DataError where not one whole batch is left to read of those asked for."""
        there = len(datasets.train) if datasets.train is not None else length.samples
        if order == "cyclic" or length.samples <= there:
            return cls(length, length, there)
        steps = batches.iterations_within(there)
        found = cls(length, Length(steps, batches.samples_after(steps)), there)
        if steps <= batches.done[0]:
            raise DataError(found.say("all whole batches of them have been read"))
        return found

    @property
    def is_short(self) -> bool:
        """Whether the data end before the run."""
        return self.length != self.asked

    def say(self, what_then: str) -> str:
        """Facts, what they lead to, and the way out."""
        return (
            f"the training data have {self.there} samples, which are read once, and "
            f"{self.asked.iterations} iterations need {self.asked.samples}: {what_then} - give "
            f"--train-iters {self.length.iterations}, more data, weights before the paths (then "
            "data repeat), or --dataloader-type cyclic"
        )


def _in_turn(
    build: Callable[[], Datasets], launch: Launch, ctx: ParallelContext, world: World
) -> Datasets:
    """Rank 0 builds, then one rank of every node, then the others map what is there.

    A node that shares no file system with rank 0 finds nothing and builds its own.  Collective
    over the world: where one rank fails all stop, and where two read different data, too.
    """
    datasets: Datasets | None = None
    turns = (launch.rank == 0, launch.local_rank == 0, True)
    for number, turn in enumerate(turns if ctx.world.size > 1 else (True,)):
        problem: MegatronLiteError | None = None
        if turn and datasets is None:
            try:
                datasets = build()
            except MegatronLiteError as error:
                problem = error
        wait_for_all(world, f"data-{number}", ctx.world_size)
        failed = torch.tensor([int(problem is not None)], device=ctx.device)
        failed = all_reduce(failed, ctx.world, MAX)
        if problem is not None:
            raise problem
        if failed.item():
            raise DataError("another rank could not open the data - see the first FATAL line")
    assert datasets is not None
    _check_equal(datasets.digest, ctx)
    return datasets


def _check_equal(digest: int, ctx: ParallelContext) -> None:
    both = torch.tensor([digest & ((1 << 63) - 1)], device=ctx.device)  # int64, and its negation
    low, high = all_reduce(-both, ctx.world, MAX), all_reduce(both, ctx.world, MAX)
    if high.item() != -low.item():
        raise DataError(
            f"rank {ctx.rank}: the ranks read different data or built different indices (digest "
            f"{digest:016x} here) - copy the same --data-path files to every node, and remove "
            "--data-cache-path"
        )


def _order(data: DataConfig, micro: int, dp_size: int) -> str:
    """--dataloader-type with all that its order depends on."""
    alone = "" if data.sft_packing else ", a sample a row"
    if data.dataloader_type == "single":
        return f"single{alone}"
    parts = "" if data.data_sharding else " without sharding"
    return f"{data.dataloader_type}{parts}, micro batch {micro} x dp {dp_size}{alone}"


def loaders_of(
    config: RunConfig, datasets: Datasets, ctx: ParallelContext, tokens: TokenizerFacts
) -> Loaders:
    """This rank's readers, in the order of --dataloader-type; evaluations never run out of data."""
    data = config.data
    documents = DocumentEnds.from_config(data, tokens.eod)

    def loader(dataset: Samples | None, order: OrderKind) -> Loader | None:
        if dataset is None:
            return None
        return Loader(
            dataset,
            dp_rank=ctx.dp.rank,
            dp_size=ctx.dp.size,
            num_workers=data.num_workers,
            documents=documents,
            order=order,
            sharding=data.data_sharding,
            permute=permutation,
            prepare=pinned_on(ctx.device),
        )

    order = data.dataloader_type
    evaluated: OrderKind = "repeated" if order == "single" else order
    return Loaders(
        loader(datasets.train, order),
        loader(datasets.valid, evaluated),
        loader(datasets.test, evaluated),
    )


def settle_data(
    config: RunConfig, datasets: Datasets, manifest: Manifest | None, log: Log
) -> Identity:
    """What is read, if it may resume where the checkpoint stopped; every rank finds the same."""
    identity = identity_of(
        datasets,
        seed=config.train.seed,
        seq_length=config.model.seq_length,
        order=_order(config.data, config.train.micro_batch_size, log.ctx.dp.size),
    )
    if not config.train.skip_train:
        notices, warnings = check_data(
            manifest, identity, allowed=config.checkpoint.allow_data_change
        )
        log.say(*notices)
        log.warn(*warnings)
    return identity
