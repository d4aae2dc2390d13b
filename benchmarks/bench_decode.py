"""How fast a model continues a text: prefill, decode, the bound that memory sets, and what a cache gives.

    python benchmarks/bench_decode.py                                    124M parameters
    python benchmarks/bench_decode.py --preset llama2-7b --dtype bfloat16    on a GPU
    python benchmarks/bench_decode.py --memory-bandwidth 20              a device that no table has

The weights are random.  Contestants take turns; a ratio is the median over the rounds.  Uncached:
a forward of the whole text for each token, measured at the text's last tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_lite.cli.speaking.model import device_bandwidth
from megatron_lite.config.flags.parser import parse
from megatron_lite.inference.bound import memory_bound
from megatron_lite.inference.generate import Generation, GenerationSpeed, TextRequest
from megatron_lite.inference.model import PRECISIONS
from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext


def random_model(preset: str, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Of a preset's sizes, for use."""
    config = parse(["--preset", preset, "--vocab-size", "50304"]).config.model
    assert config.vocab_size is not None
    context = StageContext(
        config, ParallelContext.serial(device), padded_vocab_size=config.vocab_size,
        vocab_size=config.vocab_size, precision=PRECISIONS[dtype],
    )  # fmt: skip
    model = Decoder(context, range(config.num_layers), has_embedding=True, has_head=True).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def continued(model: Decoder, prompt: list[int], new: int) -> GenerationSpeed:
    """Greedily, a text alone."""
    generation = Generation(model)
    pick = Sampler(Sampling(temperature=0.0), model.context.vocab_size)
    for _ in generation.run([TextRequest(prompt, new, pick)]):
        pass
    return generation.speed


def uncached_seconds(model: Decoder, text: list[int]) -> float:
    """Of one more token, by a forward of the text."""
    device = model.context.ctx.device
    tokens = torch.tensor(text, device=device)[:, None]
    at = ForwardContext(
        samples=torch.zeros(1, dtype=torch.int64, device=device),
        index=torch.arange(len(text), device=device),
    )
    began = time.perf_counter()
    with torch.no_grad():
        model(tokens, at, lambda outputs: outputs.logits()[-1]).argmax().item()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    """Print all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-bandwidth", type=float)
    asked = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(asked.preset, device, getattr(torch, asked.dtype))
    prompt = [n % model.context.vocab_size for n in range(asked.prompt_tokens)]
    continued(model, prompt, 8)  # libraries set themselves up
    ratios = []
    for _ in range(asked.rounds):
        speed = continued(model, prompt, asked.new_tokens)
        decode = speed.new_seconds / max(speed.new_tokens, 1)
        whole = uncached_seconds(model, prompt + prompt[:1] * asked.new_tokens)
        ratios.append(whole / decode)
        print(speed.describe())
        bound = memory_bound(model, speed)
        if bound is not None:
            name, known = device_bandwidth(device)
            print(bound.describe(asked.memory_bandwidth or known, name))
    length = asked.prompt_tokens + asked.new_tokens
    print(f"cached over uncached at {length} tokens: {statistics.median(ratios):.1f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
