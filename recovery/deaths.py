"""What kind of failure the end of a worker's process is.

It is judged by who stood still in it, by what faulthandler wrote, by its exit status or signal, by what the kernel
counted and by what NVML says of its device. Whoever has a part of this evidence judges by that part: the guardian knows
no exit status, a supervisor no stacks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..protocol.codec import shortened
from ..protocol.records import FailureKind
from .failures import MAX_TRACEBACK

_EXITS: Final[Mapping[int, FailureKind]] = MappingProxyType(
    {70: FailureKind.GPU_ERROR, 71: FailureKind.GPU_OOM, 73: FailureKind.HANG}
)
"""Exit statuses by which a worker says why it leaves (named in ``workers/pool/statuses.py``)."""

_FATAL_SIGNALS = frozenset(
    {
        signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
    }
)  # fmt: skip

FATAL: Final = "Fatal Python error: "
TIMEOUT: Final = "Timeout ("
"""What faulthandler writes first: for a native signal, and when the worker's own watchdog ends it."""

NO_ACTION: Final = frozenset({"", "NONE", "UNKNOWN"})
"""Recovery actions of NVML (field 230) that accuse no device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """What is known of the end of a worker's process; all of it may be unknown. Its kind and its reason follow."""

    status: int | None = None
    """Exit status, or a signal's number negated, as ``subprocess`` and ``os.waitstatus_to_exitcode`` give it."""
    hung: str = ""
    """Why whoever ended it took it for hung."""
    dump: str = ""
    """What faulthandler wrote, perhaps after the beginning of something else."""
    oom_kills: int = 0
    """How many processes of its cgroup the kernel killed for lack of memory when it ended."""
    action: str = ""
    """The recovery action that NVML gives for its device."""
    stopped: bool = False
    """It and its guardian had just been stopped together, and went on: no clock says anything."""

    @property
    def kind(self) -> FailureKind:
        """The kind of failure; ``WORKER_LOST`` if nothing says why."""
        found = self._kind()
        # A device that wants a reset explains how its process ended: by an error, by a signal or not at all.
        return device_kind(self.action) or found if found in _OF_A_DEVICE else found

    @property
    def reason(self) -> str:
        """What happened, as the end of a sentence that begins with the worker's name."""
        kind, name = self._kind(), self._fatal()[0]
        fault = f"; its device wants {self.action}" if self.kind is not kind else ""
        if self.hung:
            return f"hung: {self.hung}{fault}"
        if name:
            return f"crashed: {name}{fault}"
        if kind is FailureKind.HANG:
            return f"hung, and ended itself{fault}"
        if kind is FailureKind.HOST_OOM:
            return "was killed by the kernel: there was no memory left in its cgroup"
        if self.status is None or self.status == 0:
            return f"is gone{fault}"
        number = self._signal()
        if not number:
            return f"exited with status {self.status}{fault}"
        known = number in {item.value for item in signal.Signals}
        return f"was ended by {signal.Signals(number).name if known else f'signal {number}'}{fault}"

    @property
    def stacks(self) -> str:
        """The stacks of its threads, at most :data:`MAX_TRACEBACK` characters; empty if it left none."""
        return shortened(self._fatal()[1].strip(), MAX_TRACEBACK)

    def _kind(self) -> FailureKind:
        name, stacks = self._fatal()
        if self.hung:
            return FailureKind.HANG
        if name:
            return FailureKind.CRASH
        if stacks:  # its own watchdog
            return FailureKind.WORKER_LOST if self.stopped else FailureKind.HANG
        number = self._signal()
        if self.oom_kills and (self.status is None or number == signal.SIGKILL):
            return FailureKind.HOST_OOM
        if number in _FATAL_SIGNALS:
            return FailureKind.CRASH
        return _EXITS.get(self.status or 0, FailureKind.WORKER_LOST)

    def _fatal(self) -> tuple[str, str]:
        """Name of the native signal and stacks, as faulthandler wrote them; no name for a timeout."""
        _, found, dump = self.dump.partition(FATAL)
        if found:
            name, _, stacks = dump.partition("\n")
            return name.strip() or "unknown", stacks
        _, found, dump = self.dump.partition(TIMEOUT)
        return "", dump.partition("\n")[2] if found else ""

    def _signal(self) -> int:
        """The signal that ended it, or 0; a shell in between adds 128."""
        if self.status is None:
            return 0
        return -self.status if self.status < 0 else self.status - 128 if 128 < self.status < 128 + 65 else 0


def exit_status(pid: int) -> int | None:
    """With what a process ended that its parent has not waited for yet, as :attr:`Death.status`; else ``None``.

    Linux only. It takes a parent that is not quicker than this: the status of one that is gone is nobody's to read.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] not in (b"Z", b"X"):
            return None
        return os.waitstatus_to_exitcode(int(fields[49]))
    except (OSError, IndexError, ValueError):
        return None


_OF_A_DEVICE = frozenset(
    {FailureKind.WORKER_LOST, FailureKind.CRASH, FailureKind.HANG, FailureKind.GPU_OOM, FailureKind.GPU_ERROR}
)


def device_kind(action: str) -> FailureKind | None:
    """What NVML's recovery action for a device says of a failure on it: ``GPU_ERROR``, or nothing.

    By its name: ``NONE``, ``GPU_RESET``, ``NODE_REBOOT``, ``DRAIN_P2P``, ``DRAIN_AND_RESET``; ``UNKNOWN`` says nothing.
    """
    return None if action in NO_ACTION else FailureKind.GPU_ERROR
