"""Continue a prompt with a trained model, in one process, from a checkpoint of any layout.

python tools/generate.py --load RUN_FOLDER --prompt "Return the" --max-new-tokens 60
python tools/generate.py --load RUN_FOLDER/iter_0001000 --prompt-file prompts.txt    one prompt a line
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from megatron_lite.blueprint.batches import padded_vocab_size
from megatron_lite.checkpoint.description import saved_model, saved_section
from megatron_lite.checkpoint.manifest import NAME, TOKENIZER, Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.checkpoint.tensor_file import SAFETENSORS_NAMES
from megatron_lite.config.errors import CheckpointError, ConfigError, NumericsError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.data.provenance import ALLOW_MISMATCH, made_with
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.build import asked_vocab_size, build_tokenizer
from megatron_lite.data.tokenizers.kept import from_kept
from megatron_lite.data.vocabulary import check_vocabulary
from megatron_lite.inference.generate import generate
from megatron_lite.inference.sampling import sample
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import exact_slices, weight_slices
from megatron_lite.storage.reading import read_plain

PRECISIONS = {
    "float32": PrecisionConfig(),
    "float16": PrecisionConfig(fp16=True),
    "bfloat16": PrecisionConfig(bf16=True),
}


def main() -> int:
    """Load, continue every prompt, print."""
    asked = _parse(sys.argv[1:])
    device = torch.device("cuda" if torch.cuda.is_available() and not asked.use_cpu else "cpu")
    ctx = ParallelContext.serial(device)
    root, step = _checkpoint(asked.load, asked.ckpt_step)
    store = Store(root, ctx)
    manifest, notices = store.newest_intact(step)
    for line in notices:
        print(f"WARNING: {line}", file=sys.stderr)
    if manifest is None:
        raise CheckpointError(f"--load {asked.load} holds no checkpoint: check the path")
    tokenizer = _tokenizer(asked, manifest, store.folder(manifest.iteration))
    model = _load(store, manifest, ctx, asked.dtype)
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
    parser.add_argument("--load", required=True, help="run folder, or one iter_N folder of it")
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
    parser.add_argument("--dtype", choices=PRECISIONS, help="as the checkpoint holds it by default")
    parser.add_argument("--use-cpu", action="store_true")
    asked = parser.parse_args(argv)
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


def _checkpoint(load: str, step: int | None) -> tuple[Path, int | None]:
    """The run folder and the iteration that --load and --ckpt-step mean."""
    folder = Path(load)
    if not (folder / NAME).is_file():
        return folder, step
    name = folder.resolve().name
    match = re.fullmatch(r"iter_(\d{7,})", name)
    if match is None:
        raise CheckpointError(
            f"--load {load} is one checkpoint under another name than iter_NNNNNNN, which says its "
            "iteration: give it its name back"
        )
    if step not in (None, int(match[1])):
        raise ConfigError(f"--load {load} is iteration {int(match[1])}, --ckpt-step says {step}")
    return folder.resolve().parent, int(match[1])


def _tokenizer(asked: argparse.Namespace, manifest: Manifest, folder: Path) -> Tokenizer:
    """The one the checkpoint keeps; the run's own files where it is older than that."""
    data = from_kept(saved_section(manifest, DataConfig, "data", folder), folder / TOKENIZER)
    given = {
        name: value
        for name in ("vocab_file", "merge_file")
        if (value := getattr(asked, name)) is not None
    }
    data = dataclasses.replace(data, **given)
    rows = saved_model(manifest, folder).vocab_size
    assert rows is not None
    tokenizer = build_tokenizer(data, vocab_size=asked_vocab_size(data, rows))
    said = check_vocabulary(
        manifest.tokenizer,
        rows,
        made_with(tokenizer, data),
        where=f"checkpoint {manifest.iteration}",
        foreign=bool(given),
        allowed=asked.allow_tokenizer_mismatch,
    )
    for line in said:
        print(f"WARNING: {line}", file=sys.stderr)
    return tokenizer


def _precision(manifest: Manifest, dtype: str | None) -> PrecisionConfig:
    """--dtype, or the format in which the checkpoint holds the weights that training used."""
    if dtype is not None:
        return PRECISIONS[dtype]
    held = {SAFETENSORS_NAMES[getattr(torch, name)]: chosen for name, chosen in PRECISIONS.items()}
    table = manifest.tensors.get("embedding.tokens.weight")
    return PRECISIONS["float32"] if table is None else held.get(table.dtype, PRECISIONS["float32"])


def _load(store: Store, manifest: Manifest, ctx: ParallelContext, dtype: str | None) -> Decoder:
    config = saved_model(manifest, store.folder(manifest.iteration))
    assert config.vocab_size is not None
    padded = padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by, 1)
    context = StageContext(
        config, ctx, padded_vocab_size=padded, vocab_size=config.vocab_size,
        precision=_precision(manifest, dtype),
    )  # fmt: skip
    model = Decoder(context, range(config.num_layers), has_embedding=True, has_head=True)
    parameters = local_parameters(model)
    slices = list(weight_slices(parameters, ctx, owned=False))
    store.load(manifest, exact_slices(slices, manifest.tensors))
    for piece in slices:
        if not torch.isfinite(piece.data).all():
            raise NumericsError(
                f"checkpoint {manifest.iteration} in {store.root}: {piece.name} holds values that are "
                "not finite - take an older one with --ckpt-step"
            )
    return model.eval()


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
