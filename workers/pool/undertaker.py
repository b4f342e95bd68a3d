"""The undertaker: ends what a killed supervisor leaves behind.

The kernel sends SIGTERM to the children of a process that dies (on Linux), which makes a worker drain. One that hangs
in native code, or was stopped, does not hear it. So every supervisor starts one of these: a small process that is
told of each child through a pipe. When the pipe ends without a good-bye, it sends SIGTERM, waits as long as a drain
may take, and then kills what is left, group by group.

Run as a file by ``python -I -S``: the standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def main(grace: float) -> int:
    """Read ``+PID`` and ``-PID`` lines from standard input until its end; ``grace`` in seconds. Returns 0."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the supervisor's end is what it waits for
    children: dict[int, int] = {}
    rest = b""
    while data := os.read(0, 65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line == b"bye":
                return 0
            pid = int(line[1:])
            if line.startswith(b"+"):
                children[pid] = _handle(pid)
            elif (handle := children.pop(pid, -1)) >= 0:
                os.close(handle)
    _end(children, time.monotonic() + grace)
    return 0


def _handle(pid: int) -> int:
    """What a process is known by when its number may be another's; -1 if it has ended, or the system has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def _end(children: dict[int, int], deadline: float) -> None:
    for pid in children:
        _signal(pid, signal.SIGTERM)
    while children and (left := deadline - time.monotonic()) > 0:
        handles = [handle for handle in children.values() if handle >= 0]
        ended, _, _ = select.select(handles, [], [], min(left, 0.2))
        for pid, handle in list(children.items()):
            # Its group goes with it: what a worker started, it cannot end any more.
            if handle in ended or (handle < 0 and not _lives(pid)):
                _kill_group(pid)
                del children[pid]
    for pid in children:
        _kill_group(pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass  # it has ended


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass  # nobody is left in it


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
