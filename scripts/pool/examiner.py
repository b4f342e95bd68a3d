"""Asks the driver about devices, in a thread: a broken driver may not answer, and the supervisor must go on."""

from __future__ import annotations

import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from ...workers.pool.gpus import DeviceQueries, is_orphan, open_devices

log = logging.getLogger("perdure.pool")


@dataclass(slots=True)
class Examiner:
    """``answer`` gets a place, the recovery action (empty without NVML), and whether an old process is on its device.

    It is called in this object's thread, once for each question, if the driver answers at all.
    """

    answer: Callable[[str, str, bool], None]
    _questions: queue.SimpleQueue[tuple[str, int] | None] = field(default_factory=queue.SimpleQueue)
    _dead: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Processes of the pool that have ended, by device, until the driver has given back what they had."""
    _thread: threading.Thread | None = None

    def ended(self, device: int, pid: int) -> None:
        """A process on a device has ended: a successor waits until the driver says so too."""
        self._dead[device].add(pid)

    def ask(self, place: str, device: int) -> None:
        """Look at a device, for the next start in a place."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="examiner", daemon=True)
            self._thread.start()
        self._questions.put((place, device))

    def stop(self) -> None:
        """Ask nothing more; does not wait for a driver that does not answer."""
        self._questions.put(None)

    def _run(self) -> None:
        devices: DeviceQueries | None = None
        while (question := self._questions.get()) is not None:
            place, device = question
            action, occupied = "", False
            try:
                devices = devices or open_devices()  # after a driver was loaded again, too
                if devices is not None:
                    action = str(devices.action(device))
                    there = devices.processes(device)
                    left = self._dead[device] & set(there)
                    occupied = bool(left) or any(is_orphan(pid) for pid in there)
                    self._dead[device] -= self._dead[device] - left
            except Exception:
                log.exception("cannot ask the driver about GPU %d", device)
            self.answer(place, action, occupied)
