"""The census: one look at the whole pool that costs the same however much waits in it.

Numbers of members come from Redis' own counts, ages from the first entries of an order: nothing is walked through.
What grows with the pool (queues, workers, devices) is read up to a limit, and what was left out is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import redis

from ..keys import key
from ..reading.mode import DEGRADED
from ..records import whole
from ..telemetry.measures import parse_counters

HEAD: Final = 8
"""Entries at the head of a queue of which the oldest is looked for: who was handed back stands there with a new date.
"""

ENDED: Final = (b"finished", b"failed", b"canceled", b"stopped")

PAGE: Final = 1000
"""Fields of the counters that one call reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCensus:
    """One queue. ``waiting`` leaves out what has ended there; ``oldest`` is in seconds, 0 for nobody."""

    waiting: int
    suspects: int
    retries: int
    running: int
    overdue: int
    oldest: float
    registries: Mapping[str, int]
    """RQ's own, by their names in the key table."""


@dataclass(frozen=True, slots=True)
class RQWorker:
    """A worker as RQ's tools see it; stock workers are among them."""

    name: str
    state: str
    queues: str
    succeeded: int
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Everything that was found. Ages are seconds; ``None`` is "cannot be known"."""

    queues: Mapping[str, QueueCensus]
    counters: Mapping[str, int]
    workers: Sequence[RQWorker]
    ready: int
    loading: int
    expected: int
    degraded: bool
    checkpoints: int
    checkpoint_age: float
    pulse_age: float | None
    unfit: Sequence[str]
    unable: int
    """Living workers that could not load some task."""
    """Devices that are not to be used."""
    server: Mapping[str, Any]
    """Fields of INFO; empty where this user may not ask."""
    left_out: Mapping[str, int] = field(default_factory=dict)


_REGISTRIES: Final = ("wip", "finished", "failed", "canceled", "scheduled", "deferred")
_PER_QUEUE: Final = 5 + len(_REGISTRIES)


class Surveyor:
    """Takes the census, over one connection with replies as bytes. Not for several threads at once.

    ``max_queues``, ``max_workers``: how many are told apart. A queue that was once seen stays, so that a new one does
    not push it out from one look to the next.
    """

    def __init__(self, connection: redis.Redis, *, max_queues: int = 200, max_workers: int = 500) -> None:
        self.connection = connection
        self._max_queues = max_queues
        self._max_workers = max_workers
        self._queues: dict[str, None] = {}

    def take(self) -> Census:
        """Look once. Raises what redis-py raises."""
        left_out: dict[str, int] = {}
        queues = self._names(left_out)
        workers = self._workers(left_out)
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.time()
            ((seconds, micros),) = pipe.execute()
            now = seconds * 1000 + micros // 1000
            for queue in queues:
                pipe.lrange(key("queue", queue), 0, HEAD - 1)
                pipe.llen(key("queue", queue))
                pipe.zcard(key("leases", queue))
                pipe.zcount(key("leases", queue), "-inf", now)
                pipe.zrange(key("suspects", queue), 0, 0, withscores=True)
                for registry in _REGISTRIES:
                    pipe.zcard(key(registry, queue))
            for queue in queues:
                pipe.zcard(key("suspects", queue))
                pipe.zcard(key("retries", queue))
                pipe.zcard(key("ended", queue))
            pipe.zcount(key("beats"), f"({now}", "+inf")
            pipe.zcount(key("unready"), f"({now}", "+inf")
            pipe.hmget(key("mode"), "mode", "until", "expected")
            pipe.zcard(key("checkpoints"))
            pipe.zrange(key("checkpoints"), 0, 0, withscores=True)
            pipe.hget(key("pulse"), "at")
            pipe.hlen(key("unfit"))
            pipe.zcount(key("unable"), f"({now}", "+inf")
            replies = pipe.execute()
        rows = [replies[place : place + _PER_QUEUE] for place in range(0, _PER_QUEUE * len(queues), _PER_QUEUE)]
        aside = replies[_PER_QUEUE * len(queues) : (_PER_QUEUE + 3) * len(queues)]
        alive, unready, mode, stored, oldest, pulse, devices, unable = replies[-8:]
        ages = self._ages([row[0] for row in rows], now)
        found = {}
        for place, (queue, row) in enumerate(zip(queues, rows, strict=True)):
            _, waiting, running, overdue, suspect, *cards = row
            since = suspect[0][1] if suspect else now
            found[queue] = QueueCensus(
                waiting=max(0, waiting - aside[3 * place + 2]),
                suspects=aside[3 * place],
                retries=aside[3 * place + 1],
                running=running,
                overdue=overdue,
                oldest=max(ages[place], (now - since) / 1000),
                registries=dict(zip(_REGISTRIES, cards, strict=True)),
            )
        return Census(
            queues=found,
            counters=self._counters(),
            workers=workers,
            ready=max(0, alive - unready),
            loading=unready,
            expected=whole(mode[2]),
            degraded=mode[0] == DEGRADED.encode() and now < whole(mode[1]),
            checkpoints=stored,
            checkpoint_age=max(0.0, (now - oldest[0][1]) / 1000) if oldest else 0.0,
            pulse_age=max(0.0, (now - whole(pulse)) / 1000) if pulse else None,
            unfit=self._unfit(devices, left_out),
            unable=unable,
            server=self._server(),
            left_out=left_out,
        )

    def _names(self, left_out: dict[str, int]) -> list[str]:
        stem = len(key("queue"))
        members: Any = self.connection.smembers(key("queues"))
        names = {member.decode(errors="replace")[stem:] for member in members}
        kept = [name for name in self._queues if name in names]
        kept += sorted(names.difference(kept))[: max(0, self._max_queues - len(kept))]
        self._queues = dict.fromkeys(kept)
        left_out["queues"] = len(names) - len(kept)
        return kept

    def _workers(self, left_out: dict[str, int]) -> list[RQWorker]:
        """All, or none: some of them would look like all."""
        number: Any = self.connection.scard(key("workers"))
        left_out["workers"] = number if number > self._max_workers else 0
        if not 0 < number <= self._max_workers:
            return []
        members: Any = self.connection.smembers(key("workers"))
        names = sorted(members)
        fields = ("state", "queues", "successful_job_count", "failed_job_count", "total_working_time", "birth")
        with self.connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(name, fields)
            rows = pipe.execute()
        stem = len(key("worker"))
        return [
            RQWorker(
                name.decode(errors="replace")[stem:],
                _text(state) or "?",
                _text(queues),
                whole(good),
                whole(bad),
                _decimal(spent),
            )
            for name, (state, queues, good, bad, spent, birth) in zip(names, rows, strict=True)
            if birth is not None
        ]

    def _ages(self, heads: Sequence[Sequence[bytes]], now: int) -> list[float]:
        """For the head of each queue, how long the oldest of it has waited (s)."""
        with self.connection.pipeline(transaction=False) as pipe:
            for head in heads:
                for identifier in head:
                    pipe.hmget(key("job", identifier.decode(errors="replace")), "status", "enqueued_at")
            rows = iter(pipe.execute())
        result = []
        for head in heads:
            ages = [0.0]
            for _ in head:
                status, date = next(rows)
                if date and status not in ENDED:
                    ages.append(_age(date, now))
            result.append(max(ages))
        return result

    def _counters(self) -> dict[str, int]:
        """In pages: there are some hundred for each queue, and Redis does nothing else meanwhile."""
        found: dict[bytes, bytes] = {}
        cursor = 0
        while True:
            page: Any
            cursor, page = self.connection.hscan(key("counters"), cursor, count=PAGE)
            found |= page
            if not cursor:
                return parse_counters(found)

    def _unfit(self, number: int, left_out: dict[str, int]) -> list[str]:
        left_out["devices"] = number if number > self._max_workers else 0
        if not 0 < number <= self._max_workers:
            return []
        places: Any = self.connection.hkeys(key("unfit"))
        return sorted(place.decode(errors="replace") for place in places)

    def _server(self) -> dict[str, Any]:
        """A user without the right to ask, and a pretended server, cost only these figures."""
        found: dict[str, Any] = {}
        try:
            for section in ("memory", "stats", "persistence"):
                found |= self.connection.info(section)
        except redis.ResponseError:
            pass
        return found


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode(errors="replace")


def _decimal(raw: bytes | None) -> float:
    try:
        return float(raw or 0)
    except ValueError:
        return 0.0


def _age(date: bytes, now: int) -> float:
    try:
        return max(0.0, now / 1000 - datetime.fromisoformat(date.decode()).timestamp())
    except ValueError:
        return 0.0
