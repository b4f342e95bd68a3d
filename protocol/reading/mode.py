"""The mode of a pool: normal, or degraded because it has lost too many of its workers.

A pool is all workers of one Redis and one prefix. One hash holds its mode: a few fields that everybody may read
(:class:`Mode`), and those that the next decision needs (:class:`ModeTally`). Reapers write it; its dates are ms since
1970 by the server's clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from ..records import whole

DEGRADED = "degraded"
NORMAL = "normal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """Whether a pool is degraded, for people and programs.

    ``live`` workers are ready of ``expected``, as a reaper counted them last. ``since`` is when it became degraded,
    in seconds since 1970 by the server's clock; ``None`` while it is not. ``recovering``: it is still degraded, but
    enough workers are back; it is normal again once that has lasted for a heartbeat timeout.
    """

    degraded: bool
    live: int
    expected: int
    since: float | None
    recovering: bool = False

    def __str__(self) -> str:
        if self.since is None and not self.expected:
            return "the pool is normal; no worker was ready in the last hour"
        if self.since is None:
            return f"the pool is normal: {self.live} of {self.expected} workers"
        try:
            date = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        except (ValueError, OverflowError, OSError):
            date = "a date that is none"  # anybody may write it
        if self.recovering:
            return f"the pool is recovering: {self.live} of {self.expected} workers are ready; degraded since {date}"
        return f"the pool is degraded: {self.live} of {self.expected} workers since {date}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeTally:
    """All that a decision on the mode leaves to the next one, whoever makes that. Dates in ms; 0 is none.

    ``degraded`` holds from ``since`` ``until`` a moment that every decision puts off. ``recovering``: since when there
    are enough workers again, which must last for ``dwell``. ``lowest`` is the fewest that were counted since
    ``lowest_since``. ``asked`` is a configured capacity, which holds until ``asked_until``. ``peaks``: span of time ->
    the most workers that lasted in it. ``seen``: there has been a worker.
    """

    degraded: bool = False
    since: int = 0
    until: int = 0
    live: int = 0
    expected: int = 0
    seen: bool = False
    recovering: int = 0
    dwell: int = 0
    lowest: int = 0
    lowest_since: int = 0
    asked: int = 0
    asked_until: int = 0
    peaks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_redis(cls, raw: Mapping[str, str]) -> Self:
        """Read the hash; what is missing or damaged counts as nothing."""
        numbers = {
            name: max(0, whole(raw.get(name)))
            for name in (
                *("since", "until", "live", "expected", "recovering", "dwell"),
                *("lowest", "lowest_since", "asked", "asked_until"),
            )
        }
        peaks = re.findall(r"(?a:\b(\d{1,12}):(\d{1,9})\b)", raw.get("peaks", ""))
        return cls(
            degraded=raw.get("mode") == DEGRADED,
            seen=raw.get("seen") == "1",
            peaks=tuple((int(span), int(number)) for span, number in peaks[:100]),
            **numbers,
        )

    def to_redis(self) -> dict[str, str | int]:
        """The arguments of ``declare``."""
        return {
            "mode": DEGRADED if self.degraded else NORMAL, "since": self.since, "until_ms": self.until,
            "live": self.live, "expected": self.expected, "seen": int(self.seen), "recovering": self.recovering,
            "dwell": self.dwell, "lowest": self.lowest, "lowest_since": self.lowest_since, "asked": self.asked,
            "asked_until": self.asked_until, "peaks": " ".join(f"{span}:{number}" for span, number in self.peaks),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Count:
    """Answer of ``weigh``: how many workers live and are ready at ``now`` (ms), and what was decided last.

    ``judged`` is False while heartbeats say nothing. ``version`` numbers the declarations.
    """

    now: int
    judged: bool
    live: int
    version: int
    tally: ModeTally
