"""The shards of a corpus as tasks on a Ray cluster, joined in order when all are there.

    plan n shards ─▶ one task each (preprocess(shard=(i, n)) on any node) ─▶ join, remove shards

All nodes must see the input and the output folder.  Scheduling, retries and placement are Ray's.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_lite
from megatron_lite.config.errors import (
    ConfigError,
    DataError,
    DistributedError,
    MegatronLiteError,
    StorageError,
)
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.indexed import IndexedDataset, bin_path, idx_path, token_dtype
from megatron_lite.data.preparing.encode import Job
from megatron_lite.data.preparing.facts import joined, write_facts
from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder
from megatron_lite.data.preparing.preprocess import ResumeRefused, preprocess, shard_prefix
from megatron_lite.data.preparing.summary import Summary
from megatron_lite.data.provenance import KeyCounts, end_of_document, read_facts, unknown_token
from megatron_lite.storage.disk import Disk

ERRORS = {kind.exit_code: kind for kind in (ConfigError, DataError, StorageError)}
_ROOT = str(Path(megatron_lite.__file__).resolve().parents[1])

ReportRays = Callable[[int, int, float], None]


def run_shard(
    job: Job, inputs: Sequence[str], prefix: str, shard: tuple[int, int], workers: int
) -> tuple[int, str]:
    """One task: (0, "") or the exit code and the text of the failure.

    A task that Ray starts again resumes where the lost one was.
    """
    os.environ["RAYON_NUM_THREADS"] = str(workers)

    def attempt(resume: bool) -> None:
        preprocess(
            job,
            inputs=inputs,
            output_prefix=prefix,
            workers=workers,
            disk=Disk(),
            shard=shard,
            resume=resume,
            overwrite=True,
        )

    try:
        try:
            attempt(resume=True)
        except ResumeRefused:  # left by a run with other settings
            attempt(resume=False)
    except MegatronLiteError as error:
        return error.exit_code, str(error)
    return 0, ""


def preprocess_on_ray(
    job: Job,
    *,
    inputs: Sequence[str],
    output_prefix: str,
    shards: int | None,
    workers: int,
    address: str,
    disk: Disk,
    overwrite: bool = False,
    report: ReportRays = lambda done, all, seconds: None,
) -> Summary:
    """Like preprocess, by tasks of `workers` CPUs each; address: "auto", a host:port or "local".

    Finished shards stay where the run is interrupted, and the same command resumes with them.
    """
    try:
        import ray  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            f"--engine ray needs the package `ray`: {how_to_install('ray')}"
        ) from error
    began = time.perf_counter()
    for path in (p for pair in job.pairs(output_prefix) for p in (bin_path(pair), idx_path(pair))):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} is there already - give --overwrite to replace it")
    tokenizer = job.tokenizer()  # a broken one is found here
    if job.chat is not None:
        job.renderer(tokenizer).check()  # and a template that is none
        job = replace(job, chat=job.chat.anywhere())
    _connect(ray, address, workers)
    try:
        count = shards or _cpus(ray) // workers or 1
        _run_all(ray, job, [str(Path(p).absolute()) for p in inputs], output_prefix, count, workers,
                 report)  # fmt: skip
    finally:
        ray.shutdown()
    summary = join(job, output_prefix, count, disk)
    summary.dtype = str(token_dtype(tokenizer.vocab_size))
    summary.end_of_document = end_of_document(tokenizer, appended=job.append_eod)
    summary.unknown = unknown_token(tokenizer)
    summary.seconds = time.perf_counter() - began
    return summary


def _connect(ray: Any, address: str, workers: int) -> None:
    runtime = {"env_vars": {"PYTHONPATH": _ROOT}}
    options: dict[str, Any] = {"runtime_env": runtime, "log_to_driver": False}
    if address == "local":
        cores = max(len(os.sched_getaffinity(0)), workers)
        options |= {"num_cpus": cores, "include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise DistributedError(
            f"--ray-address {address}: no cluster answers ({error}) - start one with `ray start "
            "--head`, or give --ray-address local"
        ) from error


def _cpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def _run_all(
    ray: Any,
    job: Job,
    inputs: Sequence[str],
    prefix: str,
    count: int,
    workers: int,
    report: ReportRays,
) -> None:
    began = time.perf_counter()
    task = ray.remote(num_cpus=workers, max_retries=3)(run_shard)
    where = str(Path(prefix).absolute())
    waiting = [task.remote(job, inputs, where, (i + 1, count), workers) for i in range(count)]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            for code, text in ray.get(done):
                if code:
                    raise ERRORS.get(code, MegatronLiteError)(text)
            report(count - len(waiting), count, time.perf_counter() - began)
    except ray.exceptions.RayError as error:
        raise DistributedError(
            f"a Ray task was lost: {type(error).__name__}: {str(error)[:300]} - the finished "
            "shards are kept; run the same command again"
        ) from error
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def join(job: Job, prefix: str, count: int, disk: Disk) -> Summary:
    """The shards' pairs as one, in order; the shards are removed."""
    shards = [job.pairs(shard_prefix(prefix, (i + 1, count))) for i in range(count)]
    finals, summary = job.pairs(prefix), Summary([], "", "", "", [])
    for final, *sources in reversed(list(zip(finals, *shards, strict=True))):  # a mask comes first
        facts = [read_facts(source) or {} for source in sources]
        whole = joined(facts)
        total = KeyCounts.of(whole)
        if total.tokens == 0:
            raise DataError(f"{final}: {total.documents} documents without tokens")
        dtype = IndexedDataset(sources[0]).dtype
        with IndexedDatasetBuilder(bin_path(final), dtype, disk) as builder:
            for source in sources:
                builder.add_index(source)
            builder.finalize()
        if (
            job.chat is None or final == finals[0]
        ):  # what is known of a mask stands beside its samples
            write_facts(final, whole, disk)
        summary.prefixes.insert(0, final)
        summary.keys.insert(0, total)
        summary.skipped, summary.told = (
            whole["skipped"],
            whole.get("chat", {}).get("counts", Counter()),
        )
        summary.tokenizer = facts[0]["tokenizer"]["engine"]
        summary.fingerprint = facts[0]["tokenizer"]["fingerprint"]
        summary.read_bytes = whole["read_bytes"]
    for piece in (piece for shard in shards for piece in shard):
        for suffix in ("bin", "idx", "meta.json"):
            disk.remove(f"{piece}.{suffix}")
    return summary
