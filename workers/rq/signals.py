"""Stop signals, seen at once and without interrupting anything, whatever a task does to signals."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from ..health.state import UNFIT_SIGNAL

LOOK: Final = 0.5
"""Seconds after which the handlers are set again in any case: native code may have replaced them unseen."""

ECHO: Final = 0.1
"""Seconds in which both paths have reported a signal, if they do and none waits for the main thread."""

_RAN: Final = 0x80
"""Set in what the interpreter's handler writes, beside the signal's number; the wake-up byte is the number alone."""

_plain_signal = signal.signal


class SignalWatcher:
    """Sees SIGTERM, SIGINT and the guardian's word of an unfit device in a thread of its own.

    There it calls ``seen`` with the signal's number.

    1. Python runs a signal's handler in the main thread, and only between two bytecodes: a step in native code would
       keep SIGTERM waiting for as long as it lasts. The byte that the interpreter's C handler writes to the wake-up
       descriptor comes at once.
    2. An event loop takes that descriptor (``add_signal_handler``, ``set_wakeup_fd``). So the handler itself writes as
       well, and whichever byte comes first counts.
    3. A task may set other handlers, or ``SIG_IGN``. Until the end of its step they are called as well, and never
       instead (:meth:`_set`); between two steps :meth:`renew` makes everything as it was.

    Nothing is blocked: children would inherit it.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, UNFIT_SIGNAL)

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._seen = seen
        self._read, self._write = socket.socketpair()
        self._installed = False
        self._handler = self._ran  # one object, by which it is known again
        self._theirs: dict[int, Any] = {}
        """What the running step wants to be called."""
        self._unexplained = dict.fromkeys(map(int, self.NUMBERS), 0)
        """How many wake-up bytes have come whose handler has not run yet."""
        self._ran_at: dict[int, float] = {}
        """When a handler ran whose wake-up byte had not come."""
        self._renewed = 0.0

    def install(self) -> None:
        """Take over the stop signals. Main thread only."""
        self._installed = True
        signal.signal = self._set  # type: ignore[assignment]
        self.renew()
        os.register_at_fork(after_in_child=self._forked)
        self._start()

    def renew(self) -> None:
        """Make everything as it was before a task's code ran. Main thread only, often: it takes some microseconds."""
        if not self._installed:
            return
        self._theirs.clear()
        now = time.monotonic()
        due = now - self._renewed > LOOK
        for number in self.NUMBERS:
            if due or signal.getsignal(number) is not self._handler:
                _plain_signal(number, self._handler)
        try:
            signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        except (OSError, ValueError):
            # The task has closed descriptors that it did not open.
            self._read, self._write = socket.socketpair()
            self._start()
            signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        if due:
            self._renewed = now

    def remove(self) -> None:
        """Stop looking; what comes now is ignored, since the process is leaving. Main thread only."""
        self._installed = False
        signal.signal = _plain_signal
        signal.set_wakeup_fd(-1)
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        self._write.close()

    def _start(self) -> None:
        self._write.setblocking(False)
        threading.Thread(target=self._watch, args=(self._read,), name="signals", daemon=True).start()

    def _set(self, number: int, handler: Any) -> Any:
        """``signal.signal`` while a worker works: ours stay, and a step's own are called beside them."""
        if (
            not self._installed
            or number not in self.NUMBERS
            or threading.current_thread() is not threading.main_thread()
        ):
            return _plain_signal(number, handler)
        if not callable(handler) and handler not in (signal.SIG_IGN, signal.SIG_DFL):
            return _plain_signal(number, handler)  # which raises
        before = self._theirs.get(number, signal.SIG_DFL)
        self._theirs[number] = handler
        _plain_signal(number, self._handler)
        return before

    def _ran(self, number: int, frame: FrameType | None) -> None:
        """The interpreter's handler, in the main thread."""
        try:
            self._write.send(bytes([number | _RAN]))
        except BlockingIOError:
            pass  # so many are there that one more says nothing
        except OSError:
            threading.Thread(target=self._seen, args=(number,), name="signal", daemon=True).start()
        theirs = self._theirs.get(number)
        if callable(theirs) and theirs is not signal.default_int_handler:
            theirs(number, frame)

    def _forked(self) -> None:
        # A child that a task forks shares the socket: a signal to the child would stop the worker, and not the child.
        if self._installed:
            self._installed = False
            signal.signal = _plain_signal
            signal.set_wakeup_fd(-1)
            for number in self.NUMBERS:
                signal.signal(number, signal.SIG_DFL)

    def _watch(self, read: socket.socket) -> None:
        try:
            while data := read.recv(16):
                for byte in data:
                    self._heard(byte)
        except OSError:
            pass  # closed by the task; another one is made between two steps

    def _heard(self, byte: int) -> None:
        """One byte of either path. The wake-up byte of a signal comes before its handler's, if it comes here at all.

        But where another thread than the main one gets the signal, its handler may be a moment quicker.
        """
        number, now = byte & ~_RAN, time.monotonic()
        if number not in self._unexplained:
            return
        if not byte & _RAN:
            if now - self._ran_at.get(number, -ECHO) < ECHO:
                return
            self._unexplained[number] += 1
            self._seen(number)
        elif self._unexplained[number]:
            self._unexplained[number] = 0  # one call of the handler may stand for several signals
        else:
            self._ran_at[number] = now
            self._seen(number)
