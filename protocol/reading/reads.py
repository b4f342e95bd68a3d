"""What anybody may read: requests, outputs, histories, workers. Nothing here changes anything."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import redis

from ..codec import RestrictedPickle, unpack_entry, unpack_exception, unpack_result
from ..keys import key, unlisted
from ..packed_state import unpack_state
from ..records import Checkpoint, Details, Event, RequestRecord, whole
from .histories import read_history
from .mode import DEGRADED, Mode
from .output_log import LogPage, LogPlace, Outputs, ask_page, page_of, read_page
from .words import WorkerWord, read_words, trouble

_FIELDS = (
    "status", "origin", "task", "attempt", "executions", "execution", "worker_name", "epoch", "client", "created_at",
    "started_at", "ended_at", "cancel", "error_kind", "error_reason", "last", "degraded", "stretched",
    "deadline", "queue_deadline",
)  # fmt: skip


class Reads:
    """Reads over one connection. Errors of redis-py come out as they are."""

    def __init__(self, connection: redis.Redis) -> None:
        self.connection = connection

    def workers(self) -> list[dict[str, Any]]:
        """All living incarnations: id, worker, queues, pid, host, device, ready, seconds until dead, requests held.

        ``age``: seconds since its last heartbeat (``None`` of a worker of an older release); ``unfit``: why its
        device is not to be used; ``health``: where its health is served; ``model``: its setting; ``stale``: a file
        that was edited after it had been loaded; ``task`` and ``slots``: of what it claimed last. A spare has loaded
        its tasks, and claims only when it is told to (``spare``); one that was told to stop, or has lost its device,
        is ``leaving``. ``interval`` and ``usual``: seconds from one of its checkpoints to the next, now and while Redis
        is quick; ``None`` before its first.
        """
        beats: Any = self.connection.zrange(key("beats"), 0, -1, withscores=True)
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.time()
            for incarnation, _ in beats:
                pipe.hgetall(key("incarnation", incarnation.decode(errors="replace")))
                pipe.hkeys(key("held", incarnation.decode(errors="replace")))
            (seconds, micros), *replies = pipe.execute()
        now = seconds + micros / 1e6
        result = []
        for (raw, deadline), record, held in zip(beats, replies[::2], replies[1::2], strict=True):
            fields = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in record.items()}
            result.append(
                {
                    "incarnation": raw.decode(errors="replace"),
                    "worker": fields.get("worker", ""),
                    "queues": unlisted(fields.get("queues", "")),
                    "pid": whole(fields.get("pid")),
                    "host": fields.get("host", ""),
                    "device": fields.get("device", ""),
                    "ready": fields.get("ready") == "1",
                    "spare": fields.get("ready") == "spare",
                    "leaving": fields.get("ready") == "leaving" or bool(fields.get("unfit")),
                    "dead_in": deadline / 1000 - now,
                    "age": whole(fields["timeout"]) / 1000 - (deadline / 1000 - now) if "timeout" in fields else None,
                    "unfit": fields.get("unfit", ""),
                    "health": fields.get("health", ""),
                    "model": fields.get("model", ""),
                    "stale": fields.get("stale", ""),
                    "task": fields.get("task", ""),
                    "slots": whole(fields.get("slots")) or None,
                    "interval": whole(fields.get("interval")) / 1000 or None,
                    "usual": whole(fields.get("usual")) / 1000 or None,
                    "unable": [
                        {
                            "task": item.task,
                            "kind": item.kind,
                            "seconds": round(now - item.since, 3),
                            "reason": item.reason,
                        }
                        for item in WorkerWord.inabilities(fields.get("unable", ""))
                    ],
                    "held": sorted(item.decode(errors="replace") for item in held),
                }
            )
        return result

    def words(self) -> tuple[list[WorkerWord], float]:
        """What living workers say of what they cannot load, and the server's time: see :func:`~.words.read_words`."""
        return read_words(self.connection)

    def trouble(self, queue: str, task: str) -> str:
        """Why requests of a task wait in a queue, if workers could not load it; else an empty text."""
        return trouble(self.words()[0], queue, task)

    def mode(self) -> Mode:
        """Whether the pool is degraded, and how many workers were counted last."""
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hmget(key("mode"), "mode", "until", "live", "expected", "since", "recovering")
            (seconds, micros), (mode, until, live, expected, since, recovering) = pipe.execute()
        degraded = mode == DEGRADED.encode() and seconds * 1000 + micros // 1000 < whole(until)
        return Mode(
            degraded=degraded,
            live=whole(live),
            expected=whole(expected),
            since=whole(since) / 1000 if degraded else None,
            recovering=degraded and whole(recovering) > 0,
        )

    def unfit_devices(self) -> list[dict[str, Any]]:
        """Devices that a worker left because they are not to be used, and where none is ready since; oldest first.

        Each with ``device, host, worker, at`` (seconds since 1970) and ``reason``.
        """
        rows: Any = self.connection.hgetall(key("unfit"))
        result = []
        for value in rows.values():
            at, device, host, worker, reason = (value.decode(errors="replace").split("\t", 4) + [""] * 5)[:5]
            result.append({"device": device, "host": host, "worker": worker, "at": whole(at) / 1000, "reason": reason})
        return sorted(result, key=lambda item: item["at"])

    def supervisors(self) -> list[dict[str, Any]]:
        """What each running ``perdure up`` says of itself: name, host, pid, release, and its places.

        A place: name, role, phase (``ready``, ``quarantined`` …), device, worker (the process in it), and the reason
        why it is quarantined. ``release`` is what a person types to have quarantined places tried again.
        """
        return [record for _, record in self._supervisors() if record is not None]

    def lost_supervisors(self) -> list[str]:
        """Names of those that have ended without a word."""
        return [name for name, record in self._supervisors() if record is None]

    def _supervisors(self) -> list[tuple[str, dict[str, Any] | None]]:
        members: Any = self.connection.smembers(key("supervisors"))
        names = sorted(member.decode(errors="replace") for member in members)
        if not names:
            return []
        raw: Any = self.connection.mget([key("supervisor", name) for name in names])
        return [
            (name, None if text is None else {"name": name, **json.loads(text)})
            for name, text in zip(names, raw, strict=True)
        ]

    def standing(self, requests: Sequence[tuple[str, str]]) -> list[str]:
        """For each ``(id, execution)``: ``ok``, ``lost`` or ``cancel``, as a renewal would say; nothing is renewed."""
        with self.connection.pipeline(transaction=False) as pipe:
            for identifier, _ in requests:
                pipe.hmget(key("job", identifier), "execution", "status", "cancel")
            rows: list[list[bytes | None]] = pipe.execute()
        result = []
        for (_, execution), (holder, status, cancel) in zip(requests, rows, strict=True):
            canceled = cancel == b"1" or status in (b"canceled", b"stopped")
            result.append("lost" if holder != execution.encode() else "cancel" if canceled else "ok")
        return result

    def queues(self) -> list[str]:
        """All queues that ever held a job, sorted; a deleted one too, while something of ours stands in it."""
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.smembers(key("queues"))
            pipe.smembers(key("swept"))
            pipe.zrange(key("aside"), 0, -1)
            known, *aside = pipe.execute()
        stem = len(key("queue"))
        names = {member.decode(errors="replace")[stem:] for member in known}
        return sorted(names.union(*((name.decode(errors="replace") for name in some) for some in aside)))

    def fetch(self, identifier: str) -> RequestRecord | None:
        """One request, or ``None`` if there is none of ours with this id."""
        return self.fetch_many([identifier])[0]

    def fetch_many(self, identifiers: Sequence[str]) -> list[RequestRecord | None]:
        """Several requests in one round trip; payloads stay where they are."""
        return self.look(identifiers, ())[0]

    def look(
        self, identifiers: Sequence[str], places: Sequence[tuple[str, LogPlace]]
    ) -> tuple[list[RequestRecord | None], list[LogPage]]:
        """Requests, and the pages behind places of logs, in one round trip; a page behind a long entry takes more."""
        with self.connection.pipeline(transaction=False) as pipe:
            for identifier in identifiers:
                pipe.hmget(key("job", identifier), _FIELDS)
            for identifier, place in places:
                if place.brief:
                    ask_page(pipe, identifier, place)
            replies = iter(pipe.execute())
        records = [_record(identifier, next(replies)) for identifier in identifiers]
        pages = [
            page_of(self.connection, identifier, place, next(replies))
            if place.brief
            else self.output_page(identifier, place)
            for identifier, place in places
        ]
        return records, pages

    def fetch_with_result(self, identifier: str) -> tuple[RequestRecord | None, Callable[[], Any]]:
        """:meth:`fetch`, and what :meth:`result` would return or raise if it is called, in one round trip."""
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.hmget(key("job", identifier), _FIELDS)
            pipe.xrevrange(key("results", identifier), count=1)
            reply, entries = pipe.execute()
        return _record(identifier, reply), partial(_result, entries)

    def result(self, identifier: str) -> Any:
        """The value of a finished request. Raises ``ValueError`` if it is damaged."""
        return _result(self.connection.xrevrange(key("results", identifier), count=1))

    def traceback(self, identifier: str) -> str:
        """The traceback of a dead letter; empty if there is none."""
        entries: Any = self.connection.xrevrange(key("results", identifier), count=1)
        for _, fields in entries:
            if b"exc_string" in fields:
                return unpack_exception(fields[b"exc_string"])
        return ""

    def outputs(self, identifier: str, *, entry: int = 0, limit: int = 512) -> list[tuple[int, int, list[Any]]]:
        """Entries ``entry …`` of the output log, each ``(epoch, offset, outputs)``; at most ``limit`` entries."""
        raw: Any = self.connection.lrange(key("output", identifier), entry, entry + limit - 1)
        return [unpack_entry(item) for item in raw]

    def output_page(self, identifier: str, place: LogPlace, *, check: bool = False) -> LogPage:
        """Read on in the output log: see :func:`~.output_log.read_page`."""
        return read_page(self.connection, identifier, place, check=check)

    def all_outputs(self, identifier: str) -> list[Any]:
        """All outputs of the newest epoch, read in pages."""
        whole = Outputs()
        while whole.take(self.output_page(identifier, whole.place)):
            pass
        return whole.values

    def state(self, identifier: str) -> tuple[Any, bool]:
        """The checkpoint's state and whether it is sound (its CRC fits); ``(None, True)`` if there is none.

        Raises as :func:`~.packed_state.unpack_state`.
        """
        raw, sound = self.packed_state(identifier)
        return (None if raw is None else unpack_state(raw)), sound

    def packed_state(self, identifier: str, *, between: Callable[[], None] = lambda: None) -> tuple[bytes | None, bool]:
        """The checkpoint's state, still packed, and whether it is sound; ``(None, True)`` if there is none.

        ``between`` is called after each chunk of a large one, which may take long in all.
        """
        reply: Any = self.connection.hmget(key("checkpoint", identifier), "state", "crc", "chunks", "sum")
        raw, crc, mark, total = reply
        if raw is None:
            return None, True
        if mark is not None:
            _, seq, chunks = mark.decode().rsplit(":", 2)
            raw, crc = bytearray(), total
            for number in range(1, int(chunks) + 1):
                piece: Any = self.connection.get(key("chunk", f"{identifier}:{seq}:{number}"))
                if not piece:
                    return None, False
                raw += piece
                between()
        if zlib.crc32(raw) != int(crc or -1):
            return None, False
        return bytes(raw), True

    def checkpoint(self, identifier: str) -> Checkpoint | None:
        """Where the request would go on from, without the state itself."""
        name = key("checkpoint", identifier)
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.hmget(name, "seq", "offset", "at", "fingerprint", "length")
            pipe.hstrlen(name, "state")
            pipe.time()
            (seq, offset, at, fingerprint, length), size, now = pipe.execute()
        if at is None:
            return None
        age = now[0] + now[1] / 1e6 - whole(at) / 1000
        return Checkpoint(
            seq=whole(seq),
            offset=whole(offset),
            age=max(0.0, age),
            fingerprint=(fingerprint or b"").decode(errors="replace"),
            bytes=whole(length) or size,
        )

    def details(self, identifier: str, queue: str) -> Details:
        """What a request of ``queue`` was given at its submit, and what it waits for."""
        names = ("deadline", "queue_deadline", "step_ms", "retries_left", "degraded", "digest", "meta")
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zscore(key("retries", queue), identifier)
            pipe.hmget(key("job", identifier), names)
            (seconds, micros), due, values = pipe.execute()
        raw = dict(zip(names, values, strict=True))

        def in_seconds(milliseconds: bytes | float | None) -> float | None:
            return None if milliseconds is None else whole(milliseconds) / 1000

        return Details(
            now=seconds + micros / 1e6,
            due=in_seconds(due),
            deadline=in_seconds(raw["deadline"]),
            queue_deadline=in_seconds(raw["queue_deadline"]),
            step_timeout=in_seconds(raw["step_ms"]),
            retries_left=whole(raw["retries_left"]),
            degraded=None if raw["degraded"] is None else raw["degraded"] == b"1",
            idempotent=bool(raw["digest"]),
            meta=_meta(raw["meta"]),
        )

    def history(self, identifier: str) -> list[Event]:
        """What happened to a request, oldest first; its ordinary course is not in it."""
        return read_history(self.connection, identifier)


def _record(identifier: str, reply: Sequence[bytes | None]) -> RequestRecord | None:
    fields = {name.encode(): value for name, value in zip(_FIELDS, reply, strict=True) if value is not None}
    return RequestRecord.from_redis(identifier, fields)


def _result(entries: Any) -> Any:
    for _, fields in entries:
        if b"return_value" in fields:
            return unpack_result(fields[b"return_value"])
    return None


def _meta(raw: bytes | None) -> dict[str, Any] | None:
    if not raw:
        return {}
    try:
        value = RestrictedPickle.loads(raw)
    except Exception:  # a damaged or hostile pickle may raise nearly anything
        return None
    return value if isinstance(value, dict) else None
