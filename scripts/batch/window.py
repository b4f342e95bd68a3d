"""What is under way: which lines are to be submitted, which run, and when the pool may be asked again.

Events in, decisions out; nothing here reads a clock, a file or Redis.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from ...protocol.limits import MAX_REQUESTS
from ...protocol.records import NewRequest
from ...protocol.transport.refusals import RETRY_AFTER

MOST_LOSSES: Final = 3
"""Times that a line's request may vanish from Redis before the line is given up."""

LONGEST_PAUSE: Final = 30.0
"""Seconds. A pool that says later is asked again all the same: it may be well sooner."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One line under way. ``request`` is there until it is stored."""

    number: int
    offset: int
    custom_id: str
    url: str
    model: str
    request: NewRequest | None
    id: str
    losses: int = 0


class Window:
    """At most ``size`` lines at once.

    1. :meth:`take`: a line was read.
    2. :meth:`due`: what to submit now; :meth:`answered` says what came of each.
    3. :meth:`ended`: it has; :meth:`lost`: Redis does not know it (any more).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.running: dict[str, Ticket] = {}
        self.waiting_for = ""
        """Why nothing is submitted, if that is so: ``full`` or ``degraded``."""
        self._ready: deque[Ticket] = deque()
        self._not_before = 0.0
        self._freed = 0

    def __len__(self) -> int:
        return len(self._ready) + len(self.running)

    @property
    def room(self) -> int:
        """How many more lines may be read."""
        return self.size - len(self)

    def take(self, ticket: Ticket) -> None:
        self._ready.append(ticket)

    def due(self, now: float) -> list[Ticket]:
        """What to submit, for one call. While the queue is full: as many as have ended since and may have made room."""
        number = MAX_REQUESTS if now >= self._not_before else min(self._freed, MAX_REQUESTS)
        return [ticket for ticket, _ in zip(self._ready, range(number), strict=False)]

    def next(self, now: float) -> float | None:
        """Seconds until there is something to submit, if nothing ends before; ``None`` if nothing is ready."""
        return max(0.0, self._not_before - now) if self._ready else None

    def answered(self, answers: list[tuple[Ticket, str]], now: float) -> list[Ticket]:
        """Note what :meth:`due` gave, in its order, and the answers; returns tickets whose id is somebody else's."""
        conflicts: list[Ticket] = []
        again: list[Ticket] = []
        pause = 0.0
        for ticket, answer in answers:
            self._ready.popleft()
            self._freed = max(0, self._freed - 1)
            word, _, rest = answer.partition(" ")
            if word in ("accepted", "already", "same"):
                ticket.request = None
                self.running[ticket.id] = ticket
            elif word == "conflict":
                conflicts.append(ticket)
            elif word == "full":
                again.append(ticket)
                pause = max(pause, RETRY_AFTER)
            elif word == "degraded":
                again.append(ticket)
                pause = max(pause, min(LONGEST_PAUSE, int(rest.partition(" ")[0]) / 1000))
            else:
                raise ValueError(f"no answer to a submit: {answer!r}")
            if word in ("full", "degraded"):
                self.waiting_for = word
        self._ready.extendleft(reversed(again))
        if again:
            self.pause(now, pause)
        elif now >= self._not_before:
            self.waiting_for = ""
        return conflicts

    def pause(self, now: float, seconds: float) -> None:
        """Submit nothing for so long, but in the place of what ends."""
        self._not_before = now + seconds
        self._freed = 0

    def ended(self, identifier: str) -> Ticket:
        """It has ended; its line is on disk."""
        self._freed += 1
        return self.running.pop(identifier)

    def lost(self, identifier: str, request: NewRequest | None) -> bool:
        """Submit it again as ``request``; False once it has vanished too often: then it is to be ended."""
        ticket = self.running[identifier]
        ticket.losses += 1
        if ticket.losses > MOST_LOSSES:
            return False
        del self.running[identifier]
        ticket.request = request
        self._ready.append(ticket)
        return True
