"""The watch over one device: a small process that asks the driver, and the thread that hears it.

In a process of its own because a call into a broken driver may hang where no signal reaches it, or crash: then this
process does, and not the guardian. It looks once per interval, and at once when the driver reports an Xid error or
another recovery action; it writes one line of JSON for each look, and ends when its standard input does.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from .nvml import Counts, Devices, RecoveryAction, located
from .state import CheckState, Reading, Shown, Standing

MODULE: Final = "perdure.workers.health.device_watch"

PATIENCE: Final = 10.0
"""Seconds that a look may take beyond the interval before the driver counts as silent."""

RECENT: Final = 600.0
"""Seconds for which an Xid error is told."""

AGAIN: Final = 60.0
"""Seconds until a watch that ended by itself is started again."""

_NODES: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Device files of the driver; the second one under Windows."""


def wanted(device: str) -> bool:
    """Whether a worker with this ``PERDURE_DEVICE`` may compute on a GPU: with ``auto``, if the host has one."""
    return device.startswith("cuda") or (device == "auto" and any(node.exists() for node in _NODES))


@dataclass(frozen=True, slots=True)
class Look:
    """What the driver said at one time."""

    identity: str
    action: RecoveryAction
    counts: Counts
    xid: int | None = None
    """Number of the Xid error that made it look now."""

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Self:
        """From what the process wrote. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        return cls(line["identity"], RecoveryAction(line["action"]), Counts(**line["counts"]), line["xid"])


class Judge:
    """What follows from the looks at one device.

    The recovery action decides, as it is the driver's own verdict. Xid errors and counts only explain it: many an Xid
    is a mistake of the program that ran.
    """

    def __init__(self) -> None:
        self._first: Counts | None = None
        self._xid: tuple[int, float] | None = None

    def hear(self, look: Look, now: float) -> Reading:
        """Judge one look; ``now`` in seconds of any clock that does not jump."""
        first = self._first = self._first or look.counts
        if look.xid is not None:
            self._xid = (look.xid, now)
        if self._xid is not None and now - self._xid[1] > RECENT:
            self._xid = None
        after = f"; the last error was Xid {self._xid[0]}, {now - self._xid[1]:.0f} s ago" if self._xid else ""
        who = look.identity or "the device"
        if look.action.unfit:
            return Reading(CheckState.FAIL, f"{who}: the driver asks for {look.action}{after}", certain=True)
        if look.counts.failed:
            text = f"{who}: a row of its memory could not be replaced; exchange the device{after}"
            return Reading(CheckState.FAIL, text, certain=True)
        found = [
            "the driver does not say whether it needs a repair" if look.action is RecoveryAction.UNKNOWN else "",
            f"the driver asks for {look.action}"
            if look.action not in (RecoveryAction.NONE, RecoveryAction.UNKNOWN)
            else "",
            "a row of its memory is replaced at the next reset" if look.counts.pending else "",
            _more("uncorrected memory error(s)", first.uncorrected, look.counts.uncorrected),
            _more("row(s) of memory replaced", first.remapped, look.counts.remapped),
            f"Xid {self._xid[0]}, {now - self._xid[1]:.0f} s ago" if self._xid else "",
        ]
        told = "; ".join(part for part in found if part)
        # A driver without a verdict is no news, and cannot take back one that it gave.
        state = CheckState.DEGRADED if any(found[1:]) else CheckState.OK
        return Reading(
            state, f"{who}: {told or 'nothing to repair'}", certain=look.action is not RecoveryAction.UNKNOWN
        )


def _more(what: str, before: int | None, after: int | None) -> str:
    if before is None or after is None or after <= before:
        return ""
    return f"{after - before} {what} since this worker began"


class DeviceWatch:
    """The guardian's end: starts the process, hears it, and says how the device stands."""

    name = "gpu"

    def __init__(self, device: str, log: logging.Logger) -> None:
        self._device = device
        self._log = log
        self._judge = Judge()
        self._standing = Standing()
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self._interval = 0.0
        self.identity = ""
        """Name and UUID of the device, once known."""

    @property
    def condemned(self) -> str:
        with self._lock:
            return self._standing.condemned

    def start(self, interval: float) -> None:
        """Watch for as long as this process lives."""
        self._interval = interval
        self._heard = time.monotonic()
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def shown(self) -> Shown:
        with self._lock:
            late = time.monotonic() - self._heard - self._interval
            return self._standing.shown(f"the driver has not answered for {late:.0f} s" if late > PATIENCE else "")

    def _run(self) -> None:
        while True:
            process = self._started()
            if process is not None:
                with process:  # its end, and that of its pipes: another one is never started beside it
                    assert process.stdout is not None
                    for line in process.stdout:
                        self._hear(line)
                status = process.returncode
                if status == 0:
                    return  # there is nothing to watch, and it has said why
                self._tell(f"the watch over the driver ended with status {status}; another one is started")
            time.sleep(AGAIN)

    def _started(self) -> subprocess.Popen[bytes] | None:
        command = [sys.executable, "-P", "-m", MODULE, self._device, repr(self._interval)]
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            self._tell(f"the watch over the driver cannot be started: {error}")
            return None

    def _hear(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if "unknown" in message:
                self._tell(str(message["unknown"]))
                return
            look = Look.read(message)
        except (ValueError, TypeError, KeyError):
            return  # a library of the driver writes on its standard output
        with self._lock:
            self._heard = time.monotonic()
            self.identity = look.identity
            self._standing.hear(self._judge.hear(look, self._heard), time.time())

    def _tell(self, reason: str) -> None:
        with self._lock:
            self._heard = time.monotonic()
            self._standing.hear(Reading(CheckState.UNKNOWN, reason), time.time())


# --- the process -----------------------------------------------------------------------------------------


def looks(devices: Devices, index: int, interval: float) -> Iterator[Look]:
    """Look, and again after each interval or event; ends when standard input does."""
    identity = devices.identity(index)
    xid = None
    while True:
        yield Look(identity, devices.action(index), devices.counts(index), xid)
        identity = identity or devices.identity(index)
        deadline = time.monotonic() + interval
        xid = None
        while xid is None and (left := deadline - time.monotonic()) > 0:
            # In short turns: the end of the guardian must be seen, and the driver waits for events only.
            turn = min(left, 1.0)
            try:
                event = devices.wait((index,), turn)
            except NotImplementedError:
                event = None
                time.sleep(turn)
            if select.select([0], [], [], 0)[0]:
                return
            if event is not None:
                xid = event.xid
                break


def main(arguments: list[str]) -> int:
    """``DEVICE INTERVAL``: write a line for each look at this device. Returns 0 also where there is none to look at."""
    device, interval = arguments[0], float(arguments[1])
    devices = Devices.open()
    if devices is None:
        there = _installed()
        why = "its driver does not answer" if there else 'nvidia-ml-py is not installed: pip install "perdure[nvml]"'
        _write({"unknown": f"{device}: {why}"})
        return 0
    index = located(devices, device)
    if isinstance(index, str):
        _write({"unknown": index})
        return 0
    for look in looks(devices, index, interval):
        _write(asdict(look))
    return 0


def _installed() -> bool:
    try:
        import pynvml  # noqa: F401
    except ImportError:
        return False
    return True


def _write(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
