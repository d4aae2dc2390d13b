"""Serve a trained model to programs that speak OpenAI's interface, and a page to talk with it.

python tools/serve.py --load RUN_FOLDER --port 8000             http://127.0.0.1:8000/
python tools/serve.py --load HUGGING_FACE_FOLDER --rows 16 --max-length 4096
python tools/serve.py --load RUN_FOLDER --chat-template plain
python tools/serve.py --load RUN_FOLDER --host 0.0.0.0 --api-key-file key.txt

Ctrl-C or SIGTERM ends it; answers in flight have some seconds left.
"""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from megatron_lite.cli.speaking.model import (
    Speaker,
    add_chat_flags,
    add_model_flags,
    load_speaker,
)
from megatron_lite.config.context_length import beyond_trained
from megatron_lite.config.errors import ConfigError, MegatronLiteError, all_together
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import extend
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.chat.conversation import Renderer
from megatron_lite.inference.generate import RunningBatch
from megatron_lite.inference.serving.asked import Served
from megatron_lite.inference.serving.gate import LOOPBACK, Gate
from megatron_lite.inference.serving.model_thread import TRIES, ModelThread
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.launch import choose_device, read_launch
from megatron_lite.storage.reading import read_plain

LONGEST = 4096
"""--max-length where the model's own length is larger."""
_KEY_BYTES = 4096


def main() -> int:
    """Listen, load, answer until asked to stop."""
    asked = _parse(sys.argv[1:])
    app, server = (
        _optional(f"megatron_lite.inference.serving.{name}") for name in ("app", "server")
    )
    key = None if asked.api_key_file is None else _key(asked.api_key_file)
    device = _device(asked)
    listening = server.bind(asked.host, asked.port)
    speaker = load_speaker(asked, ParallelContext.serial(device))
    renderer = speaker.renderer(asked)
    served = _served(asked, speaker, renderer)
    thread = ModelThread(
        lambda: RunningBatch(speaker.model, asked.rows, served.longest, chunk=asked.prefill_chunk),
        max_waiting=asked.max_waiting,
        given_up=lambda: setattr(http, "should_exit", True),
    )
    limits = app.RequestLimits(asked.max_body_bytes, asked.body_seconds, asked.request_seconds)
    hosts = LOOPBACK | set(asked.allowed_host) if _is_loopback(asked.host) else None
    routes = app.build_app(app.Service(served, thread, limits))
    http = server.make_server(Gate(routes, hosts=hosts, key=key))
    _say(asked, served, listening, open_to_all=hosts is None and key is None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # the server hears it, and ends
    thread.start()
    try:
        http.run(sockets=[listening])
    finally:
        thread.close()
        renderer.sandbox.close()
    if thread.load.down:
        raise MegatronLiteError(
            f"the model failed {TRIES} times in a row: the reasons are above - start it again"
        )
    return 0


def _optional(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "megatron_lite":
            raise
        raise ConfigError(
            f"serving needs the package {missing.name}: {how_to_install('serve')}"
        ) from None


def _device(asked: argparse.Namespace) -> torch.device:
    launch = read_launch()
    if launch.world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE={launch.world_size} in the environment: a model is served by one process - "
            "start it without a launcher"
        )
    return choose_device(launch, use_cpu=asked.use_cpu, backend=None)


def _served(asked: argparse.Namespace, speaker: Speaker, renderer: Renderer) -> Served:
    tokenizer = speaker.tokenizer
    # plain is for whoever asks for it: a model that was never taught to answer continues texts
    chats = asked.chat_template is not None or renderer.name != "plain"
    return Served(
        name=asked.model_name or Path(asked.load).resolve().name,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        ends=frozenset((tokenizer.eod,)),
        chat=renderer if chats else None,
        longest=_longest(asked.max_length, speaker.model),
        answers=asked.max_answers,
    )


def _longest(wanted: int | None, model: Decoder) -> int:
    """Tokens of a prompt and its answer."""
    config = model.context.model
    known = config.num_positions
    if wanted is None:
        return min(known, LONGEST)
    if wanted > known and config.position_embedding_type == "learned_absolute":
        raise ConfigError(
            f"--max-length {wanted}: the model has {known} learned positions - at most {known}"
        )
    if (warning := beyond_trained(config, wanted)) is not None:
        print(f"WARNING: --max-length: {warning}", file=sys.stderr)
    return wanted


def _key(path: str) -> str:
    try:
        key = read_plain(path, _KEY_BYTES).decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(f"--api-key-file {path} must hold one key: printable ASCII, no spaces")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(
    asked: argparse.Namespace, served: Served, listening: socket.socket, *, open_to_all: bool
) -> None:
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    where = f"http://{host}:{listening.getsockname()[1]}/"
    print(f"{served.name} is served at {where} and to OpenAI's clients at {where}v1: "
          f"{asked.rows} answers at once, {served.longest} tokens with the prompt", flush=True)  # fmt: skip
    if open_to_all:
        print(f"WARNING: --host {asked.host}: whoever reaches this machine may ask - "
              "--api-key-file sets a key", file=sys.stderr)  # fmt: skip


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 is every network")
    add("--port", type=int, default=8000, help="0 takes one that is free")
    add_chat_flags(parser)
    add("--model-name", help="what clients call it; the folder's name by default")
    add("--api-key-file", help="a file with the key that every request to /v1 must bring")
    add("--allowed-host", nargs="+", action="extend", default=[],
        help="other names than localhost under which a proxy asks a server on loopback")  # fmt: skip
    add("--rows", type=int, default=8, help="answers in the making at once")
    add("--max-waiting", type=int, default=64, help="answers that may wait; the next is refused")
    add("--max-answers", type=int, default=8, help="of one request: n times its prompts")
    add(
        "--max-length",
        type=int,
        help=f"tokens of a prompt and its answer; the model's, at most {LONGEST}",
    )
    add("--prefill-chunk", type=int, default=128, help="tokens of a prompt that go in at once")
    add("--max-body-bytes", type=int, default=1 << 20, help="of one request")
    add("--body-seconds", type=float, default=30.0, help="for a request's body to come")
    add("--request-seconds", type=float, default=600.0, help="for its answer, waiting included")
    asked = parser.parse_args(argv)
    extend(asked.extend)
    _check(asked)
    return asked


def _check(asked: argparse.Namespace) -> None:
    numbers = {name: value for name, value in vars(asked).items() if type(value) in (int, float)}
    problems = [
        f"--{name.replace('_', '-')} {value} must be above 0"
        for name, value in numbers.items()
        if name not in ("port", "ckpt_step") and not value > 0
    ]
    if not 0 <= asked.port < 1 << 16:
        problems.append(f"--port {asked.port} must be 0 to 65535")
    if asked.max_waiting < asked.max_answers:
        problems.append(
            f"--max-waiting {asked.max_waiting} is below --max-answers {asked.max_answers}: a request "
            "with so many would never be served"
        )
    if asked.allowed_host and not _is_loopback(asked.host):
        problems.append(f"--allowed-host is for servers on loopback, not --host {asked.host}")
    if problems:
        raise all_together(problems, "on the command line")


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main))


if __name__ == "__main__":
    start()
