"""The pace: how long Redis takes for a call of late, and how much less is asked of it when that is long."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Final

CALLS: Final = 5
"""Calls of which the middle one counts: a pause of this process or of the server lengthens one."""

SHARE: Final = 0.5
"""The part of a checkpoint interval that its call may take."""

QUICK: Final = 0.05
"""Seconds of a call up to which Redis asks nobody to wait: a busy interpreter or a distant server takes as long."""

TOGETHER: Final = 0.004
"""Seconds in which outputs that somebody waits for are one call: nobody sees the difference, and steps of a millisecond
would otherwise spend half of their time on being stored.
"""

TURNS: Final = 20
"""First claims of others for which there is room before one's own, when a whole pool comes back."""


@dataclass(slots=True)
class Pace:
    """For the courier's thread."""

    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=CALLS))

    def took(self, seconds: float) -> None:
        """A call was answered after so long."""
        self._seconds.append(seconds)

    @property
    def slow(self) -> float:
        """Seconds that a call takes now; 0 as long as that is quick."""
        if len(self._seconds) < CALLS:
            return 0.0
        middle = statistics.median(self._seconds)
        return middle if middle > QUICK else 0.0

    def interval(self, usual: float, longest: float) -> float:
        """Seconds from one checkpoint to the next: ``usual``, and when calls take long, as long as they are to be a
        share of; at most ``longest``, unless ``usual`` is longer.

        A server that is saturated stores as much either way. What changes is where calls wait: in workers, and not in
        the server, where heartbeats and claims would stand behind them.
        """
        return max(usual, min(self.slow / SHARE, longest))

    @property
    def rest(self) -> float:
        """Seconds from the end of one call to the next for what somebody waits for: as long as a call takes now, and
        long enough for the steps of a quick engine to go together.
        """
        return max(TOGETHER, statistics.median(self._seconds) * (1 - SHARE) / SHARE) if self._seconds else 0.0

    def spread(self, longest: float) -> float:
        """Seconds over which those who come back at once are to spread their first claims; 0 while Redis is quick."""
        return min(TURNS * self.slow, longest)
