"""The processes of a measurement: started one by one, ended by their ids, whatever happens in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...protocol.errors import PerdureError
from ...protocol.settings import PREFIX
from ..pool.children import STARTER
from .systems import PEERS

STOP_TIMEOUT = 5.0
"""Seconds from SIGTERM to SIGKILL; no figure depends on how a peer leaves."""


class BenchmarkFailed(PerdureError):
    """A measurement could not be carried through; the message says which, and ends with the log."""


class BenchProcess:
    """One process, the leader of a session of its own; what it starts is ended with it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, *, folder: Path, talks: bool = False
    ) -> None:
        self.command, self.log = command, log
        pipe = subprocess.PIPE if talks else subprocess.DEVNULL
        with log.open("ab") as file:
            # Through the starter of the pool: the child gets SIGTERM when this thread ends, in whatever way.
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", STARTER, str(os.getpid()), *command],
                stdin=pipe,
                stdout=pipe if talks else file,
                stderr=file,
                start_new_session=True,
                env=dict(environment),
                cwd=folder,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self, *, at_once: bool = False) -> None:
        """SIGTERM, then SIGKILL to all of its session."""
        if self.running and not at_once:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT)
        # Its children are in its group, which lives on without it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for end in (self.process.stdin, self.process.stdout):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()

    def tail(self, lines: int = 15) -> str:
        """The end of what it and its siblings have printed."""
        try:
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


class PeerProcess(BenchProcess):
    """A producer of ``peers/``: takes commands, gives figures."""

    def ask(self, timeout: float, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer. Raises :class:`BenchmarkFailed`."""
        self.tell(**command)
        return self.hear(timeout)

    def tell(self, **command: Any) -> None:
        """Send one command."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise BenchmarkFailed(
                f"{Path(self.command[1]).name} has ended; the end of its log:\n{self.tail()}"
            ) from None

    def hear(self, timeout: float) -> dict[str, Any]:
        """The answer to the last command."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            state = "ended" if ready else f"did not answer within {timeout:g} s"
            raise BenchmarkFailed(f"{Path(self.command[1]).name} {state}; the end of its log:\n{self.tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkFailed(f"{Path(self.command[1]).name}: {answer['error']}\n{self.tail()}")
        return answer


class Crew:
    """All processes of a part; leaving the ``with`` block ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[BenchProcess] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, command: Sequence[str], url: str, log: str, **variables: str) -> BenchProcess:
        """A worker, a reaper or the like."""
        child = BenchProcess(command, environment(url, variables), self.folder / f"{log}.log", folder=self.folder)
        self.children.append(child)
        return child

    def agent(self, command: Sequence[str], url: str, log: str, **variables: str) -> PeerProcess:
        """A producer."""
        agent = PeerProcess(
            command, environment(url, variables), self.folder / f"{log}.log", folder=self.folder, talks=True
        )
        self.children.append(agent)
        return agent

    def stop(self, *children: BenchProcess, at_once: bool = False) -> None:
        """End these, or all. SIGTERM goes to all before any is waited for."""
        ending = list(children) or list(self.children)
        if not at_once:
            for child in ending:
                if child.running:
                    with contextlib.suppress(ProcessLookupError):
                        child.process.send_signal(signal.SIGTERM)
        for child in ending:
            child.stop(at_once=at_once)
            if child in self.children:
                self.children.remove(child)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.children:
            self.stop(at_once=error is not None)


def environment(url: str, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of this process without settings of Perdure: all run with their defaults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "PYTHON", "RQ_"))}
    kept |= {"RQ_REDIS_URL": url, "BENCH_URL": url, "PYTHONPATH": str(PEERS), "PYTHONUNBUFFERED": "1"}
    return kept | dict(variables or {})


def wait_for(what: str, question: Callable[[], bool], timeout: float, children: Sequence[BenchProcess] = ()) -> None:
    """Ask until it is true. Raises :class:`BenchmarkFailed` when time is over or one of the children has ended."""
    deadline = time.monotonic() + timeout
    while not question():
        for child in children:
            if not child.running:
                raise BenchmarkFailed(f"waited for {what}, but a process has ended:\n{child.tail()}")
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"{what} did not come within {timeout:g} s\n" + "\n".join(c.tail() for c in children))
        time.sleep(0.01)
