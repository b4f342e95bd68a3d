"""The same session on an event loop: calls run in a few threads, and waiting runs in none.

There is one implementation of the protocol, and it blocks. So a call is made by one of a handful of threads,
while whoever waits for a request is a future, which the client's listener wakes through the loop. Ten thousand
waiting tasks cost one subscribed connection, and their looks at the records share round trips.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import random
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple, TypeVar

from ..protocol.errors import UsageError
from ..protocol.records import RequestRecord
from ..protocol.store import Store
from ..protocol.transport.patience import pause
from .lanes import LANES
from .reading.replies import DEAF_POLL, Replies, ReplyWatch
from .session import CLOSED, Session, Waiting

Answer = TypeVar("Answer")

MOST: Final = 512
"""Records that are read in one round trip."""

TICK: Final = 0.1
"""Seconds between the moments at which waits end that no hint has ended."""


class LoopWatch(ReplyWatch):
    """A watch whose waiter is a task. Woken by other threads, awaited on its loop only."""

    def __init__(
        self,
        replies: Replies,
        identifier: str,
        channel: str,
        loop: asyncio.AbstractEventLoop,
        phase: float,
        *,
        outputs: bool = False,
    ) -> None:
        super().__init__(replies, identifier, channel, outputs=outputs)
        self._loop = loop
        self._phase = phase
        self._ringing = False
        self._rung = False
        self._future: asyncio.Future[None] | None = None

    async def hint(self, seconds: float) -> None:
        """:meth:`ReplyWatch.wait` for a task."""
        if not self._rung:
            self._future = self._loop.create_future()
            timer = self._loop.call_at(self._when(seconds), self._expire)
            try:
                await self._future
            finally:
                timer.cancel()
                self._future = None
        self._rung = False

    def wake(self, what: bytes = b"") -> None:
        if not what.isdigit():
            self.look = True
        if self._ringing:
            return
        self._ringing = True  # until the loop has noticed; a burst of hints is one
        try:
            self._loop.call_soon_threadsafe(self._ring)
        except RuntimeError:
            pass  # the loop was closed, and nobody waits any more

    def subscribed(self) -> None:
        self.wake()

    def _when(self, seconds: float) -> float:
        """The end of the wait, a little earlier than asked for: on a tick, so that many look together."""
        now = self._loop.time()
        when = now + (seconds if self.heard else min(seconds, DEAF_POLL))
        return max(now, when - (when - self._phase) % TICK) if when - now > TICK else when

    def _ring(self) -> None:
        self._ringing, self._rung = False, True
        self._release()

    def _expire(self) -> None:
        self.look = True
        self._release()

    def _release(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class _Due(NamedTuple):
    """Somebody who wants to know a record."""

    id: str
    deadline: float
    future: asyncio.Future[RequestRecord | None]


class AsyncSession:
    """A session for one event loop: the one that uses it first."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.settings = session.settings
        self.patience = session.patience
        self._closed = False
        self._phase = random.uniform(0, TICK)  # not the same as another client's
        self._reset()
        session.children.append(weakref.WeakMethod(self._reset))

    def _reset(self) -> None:
        """As new, and in a child that was forked: it has another loop, and no threads."""
        self._loop: asyncio.AbstractEventLoop | None = None
        # What waits for its turn, or sleeps through an outage, keeps no thread of the first; the second's may.
        self._attempts = ThreadPoolExecutor(LANES, "perdure-call")
        self._calls = ThreadPoolExecutor(LANES, "perdure-client")
        self._due: list[_Due] = []
        self._reading: asyncio.Task[None] | None = None

    async def run(self, function: Callable[[], Answer]) -> Answer:
        """Run what may take its time, such as a method of the blocking client, in a thread."""
        # In the task's context, for its trace.
        return await self._enter().run_in_executor(self._calls, contextvars.copy_context().run, function)

    async def call(self, operation: Callable[[Store], Answer], *, deadline: float | None = None) -> Answer:
        """:meth:`Session.call` for a task."""
        if deadline is None:
            deadline = time.monotonic() + self.patience
        tries = 0
        while True:
            try:
                return await self._attempt(operation)
            except Waiting as waiting:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._session.unavailable(waiting.error) from None
            await asyncio.sleep(min(left, pause(tries)))
            tries += 1

    async def fetch(self, identifier: str, deadline: float | None) -> RequestRecord | None:
        """Read a record, together with whoever else wants one now."""
        loop = self._enter()
        if deadline is None:
            deadline = time.monotonic() + self.patience
        due = _Due(identifier, deadline, loop.create_future())
        self._due.append(due)
        if self._reading is None:
            self._read(loop)
        return await due.future

    def watch(self, identifier: str, channel: str, *, outputs: bool = False) -> LoopWatch:
        """Begin to hear of a request. Unlike :meth:`Replies.watch`, it does not wait: a hint tells when it is so."""
        loop = self._enter()
        watch = LoopWatch(self._session.replies, identifier, channel, loop, self._phase, outputs=outputs)
        if self._session.replies.register(watch):
            # Nobody waits for it: without, the listener looks around by itself a little later.
            self._calls.submit(self._session.replies.tell)
        return watch

    def hear(self, identifier: str) -> LoopWatch | None:
        """:meth:`Replies.hear` for a task."""
        replies = self._session.replies
        return self.watch(identifier, replies.own) if replies.hears(replies.own) else None

    async def close(self) -> None:
        """Close the session; whatever waits raises :class:`UsageError`. Harmless when repeated."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()  # another one may have to clean up behind the client's own
        self._closed = True
        try:
            await loop.run_in_executor(self._attempts, self._session.close)
        finally:
            # What is queued still runs: it finds the session closed and says so to whoever waits.
            self._attempts.shutdown(wait=False)
            self._calls.shutdown(wait=False)

    def _enter(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise UsageError(CLOSED)
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise UsageError("this AsyncClient belongs to another event loop; make one client per loop")
        return loop

    async def _attempt(self, operation: Callable[[Store], Answer]) -> Answer:
        return await self._enter().run_in_executor(self._attempts, self._session.attempt, operation)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reading = loop.create_task(self._read_due(), name="perdure-records")
        self._reading.add_done_callback(self._read_again)

    def _read_again(self, task: asyncio.Task[None]) -> None:
        """Go on if something is wanted still: it came in the last moment, or somebody canceled what is not theirs."""
        self._reading = None
        self._forget_canceled()
        if self._due:
            self._read(task.get_loop())

    async def _read_due(self) -> None:
        """Read all records that are wanted; ends when none is. Each wish lasts until its own deadline."""
        tries = 0
        while True:
            self._forget_canceled()
            if not self._due:
                return
            page = self._due[:MOST]
            identifiers = list(dict.fromkeys(due.id for due in page))
            try:
                records = await self._attempt(partial(Store.fetch_many, identifiers=identifiers))
            except Waiting as waiting:
                nearest = self._give_up(waiting.error)
                await asyncio.sleep(min(nearest, pause(tries)))
                tries += 1
                continue
            except Exception as error:
                for due in page:
                    _refuse(due, error)
            else:
                tries = 0
                found = dict(zip(identifiers, records, strict=True))
                for due in page:
                    if not due.future.done():
                        due.future.set_result(found[due.id])
            del self._due[: len(page)]  # what came meanwhile stands behind it

    def _forget_canceled(self) -> None:
        self._due = [due for due in self._due if not due.future.done()]

    def _give_up(self, error: Exception) -> float:
        """Tell those whose deadline has passed; returns seconds until the next one's does."""
        now = time.monotonic()
        for due in self._due:
            if due.deadline <= now:
                _refuse(due, self._session.unavailable(error))
        self._forget_canceled()
        return min((due.deadline for due in self._due), default=now) - now


def _refuse(due: _Due, error: Exception) -> None:
    if not due.future.done():
        # Each gets one of its own: raising the same one in many tasks would string their tracebacks together.
        due.future.set_exception(copy.copy(error))
