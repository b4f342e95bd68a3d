"""A pool on this machine: a reaper and workers as child processes, each replaced when it dies.

What ``perdure up`` runs in the foreground and the demonstration kills. Workers are plain ``rq worker``
commands. Every child leads a process group of its own (Ctrl-C reaches the pool, which drains them) and
dies with its parent.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..protocol.settings import PREFIX, Settings

log = logging.getLogger("perdure.pool")

POLL = 0.1
"""Seconds between two looks at the children."""

QUICK_DEATH = 5.0
"""Seconds: a child that lived shorter is started again after a growing pause."""

MAX_PAUSE = 30.0

STARTER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(slots=True)
class Child:
    """One place in the pool, and the process that fills it now."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0
    due: float = 0.0


@dataclass(slots=True)
class Pool:
    """Starts, watches and stops the children of one ``perdure up``.

    The server's URL goes to them through the environment, where other users cannot read it; ``output`` is
    the file that takes what they print (``None``: the terminal).
    """

    url: str
    queues: Sequence[str]
    workers: int
    settings: Settings
    output: Path | None = None
    quiet: bool = False
    children: list[Child] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.children.append(Child("reaper", [sys.executable, "-P", "-m", "perdure.recovery"]))
        level = ["--quiet"] if self.quiet else []
        for number in range(1, self.workers + 1):
            rq = [sys.executable, "-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker"]
            self.children.append(Child(f"worker-{number}", [*rq, *level, *self.queues]))

    def start(self) -> None:
        """Start all children, and a thread that replaces those that die."""
        for child in self.children:
            self._spawn(child)
        self._thread = threading.Thread(target=self._watch, name="pool", daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """SIGTERM to all, SIGKILL to what outlives the drain; True if everybody left by himself."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        alive = [child for child in self.children if child.process is not None and child.process.poll() is None]
        # The reaper last: it hands on what a worker could not.
        for child in reversed(alive):
            _signal(child, signal.SIGTERM)
        deadline = time.monotonic() + self.settings.drain_timeout + 8.0
        clean = True
        for child in alive:
            assert child.process is not None
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("%s (pid %d) did not stop in time; killed", child.name, child.process.pid)
                _signal(child, signal.SIGKILL)
                child.process.wait()
                clean = False
        return clean

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            for child in self.children:
                self._tend(child)

    def _tend(self, child: Child) -> None:
        now = time.monotonic()
        if child.process is not None:
            status = child.process.poll()
            if status is None:
                return
            lived = now - child.started
            child.pause = min(MAX_PAUSE, max(0.5, 2 * child.pause)) if lived < QUICK_DEATH else 0.0
            child.due = now + child.pause
            again = f"again in {child.pause:g} s" if child.pause else "starting another"
            log.warning("%s (pid %d) ended: %s; %s", child.name, child.process.pid, ending(status), again)
            child.process = None
        if now >= child.due and not self._stop.is_set():
            self._spawn(child)

    def _spawn(self, child: Child) -> None:
        child.process = launch(child.command, environment_for(self.url, self.settings), self.output)
        child.started = time.monotonic()
        log.info("%s started (pid %d)", child.name, child.process.pid)


def environment_for(url: str, settings: Settings) -> dict[str, str]:
    """The environment of this process with exactly these settings, for a process of the pool."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment |= settings.replace(redis_url="").environment()
    return environment | {"RQ_REDIS_URL": url, "PYTHONUNBUFFERED": "1"}


def launch(command: Sequence[str], environment: dict[str, str], output: Path | None) -> subprocess.Popen[bytes]:
    """Start a process that leads a session of its own and gets SIGTERM when the calling thread ends.

    ``output`` takes what it prints; ``None``: the terminal.
    """
    file = output.open("ab") if output else None
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", STARTER, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=environment,
        )
    finally:
        if file is not None:
            file.close()


def ending(status: int) -> str:
    """How a process ended, in words: by its exit status or its signal."""
    if status < 0:
        try:
            return f"signal {signal.Signals(-status).name}"
        except ValueError:
            return f"signal {-status}"
    return f"exit status {status}"


def _signal(child: Child, number: int) -> None:
    """To the child alone: a worker's guardian is in a session of its own and ends with it."""
    assert child.process is not None
    try:
        child.process.send_signal(number)
    except ProcessLookupError:
        pass  # it left in this moment
