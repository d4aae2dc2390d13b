"""Continue a prompt with a trained model, in one process: of a checkpoint of any layout, or of Hugging Face's.

python tools/generate.py --load RUN_FOLDER --prompt "Return the" --max-new-tokens 60
python tools/generate.py --load HUGGING_FACE_FOLDER --prompt "Return the" --temperature 0
python tools/generate.py --load RUN_FOLDER/iter_0001000 --prompt-file prompts.txt    one prompt a line
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import add_extend_flag, extend
from megatron_lite.data.provenance import ALLOW_MISMATCH
from megatron_lite.inference.generate import generate
from megatron_lite.inference.model import PRECISIONS, build_model, find_model
from megatron_lite.inference.sampling import sample
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.reading import read_plain

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PRECISIONS}


def main() -> int:
    """Load, continue every prompt, print."""
    asked = _parse(sys.argv[1:])
    device = torch.device("cuda" if torch.cuda.is_available() and not asked.use_cpu else "cpu")
    ctx = ParallelContext.serial(device)
    source = find_model(Path(asked.load), ctx, step=asked.ckpt_step)
    tokenizer, said = source.tokenizer(
        asked.vocab_file, asked.merge_file, allowed=asked.allow_tokenizer_mismatch
    )
    for line in (*source.notices, *said):
        print(f"WARNING: {line}", file=sys.stderr)
    dtype = None if asked.dtype is None else _DTYPES[asked.dtype]
    model = build_model(source, ctx, dtype=dtype)
    generator = torch.Generator(device=device).manual_seed(asked.seed)

    def pick(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return sample(
            logits[:, : tokenizer.vocab_size],  # rows that no id gives mean nothing
            tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty,
            generator=generator,
        )

    rounds = (prompt for _ in range(asked.num_samples) for prompt in asked.prompt)
    for number, prompt in enumerate(rounds):
        ids = tokenizer.encode(prompt) or [tokenizer.eod]
        answer = generate(
            model, ids, max_new_tokens=asked.max_new_tokens, pick=pick, eod=tokenizer.eod
        )
        if not answer.ended and len(answer.ids) < asked.max_new_tokens:
            print(
                f"WARNING: {len(answer.ids)} of --max-new-tokens {asked.max_new_tokens}: the model has "
                f"{model.context.model.num_positions} positions, and the prompt is {len(ids)} tokens",
                file=sys.stderr,
            )
        if number:
            print("-" * 80)
        print(prompt + tokenizer.decode(answer.ids), flush=True)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load",
        required=True,
        help="run folder, one iter_N folder of it, or one of Hugging Face's",
    )
    parser.add_argument("--ckpt-step", type=int, help="this iteration instead of the newest")
    parser.add_argument("--prompt", nargs="+", action="extend", help="texts to continue")
    parser.add_argument("--prompt-file", help="one prompt a line, empty lines left out; - is stdin")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=1, help="continuations per prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep this much probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--vocab-file", help="instead of the one the run was trained with")
    parser.add_argument("--merge-file", help="instead of the one the run was trained with")
    parser.add_argument(
        ALLOW_MISMATCH, action="store_true", help="speak with another tokenizer than its own"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="as the weights are kept by default")
    parser.add_argument("--use-cpu", action="store_true")
    add_extend_flag(parser)
    asked = parser.parse_args(argv)
    extend(asked.extend)
    asked.prompt = [_text(prompt) for prompt in asked.prompt or []]
    if asked.prompt_file is not None:
        asked.prompt += _prompts(asked.prompt_file)
    asked.prompt = asked.prompt or [""]
    if asked.max_new_tokens < 1 or asked.num_samples < 1:
        raise ConfigError("--max-new-tokens and --num-samples must be at least 1")
    return asked


def _text(prompt: str) -> str:
    """The prompt as it was typed, in UTF-8; a locale without UTF-8 hands its bytes over one by one."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt {prompt!r} is not UTF-8 ({error.reason})") from None


_PROMPT_BYTES = 1 << 28  # of a --prompt-file


def _prompts(path: str) -> list[str]:
    """The lines of --prompt-file."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else read_plain(path, _PROMPT_BYTES)
    except OSError as error:
        raise ConfigError(
            f"--prompt-file {path} cannot be read: {error.strerror} - a pipe goes to `--prompt-file -`"
        ) from None
    prompts = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            prompts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--prompt-file {path}:{number} is not UTF-8 ({error.reason}): save it as UTF-8"
            ) from None
    found = [prompt for prompt in prompts if prompt]
    if not found:
        raise ConfigError(f"--prompt-file {path} holds no prompt: write one a line")
    return found


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
