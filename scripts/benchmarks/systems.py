"""The systems that are compared: how each is started, and how one sees from outside what it has finished.

What they do stands in ``peers/``; the releases in ``peers/versions.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

QUEUE = "bench"
PEERS = Path(__file__).absolute().parent / "peers"

Count = Callable[[redis.Redis], int]


@dataclass(frozen=True, slots=True)
class System:
    """One row of a table.

    ``producer`` and ``worker`` follow the interpreter of the system's ``environment`` (``""`` is this one's own;
    ``node`` is BullMQ's). ``finished`` asks for one number with one cheap command; ``waiting`` the same for what
    is not finished yet, where a system counts only that.
    """

    name: str
    producer: Sequence[str]
    worker: Sequence[str]
    how: str
    environment: str = ""
    finished: Count | None = None
    waiting: Count | None = None
    variables: dict[str, str] = field(default_factory=dict)

    def done(self, connection: redis.Redis, submitted: int) -> int:
        """How many have finished."""
        if self.finished is not None:
            return self.finished(connection)
        assert self.waiting is not None
        return submitted - self.waiting(connection)


def _number(command: str, *arguments: str) -> Count:
    def ask(connection: redis.Redis) -> int:
        reply: Any = connection.execute_command(command, *arguments)  # type: ignore[no-untyped-call]
        return int(reply or 0)

    return ask


def _python(name: str) -> str:
    return str(PEERS / name)


_RQ_FINISHED = _number("ZCARD", f"rq:finished:{QUEUE}")
_OWN_WORKER = ("-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--quiet", QUEUE)
_RQ_WORKER = ("-P", "-m", "rq.cli", "worker", "--quiet", "-w")

OWN: Sequence[System] = (
    System(
        "perdure", (_python("bench_perdure.py"), "Noop"), _OWN_WORKER, "BatchTask, 64 slots", finished=_RQ_FINISHED
    ),
    System(
        "rq SimpleWorker", (_python("bench_rq.py"),), (*_RQ_WORKER, "rq.worker.SimpleWorker", QUEUE),
        "no fork for each job", finished=_RQ_FINISHED,
    ),
    System(
        "rq Worker", (_python("bench_rq.py"),), (*_RQ_WORKER, "rq.worker.Worker", QUEUE),
        "defaults: a fork for each job", finished=_RQ_FINISHED,
    ),
    System(
        "bare loop, one by one", (_python("bench_bare.py"), "serve"), (_python("bench_bare.py"), "work", "1"),
        "no queue: the limit of redis-py", finished=_number("GET", "bare:finished"),
    ),
    System(
        "bare loop, by 64", (_python("bench_bare.py"), "serve"), (_python("bench_bare.py"), "work", "64"),
        "no queue: the limit of redis-py", finished=_number("GET", "bare:finished"),
    ),
    System(
        "perdure @task", (_python("bench_perdure.py"), "noop"), _OWN_WORKER, "@task(slots=64)", finished=_RQ_FINISHED
    ),
)  # fmt: skip


def own_python() -> str:
    """The interpreter of this environment."""
    return sys.executable
