"""What answers of Redis stand for: errors of ours, and refusals that pass.

The one table of what is waited for; clients, workers, guardians, reapers and commands ask it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import redis

from ..errors import Degraded, IdempotencyConflict, ProtocolMismatch, QueueFull
from ..keys import SCHEMA

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
    """The error of a submit that a degraded pool has refused by this ``answer``; ``items`` as in :func:`queue_full`."""
    _, ms, live, expected = answer.split(" ")
    retry_after = int(ms) / 1000
    return Degraded(
        f"the pool is degraded ({live} of {expected} workers) and takes no low priority; "
        f"try again in {retry_after:g} s or later, wait with retry_when_degraded, or give it a higher priority",
        retry_after,
        items,
    )


def memory_full(error: BaseException) -> bool:
    """Whether a script was refused because Redis is at its maxmemory; it has then written nothing."""
    return isinstance(error, redis.exceptions.OutOfMemoryError) or code_of(error) == "OOM"


PASSING: Final = {
    # what its words begin with -> how a person is told
    "LOADING": "it is still loading its data",
    "BUSY": "it is busy with a script or a function",
    "READONLY": "it is a replica, which takes no writes",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "UNBLOCKED": "it has just become a replica",
    "NOREPLICAS": "too few of its replicas are connected",
    "MISCONF": "it cannot write to its disk",
    "CLUSTERDOWN": "its cluster is down",
    "TRYAGAIN": "its cluster moves the keys right now",
}
"""The refusals that say something of the server, which may change, and nothing of the call. All of them are waited for,
and the next try is made over another connection: where the server is a primary no more, its address leads elsewhere by
now.
"""

FORBIDDEN: Final = ("NOAUTH", "WRONGPASS", "NOPERM")
"""Refusals of the user. Only a person can change that: a client says so at once. A worker waits, so that no request is
lost over it.
"""

_CLASSES: Final = {
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.TryAgainError: "TRYAGAIN",
    redis.exceptions.NoScriptError: "NOSCRIPT",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.AuthenticationError: "WRONGPASS",
    redis.exceptions.OutOfMemoryError: "OOM",
}
"""Those that redis-py knows: it takes the code off the text."""

# What redis-py puts in front of an error of a pipeline. The command may have any text in it: the last such words count.
_IN_PIPELINE = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)
# Redis 6.2 puts the error of a call within a script into the text of another one.
_CODE = re.compile(
    r"(?:ERR )?Error running script .*? -([A-Z]+) |(?:Transaction discarded because of: )?([A-Z]+) ", re.DOTALL
)


def code_of(error: BaseException) -> str:
    """The first word of an answer of Redis that is an error; empty for other errors."""
    for kind, code in _CLASSES.items():
        if isinstance(error, kind):
            return code
    if not isinstance(error, redis.RedisError):
        return ""
    text = str(error)
    if found := _IN_PIPELINE.match(text):
        text = text[found.end() :]
    found = _CODE.match(text)
    return (found[1] or found[2]) if found else ""


def forbidden(error: BaseException) -> bool:
    """Whether Redis refuses this user, or this user's call."""
    return code_of(error) in FORBIDDEN


def passing(error: BaseException) -> bool:
    """Whether Redis answers, and refuses for a reason that may pass. For a worker these are also full memory, which its
    checkpoints wait for, and :data:`FORBIDDEN`.
    """
    return _may_pass(error) or forbidden(error) or memory_full(error)


def waited_for(error: BaseException) -> bool:
    """Whether the same call may be taken in a moment: Redis does not answer, or refuses for a reason that passes."""
    if forbidden(error):
        return False
    return _may_pass(error) or isinstance(error, redis.ConnectionError | redis.TimeoutError)


def _may_pass(error: BaseException) -> bool:
    # A server that has forgotten a script which it was just sent: it was started again, or is another one. Not in the
    # table: whoever sent the name of a script alone is to send the script.
    return code_of(error) in PASSING or isinstance(error, redis.exceptions.NoScriptError)
