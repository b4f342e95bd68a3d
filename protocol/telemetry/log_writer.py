"""Log lines that never keep their writer waiting: a thread of its own writes them.

Whoever reads the standard output or error of a process may stop to (a full disk behind a pipe, a stopped terminal, a
supervisor that hangs). A line that is written then waits, and whatever waits for its lock: the courier, the thread that
hears of SIGTERM, the end of the process. Here lines wait in a bounded queue instead; what does not fit is dropped and
counted.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

ROOM: Final = 1 << 20
"""Characters that wait at most."""

FLUSH: Final = 1.0
"""Seconds that the end of a process waits for its last lines to be written."""

_writers: weakref.WeakSet[Unblocked] = weakref.WeakSet()
_hooked = False


class Unblocked(logging.Handler):
    """Stands for a handler of a stream: formats where a record is logged, and writes in a thread."""

    def __init__(self, inner: logging.StreamHandler[Any]) -> None:
        global _hooked
        super().__init__(inner.level)
        self.inner = inner
        self.formatter = inner.formatter
        self.filters = inner.filters
        self.stream = inner.stream
        self._begin()
        try:
            # Now, and not with the first line: when no memory is left, whoever starts a thread waits for it for ever.
            # It takes no signal: those of a process go to any thread that does not block them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                threading.Thread(target=self._run, name="log", daemon=True).start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._started = True
        except RuntimeError:  # the interpreter ends: no thread is started any more
            self._child = True
        _writers.add(self)
        if not _hooked:
            _hooked = True
            os.register_at_fork(after_in_child=_part)
            atexit.register(_end)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._size = self._dropped = 0
        self._writing = self._started = self._child = False

    def emit(self, record: logging.LogRecord) -> None:
        """Put one line into the queue."""
        try:
            line = self.inner.format(record) + self.inner.terminator
        except Exception:  # as a handler does
            self.handleError(record)
            return
        if self._child:
            _write_directly(self.stream, line)
            return
        with self._changed:
            if self._size + len(line) > ROOM and self._lines:
                self._dropped += 1
                return
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        self.wait(FLUSH)

    def wait(self, timeout: float) -> bool:
        """Wait until all is written; False if that has not come after so many seconds."""
        if self._child or not self._started:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not (self._lines or self._writing), timeout)

    def _run(self) -> None:
        changed = self._changed
        while True:
            with changed:
                changed.wait_for(lambda: self._lines)
                text, self._lines, self._size = "".join(self._lines), [], 0
                dropped, self._dropped = self._dropped, 0
                self._writing = True
            try:
                if dropped:
                    text += f"({dropped} log lines were dropped here: nobody read this output in time)\n"
                self.stream.write(text)
                self.stream.flush()
            except (OSError, ValueError):
                pass  # closed, or nobody will ever read it
            finally:
                with changed:
                    self._writing = False
                    changed.notify_all()


def unblock() -> Callable[[], None]:
    """Have all handlers of standard output and error write in threads; returns what makes them as they were."""
    streams = [sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]
    changed: list[tuple[logging.Logger, logging.Handler, Unblocked]] = []
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        if not isinstance(logger, logging.Logger):
            continue
        for place, handler in enumerate(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and any(handler.stream is stream for stream in streams):
                instead = Unblocked(handler)
                logger.handlers[place] = instead
                changed.append((logger, handler, instead))

    def restore() -> None:
        for logger, handler, instead in changed:
            instead.wait(FLUSH)
            if instead in logger.handlers:
                logger.handlers[logger.handlers.index(instead)] = handler

    return restore


def flush(timeout: float = FLUSH) -> bool:
    """Wait until the last lines are written; False if they have not been after so many seconds, all together."""
    deadline = time.monotonic() + timeout
    return all(writer.wait(max(0.0, deadline - time.monotonic())) for writer in list(_writers))


def _end() -> None:
    # The end of the interpreter would wait for the same output, or abort for a lock that a thread holds.
    if not flush():
        os._exit(1)


def _part() -> None:
    """In a forked child, which has no such threads: what it logs, it writes itself."""
    for writer in _writers:
        writer._begin()
        writer._child = True


def _write_directly(stream: Any, line: str) -> None:
    try:
        os.write(stream.fileno(), line.encode(errors="backslashreplace"))
    except (OSError, ValueError, AttributeError):
        pass  # closed, or no file
