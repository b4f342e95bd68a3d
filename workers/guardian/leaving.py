"""The end of a worker's process, whatever its tasks have left behind: bounded in time, with the right status.

The interpreter waits at its end for every thread that is no daemon, for the children of multiprocessing, for what
stands in ``atexit``, and for whoever should read its output. A task may leave any of these. Until :data:`PATIENCE`
seconds after its end has begun a worker waits for them too; then its process ends without. What the tasks have started
ends with it.

Somebody may call ``Worker.work()`` in a program of his own, which has threads, children and hooks too: only what
appeared meanwhile is a reason to hurry.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ...protocol.telemetry.log_writer import FLUSH, flush
from .kin import MARK, Kin, below

PATIENCE: Final = 5.0
"""Seconds from the beginning of the end of the interpreter."""

BACKSTOP: Final = 2.0
"""Seconds later the process ends in any case, also where a hook holds the interpreter's lock; its status is then 1."""


@dataclass(slots=True, eq=False)
class Leaving:
    """Begins when a worker begins to work."""

    page: int = -1
    """Descriptor of the memory that is shared with the guardian."""
    kin: Kin = field(init=False)
    _threads: set[threading.Thread] = field(default_factory=lambda: set(threading.enumerate()))
    _hooks: int = 0
    _before: frozenset[int] = field(default_factory=lambda: frozenset(below(os.getpid())))
    """Processes that this one has started for itself."""
    _status: int | None = None
    """With what the process is to exit; ``None`` while the worker works."""
    _hurries: bool = False
    """Something was left that may keep the process."""
    _nowhere: int = -1
    _pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self.kin = Kin(uuid.uuid4().hex, self.page)
        os.environ[MARK] = self.kin.token
        # It runs after all that tasks will register.
        atexit.register(self._last)
        try:
            # The only thing that runs before the interpreter waits for threads.
            threading._register_atexit(self._begin)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):
            pass  # without it, atexit's comes after the threads
        self._hooks = _hooks()

    def ready(self, status: int) -> None:
        """The worker has done its work. If anything of its tasks is left, the rest is bounded from now on."""
        os.environ.pop(MARK, None)
        self.kin.spot(os.getpid(), self._before)
        left = [
            thread
            for thread in threading.enumerate()
            if thread not in self._threads and not thread.daemon and thread is not threading.current_thread()
        ]
        self._status = status
        self._hurries = bool(left or self.kin.seen or _hooks() != self._hooks or _hooks() < 0)

    def end_kin(self) -> None:
        """End what the tasks have started and left; the process leaves."""
        self.kin.end()

    def _begin(self) -> None:
        if not self._hurries or os.getpid() != self._pid:
            return
        threading.Thread(target=self._bound, name="leaving", daemon=True).start()
        # A thread of C: it needs no lock of the interpreter.
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(PATIENCE + BACKSTOP, exit=True, file=self._nowhere)

    def _bound(self) -> None:
        time.sleep(PATIENCE)
        self._leave()

    def _last(self) -> None:
        if self._status is None or os.getpid() != self._pid:
            return
        self.end_kin()
        # The interpreter flushes both, and would wait for their readers where no thread runs any more.
        written = threading.Thread(target=_flush_output, daemon=True)
        written.start()
        written.join(FLUSH)
        if written.is_alive():
            self._leave()

    def _leave(self) -> None:
        try:
            self.end_kin()
            flush()
        finally:
            os._exit(self._status or 0)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed, or there is none


def _hooks() -> int:
    """How many functions ``atexit`` has; negative if this interpreter does not say."""
    count: Callable[[], int] = getattr(atexit, "_ncallbacks", lambda: -1)
    return count()
