"""How often the threads of a worker look for what all workers look for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

RARE: Final = 60
"""An idle worker that waits to be rung looks in one of so many rounds: another one looks in each."""


@dataclass(slots=True)
class Rounds:
    """For one thread. ``looks``: whether the worker is busy, or the one of the idle that asks each second."""

    looks: Callable[[], bool] = lambda: True
    _left_out: int = 0

    def due(self) -> bool:
        """To be called once in each round; whether to look in this one."""
        self._left_out += 1
        if not self.looks() and self._left_out < RARE:
            return False
        self._left_out = 0
        return True
