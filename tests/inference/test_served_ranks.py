"""A model served over tp and pp ranks: what it says, how it ends, and what clients hear when a rank dies."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.data.chat.conversation import renderer_of
from tests.inference.served import LONGEST, loaded, serving, write_model
from tests.support.extras import needs
from tests.support.launch import Running, start

needs("transformers")
needs("fastapi")
needs("uvicorn")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAID = [{"role": "user", "content": "the inner"}]
ASKED = [
    (COMPLETIONS, {"prompt": ["the inner thing", "in"], "temperature": 0, "max_tokens": 12}),
    (COMPLETIONS, {"prompt": "the", "seed": 5, "n": 3, "top_p": 0.9, "max_tokens": 12, "logprobs": 3}),
    (COMPLETIONS, {"prompt": "hen" * 20, "seed": 6, "logprobs": 0, "frequency_penalty": 1.5,
                   "logit_bias": {"65": 3, "70": -100}, "repetition_penalty": 1.2}),
    (CHAT, {"messages": SAID, "seed": 7, "logprobs": True, "top_logprobs": 5, "max_tokens": 9}),
    (CHAT, {"messages": SAID, "min_p": 0.05, "top_k": 9, "temperature": 0.7, "seed": 8, "max_tokens": 9}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("ranks") / "tiny")


def ask(port: int, path: str, body: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, {key: answer[key] for key in answer if key not in ("id", "created")}


@contextmanager
def served_by(folder: Path, axis: str, *words: str) -> Iterator[tuple[Running, int]]:
    """Two ranks that share the model along an axis, and the port of the first."""
    argv = ["--load", str(folder), "--use-cpu", "--port", "0", "--max-length", str(LONGEST),
            f"--{axis}-model-parallel-size", "2", "--prefill-chunk", "16", *words]  # fmt: skip
    with start(2, argv, tool="serve") as running:
        running.wait_for(0, "is served at", deadline=60)
        found = re.search(r"127\.0\.0\.1:(\d+)", running.text(0))
        assert found is not None
        yield running, int(found[1])


@pytest.mark.ci
@pytest.mark.parametrize(
    ("axis", "asked"), [("tensor", [0, 1]), ("pipeline", [1])], ids=["tp, all", "pp, the follower"]
)
def test_two_ranks_say_what_one_says_and_end_when_asked(folder, axis, asked) -> None:
    model = loaded(folder)
    with serving(*model, chat=renderer_of(model[1], folder, "plain")) as alone:
        expected = [ask(alone.port, *one) for one in ASKED]
    assert {status for status, _ in expected} == {200}
    with served_by(folder, axis, "--chat-template", "plain", "--rows", "4") as (running, port):
        assert [ask(port, *one) for one in ASKED] == rounded(expected)
        with ThreadPoolExecutor(5) as clients:  # together, in fewer rows than answers
            assert list(clients.map(lambda one: ask(port, *one), ASKED)) == rounded(expected)
        for rank in asked:
            running.kill(rank, signal.SIGTERM if axis == "pipeline" else signal.SIGINT)
        ended = running.wait(60)
    assert [one.rc for one in ended] == [0, 0], [one.err for one in ended]
    assert not any(one.fatal for one in ended)


def rounded(found: Any) -> Any:
    """Equal where floats are, but for the last bits that other shapes give."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(map(rounded, found))
    return pytest.approx(found, abs=2e-4) if isinstance(found, float) else found


def stream(port: int, body: dict[str, object]) -> http.client.HTTPResponse:
    """An answer that has begun to come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    sent = json.dumps({**body, "stream": True})
    connection.request("POST", COMPLETIONS, sent, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.readline()
    return response


ENDLESS = {"prompt": "the", "max_tokens": 90, "logit_bias": {"65": 100, "261": -100}, "n": 4}


@pytest.mark.ci
@pytest.mark.parametrize("lost", [1, 0], ids=["a follower", "the leader"])
def test_a_rank_that_dies_ends_all_and_is_named(folder, lost) -> None:
    with served_by(folder, "pipeline") as (running, port):
        coming = stream(port, ENDLESS)
        running.kill(lost)
        if lost:
            said = coming.read().decode()
            assert '"server_error"' in said and "[DONE]" not in said
        ended = running.wait(120)  # gloo may not see it: heartbeats do, after a minute
    other = ended[1 - lost]
    assert (ended[lost].rc, other.rc) == (-9, 6)
    assert f"rank {lost}" in other.fatal or "rank 0" in other.fatal
    assert "Traceback" not in other.err


FAILING = """
import os
from megatron_lite.inference.generate import RunningBatch

real = RunningBatch.step

def step(self):
    if os.environ["RANK"] == "{rank}" and any(row and len(row.generated) > 5 for row in self._places):
        raise MemoryError("planted")
    return real(self)

RunningBatch.step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0], ids=["a follower", "the leader"])
def test_a_rank_out_of_memory_ends_all_and_says_so(folder, rank, tmp_path) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(rank=rank))
    with served_by(folder, "tensor", "--extend", str(tmp_path / "failing.py")) as (running, port):
        said = stream(port, ENDLESS).read().decode()
        assert '"server_error"' in said and "[DONE]" not in said
        ended = running.wait(60)
    fatal = ended[rank].fatal
    assert f"rank {rank} is out of host memory" in fatal and "fewer texts at once (--rows" in fatal
    other = ended[1 - rank]
    assert other.rc == 6 and f"rank {rank} failed first" in other.fatal
    assert 0 < ended[rank].rc < 128 and "Traceback" not in ended[rank].err


@pytest.mark.slow
def test_ranks_that_wait_do_not_compute(folder) -> None:
    """Nor is a rank that died while nothing was asked found by the next client."""
    with served_by(folder, "tensor") as (running, port):
        assert ask(port, *ASKED[0])[0] == 200
        pids = [process.pid for process in running.processes.values()]
        before = [seconds_of(pid) for pid in pids]
        time.sleep(10)
        assert all(seconds_of(pid) - began < 0.5 for pid, began in zip(pids, before, strict=True))
        running.kill(1)
        ended = running.wait(120)
    assert ended[0].rc == 6 and "rank 1 was lost" in ended[0].fatal


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_all_and_clients_hear_of_it(folder) -> None:
    with served_by(folder, "tensor") as (running, port), ThreadPoolExecutor(1) as clients:
        assert ask(port, *ASKED[0])[0] == 200
        running.kill(1, signal.SIGSTOP)
        status, answer = clients.submit(ask, port, *ASKED[0]).result()
        assert status == 503 and answer["error"]["type"] == "server_error"
        ended = running.wait(150, stopped=[1])
    assert ended[0].rc == 6 and "rank 1 was lost" in ended[0].fatal


def seconds_of(pid: int) -> float:
    """Processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
