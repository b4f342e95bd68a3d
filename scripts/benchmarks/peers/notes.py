"""Steps that leave a note on disk: which process has taken which step, and when, by the clock that all share.

A note is one line, appended in one write: a kill leaves whole lines. Nothing of it goes through Redis, so it is the
same for all systems.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any


def note(name: str, step: int, what: str = "step") -> None:
    """``name pid step nanoseconds what``; the clock is the machine's monotonic one."""
    line = f"{name} {os.getpid()} {step} {time.monotonic_ns()} {what}\n"
    file = os.open(os.environ["BENCH_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def steps(payload: dict[str, Any], begin: int = 0) -> Iterator[int]:
    """The steps from ``begin`` on, each of ``seconds`` and then noted.

    With ``hang`` in the payload, the first who comes to that step stays there, with the interpreter's lock held.
    """
    name, hang = payload["name"], payload.get("hang")
    for step in range(begin, payload["steps"]):
        time.sleep(payload["seconds"])
        if step == hang:
            _hang_once(name, step)
        note(name, step)
        yield step


def _hang_once(name: str, step: int) -> None:
    try:
        os.close(os.open(f"{os.environ['BENCH_NOTES']}.{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    note(name, step, "hang")
    # Through PyDLL, which keeps the lock: no thread of this process runs any more.
    ctypes.PyDLL(None).sleep(3600)
