"""Forked children of a task: they end as soon as control would come back from the task's code.

A task may fork (``os.fork``, a library that does). Its child has a copy of the worker's main thread, or of the thread
that forked, and of none of the others. If it leaves the task's code by ``sys.exit``, a return or an exception, it
would go on as a second engine loop: tick the counters that the guardian reads, so that a hang of its parent stays
unseen, and talk over its parent's connections.

1. :func:`at_home` says which process the worker is; before that, and in other programs, nothing here acts.
2. :class:`Foreign` stands around every call of a task's code: where it ends in a child, the child ends, with the status
   that a program of its own would have.
3. :func:`in_child` names what a child must not share with its parent.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Final, NoReturn

FLUSH: Final = 1.0
"""Seconds that a child may take to write what it has printed: nobody may read it."""

_home = 0
_heirs: list[weakref.WeakMethod[Callable[[], None]]] = []
_hooked = False


def at_home(yes: bool) -> None:
    """Whether this process is a worker, from now on."""
    global _home
    _home = os.getpid() if yes else 0


def in_child(method: Callable[[], None]) -> None:
    """Have a bound method called in each child right after its fork, as long as its object lives here."""
    global _hooked
    _heirs.append(weakref.WeakMethod(method))
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_part)


def end_if_forked(error: BaseException | None = None) -> None:
    """End this process if it is a child that a task has forked; ``error`` is what the task's code ended with in it."""
    if _home and os.getpid() != _home:
        _leave(error)


class Foreign:
    """Code of a task's: ``with Foreign(): task.step()``. A child that comes out of it has ended."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if _home and os.getpid() != _home:
            _leave(error)


foreign: Final = Foreign()
"""One is enough: it keeps nothing."""


def _part() -> None:
    for reference in _heirs:
        if (method := reference()) is not None:
            method()


def _leave(error: BaseException | None) -> NoReturn:
    """As the end of a program, but for ``atexit``: what is registered there is the worker's."""
    status = 0
    try:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if error.code is not None and not isinstance(error.code, int):
                sys.stderr.write(f"{error.code}\n")
        elif error is not None and not isinstance(error, GeneratorExit | StopIteration | StopAsyncIteration):
            status = 1
            traceback.print_exception(error)
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(FLUSH)
    finally:
        os._exit(status & 0xFF)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed, or there is none
