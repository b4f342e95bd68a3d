"""Requests that RQ's own worker was killed with: found by where they are missing, and taken back.

A worker that was started without ``-w perdure.workers.Worker`` does not run a request: it gives it back within a
second. Killed in that second, it leaves the request started by nobody, in RQ's intermediate list, failed by RQ, or,
where it listened to several queues, nowhere at all. No worker of ours can see that; somebody has to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any, Final

from ..protocol.keys import key
from ..protocol.transitions.sweeps import Sweeps

_STEP: Final = 200

STUCK: Final = 10.0
"""Seconds that RQ's worker may have a request: it gives it back after one."""

REASON: Final = "a worker of RQ's own was killed with it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """One request that no worker will find. ``where``: started, intermediate, failed or nowhere."""

    id: str
    queue: str
    where: str
    execution: str = ""
    worker: str = ""


def find(store: Sweeps, queues: Sequence[str], *, stuck: float = STUCK, most: int = 10_000) -> Iterator[Stray]:
    """Strays that RQ's registries still show; looks at no more than ``most`` entries of each.

    ``stuck``: seconds since RQ's worker began with it.
    """
    for queue in queues:
        seen: set[str] = set()
        for stray in chain(
            _started(store, queue, stuck, most), _intermediate(store, queue, stuck, most), _failed(store, queue, most)
        ):
            # For a moment RQ has a job in its started registry and in the intermediate list.
            if stray.id not in seen:
                seen.add(stray.id)
                yield stray


def _pages(store: Sweeps, name: str, most: int, *, newest: bool = False, a_list: bool = False) -> Iterator[list[str]]:
    read: Any = store.connection.lrange if a_list else store.connection.zrevrange if newest else store.connection.zrange
    for begin in range(0, most, _STEP):
        page = [raw.decode(errors="replace") for raw in read(name, begin, begin + _STEP - 1)]
        if page:
            yield page
        if len(page) < _STEP:
            return


def _jobs(store: Sweeps, identifiers: Sequence[str], *fields: str) -> list[list[str]]:
    with store.connection.pipeline(transaction=False) as pipe:
        for identifier in identifiers:
            pipe.hmget(key("job", identifier), "task", "execution", "status", "last", *fields)
        rows = pipe.execute()
    return [[(value or b"").decode(errors="replace") for value in row] for row in rows]


def _time(raw: bytes | None) -> float:
    """A time as RQ's executions hold it, in seconds since 1970; 0, long ago, for what is none."""
    try:
        return float(raw or 0)
    except ValueError:
        return 0.0


def _started(store: Sweeps, queue: str, stuck: float, most: int) -> Iterator[Stray]:
    """What stands in RQ's started registry under an execution that is none of ours."""
    for page in _pages(store, key("wip", queue), most):
        pairs = [(identifier, execution) for identifier, _, execution in (item.partition(":") for item in page)]
        rows = _jobs(store, [identifier for identifier, _ in pairs], "worker_name")
        # Not the job's started_at: RQ writes that later, and its worker may have been killed in between.
        with store.connection.pipeline(transaction=False) as pipe:
            for identifier, execution in pairs:
                pipe.hget(key("execution", f"{identifier}:{execution}"), "created_at")
            begun = [_time(raw) for raw in pipe.execute()]
        now = _now(store)
        for (identifier, execution), (task, ours, _, _, worker), began in zip(pairs, rows, begun, strict=True):
            if task and not ours and now - began > stuck:
                yield Stray(id=identifier, queue=queue, where="started", execution=execution, worker=worker)


def _intermediate(store: Sweeps, queue: str, stuck: float, most: int) -> Iterator[Stray]:
    for page in _pages(store, f"{key('queue', queue)}:intermediate", most, a_list=True):
        now, rows = _now(store), _jobs(store, page, "started_at")
        for identifier, (task, ours, status, _, started) in zip(page, rows, strict=True):
            waits = status == "queued" or (status == "started" and now - (_seconds(started) or 0.0) > stuck)
            if task and not ours and waits:
                yield Stray(id=identifier, queue=queue, where="intermediate")


def _failed(store: Sweeps, queue: str, most: int) -> Iterator[Stray]:
    """What RQ failed: one that we have failed says so in its last verdict."""
    for page in _pages(store, key("failed", queue), most, newest=True):
        rows = _jobs(store, page, "worker_name")
        for identifier, (task, ours, status, last, worker) in zip(page, rows, strict=True):
            if task and not ours and status == "failed" and not last.endswith(":failed"):
                yield Stray(id=identifier, queue=queue, where="failed", worker=worker)


def take_back(store: Sweeps, strays: Sequence[Stray]) -> list[str]:
    """Have them wait in their queues again, those too that RQ has failed; returns the ids of those that do."""
    taken = []
    for begin in range(0, len(strays), 100):
        some = strays[begin : begin + 100]
        answers = store.readmit([(stray.id, stray.execution) for stray in some], reason=REASON)
        for stray, answer in zip(some, answers, strict=True):
            # Afterwards: were it the other way round, a death in between would lose it. RQ would fail it a minute
            # later.
            if answer != "gone":
                store.connection.lrem(f"{key('queue', stray.queue)}:intermediate", 1, stray.id)
            if answer in ("queued", "already"):
                taken.append(stray.id)
    return taken


def find_everywhere(store: Sweeps, queues: Sequence[str]) -> Iterator[Stray]:
    """Requests that wait according to their hash, and stand nowhere. Walks through all jobs there are, page by page."""
    stem = key("job")
    waiting: dict[str, str] = {}
    names: list[str] = []
    for raw in store.connection.scan_iter(match=f"{_literal(stem)}*", count=_STEP, _type="hash"):
        names.append(raw.decode(errors="replace").removeprefix(stem))
        if len(names) == _STEP:
            waiting |= _waiting(store, names)
            names = []
    waiting |= _waiting(store, names)
    for queue in queues:
        for name, a_list in (("queue", True), ("retries", False), ("suspects", False), ("wip", False)):
            for page in _pages(store, key(name, queue), 2**40, a_list=a_list):
                for item in page:
                    waiting.pop(item.partition(":")[0], None)
        for page in _pages(store, f"{key('queue', queue)}:intermediate", 2**40, a_list=True):
            for item in page:
                waiting.pop(item, None)
    # A claim in the meantime, or a move from one list to another, is no loss: asked again, one by one.
    for identifier, queue in waiting.items():
        if _waiting(store, [identifier]) and store.connection.lpos(key("queue", queue), identifier) is None:
            yield Stray(id=identifier, queue=queue, where="nowhere")


def _waiting(store: Sweeps, names: Sequence[str]) -> dict[str, str]:
    rows = _jobs(store, names, "origin") if names else []
    return {
        name: queue
        for name, (task, ours, status, last, queue) in zip(names, rows, strict=True)
        if task
        and not ours
        and status == "queued"
        and not last.endswith((":finished", ":failed", ":canceled", ":stopped"))
    }


def _literal(stem: str) -> str:
    return "".join(f"\\{sign}" if sign in "*?[]\\" else sign for sign in stem)


def _now(store: Sweeps) -> float:
    seconds, micros = store.connection.time()
    return float(seconds) + float(micros) / 1e6


def _seconds(date: str) -> float | None:
    try:
        return datetime.fromisoformat(date).timestamp()
    except ValueError:
        return None
