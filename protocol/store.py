"""The store: one typed method per transition that a producer or a worker asks for.

Those of guardians stand in :mod:`.transitions.heartbeats`, those of sweeps in :mod:`.transitions.sweeps`, what is only
read in :mod:`.reading.reads`: the store has them too.

A store sends each call once. Whoever gets a connection error decides what to send again; every
transition may be sent twice. Errors of redis-py come out as they are: the callers differ in what
they do about an outage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import redis

from .codec import envelope, pack_exception
from .errors import DurabilityUnavailable
from .identities import new_stem
from .keys import SCHEMA, crowd, key, listed
from .limits import LONGEST_DELAY, MAX_REQUESTS
from .reading.occupied import occupied
from .records import NewRequest, whole
from .scripts import Row, load
from .transitions.heartbeats import Heartbeats, refreshed
from .transitions.rows import STOCK_FUNCTION, as_text, claim_of, enqueued, in_ms, progressed
from .transport.refusals import newer_protocol

if TYPE_CHECKING:
    from .transitions.calls import Chunk, Claims, Failure, Finish, Progress

DISK_TIMEOUT = 3.0
"""Seconds that a durable submit waits for the disk, which is synced every second by default."""


class Store(Heartbeats):
    """The protocol over one connection. Not for several threads at once."""

    # --- producers -------------------------------------------------------------------------------

    def enqueue(self, requests: Sequence[NewRequest], *, client: str = "") -> list[str]:
        """Store requests; at most :data:`MAX_REQUESTS` a call.

        Returns per request ``"accepted"``, ``"already"``, ``"same"``, ``"conflict"``, ``"full"`` or
        ``"degraded <ms> <live> <expected>"``, for which there is :func:`refusal`. Raises
        :class:`ProtocolMismatch` when Redis holds a newer protocol. If any is ``durable``, returns once all are on
        disk, or raises :class:`DurabilityUnavailable`: then they are stored all the same.
        """
        groups = enqueued(requests)
        values = {"schema": SCHEMA, "client": client, "limit": self.settings.queue_limit}
        if not any(request.durable for request in requests):
            answers = self._call("enqueue", values, groups)
            if answers == ["newer"]:
                raise newer_protocol()
            return list(answers)
        # One connection for both: each waits for its own writes.
        with self.connection.client() as connection:  # type: ignore[no-untyped-call]
            answers = self._call("enqueue", values, groups, connection)
            if answers == ["newer"]:
                raise newer_protocol()
            here = [
                request.id
                for request, answer in zip(requests, answers, strict=True)
                if request.durable and answer in ("accepted", "already", "same")
            ]
            if here and (reason := _not_on_disk(connection)):
                raise DurabilityUnavailable(reason, here)
        return list(answers)

    def enqueue_in_turn(self, parts: Iterable[Sequence[NewRequest]], *, client: str = "") -> Iterator[list[str]]:
        """:meth:`enqueue` for each of these, none of them ``durable``, over one connection: while Redis stores one, the
        next is made and sent. Yields the answers of each.

        Raises as :meth:`enqueue` does, and ``redis.exceptions.NoScriptError`` if the server has forgotten the script.
        What was not answered then may have been stored; it can be sent again.
        """
        values: Row = {"schema": SCHEMA, "client": client, "limit": self.settings.queue_limit}
        self.calling()
        for reply in load("enqueue").in_turn(self.connection, ((values, enqueued(part)) for part in parts)):
            answers = as_text(reply)
            if answers == ["newer"]:
                raise newer_protocol()
            yield answers

    def cancel(
        self, requests: Iterable[tuple[str, str]], *, reason: str, incarnation: str = "", worker: str = ""
    ) -> list[str]:
        """Cancel ``(id, execution)``; the execution is empty for anybody but the worker that holds it.

        Returns per request ``"canceled"``, ``"requested"``, ``"ended"``, ``"unknown"`` or ``"lost"``.
        """
        rows = [{"id": identifier, "execution": execution} for identifier, execution in requests]
        values = {"incarnation": incarnation, "worker": worker, "reason": reason}
        return list(self._call("cancel", values, {"request": rows}))

    def listen(self, worker: str, identifier: str) -> None:
        """Tell the worker of this name that somebody listens to a request; it may not hear it, and stores in time."""
        with suppress(redis.ResponseError):  # a user who may not publish is told a little later
            self.connection.publish(key("replies", worker), identifier)

    # --- workers ---------------------------------------------------------------------------------

    def claim(
        self,
        *,
        incarnation: str,
        worker: str,
        queues: Sequence[str],
        task: str,
        free: int,
        slots: dict[str, int],
        known: Collection[str],
        resume: bool = True,
        max_bytes: int = 8 * 1024 * 1024,
        first_beat: float = 0.0,
        unable: Iterable[str] = (),
    ) -> Claims:
        """Take up to ``free`` requests of ``task``, or of whatever comes first when ``task`` is empty.

        ``unable``: tasks that this worker leaves to others for now.
        ``first_beat``: seconds that an incarnation of which no heartbeat has come may take for its first, if longer
        than the heartbeat timeout.
        """
        from .transitions.calls import Claims  # not before: producers have no use for it

        values: dict[str, str | int] = {
            "incarnation": incarnation, "worker": worker, "queues_text": listed(queues),
            "timeout_ms": in_ms(max(self.settings.heartbeat_timeout, first_beat)), "task": task,
            "lease_ms": in_ms(self.settings.lease), "ttl_ms": in_ms(self.settings.checkpoint_ttl),
            "free": min(free, MAX_REQUESTS), "resume": int(resume), "max_bytes": max_bytes, "stem": new_stem(),
            "crowd": "" if known else crowd(tuple(queues)),
        }  # fmt: skip
        groups: dict[str, list[dict[str, str | int]]] = {
            "queue": [{"queue": queue} for queue in occupied(self.connection, queues)],
            "task": [{"path": path, "slots": min(number, MAX_REQUESTS)} for path, number in slots.items()],
            "known": [{"id": identifier} for identifier in known],
            "unable": [{"left": path} for path in unable],
        }
        script, began = load("claim"), time.monotonic()
        reply: list[bytes] = script(self.connection, values, groups)
        self.called(time.monotonic() - began)
        rows = [reply[start : start + 17] for start in range(5, len(reply), 17)]
        now = whole(reply[3]) / 1000
        return Claims(reply[0].decode(), [claim_of(row, now) for row in rows], reply[2] == b"1", reply[4] == b"1")

    def progress(self, incarnation: str, requests: Sequence[Progress]) -> list[str]:
        """Store outputs and states and renew. Returns per request ``ok``, or why not: see ``progress.lua``.

        The chunks of a large state must have been written before (:meth:`write_chunks`).
        """
        # Ten checkpoints, and a second: so long a suspect must have stepped.
        clear_ms = max(1000, 10 * in_ms(self.settings.checkpoint_interval))
        values = {"incarnation": incarnation, "lease_ms": in_ms(self.settings.lease), "clear_ms": clear_ms}
        return list(self._call("progress", values, progressed(requests)))

    def write_chunks(self, chunks: Sequence[Chunk]) -> list[str]:
        """Write chunks of states, at most :data:`MAX_BYTES` a call; ``progress`` commits them. ``ok`` or ``lost``."""
        rows: list[dict[str, str | bytes | int | float]] = [
            {
                "id": item.id, "execution": item.execution, "seq": item.seq, "total": item.total,
                "number": item.number, "data": item.data,
            }
            for item in chunks
        ]  # fmt: skip
        return list(self._call("chunk", {}, {"chunk": rows}))

    def renew(self, incarnation: str, requests: Iterable[tuple[str, str]]) -> list[str]:
        """Renew the leases of ``(id, execution)``. Returns per request ``ok``, ``lost``, ``cancel``, ``deadline``."""
        rows = [{"id": identifier, "execution": execution} for identifier, execution in requests]
        values = {"incarnation": incarnation, "lease_ms": in_ms(self.settings.lease)}
        return list(self._call("renew", values, {"request": rows}))

    def stop(self, incarnation: str, requests: Iterable[tuple[str, str]]) -> list[str]:
        """Mark ``(id, execution)`` as stopped, before they are ended by ``cancel``. Returns ``cancel`` or ``lost``."""
        rows = [{"id": identifier, "execution": execution} for identifier, execution in requests]
        return list(self._call("stop", {"incarnation": incarnation}, {"request": rows}))

    def finish(self, incarnation: str, worker: str, requests: Sequence[Finish]) -> list[str]:
        """End requests with results. Returns per request ``ok``, ``already``, ``lost`` or ``gap <n>``."""
        rows = [
            {
                "id": item.id, "execution": item.execution, "offset": item.offset, "outputs": item.outputs,
                "blob": item.blob, "result": item.result, "seconds": f"{item.seconds:.6f}",
            }
            for item in requests
        ]  # fmt: skip
        return list(self._call("finish", {"incarnation": incarnation, "worker": worker}, {"request": rows}))

    def fail(self, incarnation: str, worker: str, failures: Sequence[Failure]) -> list[str]:
        """End executions by their policy. Returns per request what became of it; see ``fail.lua``."""
        rows = [
            {
                "id": item.id, "execution": item.execution, "kind": item.kind, "reason": item.reason,
                "exception": pack_exception(item.traceback), "charge": int(item.charge),
                "crash": "batch" if item.batch else int(item.crash),
                "loss": int(item.loss), "retry": int(item.retry),
            }
            for item in failures
        ]  # fmt: skip
        values = {"incarnation": incarnation, "worker": worker, **self._limits()}
        return list(self._call("fail", values, {"request": rows}))

    def release(
        self,
        incarnation: str,
        worker: str,
        requests: Sequence[tuple[str, str]],
        *,
        reason: str,
        delay: float = 0.0,
        fingerprints: Sequence[str] = (),
        unable: bool = False,
        longest: float = LONGEST_DELAY,
    ) -> list[str]:
        """Hand ``(id, execution)`` back in the order of their claims.

        ``delay``, in seconds, doubles each time up to ``longest``.

        ``fingerprints`` (one per request, or none) are those of checkpoints that the caller could not
        match. ``unable``: the task could not be loaded here, which counts to no limit of executions.
        Returns per request ``queued``, ``scheduled``, ``canceled``, ``failed``, ``already``, ``lost``.
        """
        shown = fingerprints or [""] * len(requests)
        rows = [
            {"id": identifier, "execution": execution, "fingerprint": fingerprint}
            for (identifier, execution), fingerprint in zip(requests, shown, strict=True)
        ]
        values = {
            "incarnation": incarnation, "worker": worker, "reason": reason, "delay": delay,
            "alive_ms": in_ms(self.settings.heartbeat_timeout + refreshed(self.settings)), "longest": longest,
            "max_executions": self.settings.max_executions, "exception": pack_exception(reason), "unable": int(unable),
        }  # fmt: skip
        return list(self._call("release", values, {"request": rows}))

    def settle(self, pipeline: Any, incarnation: str, queue: str, identifier: str, execution: str) -> None:
        """Queue the end of a plain job's holding on RQ's own pipeline."""
        values = {"incarnation": incarnation, "queue": queue, "id": identifier, "execution": execution}
        load("settle")(pipeline, values, {})

    def adopt(
        self,
        incarnation: str,
        worker: str,
        identifier: str,
        execution: str,
        *,
        task: str,
        payload: bytes,
        left_out: str = "",
    ) -> str:
        """Make a request of a plain job that calls a task. Returns ``"ok"`` or ``"lost"``.

        ``left_out`` says what of the job the request will not do; it goes into the history.
        """
        settings = self.settings
        values: dict[str, str | bytes | int | float] = {
            "incarnation": incarnation, "worker": worker, "id": identifier, "execution": execution, "task": task,
            "data": envelope(STOCK_FUNCTION, task), "payload": payload, "max_retries": settings.max_retries,
            "result_ttl": math.ceil(settings.result_ttl), "failure_ttl": math.ceil(settings.failure_ttl),
            "left_out": left_out,
        }  # fmt: skip
        return str(self._call("adopt", values, {}))

    def measure(
        self, incarnation: str, number: int, counts: Mapping[str, int], interval: float = 0.0, usual: float = 0.0
    ) -> str:
        """Add to the counters what a worker has measured; call ``number`` of its incarnation. ``ok``, ``already``.

        ``interval``: seconds from one of its checkpoints to the next, now; ``usual``: while Redis is quick.
        """
        rows = [{"name": name, "by": by} for name, by in counts.items()]
        values: dict[str, str | bytes | int | float] = {
            "incarnation": incarnation, "number": number, "interval": in_ms(interval), "usual": in_ms(usual),
        }  # fmt: skip
        return str(self._call("measure", values, {"count": rows}))


def _not_on_disk(connection: redis.Redis) -> str:
    """Wait until what this connection wrote is on disk; why that cannot be confirmed, or an empty text."""
    try:
        reply: Any = connection.execute_command("WAITAOF", 1, 0, in_ms(DISK_TIMEOUT))  # type: ignore[no-untyped-call]
    except redis.ResponseError as error:
        if "unknown command" in str(error).lower():
            return "this server has no WAITAOF, which came with Redis 7.2"
        return str(error)
    return "" if int(reply[0]) >= 1 else f"it was not synced within {DISK_TIMEOUT:g} s"
