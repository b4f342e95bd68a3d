"""Health: whether a worker's process lives, whether it should be given work, and whether its device may be used.

Three answers to three questions, from a guardian, which shares neither the interpreter nor the device with its worker:

1. *live*: the process is there and nobody has found it hanging. Redis has no say in it: a restart would not mend Redis.
2. *ready*: it has loaded, Redis answers, and no check fails.
3. *quarantined*: the driver has given up on the device. The worker drains; another process on it would fail too.

Each check looks in a thread of its own, as often as it likes to return: one that hangs is told as ``unknown`` after its
deadline, keeps no other waiting, and is never started beside itself. What is told changes when two of the last three
looks agree, so that one bad look changes nothing. A fault of the hardware needs no second look, and is over only when
the driver itself says so.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

UNFIT_SIGNAL: Final = signal.SIGUSR2
"""Tells a worker to drain and to leave with ``UNFIT_DEVICE``: its device is not to be used."""


class CheckState(StrEnum):
    """How a check stands."""

    OK = "ok"
    DEGRADED = "degraded"
    """It works; somebody should look at it."""
    FAIL = "fail"
    UNKNOWN = "unknown"
    """The check could not tell: it hangs, or what it would look at is not there."""


_SEVERITY: Final = {CheckState.OK: 0, CheckState.DEGRADED: 1, CheckState.FAIL: 2}


@dataclass(frozen=True, slots=True)
class Reading:
    """What one look has found."""

    state: CheckState
    reason: str
    certain: bool = False
    """Said by the device's driver, not measured: it counts at once, and only such a reading ends such a failure."""


@dataclass(frozen=True, slots=True)
class Shown:
    """How a check stands, as it is told. ``at``: seconds since 1970 of the last look, 0 before the first."""

    state: CheckState
    reason: str
    at: float

    def as_dict(self) -> dict[str, Any]:
        return {"state": str(self.state), "reason": self.reason, "at": round(self.at, 3)}


class Standing:
    """What is told of a check after its readings so far: the worst level that ``agree`` of the last ``window`` reach.

    A failure does not end because nobody can tell any more: ``unknown`` is told only in place of something better.
    """

    def __init__(self, agree: int = 2, window: int = 3) -> None:
        self._agree = agree
        self._readings: deque[Reading] = deque(maxlen=window)
        self._latched: Reading | None = None
        self._silence = "it has not been looked at yet"
        self._at = 0.0

    @property
    def condemned(self) -> str:
        """Why the hardware is not to be used; an empty text if it may be."""
        return self._latched.reason if self._latched is not None else ""

    def hear(self, reading: Reading, at: float) -> None:
        """Take in one reading; ``at`` in seconds since 1970."""
        self._at = at
        if reading.state is CheckState.UNKNOWN:
            self._silence = reading.reason
            return
        self._silence = ""
        if reading.certain:
            self._latched = reading if reading.state is CheckState.FAIL else None
            self._readings.clear()  # measured before the driver spoke
        self._readings.append(reading)

    def shown(self, silence: str = "") -> Shown:
        """How it stands now; ``silence`` says why no reading comes, if one is overdue."""
        if self._latched is not None:
            return Shown(CheckState.FAIL, self._latched.reason, self._at)
        found = self._agreed()
        silence = silence or self._silence
        if found is None or (silence and found.state is not CheckState.FAIL):
            return Shown(CheckState.UNKNOWN, silence, self._at)
        return Shown(found.state, found.reason, self._at)

    def _agreed(self) -> Reading | None:
        if not self._readings:
            return None
        ranked = sorted((_SEVERITY[item.state] for item in self._readings), reverse=True)
        level = ranked[min(self._agree, len(ranked)) - 1]
        return next(item for item in reversed(self._readings) if _SEVERITY[item.state] == level)


class Watched(Protocol):
    """Something whose health is told."""

    name: str

    @property
    def condemned(self) -> str: ...

    def start(self, interval: float) -> None: ...

    def shown(self) -> Shown: ...


class Check:
    """Looks again and again, in a thread of its own; ``look`` may raise, and may hang."""

    condemned = ""

    def __init__(self, name: str, look: Callable[[], Reading], *, deadline: float) -> None:
        self.name = name
        self._look = look
        self._deadline = deadline
        self._standing = Standing()
        self._since: float | None = None
        self._lock = threading.Lock()

    def start(self, interval: float) -> None:
        """Look every ``interval`` seconds, for as long as this process lives."""
        threading.Thread(target=self._run, args=(interval,), name=f"check-{self.name}", daemon=True).start()

    def shown(self) -> Shown:
        with self._lock:
            late = 0.0 if self._since is None else time.monotonic() - self._since
            return self._standing.shown(f"the check has hung for {late:.0f} s" if late > self._deadline else "")

    def _run(self, interval: float) -> None:
        while True:
            self.look()
            time.sleep(interval)

    def look(self) -> None:
        """Look once, however long it takes."""
        with self._lock:
            self._since = time.monotonic()
        try:
            reading = self._look()
        except Exception as error:  # a mistake in one check is no reason to lose all of them
            reading = Reading(CheckState.UNKNOWN, f"the check failed: {type(error).__name__}: {error}")
        with self._lock:
            self._since = None
            self._standing.hear(reading, time.time())


@dataclass(slots=True)
class Health:
    """The three answers about one worker process."""

    pid: int
    checks: list[Watched]
    claims: bool = False
    """Whether the worker says that it does."""
    unable: list[dict[str, Any]] = field(default_factory=list)
    """Tasks that the worker could not load, with ``task`` and ``reason``."""
    hung: Callable[[], str] = lambda: ""
    """Why the worker is thought to hang, or an empty text."""
    drains: bool = False
    """Whether the worker knows :data:`UNFIT_SIGNAL`; an older one would die of it."""
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("perdure.guardian"))
    _pidfd: int | None = None
    _carried: str = ""
    _signalled: bool = False

    def start(self, interval: float) -> None:
        """Start all checks. They end with this process."""
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            pass  # not Linux, or it is gone, which is found out without it
        for check in self.checks:
            check.start(interval)

    # --- the three answers ---------------------------------------------------------------------------

    def live(self) -> str:
        """Why the worker is not alive; an empty text if it is."""
        if self._gone():
            return "the worker process is gone"
        why = self.hung()
        return f"the worker hangs: {why}" if why else ""

    @property
    def unfit(self) -> str:
        """Why the worker is in quarantine; an empty text if it is not."""
        return next((check.condemned for check in self.checks if check.condemned), "")

    def report(self) -> dict[str, Any]:
        """Readiness: ``{"healthy", "checks": {name: {"state", "reason", "at"}}, "timestamp"}``; times since 1970."""
        now = time.time()
        shown = {"worker": self._worker(now), **{check.name: check.shown() for check in self.checks}}
        return {
            "healthy": all(item.state is not CheckState.FAIL for item in shown.values()),
            "checks": {name: item.as_dict() for name, item in shown.items()},
            "timestamp": round(now, 3),
        }

    def _worker(self, now: float) -> Shown:
        dead = self.live()
        if dead or self._signalled:
            return Shown(CheckState.FAIL, dead or "it leaves because of its device", now)
        if not self.claims:
            return Shown(CheckState.FAIL, "it claims nothing: it still loads, or is leaving", now)
        if self.unable:
            said = "; ".join(f"{row['task']}: {row['reason']}" for row in self.unable)
            return Shown(CheckState.DEGRADED, f"it claims, but leaves to others what it could not load: {said}", now)
        return Shown(CheckState.OK, "it claims", now)

    def _gone(self) -> bool:
        if self._pidfd is not None:
            return bool(select.select([self._pidfd], [], [], 0)[0])
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it is somebody
        return False

    # --- quarantine ----------------------------------------------------------------------------------

    def beat(self) -> str:
        """What the next heartbeat is to say of the quarantine: its reason, or an empty text."""
        self._carried = self.unfit
        return self._carried

    def act(self) -> None:
        """After a heartbeat: a worker whose quarantine it told of is asked to drain, once.

        In this order, or the worker would be gone before anybody could read why.
        """
        if not self._carried or self._signalled:
            return
        self._signalled = True
        self.log.error("quarantine: %s; the worker (pid %d) drains", self._carried, self.pid)
        number = UNFIT_SIGNAL if self.drains else signal.SIGTERM
        try:
            if self._pidfd is not None and hasattr(signal, "pidfd_send_signal"):
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it left by itself


def worst(readings: Iterable[Reading]) -> Reading:
    """The most severe of several known readings; of equals the first."""
    return max(readings, key=lambda reading: _SEVERITY[reading.state])
