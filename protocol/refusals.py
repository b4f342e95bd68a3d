"""The errors that answers of Redis stand for."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from .errors import Degraded, IdempotencyConflict, ProtocolMismatch, QueueFull
from .keys import SCHEMA

RETRY_AFTER = 1.0
"""Seconds after which a producer may come again to a full queue."""


def newer_protocol() -> ProtocolMismatch:
    """The error of a process that is older than what stands in Redis."""
    return ProtocolMismatch(
        f"Redis holds data of a newer Perdure protocol than this release speaks ({SCHEMA}); upgrade this process"
    )


def conflict(identifier: str) -> IdempotencyConflict:
    """The error of a submit whose id is taken."""
    return IdempotencyConflict(f"the id {identifier} belongs to another request; choose a new one")


def key_conflict(idempotency_key: str) -> IdempotencyConflict:
    """The error of a submit whose idempotency key is taken."""
    return IdempotencyConflict(
        f"the idempotency_key {idempotency_key!r} was used with another task or payload; choose another key, or send "
        "what was sent first"
    )


def queue_full(queue: str, limit: int, items: Sequence[int] = (0,)) -> QueueFull:
    """The error of a submit that came to a full queue; ``items`` are the positions of what was not stored."""
    return QueueFull(
        f"the queue {queue} holds as many waiting requests as PERDURE_QUEUE_LIMIT allows ({limit:,}); try again later",
        RETRY_AFTER,
        items,
    )


def refusal(answer: str, items: Sequence[int] = (0,)) -> Degraded:
    """The error of a submit that a degraded pool has refused with this ``answer``; ``items`` as in :func:`queue_full`."""
    _, ms, live, expected = answer.split(" ")
    retry_after = int(ms) / 1000
    return Degraded(
        f"the pool is degraded ({live} of {expected} workers) and takes no low priority; try again in {retry_after:g} s "
        "or later, wait with retry_when_degraded, or give it a higher priority",
        retry_after,
        items,
    )


def memory_full(error: redis.ResponseError) -> bool:
    """Whether a script was refused because Redis is at its maxmemory; it has then written nothing."""
    # Redis 6.2 puts the error of a call within a script into the text of another one.
    return isinstance(error, redis.exceptions.OutOfMemoryError) or "-OOM " in str(error)


_PASSING = (
    redis.exceptions.BusyLoadingError, redis.exceptions.ReadOnlyError, redis.exceptions.OutOfMemoryError,
    redis.exceptions.MasterDownError, redis.exceptions.ClusterDownError, redis.exceptions.TryAgainError,
    redis.exceptions.NoScriptError, redis.exceptions.NoPermissionError, redis.exceptions.AuthenticationError,
)  # fmt: skip
_PASSING_CODES = (
    "BUSY",
    "LOADING",
    "READONLY",
    "NOREPLICAS",
    "MISCONF",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "NOAUTH",
)


def passing(error: redis.RedisError) -> bool:
    """Whether an error says something of the server, which may change, and nothing of the call."""
    if isinstance(error, _PASSING):
        return True
    text = str(error)
    return text.startswith(_PASSING_CODES) or any(f"-{code} " in text for code in (*_PASSING_CODES, "OOM"))
