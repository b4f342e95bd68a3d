"""Generator tasks with several slots: each request is advanced in a thread, side by side.

A request has the same thread for its whole execution, so that what belongs to a thread (a connection of
sqlite, an event loop, thread-local values) stays with it. The threads are kept for the next requests.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

from .base import Step, Task
from .generators import advance, begin, close
from .members import Member, Members

Orders = queue.SimpleQueue[bool]
"""What a member is told: True for one more step, False for the end."""


class ThreadBatch(Members):
    """Runs each generator of a task in one of ``slots`` threads.

    They are daemons and no executor's: concurrent.futures waits at the exit of the process for its threads, and
    one that hangs would keep the process for ever.
    """

    def __init__(self, task: Task, news: Callable[[], None] = lambda: None) -> None:
        super().__init__(task, news)
        self._waiting: queue.SimpleQueue[tuple[Member, Orders] | None] = queue.SimpleQueue()
        self._threads = 0

    def close(self) -> None:
        for _ in range(self._threads):
            self._waiting.put(None)
        self._threads = 0

    def _start(self, member: Member) -> None:
        orders: Orders = queue.SimpleQueue()
        member.go, member.stop = partial(orders.put, True), partial(orders.put, False)
        with self._lock:
            wanted = self._threads < min(self.slots, len(self._members) + len(self._leaving))
        if wanted:
            name = f"{getattr(self.task, '__name__', 'task')}-{self._threads}"
            threading.Thread(target=self._run, name=name, daemon=True).start()
            self._threads += 1
        self._waiting.put((member, orders))

    def _run(self) -> None:
        while entry := self._waiting.get():
            member, orders = entry
            if self._began(member):
                try:
                    member.context.run(self._drive, member, orders)
                finally:
                    self._left(member)
            del entry, member, orders  # a waiting thread keeps nothing of the last request alive

    def _drive(self, member: Member, orders: Orders) -> None:
        generator = None
        while orders.get() and not member.dropped:
            if generator is None:
                started = begin(self.task, member.request)
                if isinstance(started, Step):
                    self._came(member, started)
                    return
                generator = started
            step = advance(generator)
            if not self._came(member, step):
                break
        if generator is not None:
            close(generator, member.request.id)
