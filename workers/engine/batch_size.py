"""How many requests a worker runs at once, after its device's memory has run out.

Additive increase, multiplicative decrease: out of memory halves the limit, a quiet time raises it by one.
Nothing here reads a clock or a device: what happened goes in, with its time, and the limit is read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

QUIET: Final = 30.0
"""Seconds without a change after which the limit grows by one."""

WINDOW: Final = 120.0
"""Seconds within which :data:`ENOUGH` single requests without memory make the process unfit."""

ENOUGH: Final = 3
"""Once may be a request that is too large, and so may twice."""


@dataclass(slots=True)
class BatchSize:
    """The limit on an engine's requests, between 1 and its slots. Times are in seconds, of any one clock.

    A request that alone is too large for the device brings the limit down to 1, step by step, before it is
    found; it was not the batch's size then. So where memory runs out for a single request, and the next
    step goes well without it, the limit is again what it was before.
    """

    slots: int
    limit: int = field(init=False)
    _changed: float | None = None
    """When the limit changed, or memory ran out; ``None`` before."""
    _before: int | None = None
    """The limit before memory ran out several times in succession."""
    _found: bool = False
    """Memory ran out for a single request, and no step has gone well since."""
    _alone: deque[float] = field(default_factory=lambda: deque(maxlen=ENOUGH))

    def __post_init__(self) -> None:
        self.limit = self.slots

    @property
    def exhausted(self) -> bool:
        """True when memory ran out for single requests so often that the process is to be replaced."""
        return len(self._alone) == ENOUGH and self._alone[-1] - self._alone[0] <= WINDOW

    def step_ok(self, now: float, size: int) -> None:
        """A step of ``size`` requests went well."""
        if self._found:
            self._found = False
            if self._before is not None:
                self._set(max(self.limit, self._before), now)
            self._before = None
        # A batch that is smaller than allowed says nothing about a larger one.
        elif size >= self.limit < self.slots and self._quiet(now):
            self._set(self.limit + 1, now)

    def out_of_memory(self, now: float, size: int) -> None:
        """Memory ran out in a step of ``size`` requests, or while the last of so many was taken in."""
        if size > 1:
            if self._before is None or self._quiet(now):
                self._before = self.limit
            self._found = False
            self._set(max(1, min(self.limit, size) // 2), now)
        else:
            self._found = True
            self._alone.append(now)
            self._changed = now

    def _quiet(self, now: float) -> bool:
        return self._changed is None or now - self._changed >= QUIET

    def _set(self, limit: int, now: float) -> None:
        self.limit, self._changed = limit, now
