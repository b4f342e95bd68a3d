"""Processes of a pool: how they are started, and who ends them if the pool cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...protocol.settings import PREFIX, Settings
from ...workers.pool import relay, undertaker
from ...workers.pool.notify import VARIABLES
from ...workers.pool.places import INCARNATION

LAST_WORDS = 2.0
"""Seconds that the end of a pool waits for what its children have printed to be shown."""

STARTER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def environment_for(url: str, settings: Settings) -> dict[str, str]:
    """The environment of this process with exactly these settings, for a process of the pool."""
    left_out = (*VARIABLES, INCARNATION)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(PREFIX) and name not in left_out
    }
    environment |= settings.replace(redis_url="").environment()
    return environment | {"RQ_REDIS_URL": url, "PYTHONUNBUFFERED": "1"}


def launch(
    command: Sequence[str], environment: dict[str, str], output: Path | tuple[int, int] | None
) -> subprocess.Popen[bytes]:
    """Start a process that leads a session of its own and gets SIGTERM when the calling thread ends.

    ``output`` takes what it prints: a file, or two descriptors, which are closed here; ``None``: the terminal.
    """
    if isinstance(output, Path):
        with output.open("ab") as file:
            output = os.dup(file.fileno()), os.dup(file.fileno())
    stdout, stderr = output or (None, None)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", STARTER, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            env=environment,
        )
    finally:
        for descriptor in output or ():
            os.close(descriptor)


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child has ended. Its number stays taken until somebody waits for it."""
    if hasattr(os, "waitid"):
        try:
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True
    return process.poll() is not None


def signal_group(pid: int, number: int) -> None:
    """To a child's group; a worker's guardian is in a session of its own, and sees to what the worker held."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass  # nobody is left in it
    except PermissionError:
        pass  # a member has become another user's


class OutputRelay:
    """Prints what children print, each line with the name of its place (:mod:`perdure.workers.pool.relay`)."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-S", str(relay.__file__)]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)

    def pipes(self, name: str) -> tuple[int, int] | None:
        """Where a child of this name is to print: output and errors; ``None``, the terminal, if the relay is gone."""
        pairs = [os.pipe(), os.pipe()]
        writing = pairs[0][1], pairs[1][1]
        try:
            socket.send_fds(self._socket, [name.encode()], [reading for reading, _ in pairs])
        except OSError:
            for descriptor in writing:
                os.close(descriptor)
            return None
        finally:
            for reading, _ in pairs:
                os.close(reading)
        return writing

    def close(self) -> None:
        """No more children come. Waits until all that was printed is shown, if those who print have ended."""
        self._socket.close()
        try:
            self._process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            pass  # something that a task has left behind can still print


@dataclass(slots=True)
class Undertaker:
    """Keeps one undertaker beside the pool, and tells it of every child."""

    grace: float
    """Seconds that it lets children drain, should the pool be killed."""
    _process: subprocess.Popen[bytes] | None = None

    def tend(self, pids: Iterable[int]) -> None:
        """Start one if there is none, and tell it who lives. Cheap: for every turn."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(undertaker.__file__), str(self.grace)],
            stdin=subprocess.PIPE,
            bufsize=0,  # what could not be written is not tried again when the pipe is closed
            start_new_session=True,
        )
        for pid in pids:
            self.born(pid)

    def born(self, pid: int) -> None:
        """A child was started."""
        self._report(f"+{pid}")

    def buried(self, pid: int) -> None:
        """A child has ended; its number may soon be another's."""
        self._report(f"-{pid}")

    def dismiss(self) -> None:
        """The pool ends by itself: nothing is left to be ended."""
        self._report("bye")
        self.abandon()
        if self._process is not None:
            self._process.wait()

    def abandon(self) -> None:
        """The pool can look after its children no more: as if it had been killed."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _report(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except OSError:
            pass  # it is gone; tend() starts another, and tells it of all
