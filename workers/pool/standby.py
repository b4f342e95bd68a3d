"""A spare: a worker that has loaded its tasks and claims only when it is told to, by SIGUSR1.

A supervisor keeps some (``perdure up --spares N``): when a worker is lost, a spare takes over without loading
anything. ``PERDURE_SPARE=1`` makes any worker one, also under plain ``rq worker``: ``kill -USR1 PID`` ends its wait.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from typing import Final

ROUND: Final = 0.5
"""Seconds between two looks at what runs beside the worker: nobody else looks while it waits."""


class StandBy:
    """The wait for SIGUSR1. Main thread only; installed before anybody may send the signal, which kills otherwise."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # A byte, not an Event: the handler runs in the middle of the wait, and would need the lock that it holds.
        self._before = signal.signal(signal.SIGUSR1, lambda *_: os.write(self._write, b"!"))

    def wait(self, tended: Callable[[], bool]) -> bool:
        """Until the signal has come; ``tended`` is called meanwhile, and ends the wait with False if it says False."""
        try:
            while True:
                ready, _, _ = select.select([self._read], [], [], ROUND)
                if ready:
                    return True
                if not tended():
                    return False
        finally:
            # Not what the signal did before: a second one, sent by mistake, must not kill.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN if self._before == signal.SIG_DFL else self._before)
            os.close(self._read)
            os.close(self._write)
