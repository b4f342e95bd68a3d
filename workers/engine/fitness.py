"""Whether this process is still fit to run anything, and with which status it leaves if not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from ...protocol.records import FailureKind
from ...recovery.failures import POLICIES, classify
from ..pool import statuses
from ..tasks.unfit import Unfit


def status_after(error: BaseException) -> int | None:
    """The exit status of a worker that has met an error; ``None`` if it goes on."""
    if isinstance(error, Unfit):
        return error.status
    kind = classify(error)
    if POLICIES[kind].worker != "exit":
        return None
    return statuses.UNFIT_DEVICE if kind is FailureKind.GPU_ERROR else statuses.UNFIT


@dataclass(slots=True)
class Fitness:
    """What errors have made of this process.

    1. ``judge``: most errors are their request's alone, and nothing follows for the process.
    2. Others make it leave: no further step, everything is stored and handed back, another process takes over.
    3. After an error of the device it is not called any more, not even to free something: such a call fails too, or
       never returns. For the same reason the process ends without the end of the interpreter.
    """

    stop: Callable[[], None]
    log: logging.Logger
    status: int = 0
    """With what the process exits."""
    left: bool = False
    """It is to leave: no further step."""
    device_error: BaseException | None = None
    """The first error of the device. Kept, because it refers to tensors: to free them would be a call."""

    def judge(self, error: BaseException) -> bool:
        """Have the process leave if this error makes it unfit, whichever request it came from; True if it does."""
        status = status_after(error)
        if status is None:
            return False
        if isinstance(error, Unfit):
            self.log.critical("this worker is unfit, and hands back what it holds: %s", error)
        else:
            self.log.critical("this worker is unfit after %s; leaving, to be replaced", type(error).__name__)
        lost_device = status == statuses.UNFIT_DEVICE and not isinstance(error, Unfit)
        if lost_device and self.device_error is None:
            self.device_error = error
        self.leave(status)
        return True

    def leave(self, status: int) -> None:
        """Leave with this status, unless there was another reason before."""
        self.status = self.status or status
        self.left = True
        self.stop()
