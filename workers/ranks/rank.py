"""A follower: one rank of a group besides the leader, which is the worker itself.

``python -m perdure.workers.ranks.rank FD`` is started by the leader (:mod:`.group`) and does what it is told over the
socket FD. It claims nothing and knows no Redis. It does not outlive the leader.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...protocol.codec import pack
from ...protocol.tasks import resolve
from ...protocol.telemetry import logs
from ..tasks.base import NOTHING, RAISED, BatchTask, Step
from ..tasks.collectives import CollectiveFailed, Collectives, reach
from ..tasks.forks import at_home, foreign
from .wire import Wire

log = logging.getLogger("perdure.rank")

_PR_SET_PDEATHSIG = 1


def digest(steps: Sequence[Step]) -> int:
    """What all ranks must agree about: which requests moved, with which outputs, results and kinds of error."""
    value = 0
    for step in steps:
        for part in (step.request_id, step.output, step.result, step.error):
            value = zlib.crc32(_packed(part), value)
    return value


def _packed(value: Any) -> bytes:
    if value is NOTHING or isinstance(value, BaseException):
        return type(value).__qualname__.encode()
    try:
        return pack(value, limit=sys.maxsize, what="output")
    except Exception:  # the leader's courier will refuse it, with the reason
        return type(value).__qualname__.encode()


@dataclass(slots=True)
class Rank:
    """Does what the leader orders, in its order, and says how it came out."""

    wire: Wire
    batch: BatchTask
    group: Collectives
    _admitted: set[str] = field(default_factory=set)

    def run(self, orders: queue.SimpleQueue[Any]) -> None:
        """Until the process is ended."""
        self._report(0, "loaded", self._load)
        while True:
            match orders.get():
                case number, "form", epoch, port:
                    self._report(number, "joined", partial(self._join, epoch, port))
                case number, "step", changes:
                    self._report(number, "stepped", partial(self._step, changes))
                case _, "let go":
                    self.group.abort()
                case number, "abandon":
                    self.group.abort()
                    self.wire.send((number, "idle", None))

    def _report(self, number: int, word: str, action: Callable[[], Any]) -> None:
        try:
            with foreign:
                outcome = action()
        except CollectiveFailed as error:
            log.warning("rank %d: %s", self.group.rank, str(error).partition("\n")[0])
            # Whoever waits for this rank in the same collective is let go by the end of its connections.
            self.group.abort()
            self.wire.send((number, "aborted", str(error)))
        except RAISED as error:
            log.exception("rank %d: %s", self.group.rank, type(error).__name__)
            self._raise(number, error)
        else:
            if self.group.broken:  # caught by the task
                self.group.abort()
                self.wire.send((number, "aborted", self.group.broken))
            else:
                self.wire.send((number, word, outcome))

    def _raise(self, number: int, error: BaseException) -> None:
        try:
            self.wire.send((number, "raised", error))
        except OSError:
            raise
        except Exception:  # what does not survive pickling
            self.wire.send((number, "raised", RuntimeError(f"{type(error).__name__}: {error}")))

    def _load(self) -> None:
        self.batch.group = self.group
        self.batch.load()
        import torch.distributed  # noqa: F401  it takes seconds, for which no other rank must wait in a collective

    def _join(self, epoch: int, port: int) -> None:
        for identifier in self._admitted:
            self.batch.drop(identifier)
        self._admitted.clear()
        self.group.form(epoch, reach(port, self.group.timeout))
        self.batch.meet()

    def _step(self, changes: Sequence[tuple[str, Any]]) -> int:
        for word, what in changes:
            if word == "admit":
                self._admitted.add(what.id)
                self.batch.admit(what)
            else:
                self._admitted.discard(what)
                self.batch.drop(what)
        steps = list(self.batch.step())
        self._admitted.difference_update(step.request_id for step in steps if step.ends)
        return digest(steps)


def main() -> int:
    """Meet the leader at the other end of the socket, and follow it until its end."""
    logs.configure(os.environ.get("PERDURE_LOG_FORMAT", "text"))
    # Ctrl-C and the like are for the leader; its end is what ends the followers.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    at_home(True)
    wire = Wire(socket.socket(fileno=int(sys.argv[1])), timeout=60.0)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        hello = wire.receive()
    except EOFError:
        return 0
    # What the leader can import, and from where.
    sys.path[:] = hello["path"]

    def listen() -> None:
        try:
            while True:
                orders.put(wire.receive())
        except EOFError:
            os._exit(0)  # also out of a collective that will not end

    threading.Thread(target=listen, name="wire", daemon=True).start()
    task = resolve(hello["task"])
    batch = task() if isinstance(task, type) else task
    if not isinstance(batch, BatchTask):
        raise TypeError(f"{hello['task']} is not a BatchTask")
    group = Collectives(hello["rank"], hello["world"], hello["timeout"])
    Rank(wire, batch, group).run(orders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
