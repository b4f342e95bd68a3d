"""Hearing: whether somebody listens to what a request puts out, as far as its worker knows.

It hears so from its claim, from who begins to listen later, and from Redis, which says at each telling whether anybody
has heard it. What somebody listens to is stored after each step; everything else waits for the next checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

SILENCE: Final = 2.0
"""Seconds since a request was last heard after which a telling that nobody hears ends it: who lost a connection comes
back meanwhile. Between two outputs there may be any time.
"""

EARLY: Final = 5.0
"""Seconds for which it is kept that somebody listens to a request that is not held here yet."""

MOST_EARLY: Final = 1000

ASK: Final = 1.0
"""Seconds between two tellings of what nobody listens to, as far as is known: who listens may not be able to say so."""


@dataclass(slots=True)
class Hearing:
    """Of one request. Guarded by the lock of who holds it."""

    heard: bool = False
    """What it puts out is to be stored at once."""
    _heard_at: float = 0.0
    _told: float = 0.0

    def listen(self) -> None:
        """Somebody listens now."""
        self.heard, self._heard_at = True, time.monotonic()

    def unheard(self) -> None:
        """It was told, and nobody has heard it."""
        self.heard = self.heard and time.monotonic() < self._heard_at + SILENCE

    def tell(self) -> bool:
        """Whether the outputs that are to be stored now are to be told to whoever listens."""
        now = time.monotonic()
        if not self.heard and now < self._told + ASK:
            return False
        self._told = now
        return True


@dataclass(slots=True)
class Early:
    """Who began to listen after his request was claimed, and was heard of before the answer to that claim."""

    _at: dict[str, float] = field(default_factory=dict)

    def note(self, identifier: str) -> None:
        """Somebody listens to a request that is not held here."""
        now = time.monotonic()
        self._at = {name: at for name, at in self._at.items() if now - at < EARLY}
        if len(self._at) < MOST_EARLY:
            self._at[identifier] = now

    def take(self, identifier: str) -> bool:
        """Whether somebody has begun to listen to a request that is held from now on."""
        return time.monotonic() - self._at.pop(identifier, -EARLY) < EARLY
