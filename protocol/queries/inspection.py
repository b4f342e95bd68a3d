"""What an operator asks of a whole pool: queues, leases, checkpoints.

Reads only, each bounded by what it returns: no key is read as a whole, and no payload at all. Errors of redis-py come
out as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import redis

from ..keys import all_served, key
from ..records import RequestRecord, whole
from ..store import Store

_HEADS: Final = 16
"""Entries at the head of a queue that are looked at for its oldest: what is canceled stays there until it is met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFacts:
    """One queue. ``oldest`` is how long the oldest of its first entries has waited there, in seconds.

    ``waiting`` counts what a worker could take now, suspects included; ``due_later`` delayed requests and retries.
    ``counters`` are totals since the counters began: submitted, claimed, finished, failed, retried, redelivered, ….
    """

    name: str
    waiting: int
    suspects: int
    due_later: int
    running: int
    failed: int
    finished: int
    workers: int
    oldest: float | None
    counters: dict[str, int]


def queue_facts(store: Store, names: Sequence[str]) -> list[QueueFacts]:
    """Depth, age and totals of these queues: two round trips, whatever waits."""
    workers: dict[str, int] = dict.fromkeys(names, 0)
    for worker in store.workers():
        for name in all_served(worker["queues"]):
            workers[name] = workers.get(name, 0) + 1
    with store.connection.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.hgetall(key("counters"))
        for name in names:
            pipe.llen(key("queue", name))
            for registry in ("ended", "suspects", "retries", "leases", "failed", "finished"):
                pipe.zcard(key(registry, name))
            pipe.lrange(key("queue", name), 0, _HEADS - 1)
            pipe.zrange(key("suspects", name), 0, 0, withscores=True)
        (seconds, micros), raw, *replies = pipe.execute()
    now = seconds + micros / 1e6
    totals = {field.decode(errors="replace"): whole(value) for field, value in raw.items()}
    rows = [replies[at : at + 9] for at in range(0, len(replies), 9)]
    ages = _oldest(store, [row[7] for row in rows], now)
    result = []
    for name, row, age in zip(names, rows, ages, strict=True):
        length, ended, suspects, retries, leases, failed, finished, _, first = row
        since = [now - score / 1000 for _, score in first]
        counters = {
            event.removesuffix(f":{name}"): number
            for event, number in totals.items()
            # Names may have colons, and one may be the end of another; events have none.
            if event.endswith(f":{name}") and ":" not in event.removesuffix(f":{name}")
        }
        result.append(
            QueueFacts(
                name=name,
                waiting=max(0, length - ended) + suspects,
                suspects=suspects,
                due_later=retries,
                running=leases,
                failed=failed,
                finished=finished,
                workers=workers.get(name, 0),
                counters=counters,
                oldest=max([*since, *([] if age is None else [age])], default=None),
            )
        )
    return result


def _oldest(store: Store, heads: Sequence[Sequence[bytes]], now: float) -> list[float | None]:
    with store.connection.pipeline(transaction=False) as pipe:
        for head in heads:
            for identifier in head:
                pipe.hmget(key("job", identifier.decode(errors="replace")), "status", "enqueued_at")
        rows = iter(pipe.execute() if any(heads) else [])
    result: list[float | None] = []
    for head in heads:
        ages = []
        for _ in head:
            status, date = next(rows)
            if status == b"queued" and (at := _seconds(date)) is not None:
                ages.append(max(0.0, now - at))
        result.append(max(ages, default=None))
    return result


def _seconds(date: bytes | None) -> float | None:
    try:
        return datetime.fromisoformat((date or b"").decode(errors="replace")).timestamp()
    except ValueError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who holds a request, and for how many more seconds without progress; below 0 it is overdue."""

    id: str
    queue: str
    expires_in: float
    record: RequestRecord | None


def leases(store: Store, names: Sequence[str], *, within: float | None, limit: int) -> list[Lease]:
    """The leases that end first, at most ``limit``; with ``within``, only those that end in so many seconds."""
    (seconds, micros), *_ = ask(store.connection, [("TIME",)])
    now = seconds + micros / 1e6
    most = "+inf" if within is None else int((now + within) * 1000)
    calls = [("ZRANGEBYSCORE", key("leases", name), "-inf", most, "WITHSCORES", "LIMIT", 0, limit) for name in names]
    found = [
        (score / 1000 - now, identifier.decode(errors="replace"), name)
        for name, page in zip(names, ask(store.connection, calls), strict=True)
        for identifier, score in page
    ]
    found = sorted(found)[:limit]
    records = store.fetch_many([identifier for _, identifier, _ in found]) if found else []
    return [
        Lease(id=identifier, queue=name, expires_in=left, record=record)
        for (left, identifier, name), record in zip(found, records, strict=True)
    ]


def ask(connection: redis.Redis, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """The answers to these commands, in one round trip."""
    with connection.pipeline(transaction=False) as pipe:
        for call in calls:
            pipe.execute_command(*call)  # type: ignore[no-untyped-call]
        return pipe.execute() if calls else []


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """One stored checkpoint: ``bytes`` of its state, ``age`` in seconds, ``chunks`` of a large state."""

    id: str
    queue: str
    status: str
    seq: int
    offset: int
    bytes: int
    chunks: int
    age: float
    held: bool


def checkpoints(store: Store, *, begin: int, limit: int, newest: bool = False) -> tuple[list[CheckpointFacts], int]:
    """A page of checkpoints in the order of their last write, and how many there are in all."""
    read = "ZREVRANGE" if newest else "ZRANGE"
    asked = [
        ("TIME",),
        ("ZCARD", key("checkpoints")),
        (read, key("checkpoints"), begin, begin + limit - 1, "WITHSCORES"),
    ]
    (seconds, micros), number, page = ask(store.connection, asked)
    calls: list[Sequence[Any]] = []
    for raw, _ in page:
        name = raw.decode(errors="replace")
        calls.append(("HMGET", key("checkpoint", name), "seq", "offset", "length", "chunks"))
        calls.append(("HSTRLEN", key("checkpoint", name), "state"))
        calls.append(("HMGET", key("job", name), "origin", "status", "execution"))
    rows = ask(store.connection, calls)
    result = []
    for at, (raw, score) in enumerate(page):
        (seq, offset, length, mark), size, (queue, status, execution) = rows[3 * at : 3 * at + 3]
        result.append(
            CheckpointFacts(
                id=raw.decode(errors="replace"),
                queue=text_of(queue),
                status=text_of(status) or "gone",
                seq=whole(seq),
                offset=whole(offset),
                bytes=whole(length) or size,
                chunks=whole(text_of(mark).rpartition(":")[2]),
                age=max(0.0, seconds + micros / 1e6 - float(score) / 1000),
                held=bool(execution),
            )
        )
    return result, int(number)


def text_of(value: bytes | None) -> str:
    """Text that stands in Redis; empty for what is not there."""
    return (value or b"").decode(errors="replace")
