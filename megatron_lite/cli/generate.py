"""Continue prompts with a trained model: of a checkpoint of any layout, or of Hugging Face's.

python tools/generate.py --load RUN_FOLDER --prompt "Return the" --max-new-tokens 60
python tools/generate.py --load HUGGING_FACE_FOLDER --prompt "Return the" --temperature 0 --stream
python tools/generate.py --load RUN_FOLDER/iter_0001000 --prompt-file prompts.txt    one prompt a line
python tools/generate.py --load RUN_FOLDER --start FILE:chapter.txt --num-samples 4 --jsonl
python tools/launch.py --nproc_per_node 4 tools/generate.py --load RUN_FOLDER --prompt "Return the" \\
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Texts go to stdout, how fast they came to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_lite.cli.speaking.model import (
    Speaker,
    add_cache_flags,
    add_model_flags,
    add_sampling_flags,
    device_bandwidth,
    load_speaker,
    sampling_of,
    settle_cache,
)
from megatron_lite.cli.speaking.prompts import add_prompt_flags, prompts_of
from megatron_lite.cli.speaking.ranks import add_layout_flags, counted, on_ranks, told_once
from megatron_lite.config.context_length import length_lines
from megatron_lite.config.errors import all_together
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import extend
from megatron_lite.data.tokenizers.beginning import text_ids
from megatron_lite.inference.bound import memory_bound
from megatron_lite.inference.generate import CHUNK, Generation, TextRequest, Token
from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.inference.texts import TextStream
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.heartbeat import Presence


def main() -> int:
    """Load, continue every prompt, print."""
    asked, settings = told_once(lambda: _parse(sys.argv[1:]))
    return on_ranks(asked, lambda ctx, presence: _speak(asked, settings, ctx, presence))


@dataclass(slots=True)
class _Answer:
    """One continuation as it comes."""

    prompt: str
    sample: int
    ids: list[int]
    stream: TextStream
    new: int = 0
    end: str | None = None

    def take(self, generated: Sequence[int]) -> bool:
        """A token has come; whether a stop text has."""
        self.stream.add(generated[-1])
        return self.stream.found

    def close(self, token: Token) -> None:
        self.new += token.id is not None
        if token.end is not None:
            self.end = token.end
            self.stream.finish()


def _speak(
    asked: argparse.Namespace, settings: Sampling, ctx: ParallelContext, presence: Presence
) -> int:
    speaker = load_speaker(asked, ctx)
    answers = _answers(asked, speaker)
    generation = Generation(
        speaker.model, rows=1 if asked.stream else asked.batch_size, chunk=asked.prefill_chunk,
        keep=asked.cache_tokens, start=asked.sink_tokens,
    )  # fmt: skip
    if ctx.rank == 0:
        _say_lengths(asked, speaker, answers)
    printer = _Printer(asked, answers) if ctx.rank == 0 else None
    tick = counted(presence)
    for token in generation.run([_request(asked, settings, speaker, one) for one in answers]):
        tick()
        answer = answers[token.request]
        answer.close(token)
        if token.end == "positions" and ctx.rank == 0:
            _warn_of_positions(asked, speaker, answer)
        if printer is not None:
            printer.heard(token.request)
    if ctx.rank == 0:
        _say_speed(asked, speaker, generation)
    return 0


def _say_speed(asked: argparse.Namespace, speaker: Speaker, generation: Generation) -> None:
    print(generation.speed.describe(), file=sys.stderr)
    bound = memory_bound(speaker.model, generation.speed)
    if bound is not None:
        name, bandwidth = device_bandwidth(speaker.model.context.ctx.device)
        print(bound.describe(asked.memory_bandwidth or bandwidth, name), file=sys.stderr)


def _answers(asked: argparse.Namespace, speaker: Speaker) -> list[_Answer]:
    """All continuations in the order in which they are printed."""
    tokenizer = speaker.tokenizer
    prompts = [(text, text_ids(tokenizer, text)) for text in asked.prompts]
    return [
        _Answer(text, sample, ids, TextStream(tokenizer, ids, asked.stop or ()))
        for sample in range(asked.num_samples)
        for text, ids in prompts
    ]


def _request(
    asked: argparse.Namespace, settings: Sampling, speaker: Speaker, answer: _Answer
) -> TextRequest:
    tokenizer = speaker.tokenizer
    return TextRequest(
        answer.ids, asked.max_new_tokens,
        Sampler(settings, tokenizer.vocab_size, asked.seed, answer.sample),
        ends=frozenset((tokenizer.eod,)), until=answer.take,
    )  # fmt: skip


def _say_lengths(asked: argparse.Namespace, speaker: Speaker, answers: Sequence[_Answer]) -> None:
    """For which length positions are scaled, and which texts go beyond the trained one."""
    longest = asked.cache_tokens or sys.maxsize  # positions count what is kept
    lengths = {min(len(one.ids) + asked.max_new_tokens, longest) for one in answers}
    for length in sorted(lengths):
        for line in length_lines(speaker.model.context.model, length):
            print(line, file=sys.stderr)


def _warn_of_positions(asked: argparse.Namespace, speaker: Speaker, answer: _Answer) -> None:
    positions, prompt = speaker.model.context.model.num_positions, len(answer.ids)
    cut = f", of which the last {positions} were read" if prompt > positions else ""
    print(
        f"WARNING: {answer.new} of --max-new-tokens {asked.max_new_tokens}: the model has "
        f"{positions} positions, and the prompt is {prompt} tokens{cut}",
        file=sys.stderr,
    )


class _Printer:
    """Prints continuations in their order: as they come with --stream, else each when it is whole."""

    def __init__(self, asked: argparse.Namespace, answers: Sequence[_Answer]) -> None:
        self._asked, self._answers = asked, answers
        self._printed = self._characters = 0

    def heard(self, index: int) -> None:
        """A token of a request has come."""
        if self._asked.stream:
            answer = self._answers[index]
            if not self._characters:
                self._begin(answer)
            new = answer.stream.text[self._characters - 1 :]
            print(new, end="" if answer.end is None else "\n", flush=True)
            self._characters = 0 if answer.end is not None else self._characters + len(new)
            self._printed += answer.end is not None
            return
        while self._printed < len(self._answers) and self._answers[self._printed].end is not None:
            self._whole(self._answers[self._printed])
            self._printed += 1

    def _begin(self, answer: _Answer) -> None:
        if self._printed:
            print("-" * 80)
        print(answer.prompt, end="")
        self._characters = 1  # one more than were printed

    def _whole(self, answer: _Answer) -> None:
        if self._asked.jsonl:
            found = {"prompt": answer.prompt, "sample": answer.sample, "text": answer.stream.text,
                     "tokens": answer.new, "end": answer.end}  # fmt: skip
            print(json.dumps(found, ensure_ascii=False), flush=True)
            return
        if self._printed:
            print("-" * 80)
        print(answer.prompt + answer.stream.text, flush=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Sampling]:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_prompt_flags(parser)
    add = parser.add_argument_group("continuations").add_argument
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of each (%(default)s)")
    add("--num-samples", type=int, default=1, metavar="N", help="of each prompt (%(default)s)")
    add("--stop", nargs="+", action="extend", help="texts that end one")
    add("--stream", action="store_true", help="print each token as it comes")
    add("--jsonl", action="store_true", help="print one JSON object a line")
    add_sampling_flags(parser)
    add = parser.add_argument_group("speed").add_argument
    add("--batch-size", type=int, default=8, help="continuations at once (%(default)s)")
    add("--prefill-chunk", type=int, default=CHUNK, help="tokens of a prompt that go in at once")
    add(
        "--memory-bandwidth", type=float, metavar="GB/S",
        help="of this device, for how fast decoding could be at most; known of many GPUs",
    )  # fmt: skip
    add_cache_flags(parser)
    add_layout_flags(parser)
    asked = parser.parse_args(argv)
    extend(asked.extend)
    settings = sampling_of(asked)
    settle_cache(asked)
    _check(asked)
    asked.prompts = prompts_of(asked)
    return asked, settings


def _check(asked: argparse.Namespace) -> None:
    problems = [
        f"--{name.replace('_', '-')} {getattr(asked, name)} must be at least 1"
        for name in ("max_new_tokens", "num_samples", "batch_size", "prefill_chunk")
        if getattr(asked, name) < 1
    ]
    bandwidth = asked.memory_bandwidth
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0.0):
        problems.append(f"--memory-bandwidth {bandwidth} must be a number above 0")
    if asked.stream and asked.jsonl:
        problems.append("--stream prints text as it comes, --jsonl whole lines: choose one")
    if (
        asked.prompt_file == "-"
        and asked.tensor_model_parallel_size * asked.pipeline_model_parallel_size > 1
    ):
        problems.append(
            "--prompt-file -: several ranks share one stdin: write the prompts to a file"
        )
    if "" in (asked.stop or ()):
        problems.append("--stop '' is in every text: leave it out")
    if problems:
        raise all_together(problems, "on the command line")


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
