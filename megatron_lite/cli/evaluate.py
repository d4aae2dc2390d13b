"""What a trained model is worth, in one process or over the ranks of torchrun.

python tools/evaluate.py --load RUN_FOLDER --text held_out.txt               perplexity, bits per byte
python tools/evaluate.py --load HUGGING_FACE_FOLDER --tokens corpus_text_document --stride 512
python tools/evaluate.py --load RUN_FOLDER --ceval CEVAL_FOLDER --mmlu MMLU_FOLDER     5-shot, by letters
python tools/launch.py --nproc_per_node 4 tools/evaluate.py --load RUN_FOLDER --tokens PREFIX \\
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Further ranks share the texts.  A file in RUN_FOLDER/evaluations keeps what was found.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from megatron_lite.cli.speaking.model import add_model_flags, load_speaker
from megatron_lite.cli.speaking.ranks import add_layout_flags, counted, on_ranks, told_once
from megatron_lite.config.errors import ConfigError, StorageError, all_together
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import extend
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.inference.evaluating.corpora import PerplexityOf
from megatron_lite.inference.evaluating.examinee import Advance, Exam, Examinee
from megatron_lite.inference.evaluating.harness import HarnessTasks
from megatron_lite.inference.evaluating.multiple_choice import MultipleChoice
from megatron_lite.inference.evaluating.problems import WordProblems
from megatron_lite.inference.evaluating.question_files import CEVAL, MMLU
from megatron_lite.inference.evaluating.results import (
    EVALUATIONS,
    json_text,
    keep_record,
    record_of,
    side_by_side,
)
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.inference.model import (
    CheckpointSource,
    ModelSource,
    require_layout,
)
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.launch import read_launch
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_folder, check_outputs, write_output


def main() -> int:
    """Join the other ranks, if there are any, load, measure, say and keep what was found."""
    asked = told_once(lambda: _parse(sys.argv[1:]))
    exams, disk = _exams(asked), Disk()
    if asked.json and read_launch().rank == 0:
        check_outputs("--json", [asked.json], disk)
    return on_ranks(
        asked,
        lambda ctx, presence: _evaluate(asked, exams, ctx, counted(presence), disk),
        further=True,
    )


def _evaluate(
    asked: argparse.Namespace,
    exams: Sequence[Exam],
    ctx: ParallelContext,
    tick: Callable[[], None],
    disk: Disk,
) -> int:
    began, first, keeper = time.monotonic(), ctx.rank == 0, Keeper(disk)

    def look(source: ModelSource, tokenizer: Tokenizer) -> list[str]:
        nonlocal keeper
        require_layout(source.config, ctx.tp.size, ctx.pp.size)
        said = [line for exam in exams for line in exam.look(source.config, tokenizer)]
        if first:
            keeper = Keeper.of(source, disk)
        return [*said, *keeper.notices]

    model, tokenizer = load_speaker(asked, ctx, look)[1:]
    examinee = Examinee(
        Scorer(model, asked.batch_size), tokenizer, progress=functools.partial(_bar, first, tick)
    )
    results = [exam.run(examinee) for exam in exams]
    if first:
        head = {
            "load": asked.load, "iteration": keeper.iteration,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"), "seconds": time.monotonic() - began,
            "dtype": str(model.context.dtype).removeprefix("torch."), "batch_size": asked.batch_size,
            "tp": ctx.tp.size, "pp": ctx.pp.size, "ranks": ctx.world_size,
        }  # fmt: skip
        try:  # what took hours is kept and said, whichever of the two fails
            for number, result in enumerate(results):
                print(
                    "\n".join([*([""] if number else []), side_by_side(result.rows), *result.notes])
                )
        finally:
            keeper.keep(record_of(head, results), asked.json)
    return 0


def _exams(asked: argparse.Namespace) -> list[Exam]:
    found: list[Exam] = [
        PerplexityOf(
            flag, path, window=asked.window, stride=asked.stride, first=asked.first_token,
            allowed=asked.allow_tokenizer_mismatch,
        )
        for flag, paths in (("--text", asked.text), ("--tokens", asked.tokens))
        for path in paths
    ]  # fmt: skip
    found += [
        MultipleChoice(known, folder, asked.exam_split, shots=asked.shots, limit=asked.limit)
        for known, folders in ((CEVAL, asked.ceval), (MMLU, asked.mmlu))
        for folder in folders
    ]
    found += [
        WordProblems(
            path,
            asked.gsm8k_examples,
            shots=asked.shots,
            limit=asked.limit,
            max_new_tokens=asked.max_new_tokens,
        )
        for path in asked.gsm8k
    ]
    if asked.lm_eval:
        found.append(
            HarnessTasks(asked.lm_eval, asked.include_path, asked.num_fewshot, asked.limit)
        )
    if not found:
        raise ConfigError(
            "nothing is asked: give --text FILE, --tokens PREFIX, --ceval FOLDER, --mmlu FOLDER, "
            "--gsm8k FILE or --lm-eval TASK"
        )
    return found


@contextmanager
def _bar(
    shown: bool, tick: Callable[[], None], what: str, total: int, unit: str
) -> Iterator[Advance]:
    """On a terminal, with the time left; other ranks hear that this one gets on."""
    with tqdm(total=total, desc=what, unit=f" {unit}", disable=None if shown else True) as bar:

        def advance(done: int) -> None:
            tick()
            bar.update(done)

        yield advance


@dataclass(frozen=True, slots=True)
class Keeper:
    """Where results go beside the terminal: the run folder, if the model is of one that takes files."""

    disk: Disk
    run: Path | None = None
    iteration: int | None = None
    notices: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: ModelSource, disk: Disk) -> Keeper:
        """Looks whether a file can be written there."""
        if not isinstance(source, CheckpointSource):
            return cls(disk)
        run, iteration = source.store.root, source.manifest.iteration
        try:
            check_folder("--load", run / EVALUATIONS, disk)
        except (ConfigError, StorageError) as error:
            return cls(disk, iteration=iteration, notices=(f"the run keeps no record: {error}",))
        return cls(disk, run, iteration)

    def keep(self, record: Mapping[str, Any], asked: str | None) -> None:
        """Into the run and the file that was asked for."""
        if asked:
            write_output(asked, json_text(record), self.disk)
            print(f"\nwritten to {asked}")
        if self.run is not None and self.iteration is not None:
            print(f"\nkept in {keep_record(self.run, self.iteration, record, self.disk)}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_layout_flags(parser)
    measured = parser.add_argument_group("what is measured")
    add = measured.add_argument
    add("--text", nargs="+", action="extend", default=[], help="files of text, a document each")
    add(
        "--tokens",
        nargs="+",
        action="extend",
        default=[],
        help="token files (.bin and .idx): prefixes",
    )
    add("--window", type=int, help="tokens that the model sees; all its positions by default")
    add("--stride", type=int, help="tokens from one window to the next; half a window by default")
    add(
        "--ceval",
        nargs="+",
        action="extend",
        default=[],
        help="folders in C-Eval's layout: dev/, val/",
    )
    add(
        "--mmlu",
        nargs="+",
        action="extend",
        default=[],
        help="folders in MMLU's layout: dev/, test/",
    )
    add("--exam-split", choices=["val", "test"], help="C-Eval's val and MMLU's test by default")
    add(
        "--gsm8k",
        nargs="+",
        action="extend",
        default=[],
        help="files of JSON lines in GSM8K's form",
    )
    add("--gsm8k-examples", help="a file of the same form, whose first problems are shown solved")
    add("--max-new-tokens", type=int, help="of a solution; 256 by default")
    add("--lm-eval", nargs="+", action="extend", default=[], help="tasks of lm-eval-harness")
    add("--include-path", help="a folder with more of its tasks, as YAML files")
    add("--num-fewshot", type=int, help="examples before each question, instead of the tasks' own")
    add("--shots", type=int, help="examples before each question, in file order; 5 by default")
    add("--limit", type=int, help="at most so many questions of each file")
    add = parser.add_argument
    add("--batch-size", type=int, default=8, help="rows of a forward; results do not depend on it")
    add("--json", help="a file for the results")
    asked = parser.parse_args(argv)
    extend(asked.extend)
    _check(asked)
    asked.shots = 5 if asked.shots is None else asked.shots
    asked.max_new_tokens = 256 if asked.max_new_tokens is None else asked.max_new_tokens
    return asked


_LEAST = {"batch_size": 1, "shots": 0, "max_new_tokens": 1, "limit": 1, "num_fewshot": 0}
_BELONGS = {
    "window": ("text", "tokens"), "stride": ("text", "tokens"),
    "exam_split": ("ceval", "mmlu"), "shots": ("ceval", "mmlu", "gsm8k"),
    "limit": ("ceval", "mmlu", "gsm8k", "lm_eval"), "gsm8k_examples": ("gsm8k",),
    "max_new_tokens": ("gsm8k",), "num_fewshot": ("lm_eval",), "include_path": ("lm_eval",),
}  # fmt: skip
"""What would be ignored without one of these."""


def _check(asked: argparse.Namespace) -> None:
    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    problems = [
        f"{flag(name)} {getattr(asked, name)} must be at least {least}"
        for name, least in _LEAST.items()
        if getattr(asked, name) is not None and getattr(asked, name) < least
    ]
    problems += [
        f"{flag(name)} is of {', '.join(map(flag, exams))}: give {'one of them' if exams[1:] else 'it'} too, "
        f"or leave out {flag(name)}"
        for name, exams in _BELONGS.items()
        if getattr(asked, name) is not None and not any(getattr(asked, exam) for exam in exams)
    ]
    if asked.gsm8k and asked.shots and asked.gsm8k_examples is None:
        problems.append(
            f"--shots {asked.shots}: --gsm8k shows solved problems of --gsm8k-examples: give that file too"
            + (
                ", or evaluate --gsm8k apart"
                if asked.ceval or asked.mmlu
                else ", or leave out --shots"
            )
        )
    if problems:
        raise all_together(problems, "on the command line")


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
