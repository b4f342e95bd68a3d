"""The transitions of sweeps: what reapers, guardians and whoever waits do for a pool, and not for a request of theirs.

A call is sent once. Whoever gets a connection error decides what to send again; every transition may be sent twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import redis

from ..codec import pack_exception, shortened
from ..keys import SCHEMA, key
from ..limits import MAX_REQUESTS
from ..reading.mode import Count, ModeTally
from ..reading.reads import Reads
from ..records import RequestRecord, whole
from ..scripts import load
from ..settings import Settings
from ..transport.refusals import newer_protocol
from .rows import as_text, in_ms

if TYPE_CHECKING:
    from .calls import Sweep

TIDIED = 16
"""Queues whose sets one call of ``expire`` looks through."""

HANG = "HANG: the lease expired: no progress while its worker's heart was beating"

MAX_EVIDENCE = 8_000
"""Characters of what a dead worker left behind that the history of each request keeps."""


class Sweeps(Reads):
    """Reads and sweeps over one connection. Not for several threads at once."""

    def __init__(self, connection: redis.Redis, settings: Settings) -> None:
        super().__init__(connection)
        self.settings = settings
        self.calling: Callable[[], object] = _nothing
        """Called before each script."""
        self.called: Callable[[float], object] = _nothing
        """Called with the seconds that the answer to a script took."""

    def aside(self) -> list[str]:
        """The queues that hold something beside their lists, in one round trip.

        Raises :class:`ProtocolMismatch` if Redis holds a newer protocol.
        """
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.get(key("schema"))
            pipe.zrange(key("aside"), 0, -1)
            schema, names = pipe.execute()
        if whole(schema) > SCHEMA:
            raise newer_protocol()
        return [name.decode(errors="replace") for name in names]

    def reap(
        self,
        queues: Iterable[str] = (),
        *,
        incarnation: str = "",
        kind: str,
        reason: str,
        charge: bool = False,
        crash: bool = False,
        loss: bool = True,
        retry: bool = True,
        seen: bool = False,
        clean: bool = False,
        evidence: str = "",
        limit: int = MAX_REQUESTS,
    ) -> Sweep:
        """Take requests from one incarnation, or sweep (``incarnation=""``). One bounded call.

        ``clean``: the incarnation has left of its own accord, and the pool expects one worker less.
        ``seen``: its guardian saw its end, so that its host lives: a loss counts as a crash for one that was alone.
        ``evidence``: what the dead left behind, such as the stacks of a native crash; a dead letter keeps it, and of
        :data:`MAX_EVIDENCE` characters each request's history.
        """
        shown = f"{kind}: {reason}\n{evidence}" if evidence else f"{kind}: {reason}"
        values = {
            "incarnation": incarnation, "kind": kind, "reason": reason, "exception": pack_exception(shown),
            "evidence": shortened(evidence, MAX_EVIDENCE).replace("\t", " "),
            "charge": int(charge), "crash": "alone" if seen and loss and not crash else int(crash), "loss": int(loss),
            "retry": int(retry), "clean": int(clean),
            "hang_exception": pack_exception(HANG),
            "timeout_ms": in_ms(self.settings.heartbeat_timeout), "pulse_ms": self._pulse_ms(), "limit": limit,
            **self._limits(),
        }  # fmt: skip
        groups = {"queue": [] if incarnation else [{"queue": queue} for queue in queues]}
        reply = self._call("reap", values, groups)
        from .calls import Reaped, Sweep  # not before: producers have no use for it

        rows = [Reaped(*reply[start : start + 6]) for start in range(2, len(reply), 6)]
        return Sweep(reply[0] == "1", reply[1] == "1", rows)

    def promote(self, queues: Iterable[str], *, limit: int = MAX_REQUESTS, rounds: int = 1) -> int:
        """Move what is due to its queue, end what waits past its deadline; returns how many were moved.

        At most ``rounds`` calls, each of at most ``limit`` in all queues together.
        """
        rows = {"queue": [{"queue": queue} for queue in queues]}
        moved = 0
        for _ in range(rounds):
            number, more = self._call("promote", {"limit": limit}, rows)
            moved += int(number)
            if more != "1":
                break
        return moved

    def end_late(self, records: Iterable[RequestRecord]) -> float:
        """Do what a sweep does for those of these requests whose deadline has passed: end what waits. For who waits for
        them, where no worker and no reaper runs. Returns the seconds until the next deadline of theirs, at most 0 if
        one has passed.
        """
        seconds, micros = self.connection.time()
        now = seconds + micros / 1e6
        due = [record for record in records if record.due]
        if late := {record.queue for record in due if record.due <= now}:
            with suppress(redis.ResponseError):  # who may not end anything waits for those who may
                self.promote(late)
        return min((record.due for record in due), default=math.inf) - now

    def give_up(
        self, queue: str, task: str, *, kind: str, reason: str, workers: Iterable[str], limit: int = MAX_REQUESTS
    ) -> int:
        """End waiting requests of a task that these incarnations, all that serve the queue, could not load.

        Returns how many were ended by this call, -1 if it is not so any more.
        """
        values = {
            "queue": queue, "task": task, "kind": kind, "reason": reason,
            "exception": pack_exception(f"{kind}: {reason}"), "limit": limit,
        }  # fmt: skip
        return int(self._call("give_up", values, {"worker": [{"incarnation": name} for name in workers]}))

    def expire(self, queues: Sequence[str], *, limit: int = MAX_REQUESTS) -> int:
        """Delete stale checkpoints and what is left of requests that are gone; returns how many checkpoints.

        One call for each :data:`TIDIED` queues.
        """
        values = {"ttl_ms": in_ms(self.settings.checkpoint_ttl), "limit": limit}
        stale = 0
        for begin in range(0, max(1, len(queues)), TIDIED):
            some = queues[begin : begin + TIDIED]
            stale += int(self._call("expire", values, {"queue": [{"queue": queue} for queue in some]}))
        return stale

    def weigh(self) -> Count:
        """How many workers live and are ready, and what was declared last."""
        values = {"timeout_ms": in_ms(self.settings.heartbeat_timeout), "pulse_ms": self._pulse_ms()}
        now, judged, live, *rest = self._call("weigh", values, {})
        fields = dict(zip(rest[::2], rest[1::2], strict=True))
        return Count(int(now), judged == "1", int(live), whole(fields.get("version")), ModeTally.from_redis(fields))

    def declare(self, count: Count, tally: ModeTally) -> bool:
        """Declare the mode that was decided by ``count``; False if somebody else has declared meanwhile."""
        values = {"version": count.version, "weighed_ms": count.now, **tally.to_redis()}
        return bool(self._call("declare", values, {}) == "ok")

    def readmit(self, requests: Sequence[tuple[str, str]], *, reason: str) -> list[str]:
        """Take back ``(id, execution of RQ or "")`` that nobody holds. Returns for each what ``readmit.lua`` says."""
        rows = [{"id": identifier, "execution": execution} for identifier, execution in requests]
        return list(self._call("readmit", {"reason": reason}, {"request": rows}))

    def check_protocol(self) -> None:
        """Raise :class:`ProtocolMismatch` when Redis holds a newer protocol than this release speaks."""
        raw: Any = self.connection.get(key("schema"))
        if whole(raw) > SCHEMA:
            raise newer_protocol()

    # --- within ----------------------------------------------------------------------------------

    def _call(self, name: str, values: Any, groups: Any, connection: redis.Redis | None = None) -> Any:
        self.calling()
        script, began = load(name), time.monotonic()
        reply = script(connection or self.connection, values, groups)
        self.called(time.monotonic() - began)
        return as_text(reply)

    def _limits(self) -> dict[str, str | int | float]:
        settings = self.settings
        return {
            "base": settings.retry_base, "cap": settings.retry_cap, "max_crashes": settings.max_crashes,
            "max_crashes_total": settings.max_crashes_total, "max_executions": settings.max_executions,
        }  # fmt: skip

    def _pulse_ms(self) -> int:
        # Without a reaper process the guardians sweep, and they wake only once per heartbeat.
        return in_ms(max(4 * self.settings.reap_interval, 3 * self.settings.heartbeat))


def _nothing(*_: object) -> None:
    """What is called where nobody listens."""
