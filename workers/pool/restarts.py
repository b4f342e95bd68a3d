"""How often one place of a pool may be filled again, and how soon.

Two things are kept apart. The *pause* before the next start grows with every quick end, whatever ended it. The
*budget* counts only ends that speak against the place itself: before it was ready, with nothing to do, or with the
device's error. What requests do to a worker is bounded by their own counts, and must not cost the pool a place.

Nothing here reads a clock or starts anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

BUDGET: Final = 3
"""Counted ends that are borne: within :data:`WINDOW`, or one after the other before the place was ready again."""

WINDOW: Final = 60.0
"""Seconds after which a counted end is forgotten."""

QUICK: Final = 5.0
"""Seconds: a worker that was ready for less ended quickly."""

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0

LONGEST_FOR_REQUESTS: Final = 5.0
"""Seconds between two starts at most, where requests end the workers: they use up their own counts that way."""

RETRY: Final = 300.0
"""Seconds until a quarantined place is tried once more; doubles with each try, up to :data:`LONGEST_RETRY`."""

LONGEST_RETRY: Final = 3600.0


@dataclass(slots=True)
class Budget:
    """The record of one place. All times are seconds on one monotonic clock."""

    ends: list[float] = field(default_factory=list)
    """When it ended in a way that counts, oldest first."""
    failures: int = 0
    """Counted ends in a row without having been ready."""
    quick: int = 0
    """Quick ends in a row, counted or not."""
    tries: int = 0
    """Times that it was tried again out of quarantine."""

    def ended(self, now: float, *, ready: float | None, counts: bool) -> float:
        """Note an end; returns the pause before the next start.

        ``ready``: seconds that it had been ready, ``None`` if it never was.
        """
        self.ends = [at for at in self.ends if now - at < WINDOW]
        if counts:
            self.ends.append(now)
            self.failures += ready is None
        self.quick = self.quick + 1 if ready is None or ready < QUICK else 0
        doublings = self.quick - (1 if counts else 2)  # the first end by a request is nobody's fault
        if self.quick == 0 or doublings < 0:
            return 0.0
        longest = LONGEST_PAUSE if counts else LONGEST_FOR_REQUESTS
        return float(min(longest, FIRST_PAUSE * 2 ** min(doublings, 10)))

    def exhausted(self, now: float) -> bool:
        """Whether the place has ended too often to be filled again now."""
        return sum(now - at < WINDOW for at in self.ends) > BUDGET or self.failures > BUDGET

    def stood(self) -> None:
        """It was ready again."""
        self.failures = 0

    def try_again(self) -> None:
        """Out of quarantine for one try: the next counted end before readiness exhausts it at once."""
        self.ends.clear()
        self.failures = BUDGET
        self.quick = 0
        self.tries += 1

    def patience(self) -> float:
        """Seconds of quarantine before the next try."""
        return float(min(LONGEST_RETRY, RETRY * 2 ** min(self.tries, 10)))

    def forgive(self) -> None:
        """Start anew: a person has released the place."""
        self.ends.clear()
        self.failures = self.quick = self.tries = 0
