"""An engine: a loaded task, what is admitted to it, and what waits until there is room."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ...protocol.settings import Settings
from ...protocol.transitions.calls import Claim
from ..ranks.group import Group
from ..tasks.async_generators import AsyncBatch
from ..tasks.base import AnyTask, BatchTask, Request, Task
from ..tasks.generators import GeneratorBatch
from ..tasks.threads import ThreadBatch
from .batch_size import BatchSize
from .room import Room, RoomVerdict
from .soundness import Soundness

PATIENCE = 1.0
"""Seconds after which requests that wait behind another one are handed back: another worker may have room."""


def as_batch(task: AnyTask, news: Callable[[], None] = lambda: None) -> BatchTask:
    """What an engine runs for a task: an instance of a batch task, a group of them, or one made of generators.

    ``news`` is called, from any thread, when requests that move by themselves have something to collect.
    """
    if not isinstance(task, Task):
        batch = task() if isinstance(task, type) else task
        return batch if batch.ranks == 1 else Group(batch)
    if task.asynchronous:
        return AsyncBatch(task, news)
    return GeneratorBatch(task) if task.slots == 1 else ThreadBatch(task, news)


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A claimed request for which there is no room yet."""

    claim: Claim
    request: Request
    since: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Engine:
    """A loaded task and what is admitted to it."""

    path: str
    batch: BatchTask
    fingerprint: str
    admitted: dict[str, str] = field(default_factory=dict)
    """Request id -> the execution for which it was admitted: it may come again while an old step still runs."""
    waiting: dict[str, WaitingRequest] = field(default_factory=dict)
    """In the order in which they will be admitted."""
    needed: dict[str, int | None] = field(default_factory=dict)
    """Request id -> bytes, of those admitted."""
    size: BatchSize = field(init=False)
    room: Room = field(default_factory=Room)
    soundness: Soundness = field(default_factory=Soundness)
    changed: bool = True
    """Somebody came or left since :meth:`places` was asked."""

    def __post_init__(self) -> None:
        self.size = BatchSize(self.batch.slots)

    def step_timeout(self, settings: Settings) -> float:
        """Seconds that one step of its requests may take."""
        return self.batch.step_timeout or settings.step_timeout

    def judge(self, needed: int | None) -> RoomVerdict:
        """Whether a request that needs so many bytes is admitted now."""
        verdict = self.room.judge(needed, self.batch.memory_free() if needed is not None else None, len(self.admitted))
        full = len(self.admitted) >= self.size.limit
        return RoomVerdict.WAIT if verdict is RoomVerdict.ADMIT and full else verdict

    def took(self, claim: Claim, needed: int | None) -> None:
        """A request was admitted."""
        self.admitted[claim.id] = claim.execution
        self.needed[claim.id] = needed
        self.changed = True

    def left(self, identifier: str) -> None:
        """A request is not in the batch any more, if it was."""
        self.changed = self.admitted.pop(identifier, None) is not None or self.changed
        self.needed.pop(identifier, None)

    def overdue(self) -> list[tuple[str, str]]:
        """Take out those that have waited too long behind another one: ids and executions, in their order."""
        behind = list(self.waiting.values())[1:]
        if not behind or time.monotonic() - behind[0].since < PATIENCE:
            return []
        return self.take_waiting(behind)

    def take_waiting(self, entries: list[WaitingRequest] | None = None) -> list[tuple[str, str]]:
        """Take these, or all, out of what waits: ids and executions, in their order."""
        taken = list(self.waiting.values()) if entries is None else entries
        for entry in taken:
            del self.waiting[entry.claim.id]
        self.changed = self.changed or bool(taken)
        return [(entry.claim.id, entry.claim.execution) for entry in taken]

    def places(self) -> int | None:
        """How many requests the worker should hold for it; ``None`` for as many as there are slots."""
        self.changed = False
        return self.room.places(self.batch.memory_free(), len(self.admitted), len(self.waiting))
