"""Stop signals, seen at once and without interrupting anything."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

from .health import UNFIT_SIGNAL


class SignalWatcher:
    """Sees SIGTERM, SIGINT and the guardian's word of an unfit device in a thread of its own, and calls ``seen`` there with the signal's number.

    Python runs a signal's handler in the main thread, and only between two bytecodes: a step in native
    code would keep SIGTERM waiting for as long as it lasts. The byte that the interpreter's C handler
    writes to the wake-up descriptor comes at once.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, UNFIT_SIGNAL)

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._seen = seen
        self._read, self._write = socket.socketpair()
        self._installed = False

    def install(self) -> None:
        """Take over the stop signals. Main thread only."""
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in self.NUMBERS:
            signal.signal(number, lambda *_: None)
        self._installed = True
        os.register_at_fork(after_in_child=self._forked)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def remove(self) -> None:
        """Stop looking; what comes now is ignored, since the process is leaving. Main thread only."""
        self._installed = False
        signal.set_wakeup_fd(-1)
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        self._write.close()

    def _forked(self) -> None:
        # A child that a task forks shares the socket: a signal to the child would stop the worker, and not the child.
        if self._installed:
            signal.set_wakeup_fd(-1)
            for number in self.NUMBERS:
                signal.signal(number, signal.SIG_DFL)

    def _watch(self) -> None:
        while data := self._read.recv(16):
            for number in data:
                if number in self.NUMBERS:
                    self._seen(number)
