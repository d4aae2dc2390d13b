"""The identity of a run's data, kept in its checkpoints: a resume must read the same.

Two runs of equal identity read the same samples in the same order, whatever their layout, batch
size and the place of their files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_lite.data.blended import BlendedDataset
from megatron_lite.data.build import Datasets
from megatron_lite.data.pretrain import GPTDataset
from megatron_lite.data.samples import Samples
from megatron_lite.data.tuning import TuningDataset

_SPLITS = ("train", "valid", "test")
Identity = dict[str, Any]


def identity_of(datasets: Datasets, *, seed: int, seq_length: int, order: str) -> Identity:
    """JSON-ready; order is --dataloader-type."""
    found: Identity = {"--seed": seed, "--seq-length": seq_length, "--dataloader-type": order}
    for split, dataset in zip(
        _SPLITS, (datasets.train, datasets.valid, datasets.test), strict=True
    ):
        if dataset is not None:
            found[split] = _parts(dataset)
    return found


def _parts(dataset: Samples) -> list[dict[str, Any]]:
    if isinstance(dataset, BlendedDataset):
        pairs = list(zip(dataset.datasets, dataset.weights, strict=True))
    else:
        pairs = [(dataset, 1.0)]
    return [_part(part, weight) for part, weight in pairs]


def _part(dataset: Samples, weight: float) -> dict[str, Any]:
    documents, epochs = [0, len(dataset)], [1, False]  # its samples, each of them once
    if isinstance(dataset, GPTDataset):
        plan = dataset.plan
        documents, epochs = list(plan.documents), [plan.epochs.epochs, plan.epochs.separate_last]
    elif isinstance(dataset, TuningDataset):  # each epoch is what it is, however many follow
        documents = list(dataset.plan.documents)
    return {
        "prefix": dataset.name,
        "content": dataset.content(),
        "documents": documents,
        "weight": weight,
        "epochs": epochs,
    }


def changes(before: Identity, now: Identity, splits: tuple[str, ...] = _SPLITS) -> list[str]:
    """What differs in the named splits, one line each; a split that only one of them reads does not."""
    found = [
        f"{flag}: {before[flag]} -> {now[flag]}"
        for flag in now
        if flag.startswith("--") and flag in before and before[flag] != now[flag]
    ]
    for split in splits:
        if split in before and split in now:
            found += _split_changes(split, before[split], now[split])
    return found


def _split_changes(
    split: str, before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> Iterator[str]:
    if len(before) != len(now):
        gone = {part["prefix"] for part in before} - {part["prefix"] for part in now}
        new = {part["prefix"] for part in now} - {part["prefix"] for part in before}
        names = [f"without {name}" for name in sorted(gone)] + [f"with {n}" for n in sorted(new)]
        yield f"{split}: {len(before)} datasets -> {len(now)} ({', '.join(names) or 'the same'})"
        return
    for old, this in zip(before, now, strict=True):
        where = f"{split}: {this['prefix']}"
        if old["content"] != this["content"]:
            moved = "" if old["prefix"] == this["prefix"] else f" than that of {old['prefix']}"
            yield f"{where}: its files hold other tokens{moved}"
        elif old["documents"] != this["documents"]:
            (a, b), (c, d) = old["documents"], this["documents"]
            yield f"{where}: documents {a} to {b - 1} -> {c} to {d - 1} (--split)"
        if not math.isclose(old["weight"], this["weight"], rel_tol=1e-12):
            yield f"{where}: weight {old['weight']:.6g} -> {this['weight']:.6g}"
        if old["epochs"] != this["epochs"] and old["content"] == this["content"]:
            yield (
                f"{where}: {_epochs(old['epochs'])} -> {_epochs(this['epochs'])}, which are shuffled "
                "anew (the run's length: --train-iters, --train-samples or --train-epochs)"
            )


def _epochs(plan: list[Any]) -> str:
    return f"{plan[0]} epochs" + (" with the last one apart" if plan[1] else "")
