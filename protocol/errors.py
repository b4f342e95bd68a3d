"""Every error a user of Perdure can meet, in one shallow tree.

::

    PerdureError
    ├── UsageError                the caller's mistake; sending it again cannot help
    │   ├── InvalidRequest        a field of the request is wrong
    │   ├── UnknownTask           no task stands at this dotted path
    │   ├── PayloadTooLarge       more bytes than the limit
    │   ├── IdempotencyConflict   the id is taken by a different request
    │   └── SettingsError         a setting cannot be used as given
    ├── RequestFailed             the request ended in a failure
    │   └── DeadlineExceeded      ... because its deadline had passed
    ├── RequestCanceled           the request was canceled or stopped
    ├── OutputsRestarted          the outputs began again from zero
    │   └── OutputsLost           ... because Redis has lost what it had confirmed
    ├── OutputsDamaged            the output log holds what is no output
    ├── TryAgainLater             not accepted now; nothing was stored
    │   ├── QueueFull
    │   └── Degraded
    ├── UnknownRequest            there is no request with this id (any more)
    ├── RedisUnavailable          no answer from Redis
    ├── DurabilityUnavailable     Redis cannot confirm that it wrote to disk
    ├── SnapshotError             a snapshot on disk was not saved, or is not whole
    └── ProtocolMismatch          this release does not speak the protocol found in Redis

Each class says when it is raised and what the catcher should do. All of them survive pickling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class PerdureError(Exception):
    """Base of every error below."""


class UsageError(PerdureError, ValueError):
    """The caller's mistake. Mend the call; sending it again cannot help."""


class InvalidRequest(UsageError):
    """A field of the request is wrong. Never retried: neither by the pool nor, unchanged, by you.

    ``field`` names the field (``"max_tokens"``), or is empty when the request as a whole is wrong.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.field)


class UnknownTask(UsageError):
    """Nothing at this dotted path is a task: it cannot be imported, or it is some other object."""


class PayloadTooLarge(UsageError):
    """A payload, state or output has more bytes than its limit. Store it elsewhere and send a reference."""


class IdempotencyConflict(UsageError):
    """The id belongs to a request with another body. Use a new id, or send the same body."""


class SettingsError(UsageError):
    """A setting cannot be used as given; the message names it as the user spells it."""


class RequestFailed(PerdureError):
    """The request ended in a failure; it is in RQ's failed registry and can be requeued.

    ``kind`` is one of :class:`perdure.protocol.records.FailureKind`; ``reason`` is for people;
    ``history`` lists what happened to the request, oldest first.
    """

    def __init__(
        self,
        request_id: str,
        kind: str,
        reason: str,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(f"request {request_id} failed ({kind}): {reason}")
        self.request_id = request_id
        self.kind = kind
        self.reason = reason
        self.history = list(history)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.request_id, self.kind, self.reason, self.history)


class DeadlineExceeded(RequestFailed):
    """The request's deadline passed before it ended. Send it again with a later one."""


class RequestCanceled(PerdureError):
    """The request was canceled (by ``cancel``) or stopped (by RQ's stop command). Do not wait for it."""

    def __init__(self, request_id: str, status: str = "canceled") -> None:
        super().__init__(f"request {request_id} was {status}")
        self.request_id = request_id
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.request_id, self.status)


class OutputsRestarted(PerdureError):
    """The request began again from zero, and what was read before cannot be continued.

    ``offset`` is how many outputs the reader had. Start over with ``stream()``, or read on with
    ``stream(restarts=True)``.
    """

    def __init__(self, request_id: str, offset: int) -> None:
        super().__init__(
            f"request {request_id} restarted from zero after {offset} outputs were read; "
            "stream(restarts=True) reads the new ones from the start"
        )
        self.request_id = request_id
        self.offset = offset

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.request_id, self.offset)


class OutputsDamaged(PerdureError, ValueError):
    """An entry of the output log is none: somebody else has written there. A worker that meets it begins from zero."""


class OutputsLost(OutputsRestarted):
    """Redis has lost outputs that were read already, and others were put out in their place.

    So it is after a failover to a replica that lagged, or from a file that was restored, with a task whose outputs are
    not reproducible. ``offset`` is how many outputs the reader had; some of the first of them may still be right. Start
    over with ``stream()``, or read on with ``stream(restarts=True)``.
    """

    def __init__(self, request_id: str, offset: int) -> None:
        PerdureError.__init__(
            self,
            f"Redis has lost data (a failover, or a restored file?): of the {offset} outputs of request "
            f"{request_id} that were read, some are gone, and others were put out in their place; "
            "stream(restarts=True) reads the new ones from the start",
        )
        self.request_id = request_id
        self.offset = offset


class TryAgainLater(PerdureError):
    """Not accepted now; nothing was stored. Send it again after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after)


class QueueFull(TryAgainLater):
    """The queue holds as many requests as ``PERDURE_QUEUE_LIMIT`` allows.

    ``items`` are the positions of what was not stored: ``(0,)`` after ``submit``; of a ``submit_many`` all others
    were stored.
    """

    def __init__(self, message: str, retry_after: float, items: Sequence[int] = (0,)) -> None:
        super().__init__(message, retry_after)
        self.items = tuple(items)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after, self.items)


class Degraded(TryAgainLater):
    """The pool has lost more than half of its workers and takes no request of low priority.

    Give it a higher priority, or send it again after ``retry_after`` seconds, which is when the pool may be normal
    again at the earliest; ``retry_when_degraded=True`` does that for you. ``items`` are the positions of what was not
    stored, as in :class:`QueueFull`.
    """

    def __init__(self, message: str, retry_after: float, items: Sequence[int] = (0,)) -> None:
        super().__init__(message, retry_after)
        self.items = tuple(items)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after, self.items)


class UnknownRequest(PerdureError, LookupError):
    """There is no request with this id: none was submitted, it was deleted, its time to be kept is over, or Redis has
    lost it.

    Check the id. One that was accepted is gone if Redis forgot its last second: submit it again.
    """

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"there is no request {request_id}: none was submitted with this id, it was deleted, "
            "it ended so long ago that it is no longer kept, or Redis has lost it (a failover, or a restored file?)"
        )
        self.request_id = request_id

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.request_id,)


class RedisUnavailable(PerdureError):
    """No answer from Redis. The message names the server and the next command; no password is in it."""


class DurabilityUnavailable(PerdureError):
    """Redis cannot confirm that the request is on disk (no AOF, or older than 7.2).

    It is stored all the same and will run: ``client.get(id)`` gives its handle, ``request_ids`` has the ids. Do not
    send it again; turn AOF on, or submit without ``durable``.
    """

    def __init__(self, reason: str, request_ids: Sequence[str] = ()) -> None:
        shown = ", ".join(request_ids[:10]) + (", …" if len(request_ids) > 10 else "")
        super().__init__(
            f"Redis does not confirm that {shown} is on disk: {reason}. It is stored all the same and will run"
        )
        self.reason = reason
        self.request_ids = tuple(request_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.request_ids)


class SnapshotError(PerdureError):
    """A snapshot was not saved, or the one that was asked for cannot be used; others are as they were.

    The message says where and why; ``__cause__`` has the ``OSError`` if there was one. Go on without, and try again
    later; or let it end the worker, if it must not run without what it has saved.
    """


class ProtocolMismatch(PerdureError):
    """Redis holds data of a newer protocol, or RQ is a release that was not tested. Upgrade this process."""
