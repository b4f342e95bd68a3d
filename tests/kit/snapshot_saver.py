"""Processes that save snapshots, for tests/recovery/test_snapshots.py: they are killed, and save beside each other.

``python tests/kit/snapshot_saver.py FOLDER`` forks a saver for each line that it reads, ``SAVES [POINT]``, and answers
with its process id. A saver appends to FOLDER/saved the number of each save that has returned. With a POINT it kills
itself at its so-manieth call into the operating system.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perdure.recovery import Snapshots

CALLS = [(os, name) for name in ("open", "write", "pwrite", "fsync", "replace", "unlink")] + [(fcntl, "flock")]


def value_of(number: int) -> dict[str, Any]:
    """What is saved under a number: large enough for more than one write."""
    return {"number": number, "bytes": number.to_bytes(4, "big") * 20_000}


def kill_at(point: int) -> None:
    """From now on each call counts; that of this number is the last one, and a write only half done."""
    left = itertools.count(point, -1)

    def deadly(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(left) == 0:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for module, name in CALLS:
        setattr(module, name, deadly(name, getattr(module, name)))


def save(folder: Path, times: int, point: int | None) -> None:
    log = os.open(folder / "saved", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    write = os.write
    snapshots = Snapshots(folder, "state")
    numbers = itertools.count(max(snapshots.list(), default=0) + 1)
    if point is not None:
        kill_at(point)
    for _ in range(times):
        number = snapshots.save(value_of(next(numbers)))
        write(log, b"%d\n" % number)


def main() -> None:
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        times, *point = map(int, line.split())
        child = os.fork()
        if not child:
            try:
                save(folder, times, point[0] if point else None)
            finally:
                os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
