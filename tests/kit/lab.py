"""What the tests of workers share: real processes, started and ended one by one, and patient waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import redis
from rq import SimpleWorker

from perdure.protocol.codec import pack
from perdure.protocol.connection import connect
from perdure.protocol.identities import new_id
from perdure.protocol.keys import key
from perdure.protocol.records import NewRequest, RequestRecord
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from tests.kit.places import TASKS

QUICK: dict[str, Any] = {"heartbeat": 0.1, "heartbeat_timeout": 1.5, "checkpoint_interval": 0.02, "retry_base": 0.05}
"""Settings under which nothing is waited for long. The law that a test states holds with any."""

LONG = 30.0
"""Seconds; reached only when something is broken."""

Value = TypeVar("Value")


def eventually(what: Callable[[], Value], timeout: float = LONG) -> Value:
    """The first true value of ``what``. Fails when none has come in ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < deadline, f"it did not come within {timeout} s; at last: {value!r}"
        time.sleep(0.01)


class Quiet(SimpleWorker):
    """RQ's worker for one thread of a test: without its listener for commands, which would go on for a
    minute after it.
    """

    def subscribe(self) -> None: ...

    def unsubscribe(self) -> None: ...

    def _install_signal_handlers(self) -> None: ...


@dataclass
class Process:
    """One process that a test has started, and what it prints."""

    process: subprocess.Popen[bytes]
    output: Path
    name: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def children(self) -> list[int]:
        """Process ids of everything below: the guardian."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to this process alone."""
        self.process.kill()
        self.process.wait()

    def kill_tree(self) -> None:
        """SIGKILL to it and its guardian, the guardian first so that it sees nothing."""
        for pid in [*self.children(), self.pid]:
            send(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, timeout: float = LONG) -> int:
        """Its exit status, once it has ended by itself."""
        return self.process.wait(timeout)


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def command_of(pid: int) -> list[str]:
    """The command line of a process; nothing of one that has ended, or ends in this moment."""
    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.Error:
        return []


@dataclass
class Lab:
    """A Redis, and worker and reaper processes around it."""

    url: str
    folder: Path
    connection: redis.Redis
    settings: dict[str, Any] = field(default_factory=lambda: dict(QUICK))
    processes: list[Process] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    @property
    def store(self) -> Store:
        return Store(self.connection, Settings())

    # --- requests ------------------------------------------------------------------------------------

    def submit(
        self, task: str, payload: Any = None, *, queue: str = "gpu", max_retries: int = 3, **options: Any
    ) -> str:
        """A request for one of the tasks beside this file, or for a whole dotted path."""
        identifier = new_id()
        request = NewRequest(
            id=identifier,
            nonce=identifier,
            queue=queue,
            task=task if "." in task else f"lab_tasks.{task}",
            payload=pack(payload if payload is not None else {}, limit=10**6, what="payload"),
            max_retries=max_retries,
            result_ttl=600,
            failure_ttl=600,
            description=task,
            **options,
        )
        assert self.store.enqueue([request]) == ["accepted"]
        return identifier

    def record(self, identifier: str) -> RequestRecord:
        record = self.store.fetch(identifier)
        assert record is not None
        return record

    def ended(self, identifier: str, timeout: float = LONG) -> RequestRecord:
        """The request once it has ended."""
        try:
            eventually(lambda: self.record(identifier).ended, timeout)
        except AssertionError:
            logs = "\n".join(f"--- {process.output.name}\n{process.log}" for process in self.processes)
            raise AssertionError(f"{self.record(identifier)}\n{self.events(identifier)}\n{logs}") from None
        return self.record(identifier)

    def outputs(self, identifier: str) -> list[Any]:
        return self.store.all_outputs(identifier)

    def moved(self, identifier: str, number: int = 1) -> int:
        """Wait until so many outputs are stored; returns how many are."""
        return eventually(lambda: len(self.outputs(identifier)) >= number and len(self.outputs(identifier)))

    def events(self, identifier: str) -> list[tuple[str, str]]:
        """The history: what, and of which kind."""
        return [(event.event, event.kind) for event in self.store.history(identifier)]

    def check(self, identifier: str, number: int) -> RequestRecord:
        """It finished with its outputs 0, 1, 2 … gapless, and ended once."""
        record = self.ended(identifier)
        assert record.status == "finished", (record, self.events(identifier))
        assert self.outputs(identifier) == list(range(number))
        ends: Any = self.connection.xrange(key("results", identifier))
        assert [fields[b"type"] for _, fields in ends].count(b"1") == 1
        return record

    def waiting(self, queue: str = "gpu") -> list[str]:
        """The queue's ids in order."""
        names: Any = self.connection.lrange(key("queue", queue), 0, -1)
        return [name.decode() for name in names]

    def nothing_held(self, queue: str = "gpu") -> bool:
        """No lease, no holding and none of RQ's traces of an execution."""
        names = [key("leases", queue), key("wip", queue), *self.connection.scan_iter(f"{key('held')}*")]
        return not self.connection.exists(*names)

    # --- processes -----------------------------------------------------------------------------------

    def worker(
        self,
        *arguments: str,
        queues: Sequence[str] = ("gpu",),
        url: str = "",
        wait: bool = True,
        environment: dict[str, str] | None = None,
        ours: bool = True,
        python: Path | None = None,
        **settings: Any,
    ) -> Process:
        """A plain ``rq worker`` process; ``wait`` until it claims (unless it ends by itself, or is RQ's own).

        ``python`` is that of another environment, for a release of ours.
        """
        name = f"worker-{len(self.processes)}"
        rq = [str(python), "-m", "rq.cli"] if python else [str(Path(sys.executable).with_name("rq"))]
        kind = ["-w", "perdure.workers.Worker"] if ours else []
        command = [*rq, "worker", *kind, "--url", url or self.url, "--name", name, *arguments, *queues]
        process = self._start(name, command, settings, environment)
        if wait and ours and "--burst" not in arguments:
            eventually(lambda: self.ready(name) or not process.running)
            assert process.running, process.log
            self.seen.update(process.children())
        return process

    def ready(self, name: str) -> dict[str, Any] | None:
        """What is known of the worker of this name, once it claims."""
        return next((item for item in self.store.workers() if item["worker"] == name and item["ready"]), None)

    def reaper(
        self, *, environment: dict[str, str] | None = None, python: Path | None = None, **settings: Any
    ) -> Process:
        """A ``python -m perdure.recovery`` process, once it has swept."""
        name = f"reaper-{len(self.processes)}"
        self.connection.delete(key("pulse"))
        process = self._start(
            name,
            [str(python or sys.executable), "-m", "perdure.recovery"],
            {"reap_interval": 0.1, **settings},
            {"RQ_REDIS_URL": self.url, **(environment or {})},
        )
        eventually(lambda: self.connection.exists(key("pulse")) or not process.running)
        # The pulse may be that of a guardian, which sweeps while nobody else does.
        clients = self.connection.client_list
        eventually(lambda: any(item["name"] == "perdure-reaper" for item in clients()) or not process.running)
        return process

    def _start(
        self, name: str, command: list[str], settings: dict[str, Any], environment: dict[str, str] | None
    ) -> Process:
        merged = Settings().replace(**(self.settings | settings)).environment()
        output = self.folder / f"{name}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(TASKS), "PYTHONUNBUFFERED": "1", **merged, **(environment or {})},
            )
        started = Process(process, output, name)
        self.processes.append(started)
        return started

    def close(self) -> None:
        """SIGKILL to everything that was started here, guardians first."""
        for process in self.processes:
            if process.running:
                self.seen.update(process.children())
        for pid in self.seen:
            # A number may belong to somebody else by now.
            if "perdure.workers.guardian.process" in command_of(pid):
                send(pid, signal.SIGCONT)
                send(pid, signal.SIGKILL)
        for process in self.processes:
            if process.running:
                process.kill()


@contextmanager
def laboratory(url: str, folder: Path, **settings: Any) -> Iterator[Lab]:
    """A lab that leaves no process behind."""
    with connect(url, name="test") as connection:
        lab = Lab(url, folder, connection)
        lab.settings |= settings
        try:
            yield lab
        finally:
            lab.close()


@contextmanager
def later(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Do something after so many seconds, or at the end of the block."""
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
