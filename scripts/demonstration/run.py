"""A pool under fire: real requests to a real model while workers are killed.

1. Start a server, a reaper and two workers; wait until both have loaded the model.
2. Submit all prompts and stream every answer.
3. SIGKILL one worker alone; then, when its requests go on elsewhere, the other one with its whole process tree.
   Each kill fires on what has been put out so far, not on a clock.
4. Stop the pool, then have the same prompts answered alone, in a process without Redis.

What is measured comes from the streams (what a client sees), from the requests' history in Redis, and from the
engines' own trace of their forward passes, which is on disk before a kill can reach it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

from ...producer import Client, Handle
from ...protocol.connection import connect
from ...protocol.errors import PerdureError
from ...protocol.keys import key
from ...protocol.records import Event, RequestRecord
from ...protocol.settings import Settings
from ...protocol.store import Store
from ..pool.pool import Pool
from ..pool.server import Server

TASK = "perdure.workers.text.generate"
QUEUE = "demo"
WORKERS = 2

WRITTEN_BEFORE_KILL = 3
"""Outputs of a request that must have been seen before its worker is killed."""

INTERRUPTED = 2
"""Requests with written outputs that each kill must interrupt."""

SLACK = 2
"""Tokens that a kill may cost above those of one checkpoint interval: one in the step that was running, one
between the step and the checkpoint."""

READY_TIMEOUT = 300.0
RUN_TIMEOUT = 150.0
GOLDEN_TIMEOUT = 300.0
"""Seconds: for loading the model, for all answers under fire, and for the answers without."""


class DemonstrationFailed(PerdureError):
    """The demonstration could not be carried through; the message says at which step, and where its log is."""


@dataclass(slots=True)
class Answer:
    """What a client saw of one request; ``times`` are monotonic seconds, one per output."""

    payload: dict[str, Any]
    handle: Handle
    outputs: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: str = ""
    done: bool = False


@dataclass(slots=True, kw_only=True)
class DemoKill:
    """One kill: what was killed, when (monotonic seconds), and what it held."""

    kind: str
    worker: str
    pid: int
    at: float
    held: list[str]


@dataclass(slots=True)
class Record:
    """All that was seen, for the verdict."""

    settings: Settings
    answers: list[Answer] = field(default_factory=list)
    kills: list[DemoKill] = field(default_factory=list)
    histories: dict[str, list[Event]] = field(default_factory=dict)
    logs: dict[str, list[Any]] = field(default_factory=dict)
    """The output log in Redis, read after the end."""
    entries: dict[str, int] = field(default_factory=dict)
    """Entries of RQ's result stream: one for a request that ended once."""
    workers: dict[int, str] = field(default_factory=dict)
    """Process id -> a short name for people."""
    names: dict[str, str] = field(default_factory=dict)
    """Worker -> the same short name."""
    ends: dict[str, RequestRecord] = field(default_factory=dict)
    clock: float = 0.0
    """Seconds since 1970 at monotonic second 0; the server is on this machine."""
    trace: list[dict[str, Any]] = field(default_factory=list)
    golden: list[dict[str, Any]] = field(default_factory=list)


TINY_FACTOR = 4
"""The tiny model takes milliseconds for a token: with answers of the same length, all would have ended before a
worker could be killed for the second time."""


def prompts(model: str) -> list[dict[str, Any]]:
    """The payloads of the demonstration; longer answers for the tiny model."""
    text = (files(__package__) / "prompts.jsonl").read_text(encoding="utf-8")
    payloads = [json.loads(line) for line in text.splitlines()]
    if model == "tiny":
        for payload in payloads:
            payload["max_tokens"] *= TINY_FACTOR
    return payloads


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The forward passes that one worker has noted so far. What follows the last line end is still being written."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def most_within(trace: Sequence[dict[str, Any]], name: str, pid: int, seconds: float) -> int:
    """The most outputs of a request that one process has sampled within so many seconds."""
    times = [
        line["at"]
        for line in trace
        if line["pid"] == pid and any(row[0] == name and row[3] == "decode" for row in line["rows"])
    ]
    most = first = 0
    for last, at in enumerate(times):
        while at - times[first] > seconds * 1e9:
            first += 1
        most = max(most, last - first + 1)
    return most


class Demonstration:
    """Runs once. ``say`` gets a line for people at every turn; ``changed`` is called after every output."""

    def __init__(
        self, settings: Settings, folder: Path, say: Callable[[str], None], changed: Callable[[Record], None]
    ) -> None:
        self.folder = folder
        self.log = folder / "pool.log"
        # Two workers share the machine: one thread each, and the same for the golden answers, whose bits would differ.
        self.settings = settings.replace(
            tasks=(TASK,), threads=settings.threads or 1, trace=str(folder / "trace"), redis_url=""
        )
        self.record = Record(self.settings)
        self._say = say
        self._changed = changed
        self._lock = threading.Lock()

    def run(self, payloads: Sequence[dict[str, Any]]) -> Record:
        """Carry it through. Raises :class:`DemonstrationFailed`."""
        with Server(self.folder / "redis", die_with_parent=True) as server:
            pool = Pool(server.url, [QUEUE], WORKERS, self.settings, output=self.log)
            with Client(server.url, settings=self.settings) as client, connect(server.url) as connection:
                store = Store(connection, self.settings)
                pool.start()
                try:
                    self._wait_ready(store, pool)
                    self._serve(client, store, payloads)
                finally:
                    pool.stop()
                self._collect(store)
        self._say("The pool has stopped. Answering each prompt again, alone and without Redis …")
        self.record.golden = self._golden(payloads)
        return self.record

    # --- the pool ----------------------------------------------------------------------------------

    def _wait_ready(self, store: Store, pool: Pool) -> None:
        self._say(f"Server, reaper and {WORKERS} workers started; loading {self.settings.model} …")
        deadline = time.monotonic() + READY_TIMEOUT
        while len(self._ready(store)) < WORKERS:
            restarts = self.log.read_text(errors="replace").count("cannot load a task") if self.log.exists() else 0
            if restarts or time.monotonic() > deadline:
                raise DemonstrationFailed(f"the workers did not come up; the end of {self.log}:\n{self._tail()}")
            time.sleep(0.05)  # the state of other processes: there is nothing to wait on but time
        self._say("Both workers are ready.")

    def _ready(self, store: Store) -> list[dict[str, Any]]:
        ready = [worker for worker in store.workers() if worker["ready"] and worker["dead_in"] > 0]
        for worker in ready:
            if worker["pid"] not in self.record.workers:
                self.record.workers[worker["pid"]] = chr(ord("A") + len(self.record.workers))
            self.record.names[worker["worker"]] = self.record.workers[worker["pid"]]
        return ready

    def _serve(self, client: Client, store: Store, payloads: Sequence[dict[str, Any]]) -> None:
        handles = client.submit_many([(TASK, payload) for payload in payloads], queue=QUEUE)
        answers = [Answer(payload, handle) for payload, handle in zip(payloads, handles, strict=True)]
        self.record.answers = answers
        threads = [threading.Thread(target=self._follow, args=(answer,), daemon=True) for answer in answers]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + RUN_TIMEOUT
        self._kill_alone(store, deadline)
        self._kill_tree(store, deadline)
        while not all(answer.done for answer in answers):
            if time.monotonic() > deadline:
                raise DemonstrationFailed(
                    f"after {RUN_TIMEOUT:g} s some requests have not ended; the end of {self.log}:\n{self._tail()}"
                )
            time.sleep(0.05)
            self._ready(store)
        for thread in threads:
            thread.join()

    def _follow(self, answer: Answer) -> None:
        try:
            for output in answer.handle.stream(timeout=RUN_TIMEOUT):
                with self._lock:
                    answer.outputs.append(output)
                    answer.times.append(time.monotonic())
                    self._changed(self.record)
            answer.result = answer.handle.result(timeout=RUN_TIMEOUT)
        except (PerdureError, TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            answer.done = True
            self._changed(self.record)

    # --- the kills ---------------------------------------------------------------------------------

    def _kill_alone(self, store: Store, deadline: float) -> None:
        """The worker with the most requests, once enough of them have been seen putting out: the other has room."""

        def target() -> dict[str, Any] | None:
            worker = max(self._ready(store), key=lambda item: len(item["held"]), default=None)
            return worker if worker is not None and len(self._written(worker, {})) >= INTERRUPTED else None

        worker = self._await(target, deadline)
        if worker is not None:
            self._kill("worker", worker, [worker["pid"]])

    def _kill_tree(self, store: Store, deadline: float) -> None:
        """The other one, once it has gone on with requests of the first, and all its own have put out more."""
        if not self.record.kills:
            return
        first = self.record.kills[0]
        before = {answer.handle.id: len(answer.outputs) for answer in self.record.answers}

        def target() -> dict[str, Any] | None:
            ready = self._ready(store)
            others = [item for item in ready if item["pid"] in pids]
            # Or the first recovery could not be told from the second.
            if not others or not any(self._went_on(store, name, first.worker) for name in first.held):
                return None
            return others[0] if len(self._written(others[0], before)) >= INTERRUPTED else None

        pids = {pid for pid in self.record.workers if pid != first.pid}
        worker = self._await(target, deadline)
        if worker is not None:
            children = [child.pid for child in psutil.Process(worker["pid"]).children(recursive=True)]
            self._kill("tree", worker, [worker["pid"], *children])

    def _await(self, target: Callable[[], dict[str, Any] | None], deadline: float) -> dict[str, Any] | None:
        """The first worker that fits; ``None`` when all requests have ended before one did."""
        while time.monotonic() < deadline and not all(answer.done for answer in self.record.answers):
            if (worker := target()) is not None:
                return worker
            time.sleep(0.01)
        return None

    def _written(self, worker: dict[str, Any], before: dict[str, int]) -> list[str]:
        """Requests of a worker that a client has seen enough outputs of, and that have some way to go."""
        names = []
        for name in worker["held"]:
            answer = self._answer(name)
            seen = len(answer.outputs)
            fresh = seen - before.get(name, 0)
            if fresh >= WRITTEN_BEFORE_KILL and answer.payload["max_tokens"] - seen >= WRITTEN_BEFORE_KILL:
                names.append(name)
        if len(names) < INTERRUPTED:
            return names
        # So many that beginning again from zero would cost more than a checkpoint interval: or it could not be told
        # from going on.
        trace = read_trace(Path(self.settings.trace) / f"{worker['pid']}.jsonl")
        most = {
            name: most_within(trace, name, worker["pid"], self.settings.checkpoint_interval) + SLACK for name in names
        }
        return [name for name in names if len(self._answer(name).outputs) > most[name]]

    def _went_on(self, store: Store, name: str, lost: str) -> bool:
        """Whether a client has seen an output that the lost worker cannot have stored."""
        offsets = [event.offset for event in store.history(name) if event.worker == lost and event.offset >= 1]
        return bool(offsets) and len(self._answer(name).outputs) > max(offsets)

    def _answer(self, name: str) -> Answer:
        return next(answer for answer in self.record.answers if answer.handle.id == name)

    def _kill(self, kind: str, worker: dict[str, Any], pids: Sequence[int]) -> None:
        at = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        held = list(worker["held"])
        self.record.kills.append(DemoKill(kind=kind, worker=worker["worker"], pid=worker["pid"], at=at, held=held))
        what = "alone" if kind == "worker" else f"and its whole process tree ({len(pids)} processes)"
        name = self.record.workers[worker["pid"]]
        self._say(f"kill -9 {worker['pid']}: worker {name} {what}, holding {len(worker['held'])} requests")

    # --- afterwards --------------------------------------------------------------------------------

    def _collect(self, store: Store) -> None:
        self.record.clock = time.time() - time.monotonic()
        for answer in self.record.answers:
            name = answer.handle.id
            self.record.histories[name] = store.history(name)
            if (end := store.fetch(name)) is not None:
                self.record.ends[name] = end
            self.record.logs[name] = store.all_outputs(name)
            length: Any = store.connection.xlen(key("results", name))
            self.record.entries[name] = int(length)
        for path in sorted(Path(self.settings.trace).glob("*.jsonl")):
            self.record.trace += read_trace(path)

    def _golden(self, payloads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PERDURE_")}
        environment |= self.settings.replace(trace="").environment()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "perdure.workers.text.golden"],
            input="\n".join(map(json.dumps, payloads)).encode(),
            capture_output=True,
            env=environment,
            timeout=GOLDEN_TIMEOUT,
            check=False,
        )
        if done.returncode != 0:
            raise DemonstrationFailed(f"the golden answers could not be made:\n{done.stderr.decode()[-2000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def _tail(self) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        except OSError:
            return "(nothing was logged)"
