"""The watchdog: whether the two threads that a worker lives by still move.

The engine loop and the courier each tick a counter in memory that the worker shares with its guardian, and say
with every tick how long the next one may take: a step its step timeout, a load the load timeout. Idle,
suspended, paused or reconnecting they tick as well, so a counter that stands still is a hang and nothing else.

1. :class:`Counter`: one counter. Nobody waits for anybody: its thread writes, the guardian reads.
2. :class:`Watch`: what the guardian makes of it, as a pure decision: readings and a clock in, a verdict out.
3. :class:`Lookout`: the guardian's thread that looks, and ends a worker that hangs: SIGABRT, so that it writes the
   stacks of its threads, then SIGKILL.
4. :class:`Watchdog`: the engine loop's side, with a backstop for a worker whose guardian is gone as well.

No thread of the worker is asked: one that holds the interpreter's lock in native code silences them all.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from ..tasks.forks import in_child

LOOK: Final = 0.1
"""Seconds between two looks of the guardian at the counters."""

SPOT: Final = 10
"""Looks at the counters to one at the worker's children."""

MARGIN: Final = 0.5
"""Seconds beyond what is allowed after which a standstill is a hang; a quarter of what is allowed, if that is less,
so that it is always found before the lease runs out at one and a half times."""

GAP: Final = 5.0
"""Seconds between two looks after which the guardian was stopped itself: the worker has another whole period."""

STACKS: Final = 1.0
"""Seconds that a worker has to write its stacks, from SIGABRT to SIGKILL."""

LAST: Final = 2.0
"""Seconds after SIGKILL in which the process ends; one in the middle of a driver's call may not, and is left."""

SPARE: Final = 5.0
"""Seconds that the backstop leaves the guardian."""

WAIT: Final = 1.0
"""Seconds that the engine loop waits for anything before it looks around."""

_SIZE: Final = 32
"""Bytes that are shared: for each of the two, count and allowed milliseconds."""


class CounterReading(NamedTuple):
    """A counter as it stands: how often it was ticked, and the seconds until the next tick (0: it is not judged)."""

    ticks: int
    allowed: float


class Counter:
    """Two words of memory that one thread writes and others read.

    A reader may see one word of a tick without the other. The allowed time is written first, so that what it sees
    then is a tick that has not come yet; the next look sees it.
    """

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview | None = None, at: int = 0) -> None:
        self._words = memoryview(bytearray(_SIZE)).cast("Q") if words is None else words
        self._at = at

    def tick(self, allowed: float) -> None:
        """The thread moves, and will again within so many seconds; after 0 it is not judged until its next tick."""
        self._words[self._at + 1] = math.ceil(allowed * 1000)
        self._words[self._at] += 1

    def part(self) -> None:
        """Tick memory of one's own from now on, which nobody reads."""
        self._words = memoryview(bytearray(_SIZE)).cast("Q")

    def read(self) -> CounterReading:
        """How it stands."""
        return CounterReading(self._words[self._at], self._words[self._at + 1] / 1000)


class Page:
    """The memory that a worker and its guardian share: the counters ``loop`` and ``courier``."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        self.fd = fd
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        words = memoryview(mmap.mmap(fd, _SIZE, access=access)).cast("Q")
        self.loop, self.courier = Counter(words, 0), Counter(words, 2)
        self._words = words  # a forked child keeps it mapped, by which it is known as one
        if writable:
            in_child(self._forked)

    def _forked(self) -> None:
        # Whatever a forked child ticks must not hide that its parent hangs.
        self.loop.part()
        self.courier.part()

    @classmethod
    def create(cls) -> Page:
        """A new one. Its descriptor stays open as long as the process lives: each guardian inherits it."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("perdure-watchdog")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, _SIZE)
        return cls(fd, writable=True)


@dataclass(slots=True)
class Watch:
    """Decides from readings whether a worker hangs. Pure: the clock is an argument.

    Only time in which the guardian itself ran is counted: whoever stopped both of them, or the machine, proves nothing
    about the worker.
    """

    stopped_at: float = -math.inf
    """When the guardian was last stopped itself, by the clock of :meth:`look`."""
    _looked: float | None = None
    _seen: list[CounterReading] = field(default_factory=lambda: [CounterReading(0, 0)] * 2)
    _still: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Seconds for which each of the two has been seen to stand still."""

    def look(self, now: float, loop: CounterReading, courier: CounterReading) -> str:
        """Who stands still for too long, as a sentence about "its …"; an empty text for nobody. ``now`` in seconds."""
        passed = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        if passed > GAP:
            self.stopped_at = now
            self._still = [0.0, 0.0]
        for index, reading in enumerate((loop, courier)):
            moved = reading != self._seen[index]
            self._seen[index] = reading
            self._still[index] = 0.0 if moved else self._still[index] + min(passed, 3 * LOOK)
        if not loop.allowed:
            return ""  # a plain job runs under RQ's rules, or the worker starts or leaves
        # A step may hold the interpreter's lock for as long as it may take: the courier cannot tick meanwhile.
        courier_may = max(loop.allowed, courier.allowed)
        for name, still, allowed in (
            ("engine loop", self._still[0], loop.allowed),
            ("courier", self._still[1], courier_may if courier.allowed else math.inf),
        ):
            if still > allowed + min(MARGIN, allowed / 4):
                return f"its {name} has not moved for {still:.1f} s ({allowed:g} s are allowed)"
        return ""


class Lookout:
    """The guardian's thread that watches a worker and ends it when it hangs.

    A thread of its own, since the guardian's main thread may wait for a Redis that does not answer. ``done`` becomes
    readable when the worker was ended, or cannot be.
    """

    def __init__(self, page: Page, pid: int, pidfd: int | None, warn: Callable[[str], object]) -> None:
        self.found = ""
        """Why it was ended; set before anything is done to it."""
        self.done, self._done = os.pipe()
        self._page, self._pid, self._pidfd, self._warn = page, pid, pidfd, warn
        self._watch = Watch()
        self.spot: Callable[[], object] = lambda: None
        """Called about once a second, and before the worker is ended: its children are to be remembered."""
        self._stopping = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start looking."""
        threading.Thread(target=self._run, name="lookout", daemon=True).start()

    def stop(self) -> None:
        """Look no more: the guardian leaves."""
        self._stopping = True

    @property
    def stopped_lately(self) -> bool:
        """Whether the guardian was stopped itself a moment ago, and its worker perhaps with it."""
        return time.monotonic() - self._watch.stopped_at < 2 * GAP

    def gone(self, timeout: float) -> bool:
        """Whether the worker's process has ended, which is waited for: its files are closed a moment before."""
        return self._gone(timeout)

    def end(self, why: str) -> None:
        """End the worker: it hangs. Takes up to ``STACKS + LAST`` seconds; a second call does nothing."""
        with self._lock:
            if self.found or self._gone(0):
                return  # what has ended by itself did not hang
            self.found = why
        self._warn(why)
        self.spot()
        if not stopped(self._pid):  # else it could not write its stacks
            self._send(signal.SIGABRT)
            self._gone(STACKS)
        self._send(signal.SIGKILL)
        self._gone(LAST)
        os.write(self._done, b"!")

    def _run(self) -> None:
        looks = 0
        while not (self._stopping or self.found or self._gone(LOOK)):
            looks += 1
            if looks % SPOT == 0:
                self.spot()
            why = self._watch.look(time.monotonic(), self._page.loop.read(), self._page.courier.read())
            if why:
                self.end(why)

    def _gone(self, timeout: float) -> bool:
        """Whether the process has ended, which is waited for."""
        if self._pidfd is not None:
            return bool(select.select([self._pidfd], [], [], timeout)[0])
        end = time.monotonic() + timeout
        while os.getppid() == self._pid:
            if time.monotonic() >= end:
                return False
            time.sleep(min(LOOK, timeout))
        return True

    def _send(self, number: signal.Signals) -> None:
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif os.getppid() == self._pid:  # its number is nobody else's yet
                os.kill(self._pid, number)
        except ProcessLookupError:
            pass  # it has just ended


def stopped(pid: int) -> bool:
    """Whether a process is stopped (SIGSTOP, SIGTSTP): no signal but SIGKILL reaches it. Linux only, else False."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


class Watchdog:
    """The engine loop's side: a tick before everything that may take long.

    A tick costs about 1 µs. To arm the backstop costs 90 µs (a thread in C is ended and another started), so it is
    armed for twice the allowed time and again only when half of that is over; should the guardian be gone, or stopped,
    it writes the stacks and ends the process. It cannot know whether the process was stopped itself in between, which
    is why it leaves the guardian, who can, some time to decide.
    """

    def __init__(self, counter: Counter | None = None, file: int | None = None) -> None:
        self._counter = counter or Counter()
        self._file = file
        self._fires = 0.0

    def tick(self, allowed: float) -> None:
        """The loop moves; what it does now may take so many seconds. Main thread only."""
        self._counter.tick(allowed)
        if self._file is None:
            return
        now = time.monotonic()
        if not now + allowed + SPARE <= self._fires <= now + 4 * allowed + 2 * SPARE:
            faulthandler.dump_traceback_later(2 * allowed + SPARE, exit=True, file=self._file)
            self._fires = now + 2 * allowed + SPARE

    def rest(self) -> None:
        """Nothing is judged until the next tick."""
        self._counter.tick(0)
        if self._file is not None and self._fires:
            faulthandler.cancel_dump_traceback_later()
            self._fires = 0.0
