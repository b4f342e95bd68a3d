"""What an operator asks of a whole pool: queues, leases, checkpoints, failures, the server's load.

Reads only, each bounded by what it returns: no key is read as a whole, and no payload at all. Errors of redis-py come
out as they are; a question that an ACL forbids is answered with ``None`` where the rest can be.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import redis

from .. import scripts
from ..codec import unpack_exception
from ..keys import NAMES, all_served, key
from ..records import RequestRecord, whole
from ..store import Store

_HEADS: Final = 16
"""Entries at the head of a queue that are looked at for its oldest: what is canceled stays there until it is met."""

_STEP: Final = 500


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
    (seconds, micros), *_ = _ask(store.connection, [("TIME",)])
    now = seconds + micros / 1e6
    most = "+inf" if within is None else int((now + within) * 1000)
    calls = [("ZRANGEBYSCORE", key("leases", name), "-inf", most, "WITHSCORES", "LIMIT", 0, limit) for name in names]
    found = [
        (score / 1000 - now, identifier.decode(errors="replace"), name)
        for name, page in zip(names, _ask(store.connection, calls), strict=True)
        for identifier, score in page
    ]
    found = sorted(found)[:limit]
    records = store.fetch_many([identifier for _, identifier, _ in found]) if found else []
    return [
        Lease(id=identifier, queue=name, expires_in=left, record=record)
        for (left, identifier, name), record in zip(found, records, strict=True)
    ]


def _ask(connection: redis.Redis, calls: Sequence[Sequence[Any]]) -> list[Any]:
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
    (seconds, micros), number, page = _ask(store.connection, asked)
    calls: list[Sequence[Any]] = []
    for raw, _ in page:
        name = raw.decode(errors="replace")
        calls.append(("HMGET", key("checkpoint", name), "seq", "offset", "length", "chunks"))
        calls.append(("HSTRLEN", key("checkpoint", name), "state"))
        calls.append(("HMGET", key("job", name), "origin", "status", "execution"))
    rows = _ask(store.connection, calls)
    result = []
    for at, (raw, score) in enumerate(page):
        (seq, offset, length, mark), size, (queue, status, execution) = rows[3 * at : 3 * at + 3]
        result.append(
            CheckpointFacts(
                id=raw.decode(errors="replace"),
                queue=_text(queue),
                status=_text(status) or "gone",
                seq=whole(seq),
                offset=whole(offset),
                bytes=whole(length) or size,
                chunks=whole(_text(mark).rpartition(":")[2]),
                age=max(0.0, seconds + micros / 1e6 - float(score) / 1000),
                held=bool(execution),
            )
        )
    return result, int(number)


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


# --- failures ------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class DeadLetters:
    """Failures with one error: what failed in the same task, of the same kind, for the same reason but for its numbers."""

    fingerprint: str
    task: str
    kind: str
    reason: str
    number: int = 0
    first: str = ""
    last: str = ""
    queues: set[str]
    sample: str = ""
    """The id of the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One failed request or plain job; ``kind`` is empty for what RQ itself failed."""

    id: str
    queue: str
    task: str
    kind: str
    reason: str
    ended_at: str
    fingerprint: str


_CHANGING = re.compile(r"0x[0-9a-fA-F]+|\b[0-9a-fA-F]{8,}(?:-[0-9a-fA-F]{4,})*\b|\d+(?:\.\d+)?|'[^']*'|\"[^\"]*\"")


def fingerprint_of(task: str, kind: str, reason: str) -> str:
    """Ten digits that failures have in common which differ in numbers, addresses, ids and quoted words only."""
    plain = _CHANGING.sub("#", reason)
    return hashlib.sha256("\0".join((task, kind, plain)).encode(errors="replace")).hexdigest()[:10]


def dead_letters(store: Store, names: Sequence[str], *, limit: int) -> Iterator[DeadLetter]:
    """The failures of these queues, the newest of each queue first, at most ``limit`` of each queue."""
    for name in names:
        for begin in range(0, limit, _STEP):
            page: Any = store.connection.zrevrange(key("failed", name), begin, min(begin + _STEP, limit) - 1)
            identifiers = [raw.decode(errors="replace") for raw in page]
            yield from _letters(store, name, identifiers)
            if len(page) < _STEP:
                break


def _letters(store: Store, queue: str, identifiers: Sequence[str]) -> Iterator[DeadLetter]:
    fields = ("task", "error_kind", "error_reason", "ended_at", "description", "last")
    rows = _ask(store.connection, [("HMGET", key("job", name), *fields) for name in identifiers])
    # What RQ failed has no reason in its hash, but a traceback in its results.
    silent = [
        name for name, row in zip(identifiers, rows, strict=True) if not row[1] or not _text(row[5]).endswith(":failed")
    ]
    said = _ask(store.connection, [("XREVRANGE", key("results", name), "+", "-", "COUNT", 1) for name in silent])
    reasons = {name: _last_line(entries) for name, entries in zip(silent, said, strict=True)}
    for name, row in zip(identifiers, rows, strict=True):
        task, kind, reason, ended, description, _ = map(_text, row)
        if name in reasons:
            kind, reason = "", reasons[name]
        task = task or description.partition("(")[0]
        yield DeadLetter(
            id=name, queue=queue, task=task, kind=kind, reason=reason, ended_at=ended,
            fingerprint=fingerprint_of(task, kind, reason),
        )  # fmt: skip


def _last_line(entries: Any) -> str:
    for _, fields in entries or []:
        raw = dict(zip(fields[::2], fields[1::2], strict=False)) if isinstance(fields, list) else fields
        try:
            lines = unpack_exception(raw.get(b"exc_string", b"")).strip().splitlines()
        except ValueError:
            continue
        if lines:
            return lines[-1]
    return "no reason was stored"


def grouped(letters: Iterator[DeadLetter]) -> list[DeadLetters]:
    """Groups of one fingerprint each, the largest first."""
    groups: dict[str, DeadLetters] = {}
    for letter in letters:
        group = groups.setdefault(
            letter.fingerprint,
            DeadLetters(
                fingerprint=letter.fingerprint,
                task=letter.task,
                kind=letter.kind,
                reason=letter.reason,
                queues=set(),
                first=letter.ended_at,
                sample=letter.id,
            ),
        )
        group.number += 1
        group.queues.add(letter.queue)
        if letter.ended_at >= group.last:
            group.last, group.sample, group.reason = letter.ended_at, letter.id, letter.reason
        group.first = min(group.first, letter.ended_at)
    return sorted(groups.values(), key=lambda group: (-group.number, group.fingerprint))


# --- the server ----------------------------------------------------------------------------------


def pressure(connection: redis.Redis, *, slow: int = 10, pings: int = 20) -> dict[str, Any]:
    """How hard the server has it. Durations are seconds, sizes bytes; ``None`` is what this user may not ask.

    Arguments of slow commands are not read further than the command: they may be payloads.
    """
    times = []
    for _ in range(pings):
        began = time.perf_counter()
        connection.ping()
        times.append(time.perf_counter() - began)
    times.sort()
    info: dict[str, Any] = _allowed(lambda: connection.info()) or {}
    config: dict[str, Any] = _allowed(lambda: connection.config_get("appendfsync")) or {}
    entries = _allowed(lambda: connection.slowlog_get(slow))
    used, most = info.get("used_memory"), info.get("maxmemory")
    return {
        "version": info.get("valkey_version") or info.get("redis_version"),
        "uptime": info.get("uptime_in_seconds"),
        "keys": connection.dbsize(),
        "memory": {
            "used": used,
            "peak": info.get("used_memory_peak"),
            "limit": most or None,
            "ratio": round(used / most, 4) if used and most else None,
            "fragmentation": info.get("mem_fragmentation_ratio"),
            "policy": info.get("maxmemory_policy"),
            "evicted": info.get("evicted_keys"),
        },
        "persistence": {
            "aof": None if "aof_enabled" not in info else info["aof_enabled"] == 1,
            "fsync": _word(config.get("appendfsync")),
            "last_write": info.get("aof_last_write_status"),
            "rewriting": None if "aof_rewrite_in_progress" not in info else info["aof_rewrite_in_progress"] == 1,
            "delayed_fsyncs": info.get("aof_delayed_fsync"),
        },
        "load": {
            "commands_per_s": info.get("instantaneous_ops_per_sec"),
            "clients": info.get("connected_clients"),
            "blocked": info.get("blocked_clients"),
            "rejected": info.get("rejected_connections"),
        },
        "latency": {"min": times[0], "median": times[len(times) // 2], "max": times[-1]},
        "slow": None if entries is None else [_slow(entry) for entry in entries],
    }


def _allowed(ask: Any) -> Any:
    try:
        return ask()
    except redis.exceptions.NoPermissionError:
        return None
    except redis.ResponseError:
        return None  # renamed or switched off, as managed services do


def _word(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _slow(entry: dict[str, Any]) -> dict[str, Any]:
    words = (entry.get("command") or b"").split(b" ", 2)
    command = words[0].decode(errors="replace").upper()
    if command == "EVALSHA" and len(words) > 1:
        command = f"EVALSHA {_script_names().get(words[1].decode(errors='replace'), 'of somebody else')}"
    return {"at": entry["start_time"], "seconds": entry["duration"] / 1e6, "command": command}


def _script_names() -> dict[str, str]:
    return {scripts.digest(scripts.load(name).source): name for name in scripts.names()}


def kind_of_key(name: str) -> tuple[str, str] | None:
    """Which of the known keys this is, and its id: ``("checkpoint", "42")``; ``None`` if it is none of them."""
    best = max(
        (
            stem
            for stem, prefix in NAMES.items()
            if name == prefix or (prefix.endswith(":") and name.startswith(prefix))
        ),
        key=lambda stem: len(NAMES[stem]),
        default=None,
    )
    return None if best is None else (best, name.removeprefix(NAMES[best]))
