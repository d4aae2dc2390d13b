"""Hosts(n): n hosts as network namespaces on one switch, whose cables can be cut; needs root.

    host 0 ── cable ──┐
    host 1 ── cable ──┤ switch (a bridge in a namespace of its own)
    ...               ┘

Nothing of the machine's own network is touched: every interface is made inside the namespaces, whose
names carry this process' id, and all of them go away with the `with` block, whatever happens in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CABLE = "cable0"
"""The interface of every host towards the switch: GLOO_SOCKET_IFNAME."""


@cache
def no_hosts_here() -> str | None:
    """Why this machine cannot build hosts, or None."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux and ip (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    try:
        with Hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()[:120]}"


@dataclass
class Command:
    """A command that runs on a host, in a session of its own; out and err are files."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        return (self.folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return (self.folder / "err").read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit code; raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)


@dataclass
class Hosts:
    """Context manager; host numbers count from 0.  outputs: where what the commands say is kept."""

    number: int
    outputs: Path | None = None
    commands: list[Command] = field(default_factory=list)
    _mark: str = field(default_factory=lambda: f"{os.getpid()}-{secrets.token_hex(3)}")

    def address(self, host: int) -> str:
        """Its IPv4 address, the same in every test: each Hosts has a network of its own."""
        return f"10.77.0.{host + 1}"

    def __enter__(self) -> Hosts:
        try:
            for host in range(self.number):
                _ip("netns", "add", self._name(host))
            _ip("netns", "add", self._name("switch"))
            self._on("switch", "link", "add", "bridge0", "type", "bridge")
            self._on("switch", "link", "set", "bridge0", "up")
            for host in range(self.number):
                self._connect(host)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def start(
        self, host: int, command: Sequence[str], env: Mapping[str, str], cwd: Path
    ) -> Command:
        """Run the command on the host."""
        assert self.outputs is not None, "Hosts(number, outputs) runs commands"
        folder = self.outputs / f"command{len(self.commands)}"
        folder.mkdir()
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._name(host), *command],
                stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=cwd, env=dict(env),
                start_new_session=True,
            )  # fmt: skip
        self.commands.append(Command(process, folder))
        return self.commands[-1]

    def unplug(self, host: int) -> None:
        """Pull the cable out of the host: its interface is down, and the host can see that."""
        self._on(host, "link", "set", CABLE, "down")

    def silence(self, host: int) -> None:
        """The switch forgets the host's port: both ends look well, no packet and no reset comes."""
        self._on("switch", "link", "set", f"port{host}", "nomaster")

    def processes(self, host: int) -> list[int]:
        """What runs on the host."""
        listed = _ip("netns", "pids", self._name(host))
        return [int(line) for line in listed.split() if not _is_zombie(int(line))]

    def end_processes(self, host: int) -> None:
        """The host loses its power."""
        for pid in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _connect(self, host: int) -> None:
        peer = ("peer", "name", f"port{host}", "netns", self._name("switch"))
        self._on(host, "link", "add", CABLE, "type", "veth", *peer)
        self._on("switch", "link", "set", f"port{host}", "master", "bridge0", "up")
        self._on(host, "addr", "add", f"{self.address(host)}/24", "dev", CABLE)
        self._on(host, "link", "set", "lo", "up")
        self._on(host, "link", "set", CABLE, "up")

    def _name(self, host: int | str) -> str:
        return f"megatron-lite-{self._mark}-{host}"

    def _on(self, host: int | str, *words: str) -> None:
        _ip("-n", self._name(host), *words)

    def _namespaces(self) -> Iterator[str]:
        ours = {self._name(host) for host in (*range(self.number), "switch")}
        for line in _ip("netns", "list").splitlines():
            if line.split()[0] in ours:
                yield line.split()[0]

    def _remove(self) -> None:
        for name in list(self._namespaces()):
            for pid in _ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "delete", name)
        for command in self.commands:
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.process.wait(10)


def wait_until(what: str, condition: object, seconds: float, alive: Sequence[Command] = ()) -> None:
    """Wait for condition() to be true; raises AssertionError naming `what`, at once if a command ended."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        for command in alive:
            if command.process.poll() is not None:
                raise AssertionError(f"ended before {what}: {command.err[-3000:]}")
        if time.monotonic() > end:
            raise AssertionError(f"not in {seconds:g} s: {what}")
        time.sleep(0.05)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout
