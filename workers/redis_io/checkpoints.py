"""Checkpoints: what the requests of this worker have put out gets to Redis, once per interval and before an end.

The interval is longer while Redis is slow (:class:`.pace.Pace`). What somebody listens to is stored after each step,
all of one step in one call; when Redis is slow, that of several.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import redis

from ...protocol.packed_state import stored
from ...protocol.settings import LEASE
from ...protocol.telemetry.logs import about
from ...protocol.transitions.calls import Progress
from ...protocol.transport.refusals import memory_full
from .line import Line
from .uploads import Uploads


@dataclass(slots=True)
class Checkpoints:
    """For the courier's thread."""

    line: Line
    uploads: Uploads = field(init=False)
    _last: float = 0.0
    """When something was stored last (monotonic seconds)."""
    _called: float = 0.0
    """When the last call ended (monotonic seconds)."""
    _full: bool = False
    """Redis was at its maxmemory at the last checkpoint."""

    def __post_init__(self) -> None:
        self.uploads = Uploads(self.line, self._hear)

    def hasten(self) -> None:
        """The next checkpoint is due at once."""
        self._last = 0.0

    @property
    def usual(self) -> float:
        """Seconds from one checkpoint to the next while Redis is quick."""
        return self.line.holdings.settings.checkpoint_interval

    def interval(self) -> float:
        """Seconds from one checkpoint to the next, now (lock held)."""
        longest = LEASE * min(self.line.holdings.step_timeouts()) / 4  # a checkpoint is a renewal, too
        return self.line.pace.interval(self.usual, longest)

    def due_in(self) -> float:
        """Seconds until the next checkpoint is due; 0 or less if it is (lock held)."""
        return self._last + self.interval() - time.monotonic()

    def prompt_in(self) -> float:
        """Seconds until what somebody listens to may be stored; 0 or less if it may be now."""
        return self._called + self.line.pace.rest - time.monotonic()

    def store(self) -> None:
        """Checkpoint what has come since the last checkpoint, once per interval, and before an end; at once what
        somebody listens to.
        """
        now = time.monotonic()
        holdings = self.line.holdings
        with holdings.lock:
            due = self.due_in() <= 0
            prompt = holdings.prompt and self.prompt_in() <= 0
            if not due and not prompt and not self.uploads.busy:
                return
            if prompt or due:
                holdings.prompt = False
            # A finish takes its last outputs along; it needs no checkpoint of its own before.
            rows = [
                row
                for item in holdings.held.values()
                if (row := item.next_progress(due=due or (prompt and item.prompt)))
            ]
            if due and (rows or not self._last):
                self._last = now
            if any(item.splits for item in holdings.held.values()):
                self.hasten()  # the rest goes out in the rounds that follow, without waiting
                holdings.excuse()
        full = False
        try:
            self.line.send(self.uploads.advance(rows), _size, self._call, self._settle)
        except redis.ResponseError as error:
            full = memory_full(error)
            if not full:
                raise
            self._give_way(error)
        else:
            self._full = self._full and not rows
        finally:
            with holdings.lock:
                # What was cut off is sent again, and not only at the next checkpoint.
                left = not full and any(item.flight and item.hearing.heard for item in holdings.held.values())
                holdings.prompt = holdings.prompt or left

    def _call(self, rows: Sequence[Progress]) -> list[str]:
        holdings = self.line.holdings
        with holdings.lock:
            mine, interval = [holdings.current(row.id, row.execution) for row in rows], self.interval()
            for holding in filter(None, mine):
                holding.sendings += 1
        began = time.monotonic()
        try:
            answers = self.line.store.progress(self.line.incarnation, rows)
        except redis.ResponseError as error:
            if memory_full(error):
                for holding in filter(None, mine):
                    holding.sendings -= 1  # refused before it wrote anything
            raise
        self._called = time.monotonic()
        self.line.ledger.answered(self._called - began, interval)
        return answers

    def _settle(self, rows: Sequence[Progress], answers: list[str]) -> None:
        holdings = self.line.holdings
        with holdings.lock:
            for row, answer in zip(rows, answers, strict=True):
                self._hear(row, answer)
            holdings.lock.notify_all()

    def _hear(self, row: Progress, answer: str) -> None:
        """Act upon the answer to a checkpoint, or to a chunk of its state."""
        with self.line.holdings.lock:
            holding = self.line.holdings.current(row.id, row.execution)
            if holding is None:
                return
            holding.shown = True
            if answer == "heard":
                holding.hearing.listen()
            elif row.tell:
                holding.hearing.unheard()
            if answer in ("ok", "heard") and holding.flight is row:
                self.line.ledger.stored(holding, row)
                holding.confirm()
            elif answer == "missing":
                self.line.log.warning(
                    "request %s: Redis has lost parts of a state on its way; written again",
                    row.id,
                    extra=about(*holding.key),
                )
                self.uploads.again(row)
            self.line.hear(holding, answer)

    def _give_way(self, error: redis.ResponseError) -> None:
        """Redis is at its maxmemory: what is to be stored waits here, and the leases are renewed alone."""
        if not self._full:
            self.line.log.warning("Redis takes no checkpoints (%s); they wait here, and are tried again", error)
        self._full = True
        self.uploads.busy = False  # with the next checkpoint
        self.line.holdings.excuse()


def _size(row: Progress) -> int:
    state = stored(row.state)
    return len(row.blob) + (0 if state.chunks else state.length)
