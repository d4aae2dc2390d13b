"""What a run will read, as a table: weight asked and achieved, samples, tokens, epochs per dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_lite.data.blended import BlendedDataset
from megatron_lite.data.build import Datasets
from megatron_lite.data.pretrain import GPTDataset
from megatron_lite.data.samples import Samples
from megatron_lite.data.tuning import TuningDataset

MOST_ROWS = 40  # of a split; a blend may have thousands of datasets
_NAME_WIDTH = 48
COLUMNS = f"{'asked':>9} {'achieved':>9} {'samples':>14} {'tokens':>18} {'epochs':>9}"


class Share(NamedTuple):
    """One dataset's part of a split; samples it gives, of tokens_per_epoch tokens in all."""

    name: str
    asked: float
    achieved: float
    samples: int
    tokens: int
    epochs: float


def shares(dataset: Samples, asked: int | None = None) -> list[Share]:
    """The parts of a split, in the order of --data-path; asked: samples the run takes."""
    if not isinstance(dataset, BlendedDataset):
        return [_share(dataset, 1.0, 1.0, len(dataset) if asked is None else asked)]
    return [
        _share(part, weight, taken / len(dataset), taken)
        for part, weight, taken in zip(
            dataset.datasets, dataset.weights, dataset.counts, strict=True
        )
    ]


def _share(dataset: Samples, asked: float, achieved: float, samples: int) -> Share:
    if isinstance(dataset, GPTDataset):
        tokens = samples * dataset.seq_length
        epochs = tokens / dataset.plan.tokens_per_epoch
    elif isinstance(dataset, TuningDataset):
        tokens, epochs = samples * dataset.plan.seq_length, samples / len(dataset.plan.rows)
    else:
        tokens, epochs = samples * (len(dataset[0].tokens) - 1), samples / len(dataset)
    return Share(dataset.name, asked, achieved, samples, tokens, epochs)


def overview(datasets: Datasets) -> list[str]:
    """Lines to print before training; a split without data has none."""
    lines: list[str] = []
    named = {"train": datasets.train, "validation": datasets.valid, "test": datasets.test}
    for (name, dataset), asked in zip(named.items(), datasets.asked, strict=True):
        if dataset is not None:
            lines += _table(name, shares(dataset, asked))
            parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
            lines += [_learned(part) for part in parts if isinstance(part, TuningDataset)]
    return lines


def _learned(dataset: TuningDataset) -> str:
    """How much of an epoch is learned, and what is not read as it is."""
    plan, kept = dataset.plan, dataset.plan.kept
    learned, tokens = int(kept.learned.sum()), int(kept.lengths.sum())
    rows, length = len(plan.rows), plan.seq_length
    full = tokens / (rows * (length + 1))
    return (
        f"   an epoch of {dataset.name}: {len(kept.numbers)} samples of {tokens} tokens, of which "
        f"{learned} count ({learned / tokens:.1%}), in {rows} rows of --seq-length {length} "
        f"({full:.1%} full); {kept.cut} are cut there, {kept.weightless} left out: nothing in them counts"
    )


def _table(split: str, rows: Sequence[Share]) -> list[str]:
    lines = [f" > {split + ' data':<{_NAME_WIDTH}} {COLUMNS}"]
    lines += [_line(row) for row in rows[:MOST_ROWS]]
    rest = rows[MOST_ROWS:]
    if rest:
        both = [f"{sum(getattr(row, what) for row in rest):.5f}" for what in ("asked", "achieved")]
        samples, tokens = sum(row.samples for row in rest), sum(row.tokens for row in rest)
        name = f"and {len(rest)} more datasets"
        lines.append(
            f"   {name:<{_NAME_WIDTH}} {both[0]:>9} {both[1]:>9} {samples:>14} {tokens:>18}"
        )
    if len(rows) > 1:
        samples, tokens = sum(row.samples for row in rows), sum(row.tokens for row in rows)
        lines.append(f"   {'all':<{_NAME_WIDTH}} {'':>9} {'':>9} {samples:>14} {tokens:>18}")
    return lines


def _line(row: Share) -> str:
    name = row.name if len(row.name) <= _NAME_WIDTH else "..." + row.name[3 - _NAME_WIDTH :]
    return (
        f"   {name:<{_NAME_WIDTH}} {row.asked:>9.5f} {row.achieved:>9.5f} {row.samples:>14} "
        f"{row.tokens:>18} {row.epochs:>9.3f}"
    )
