"""Tasks that this worker cannot load: it leaves them to others for a growing while, and says so.

The module may not have been deployed here yet, a library, weights, a licence or the device may be missing. Its requests
are handed back at once, uncharged, for a worker that can; this one tries again later, in case what was missing has
come.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from ...protocol.errors import UnknownTask
from ...recovery.failures import describe

FIRST: Final = 5.0
LONGEST: Final = 300.0
"""Seconds for which a task is left alone after it could not be loaded: doubling from the first to the longest."""

MISSING: Final = "missing"
BROKEN: Final = "broken"
"""What kind of inability: the module or the task in it is not there; it is there, and loading it raises."""


@dataclass(frozen=True, slots=True)
class UnloadedTask:
    """A task that could not be loaded; ``since`` and ``until`` in monotonic seconds, which all processes share."""

    task: str
    kind: str
    reason: str
    since: float
    until: float
    tries: int = 1


@dataclass(slots=True)
class Unable:
    """All of them. Written by the engine loop, read by the claimer: a dict that is replaced, never changed."""

    told: Callable[[list[dict[str, Any]]], None] = lambda rows: None
    """Called with what is to be said of them, when that has changed."""
    found: dict[str, UnloadedTask] = field(default_factory=dict)

    def failed(self, task: str, error: BaseException) -> UnloadedTask:
        """A task could not be loaded."""
        now, before = time.monotonic(), self.found.get(task)
        tries = before.tries + 1 if before else 1
        wait = min(LONGEST, FIRST * 2.0 ** min(tries - 1, 30))
        now_unable = UnloadedTask(
            task, _kind(task, error), describe(error), before.since if before else now, now + wait, tries
        )
        self._become({**self.found, task: now_unable})
        return now_unable

    def loaded(self, task: str) -> None:
        """It could, now."""
        if task in self.found:
            self._become({name: item for name, item in self.found.items() if name != task})

    def left_alone(self) -> list[str]:
        """The tasks of which nothing is to be claimed now."""
        now = time.monotonic()
        return [name for name, item in self.found.items() if now < item.until]

    def _become(self, found: dict[str, UnloadedTask]) -> None:
        self.found = found
        rows = [
            {"task": item.task, "kind": item.kind, "reason": item.reason, "since": item.since}
            for item in found.values()
        ]
        self.told(rows)


def _kind(task: str, error: BaseException) -> str:
    """A module that is there, and lacks a library of its own, is broken: it may be installed at any time."""
    if not isinstance(error, UnknownTask):
        return BROKEN
    cause = error.__cause__
    lacks = cause.name if isinstance(cause, ModuleNotFoundError) and cause.name else ""
    return MISSING if cause is None or (lacks and f"{task}.".startswith(f"{lacks}.")) else BROKEN
