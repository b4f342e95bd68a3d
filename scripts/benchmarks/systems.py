"""The systems that are compared: how each is started, and how one sees from outside what it has finished.

What they do stands in ``peers/``; the releases in ``peers/versions.json``.
"""

from __future__ import annotations

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
_CELERY = (
    *("-m", "celery", "-A", "bench_celery", "worker", "--loglevel", "WARNING"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)
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
        "bare loop (one by one)", (_python("bench_bare.py"), "serve"), (_python("bench_bare.py"), "work", "1"),
        "no queue: the limit of redis-py", finished=_number("GET", "bare:finished"),
    ),
    System(
        "bare loop (by 64)", (_python("bench_bare.py"), "serve"), (_python("bench_bare.py"), "work", "64"),
        "no queue: the limit of redis-py", finished=_number("GET", "bare:finished"),
    ),
    System(
        "perdure @task", (_python("bench_perdure.py"), "noop"), _OWN_WORKER, "@task(slots=64)", finished=_RQ_FINISHED
    ),
)  # fmt: skip


def _keys_beyond(number: int) -> Count:
    """For those that keep a key for each result: all keys but so many of their own."""
    count = _number("DBSIZE")
    return lambda connection: max(0, count(connection) - number)


PEERS_OF_THE_QUEUE: Sequence[System] = (
    System(
        "dramatiq", (_python("bench_dramatiq.py"),),
        ("-m", "dramatiq", "bench_dramatiq", "--processes", "1", "--threads", "8"),
        "1 process, 8 threads, results in Redis", "dramatiq", waiting=_number("HLEN", f"dramatiq:{QUEUE}.msgs"),
    ),
    System(
        "celery prefork", (_python("bench_celery.py"),), (*_CELERY, "--pool", "prefork", "--concurrency", "1"),
        "1 child, prefetch 64, results in Redis", "celery", finished=_keys_beyond(2),
    ),
    System(
        "celery solo", (_python("bench_celery.py"),), (*_CELERY, "--pool", "solo"),
        "prefetch 64, results in Redis", "celery", finished=_keys_beyond(2),
    ),
    System(
        "saq", (_python("bench_saq.py"),), ("-m", "saq", "bench_saq.settings"),
        "64 at once, hiredis", "saq", waiting=_number("ZCARD", f"saq:{QUEUE}:incomplete"),
    ),
    System(
        "streaq", (_python("bench_streaq.py"),), ("-m", "streaq", "run", "bench_streaq:worker"),
        "64 at once", "streaq", finished=_number("ZCARD", f"streaq:{QUEUE}:index:results"),
    ),
    System(
        "taskiq-redis", (_python("bench_taskiq.py"),),
        ("-m", "taskiq", "worker", "bench_taskiq:broker", "--workers", "1", "--log-level", "WARNING"),
        "stream broker, 100 at once, results asked for every ms", "taskiq", finished=_keys_beyond(1),
    ),
    System(
        "huey", (_python("bench_huey.py"),),
        ("-m", "huey.bin.huey_consumer", "bench_huey.huey", "-w", "4", "-k", "thread", "-n", "-q", "-g", "TERM"),
        "4 threads, notify_result; at most once", "huey", finished=_number("HLEN", f"huey.results.{QUEUE}"),
    ),
    System(
        "bullmq", (_python("bench_bullmq.cjs"),), (_python("bench_bullmq.cjs"), "work"),
        "node, 50 at once, QueueEvents", "bullmq", finished=_number("ZCARD", f"bull:{QUEUE}:completed"),
    ),
)  # fmt: skip
