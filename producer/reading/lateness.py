"""What has not come: why a waiter gives up, and deadlines, at which a waiter ends a request where nobody else does."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from functools import partial
from typing import Final

import redis

from ...protocol.records import RequestRecord
from ...protocol.states import State
from ...protocol.store import Store
from .steps import Call, Question

OVERDUE: Final = 5.0
"""Seconds that a worker has for ending what it runs, when the deadline has passed."""


class NotYet(TimeoutError):
    """What was waited for has not come. ``what`` is that without the advice, which is for callers in Python."""

    def __init__(self, what: str, advice: str, identifier: str) -> None:
        super().__init__(f"{what}. It goes on; {advice}, or look at it with: perdure show {identifier}")
        self.what = what


def not_yet(record: RequestRecord, what: str, hint: str) -> Question[NotYet]:
    state = yield from _state(record)
    return NotYet(f"request {record.id} {what}: it is {state}", hint, record.id)


def _state(record: RequestRecord) -> Question[str]:
    """Where it stands, and why nothing moves if its workers say so; for an error, so that no other takes its place."""
    if record.execution:
        return f"running on {record.worker}"

    def read(store: Store) -> str:
        with suppress(redis.RedisError):
            return store.trouble(record.queue, record.task)
        return ""

    trouble: str = yield Call(read, time.monotonic())
    if record.status is State.QUEUED:
        return f"waiting in the queue {record.queue} ({trouble or 'does a worker serve it?'})"
    return f"{record.status} in the queue {record.queue}" + (f" ({trouble})" if trouble else "")


class Overdue:
    """A request's deadline, for who waits for its end: where no worker and no reaper runs, the waiter ends the request.

    ``within``: seconds after which the keys are to be read without a hint, for as much as the last look says.
    """

    def __init__(self) -> None:
        self.within = math.inf
        self._since: float | None = None

    def look(self, record: RequestRecord, deadline: float) -> Question[None]:
        """Raises :class:`NotYet` for what runs on after its deadline: only its worker or a sweep may end it."""
        left = (yield Call(partial(Store.end_late, records=[record]), deadline)) if record.due else math.inf
        if left > 0:
            # A little later than asked for, and not a little earlier: a watch spreads its waits.
            self.within, self._since = 1.2 * left + 0.05, None
        elif self._since is None:
            self.within, self._since = 0.0, time.monotonic()
        elif (late := time.monotonic() - self._since) < OVERDUE:
            self.within = 1.2 * (OVERDUE - late) + 0.05
        else:
            hint = "a reaper, once there is one (perdure reaper), ends it; wait again with result()"
            raise (yield from not_yet(record, f"has not ended {late:.0f} s after its deadline", hint))
