"""The places of a pool, and what a supervisor may have done about them."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from .restarts import Budget
from .statuses import HUNG, OUT_OF_MEMORY, UNFIT, UNFIT_DEVICE

INCARNATION: Final = "_PERDURE_INCARNATION"
"""Variable by which a supervisor names the first incarnation of a worker, to ask Redis about it afterwards."""


class Role(StrEnum):
    """What the process of a place is for."""

    WORKER = "worker"
    SPARE = "spare"
    """A worker that has loaded its tasks, and claims only when it is told to."""
    REAPER = "reaper"


class Phase(StrEnum):
    """How it stands with a place."""

    WAITING = "waiting"
    """Empty; a process is started when it is due and the device is free."""
    STARTING = "starting"
    """A process runs and is not ready yet."""
    SPARE = "spare"
    """Its process has loaded, and waits."""
    READY = "ready"
    JUDGED = "judged"
    """Its process has ended; what it held is being asked for."""
    ENDING = "ending"
    """Its process was told to leave, or killed."""
    QUARANTINED = "quarantined"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process of this name in a place."""

    run: str
    role: Role
    device: int | None


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a signal to a process alone."""

    run: str
    number: int


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to a process and its group."""

    run: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Find out how many requests a process that has ended was holding; :meth:`Supervisor.judged` takes the answer."""

    run: str


@dataclass(frozen=True, slots=True)
class Examine:
    """Look at a device; :meth:`Supervisor.examined` takes the answer."""

    place: str
    device: int


@dataclass(frozen=True, slots=True)
class Say:
    """Tell people."""

    level: int
    text: str


Action = Start | Tell | Kill | Ask | Examine | Say


@dataclass(slots=True)
class Place:
    """One place of the pool, and the process that fills it now."""

    name: str
    role: Role = Role.WORKER
    device: int | None = None
    """NVML's index of its GPU; ``None``: there is nothing to look at before a start."""
    phase: Phase = Phase.WAITING
    run: str = ""
    """Name of its process; empty when there is none."""
    since: float = 0.0
    """When its phase began."""
    due: float = 0.0
    """When to start, to try again, or to look again."""
    reason: str = ""
    """Why it is quarantined, or is being ended."""
    repair: bool = False
    """It is quarantined for its device."""
    budget: Budget = field(default_factory=Budget)
    examining: float | None = None
    """When its device was first asked about, for the next start."""
    asked: float | None = None
    """When the question that is open was asked."""
    clear: bool = False
    """The device was found free and fit."""
    end: tuple[str, int, float | None] = ("", 0, None)
    """Of the process that ended last: name, status, seconds that it was ready."""

    def look_anew(self) -> None:
        """Before the next start its device is to be looked at again."""
        self.clear, self.examining, self.asked = False, None, None


def describe(status: int) -> str:
    """How a process ended, in words: by its exit status or its signal."""
    if status < 0:
        try:
            return f"signal {signal.Signals(-status).name}"
        except ValueError:
            return f"signal {-status}"
    names = {
        UNFIT_DEVICE: " (a device error)", OUT_OF_MEMORY: " (device memory)", UNFIT: " (unfit)", HUNG: " (hung)",
    }  # fmt: skip
    return f"exit status {status}{names.get(status, '')}"
