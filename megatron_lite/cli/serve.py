"""Serve a trained model to programs that speak OpenAI's interface, and a page to talk with it.

python tools/serve.py --load RUN_FOLDER --port 8000             http://127.0.0.1:8000/
python tools/serve.py --load HUGGING_FACE_FOLDER --rows 16 --max-length 4096
python tools/serve.py --load RUN_FOLDER --chat-template plain
python tools/serve.py --load RUN_FOLDER --host 0.0.0.0 --api-key-file key.txt
python tools/launch.py --nproc_per_node 2 tools/serve.py --load RUN_FOLDER --tensor-model-parallel-size 2

Ctrl-C or SIGTERM ends it; answers in flight have some seconds left.
"""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

from megatron_lite.cli.speaking.model import (
    Speaker,
    TriedTemplate,
    add_chat_flags,
    add_model_flags,
    load_speaker,
    look_at_nothing,
)
from megatron_lite.cli.speaking.ranks import add_layout_flags, on_ranks, told_once
from megatron_lite.config.context_length import beyond_trained
from megatron_lite.config.errors import ConfigError, MegatronLiteError, all_together
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import extend
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.chat.conversation import Renderer
from megatron_lite.data.chat.formats import Message
from megatron_lite.inference.serving.asked import Served
from megatron_lite.inference.serving.gate import LOOPBACK, Gate
from megatron_lite.inference.serving.model_thread import TRIES, ModelThread
from megatron_lite.inference.serving.orders import (
    Leader,
    LeadingBatch,
    OrderLine,
    SharedBatch,
    follow,
)
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.heartbeat import Presence
from megatron_lite.storage.reading import read_plain
from megatron_lite.train.ending.failures import end_process

LONGEST = 4096
"""--max-length where the model's own length is larger."""
FAREWELL_SECONDS = 1.0
_KEY_BYTES = 4096


def main() -> int:
    """Listen, load, answer until asked to stop."""
    asked = told_once(lambda: _parse(sys.argv[1:]))
    farewell = _Farewell()
    return on_ranks(
        asked, lambda ctx, presence: _work(asked, ctx, presence, farewell), farewell=farewell.say
    )


def _work(
    asked: argparse.Namespace, ctx: ParallelContext, presence: Presence, farewell: _Farewell
) -> int:
    """Of rank 0 to serve, of the others to follow."""
    front = _front(asked) if ctx.rank == 0 else None
    template = _template(asked)
    speaker = load_speaker(asked, ctx, template.look if ctx.rank == 0 else look_at_nothing)
    longest = _longest(asked.max_length, speaker.model)
    line = OrderLine.between(ctx, presence.reached)
    size = (speaker.model, asked.rows, longest)
    if front is not None:
        return _lead(asked, speaker, template.renderer, front, line, size, farewell)
    stop = _signals()
    batch = SharedBatch(*size, chunk=asked.prefill_chunk)
    follow(batch, line, ids=speaker.tokenizer.vocab_size, stop=stop.is_set)
    return 0


def _template(asked: argparse.Namespace) -> TriedTemplate:
    """One that is asked for must work; a model's own that does not is told to who wants to talk."""
    return TriedTemplate(asked, [Message("user", "hello")] if asked.chat_template else None)


class _Front(NamedTuple):
    """What clients meet: HTTP's modules, the socket, the key."""

    app: ModuleType
    server: ModuleType
    listening: socket.socket
    key: str | None


def _front(asked: argparse.Namespace) -> _Front:
    app, server = (
        _optional(f"megatron_lite.inference.serving.{name}") for name in ("app", "server")
    )
    key = None if asked.api_key_file is None else _key(asked.api_key_file)
    return _Front(app, server, server.bind(asked.host, asked.port), key)


def _lead(
    asked: argparse.Namespace, speaker: Speaker, renderer: Renderer, front: _Front, line: OrderLine,
    size: tuple[Decoder, int, int], farewell: _Farewell,
) -> int:  # fmt: skip
    """Serve, with the other ranks where there are any."""
    served = _served(asked, speaker, renderer, longest=size[2])
    hosts = LOOPBACK | set(asked.allowed_host) if _is_loopback(asked.host) else None
    several = line.axis.size > 1

    def stop() -> None:
        http.should_exit = True

    leader = Leader(line, stop)

    def make_batch() -> SharedBatch:
        chunk = asked.prefill_chunk
        return (
            LeadingBatch(leader, *size, chunk=chunk) if several else SharedBatch(*size, chunk=chunk)
        )

    thread = ModelThread(
        make_batch,
        max_waiting=asked.max_waiting, given_up=stop, tries=1 if several else TRIES,
        rest=leader.rest if several else None,
    )  # fmt: skip
    limits = front.app.RequestLimits(
        asked.max_body_bytes, asked.body_seconds, asked.request_seconds
    )
    routes = front.app.build_app(front.app.Service(served, thread, limits))
    http = front.server.make_server(Gate(routes, hosts=hosts, key=front.key))
    _say(asked, served, front.listening, open_to_all=hosts is None and front.key is None)
    _signals()  # the server hears them, too, and ends
    farewell.thread = thread
    thread.start()
    try:
        http.run(sockets=[front.listening])
    finally:
        ended = thread.close()
        renderer.sandbox.close()
    if several and thread.failure is not None:
        raise thread.failure
    if thread.load.down or not ended:
        raise MegatronLiteError(
            f"the model failed {TRIES} times in a row: the reasons are above - start it again"
            if ended else "the model's step does not end: look at its device - start it again"
        )  # fmt: skip
    leader.end()
    return 0


class _Farewell:
    """What clients hear where a lost rank ends this one in the middle of a step."""

    def __init__(self) -> None:
        self.thread: ModelThread | None = None

    def say(self) -> None:
        """End all answers, and leave them a moment to reach those who wait for them."""
        if self.thread is not None:
            self.thread.give_up()
            time.sleep(FAREWELL_SECONDS)


def _signals() -> threading.Event:
    """Set by Ctrl-C or SIGTERM, which then does nothing else."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.set())
    return asked


def _optional(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "megatron_lite":
            raise
        raise ConfigError(
            f"serving needs the package {missing.name}: {how_to_install('serve')}"
        ) from None


def _served(
    asked: argparse.Namespace, speaker: Speaker, renderer: Renderer, *, longest: int
) -> Served:
    tokenizer = speaker.tokenizer
    # plain is for whoever asks for it: a model that was never taught to answer continues texts
    chats = asked.chat_template is not None or renderer.name != "plain"
    return Served(
        name=asked.model_name or Path(asked.load).resolve().name,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        ends=frozenset((tokenizer.eod,)),
        chat=renderer if chats else None,
        longest=longest,
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
    warning = beyond_trained(config, wanted)
    if warning is not None and model.context.ctx.rank == 0:
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
    add_layout_flags(parser)
    add = parser.add_argument_group("clients").add_argument
    add("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 is every network")
    add("--port", type=int, default=8000, help="0 takes one that is free")
    add_chat_flags(add)
    add("--model-name", help="what clients call it; the folder's name by default")
    add("--api-key-file", help="a file with the key that every request to /v1 must bring")
    add("--allowed-host", nargs="+", action="extend", default=[],
        help="other names than localhost under which a proxy asks a server on loopback")  # fmt: skip
    add = parser.add_argument_group("limits").add_argument
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
            "with so many would never be served: give both"
        )
    if asked.allowed_host and not _is_loopback(asked.host):
        problems.append(f"--allowed-host is for servers on loopback, not --host {asked.host}")
    if problems:
        raise all_together(problems, "on the command line")


def start() -> NoReturn:
    """Run it, and end the process with its exit code; see pretrain_gpt.py for why at once."""
    end_process(run_tool(main))


if __name__ == "__main__":
    start()
