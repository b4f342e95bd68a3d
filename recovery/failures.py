"""What kind of failure an error is, and what follows from it.

An error is judged by its type, by what caused it and by errno, never by its text: that may be the
user's prompt; :mod:`.deaths` judges the end of a process. What follows stands in one table, :data:`POLICIES`. Torch is
looked up only if somebody has imported it; a worker without torch raises none of its errors.
"""

from __future__ import annotations

import errno
import socket
import ssl
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final, Literal

import redis

from ..protocol.codec import shortened
from ..protocol.errors import PerdureError, RedisUnavailable, SettingsError, UsageError
from ..protocol.records import FailureKind
from ..protocol.transitions.calls import Failure

MAX_REASON: Final = 500
"""Characters of :func:`describe`."""

MAX_TRACEBACK: Final = 32_000
"""Characters of a traceback that are stored; of a longer one the middle is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What follows when an execution ends with one kind of failure."""

    charge: bool
    """It counts as an attempt; when ``max_retries`` further ones are used up, the request is a dead letter."""
    crash: bool
    """It counts as a crash; ``max_crashes`` alone on a worker, or ``max_crashes_total``, make a dead letter."""
    loss: bool
    """It counts as the loss of a worker: the first redelivery is immediate and free, later ones wait longer."""
    retry: bool
    """Another execution may follow; without, the request is a dead letter at once."""
    worker: Literal["go on", "shrink its batch", "leave its group", "exit"]
    """What the worker does. One that exits is replaced. A group (several ranks that step together) is left when a
    collective failed (:func:`lost_peer`); otherwise such a worker goes on.
    """

    @property
    def flags(self) -> dict[str, Any]:
        """What of it the scripts act upon, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.type == "bool"}

    @property
    def suspect(self) -> str:
        """Whether all that was in flight runs in limited company from then on."""
        return "at once" if self.crash else "the second time without progress" if self.loss else "never"

    @property
    def delay(self) -> str:
        """How long the next execution waits; a backoff is computed by the scripts."""
        if not self.retry:
            return "there is none"
        reasons = [
            *(["attempts"] if self.charge else []),
            *(["crashes, if it was alone on its worker"] if self.crash else []),
            *(["losses, if it was alone, from the second on"] if self.loss else []),
        ]
        return "backoff by its " + "; by its ".join(reasons) if reasons else "none"


POLICIES: Final[Mapping[FailureKind, Policy]] = MappingProxyType(
    {
        # The step was too large for what was free; with other neighbours, or elsewhere, it may fit.
        FailureKind.GPU_OOM: Policy(charge=True, crash=False, loss=False, retry=True, worker="shrink its batch"),
        # After a device error every further call of the process fails, for its batch-mates too.
        FailureKind.GPU_ERROR: Policy(charge=False, crash=True, loss=True, retry=True, worker="exit"),
        # What the task wanted to reach may be back by the next attempt.
        FailureKind.NETWORK: Policy(charge=True, crash=False, loss=False, retry=True, worker="leave its group"),
        # To have been on a worker that was lost is not the request's fault.
        FailureKind.WORKER_LOST: Policy(charge=False, crash=False, loss=True, retry=True, worker="exit"),
        # The request, or the machine: crashes count until it is clear which.
        FailureKind.HANG: Policy(charge=False, crash=True, loss=False, retry=True, worker="exit"),
        # As above; and a process without memory cannot be trusted to report anything.
        FailureKind.HOST_OOM: Policy(charge=False, crash=True, loss=False, retry=True, worker="exit"),
        # As above; a native signal has ended the process already.
        FailureKind.CRASH: Policy(charge=False, crash=True, loss=False, retry=True, worker="exit"),
        # Running it again cannot help.
        FailureKind.INVALID_REQUEST: Policy(charge=True, crash=False, loss=False, retry=False, worker="go on"),
        # Nobody has tried: the worker hands it back with `release`, for one that has the right model.
        FailureKind.MODEL_MISMATCH: Policy(charge=False, crash=False, loss=False, retry=True, worker="go on"),
        # Its answer would come too late.
        FailureKind.DEADLINE: Policy(charge=False, crash=False, loss=False, retry=False, worker="go on"),
        # The task's own error, perhaps one of the moment.
        FailureKind.ERROR: Policy(charge=True, crash=False, loss=False, retry=True, worker="go on"),
        # Workers of the release before say this where these say ERROR.
        FailureKind.UNKNOWN: Policy(charge=True, crash=False, loss=False, retry=True, worker="go on"),
    }
)
"""What follows from each kind of failure."""

_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation and hipErrorOutOfMemory: not sticky, the device is well

_NETWORK_ERRNO = frozenset(
    {
        errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
        errno.ENETRESET, errno.ENETUNREACH, errno.ENOTCONN, errno.EPIPE, errno.ESHUTDOWN, errno.ETIMEDOUT,
    }
)  # fmt: skip


def classify(error: BaseException) -> FailureKind:
    """The kind of failure that ``error`` is; ``ERROR`` if its types say nothing.

    The first error that says something decides, from the outermost inwards; but a device error decides wherever
    it stands, since the process is unfit whoever wrapped it. ``INVALID_REQUEST`` needs intent: an error that
    merely happened while an invalid request was handled is judged by itself.
    """
    found: FailureKind | None = None
    for link, meant in _links(error):
        kind = _kind(link)
        if kind is FailureKind.GPU_ERROR:
            return kind
        if kind is FailureKind.INVALID_REQUEST and not meant:
            continue
        found = found or kind
    return found or FailureKind.ERROR


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed: another rank of the group, or the way to it, is gone."""
    return any(_is_torch(link, "torch.distributed", "DistError") for link, _ in _links(error))


def describe(error: BaseException) -> str:
    """One line for people: type and first line of the message, at most :data:`MAX_REASON` characters."""
    kind = type(error)
    # Our own errors are sentences for people already.
    ours = isinstance(error, PerdureError)
    plain_name = kind.__module__ in ("builtins", "__main__")
    name = "" if ours else kind.__qualname__ if plain_name else f"{kind.__module__}.{kind.__qualname__}"
    try:
        text = str(error)
    except BaseException:  # a user's __str__ may raise anything
        text = "(its message cannot be shown)"
    # A message of many megabytes would take seconds, and its worker would seem to hang.
    text = text.lstrip()[: 10 * MAX_REASON]
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    whole = f"{name}: {line}" if name and line else line or name or kind.__qualname__
    # No terminal escapes from a user's text, and nothing that UTF-8 cannot hold.
    plain = "".join(character if character.isprintable() else " " for character in whole)
    return plain if len(plain) <= MAX_REASON else plain[: MAX_REASON - 1] + "…"


def failure(claim_id: str, execution: str, error: BaseException, kind: FailureKind | None = None) -> Failure:
    """The record that ``fail`` wants for a request whose ``execution`` ended with ``error``; ``kind``: if it is
    known.
    """
    kind = kind or classify(error)
    return Failure(
        id=claim_id,
        execution=execution,
        kind=kind,
        reason=describe(error),
        traceback=_traceback(error),
        **POLICIES[kind].flags,
    )


def _links(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """The error and all that led to it, outermost first; with whether each was meant (by ``from`` or a group).

    ``raise … from None`` hides a cause from people; it is looked at all the same. Chains may be circular.
    """
    seen: set[int] = set()
    todo: list[tuple[BaseException, bool]] = [(error, True)]
    while todo and len(seen) < 100:
        link, meant = todo.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link, meant
        if link.__cause__ is not None:
            todo.append((link.__cause__, meant))
        if isinstance(link, BaseExceptionGroup):
            todo.extend((member, meant) for member in link.exceptions)
        if link.__context__ is not None:
            todo.append((link.__context__, False))


def _kind(error: BaseException) -> FailureKind | None:
    """What one error says by itself; ``None`` for nothing."""
    if _is_torch(error, "torch", "OutOfMemoryError"):
        return FailureKind.GPU_OOM
    if _is_torch(error, "torch", "AcceleratorError"):
        full = getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
        return FailureKind.GPU_OOM if full else FailureKind.GPU_ERROR
    if _is_torch(error, "torch.distributed", "DistError"):
        return FailureKind.NETWORK
    match error:
        case SettingsError():
            return None  # the worker's mistake, not the request's
        case UsageError():
            return FailureKind.INVALID_REQUEST
        case MemoryError() | OSError(errno=errno.ENOMEM):
            return FailureKind.HOST_OOM
        case redis.ConnectionError() | redis.TimeoutError() | RedisUnavailable():
            return FailureKind.NETWORK
        case ConnectionError() | TimeoutError() | socket.gaierror() | socket.herror() | ssl.SSLError():
            return FailureKind.NETWORK
        case OSError() if error.errno in _NETWORK_ERRNO:
            return FailureKind.NETWORK
    return None


def _is_torch(error: BaseException, module: str, name: str) -> bool:
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and isinstance(error, found)


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException:  # a user's exception may break the formatting of its own traceback
        return describe(error)
    return shortened(text, MAX_TRACEBACK)
