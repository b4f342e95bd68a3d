"""What is read from Redis, as frozen records.

Absent and empty are different where it matters: an absent job hash is ``None``, an empty result is
a result of ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from .states import State


class FailureKind(StrEnum):
    """Why an execution ended without a result. Decided by types and evidence, never by text."""

    GPU_OOM = "GPU_OOM"
    """The device had no memory for the step."""
    GPU_ERROR = "GPU_ERROR"
    """The device or its driver failed; the process cannot go on."""
    NETWORK = "NETWORK"
    """A connection that the task needed failed."""
    WORKER_LOST = "WORKER_LOST"
    """The worker process is gone and left no evidence why: kill -9, power, host."""
    HANG = "HANG"
    """No progress for longer than a step may take, although the worker's process was there."""
    HOST_OOM = "HOST_OOM"
    """The kernel's out-of-memory killer ended the worker."""
    CRASH = "CRASH"
    """A native signal ended the worker."""
    INVALID_REQUEST = "INVALID_REQUEST"
    """The request cannot succeed; it is never retried."""
    MODEL_MISMATCH = "MODEL_MISMATCH"
    """Another model began it."""
    DEADLINE = "DEADLINE"
    """Its deadline passed."""
    ERROR = "ERROR"
    """The task raised something that says nothing about the pool."""
    UNKNOWN = "UNKNOWN"
    """Nobody can tell: it came back again and again without progress, or RQ itself ended it. Workers of 0.1.0 say it
    for ``ERROR``.
    """


STORED: Final[dict[str, tuple[str, ...]]] = {
    "queue": ("origin",),
    "task": ("task",),
    "data": ("data",),
    "description": ("description",),
    "delay": ("aside_at",),
    "deadline": ("deadline", "counted_from"),
    "deadline_at": ("deadline", "dated"),
    "queue_timeout": ("queue_deadline", "counted_from"),
    "step_timeout": ("step_ms",),
    "max_retries": ("max_retries", "retries_left"),
    "result_ttl": ("result_ttl",),
    "failure_ttl": ("failure_ttl",),
    "meta": ("meta",),
    "trace": ("trace",),
    "payload": ("payload",),
    "degraded_payload": ("payload_aside", "degraded"),
    "nonce": ("nonce",),
    "digest": ("digest",),
}
"""Where a request's job hash has what its submit gave: fields of :class:`NewRequest` → fields of the hash.

Everywhere else an option has its own name. The id is a part of the key, and ``durable`` is kept nowhere.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """What ``enqueue`` stores. ``payload`` is packed; numbers of the type ``float`` are seconds.

    ``digest`` is that of task and body when the id was made from an idempotency key, and empty otherwise. ``delay``
    keeps the request out of its queue for so long; ``durable`` waits until it is on disk; ``meta`` is RQ's field of
    that name, pickled. ``deadline`` counts from now, ``deadline_at`` is a date in seconds since 1970; 0 is none.
    ``step_timeout`` is the longest step of this request, 0 leaves it to task and worker. ``degraded_payload``,
    packed, is what a degraded pool runs instead. ``trace``: see :mod:`~perdure.protocol.telemetry.tracing`.

    :data:`STORED` says where it is stored. A field that ``enqueue.lua`` does not name is stored as it is, unless it has
    its default.
    """

    id: str
    nonce: str
    queue: str
    task: str
    payload: bytes
    max_retries: int
    result_ttl: int
    failure_ttl: int
    description: str
    digest: str = ""
    delay: float = 0.0
    durable: bool = False
    meta: bytes = b""
    deadline: float = 0.0
    deadline_at: float = 0.0
    queue_timeout: float = 0.0
    step_timeout: float = 0.0
    degraded_payload: bytes = b""
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """How the execution before this one ended: ``kind`` is that of a failure, or ``RELEASED``.

    Dates are seconds since 1970 on the server's clock: when it ``began``, when something of it was last stored
    (``moved``), and when it was known to be over (``ended``). ``taken``: a reaper or guardian ended it, not its worker.
    """

    kind: str
    moved: float
    ended: float
    began: float
    taken: bool
    execution: str
    worker: str

    @classmethod
    def parse(cls, text: str) -> Interruption | None:
        """Read the job hash's field; ``None`` for an empty one, and for what no script of ours has written."""
        parts = text.split(" ", 6)
        if len(parts) < 7:
            return None
        kind, moved, ended, began, taken, execution, worker = parts
        return cls(
            kind=kind,
            moved=whole(moved) / 1000,
            ended=whole(ended) / 1000,
            began=whole(began) / 1000,
            taken=taken == "1",
            execution=execution,
            worker=worker,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a request's history: what happened, and when.

    ``at`` is in seconds since 1970 on the server's clock; ``offset`` is how many outputs were stored then. ``kind`` is
    that of a failure, ``reason`` is for people; both may be empty. ``evidence`` is what a worker that crashed or hung
    left behind: the stacks of its threads. What ended an execution says when that ``began`` and which checkpoint it
    left: its number, and when it was ``stored``; ``None`` where that is not known.
    """

    at: float
    event: str
    worker: str
    execution: str
    offset: int
    kind: str
    reason: str
    evidence: str = ""
    began: float | None = None
    seq: int | None = None
    stored: float | None = None

    @classmethod
    def parse(cls, line: bytes) -> Event:
        """Read a tab-separated line as the scripts write it. Raises ``ValueError`` for any other."""
        at, event, worker, execution, offset, kind, rest = line.decode(errors="replace").split("\t", 6)
        reason, course, evidence = [*rest.split("\t", 2), "", ""][:3]
        began, seq, stored = [*map(whole, course.split(":")), 0, 0, 0][:3]
        return cls(
            at=whole(at) / 1000,
            event=event,
            worker=worker,
            execution=execution,
            offset=whole(offset),
            kind=kind,
            reason=reason,
            evidence=evidence,
            began=began / 1000 if began else None,
            seq=seq or None,
            stored=stored / 1000 if stored else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a request would go on from.

    ``seq`` counts its checkpoints, ``offset`` the outputs up to it; ``age`` is in seconds since it was last written,
    ``bytes`` the size of its state as stored. Only a worker with the same ``fingerprint`` goes on from it.
    """

    seq: int
    offset: int
    age: float
    fingerprint: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What a request was given at its submit, and what it waits for. Dates are seconds since 1970, ``None`` is none.

    ``now`` is the server's clock at the reading. ``due``: when it may enter its queue, delayed or for a retry.
    ``queue_deadline``: until when a worker must have taken it; forgotten at its first claim. ``step_timeout`` is its
    own, in seconds. ``degraded``: ``None`` without overrides for a degraded pool, else whether it runs, or ran, with
    them. ``meta`` is ``None`` if somebody else has written into it what is no plain value.
    """

    now: float
    due: float | None
    deadline: float | None
    queue_deadline: float | None
    step_timeout: float | None
    retries_left: int
    degraded: bool | None
    idempotent: bool
    meta: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request as it stands in Redis, without payload, outputs and result.

    ``attempt`` counts its own failures and ``executions`` the claims so far; ``execution`` and ``worker`` say who holds
    it now (``execution`` is empty when nobody does). ``epoch`` grows when it begins again from zero. Dates are RQ's
    text, in UTC, empty until they come. ``canceling`` is True once a cancel was asked for while it runs. ``degraded``:
    it runs, or ran, with its overrides for a degraded pool; ``stretched``: the pool was degraded at its submit, and it
    has twice the time.
    ``due``: the nearest of its deadlines, in seconds since 1970; 0 without one.
    """

    id: str
    status: State
    queue: str
    task: str
    attempt: int
    executions: int
    execution: str
    worker: str
    epoch: int
    client: str
    created_at: str
    started_at: str
    ended_at: str
    canceling: bool
    error_kind: str
    error_reason: str
    verdict: str = ""
    degraded: bool = False
    stretched: bool = False
    due: float = 0.0
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """True once it has ended and nobody has requeued it since.

        RQ writes ``canceled`` and ``stopped`` on running jobs too: those end when their worker says so.
        """
        return self.status.ended and not self.execution

    @classmethod
    def from_redis(cls, identifier: str, raw: Mapping[bytes, bytes]) -> RequestRecord | None:
        """Read a job hash; ``None`` if it holds no request of ours."""
        values = {name.decode(): value for name, value in raw.items()}
        if b"task" not in raw:
            return None

        def text(name: str) -> str:
            return values.get(name, b"").decode(errors="replace")

        def number(name: str) -> int:
            return whole(values.get(name))

        return cls(
            id=identifier,
            status=_state(text("status"), text("last").rpartition(":")[2]),
            queue=text("origin"),
            task=text("task"),
            attempt=number("attempt"),
            executions=number("executions"),
            execution=text("execution"),
            worker=text("worker_name"),
            epoch=number("epoch"),
            client=text("client"),
            created_at=text("created_at"),
            started_at=text("started_at"),
            ended_at=text("ended_at"),
            canceling=text("cancel") == "1",
            error_kind=text("error_kind"),
            error_reason=text("error_reason"),
            verdict=text("last").rpartition(":")[2],
            degraded=text("degraded") == "1",
            stretched=text("stretched") == "1",
            due=min(filter(None, map(number, ("deadline", "queue_deadline"))), default=0) / 1000,
        )


def _state(word: str, verdict: str) -> State:
    """RQ's word as a state. RQ has more words for what waits elsewhere than in its queue (under a rate limit, say).

    A status is for display, and anybody may write it: with a word that is none, the last verdict speaks.
    """
    if word in ("rate_limited", "deferred", "ready_to_enqueue"):
        return State.SCHEDULED
    return next((State(found) for found in (word, verdict) if found in _WORDS), State.QUEUED)


_WORDS = frozenset(State)


def whole(raw: str | bytes | float | None) -> int:
    """A number that stands in Redis; 0 for what is none, such as a field that somebody else has overwritten."""
    try:
        return int(raw or 0)
    except (ValueError, OverflowError):
        return 0
