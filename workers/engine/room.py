"""Whether a request fits into what is free, for engines that can say what one needs.

An engine that cannot (most tasks) takes whatever its slots hold. The numbers are bytes, and estimates: what they
miss is an out of memory like any other (:mod:`.batch_size`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class RoomVerdict(Enum):
    """What becomes of a request that asks to be taken in."""

    ADMIT = auto()
    WAIT = auto()
    """There will be room when others have left."""
    NEVER = auto()
    """There is too little with nobody else there."""


@dataclass(slots=True)
class Room:
    """What one engine's requests need, and what was free."""

    most: int | None = None
    """Bytes that were free when the engine was last empty; ``None`` before."""
    newest: int | None = None
    """Bytes that the newest request needs; ``None`` before the first."""

    def judge(self, needed: int | None, free: int | None, admitted: int) -> RoomVerdict:
        """About a request that needs so much, where ``admitted`` others are. ``None`` is unknown."""
        if needed is None or free is None:
            return RoomVerdict.ADMIT
        if admitted == 0:
            self.most = free
        self.newest = needed
        if needed <= free:
            return RoomVerdict.ADMIT
        if admitted == 0 or (self.most is not None and needed > self.most):
            return RoomVerdict.NEVER
        return RoomVerdict.WAIT

    def places(self, free: int | None, admitted: int, waiting: int) -> int | None:
        """How many requests the worker should hold, by the size of the newest one; ``None`` for any number.

        None is claimed behind one that waits: another worker may have room for it. Otherwise one more may always
        come, since it may be small.
        """
        if waiting:
            return admitted + waiting
        if free is None:
            return None
        return admitted + max(1, free // self.newest if self.newest else 1)
