"""The end of a pool: workers first, then the reaper, which hands on what they could not."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .places import Action, Kill, Place, Role, Say, Tell

LEAVE: Final = 8.0
"""Seconds beyond the drain timeout that a worker has to leave: Redis may be slow to answer."""

ECHO: Final = 1.2
"""Seconds between two signals to a worker, which takes a second one within a second for the echo of the first."""


@dataclass(slots=True)
class Drain:
    """How far a pool has been asked to stop, and what that means now."""

    timeout: float
    """Seconds that workers wait for running steps."""
    stops: int = 0
    """How often it was asked: once drains, twice does not wait for running steps, three times kills."""
    killed: int = 0
    """Processes that did not leave in time."""
    _began: float = 0.0
    _again_at: float | None = None
    _kill_at: float = 0.0

    def ask(self, now: float, places: Sequence[Place]) -> list[Action]:
        """Stop, or stop faster."""
        self.stops += 1
        told: list[Action] = []
        if self.stops == 1:
            self._began, self._kill_at = now, now + self.timeout + LEAVE
            told += [Tell(place.run, signal.SIGTERM) for place in _workers(places)]
        elif self.stops == 2:
            self._again_at = max(now, self._began + ECHO)
            self._kill_at = min(self._kill_at, self._again_at + LEAVE)
        else:
            self._kill_at = now
        return told + self.press(now, places)

    def press(self, now: float, places: Sequence[Place]) -> list[Action]:
        """Time has passed, or a process has ended."""
        actions: list[Action] = []
        workers = _workers(places)
        if self._again_at is not None and now >= self._again_at:
            self._again_at = None
            actions += [Tell(place.run, signal.SIGTERM) for place in workers]
        late = workers if now >= self._kill_at else []
        if not workers:
            for place in places:
                if not place.run:
                    continue
                if not place.reason:
                    place.reason, place.due = "the pool stops", now + LEAVE
                    actions.append(Tell(place.run, signal.SIGTERM))
                elif now >= place.due or self.stops > 2:
                    late = [place]
        for place in late:
            if place.reason != "killed":
                place.reason, self.killed = "killed", self.killed + 1
                actions.append(Say(logging.WARNING, f"{place.name} ({place.run}) did not stop in time; killed"))
                actions.append(Kill(place.run))
        return actions


def _workers(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if place.run and place.role is not Role.REAPER]
