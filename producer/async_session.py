"""The same session on an event loop: calls run in a few threads, and waiting runs in none.

There is one implementation of the protocol, and it blocks. So a call is made by one of a handful of threads,
while whoever waits for a request is a future, which the client's listener wakes through the loop. Ten thousand
waiting tasks cost one subscribed connection, and what they read comes in few round trips, one after the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from ..protocol.errors import UsageError
from ..protocol.reading.output_log import LogPage, LogPlace
from ..protocol.records import RequestRecord
from ..protocol.store import Store
from ..protocol.transport.patience import Waiting, pause
from .lanes import LANES
from .reading.loop_watch import Bell, LoopWatch
from .reading.together import Together
from .session import CLOSED, Session

Answer = TypeVar("Answer")


class AsyncSession:
    """A session for one event loop: the one that uses it first."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.settings = session.settings
        self.patience = session.patience
        self._closed = False
        self._reset()
        session.children.append(weakref.WeakMethod(self._reset))

    def _reset(self) -> None:
        """As new, and in a child that was forked: it has another loop, and no threads."""
        self._loop: asyncio.AbstractEventLoop | None = None
        # What waits for its turn, or sleeps through an outage, keeps no thread of the first; the second's may.
        self._attempts = ThreadPoolExecutor(LANES, "perdure-call")
        self._calls = ThreadPoolExecutor(LANES, "perdure-client")
        self._together = Together(self._attempt, self._session.unavailable)
        self._bell: Bell | None = None

    async def run(self, function: Callable[[], Answer]) -> Answer:
        """Run what may take its time, such as a method of the blocking client, in a thread."""
        # In the task's context, for its trace.
        return await self._enter().run_in_executor(self._calls, contextvars.copy_context().run, function)

    async def call(self, operation: Callable[[Store], Answer], *, deadline: float | None = None) -> Answer:
        """:meth:`Session.call` for a task."""
        deadline = self._until(deadline)
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
        """Read a record, together with what others want to know now."""
        self._enter()
        return await self._together.record(identifier, self._until(deadline))

    async def page(self, identifier: str, place: LogPlace, deadline: float | None, *, check: bool) -> LogPage:
        """Read a page of a log, together with what others want to know now."""
        self._enter()
        if check:
            operation = partial(Store.output_page, identifier=identifier, place=place, check=True)
            return await self.call(operation, deadline=deadline)
        return await self._together.page(identifier, place, self._until(deadline))

    def watch(self, identifier: str, channel: str, *, outputs: bool = False) -> LoopWatch:
        """Begin to hear of a request. Unlike :meth:`Replies.watch`, it does not wait: a hint tells when it is so."""
        loop = self._enter()
        if self._bell is None:
            self._bell = Bell(loop, self._together)
        watch = LoopWatch(self._session.replies, identifier, channel, self._bell, outputs=outputs)
        if self._session.replies.register(watch):
            # Nobody waits for it: without, the listener looks around by itself a little later.
            self._calls.submit(self._session.replies.tell)
        return watch

    def hear(self, identifier: str) -> LoopWatch | None:
        """:meth:`Replies.hear` for a task."""
        replies = self._session.replies
        return self.watch(identifier, replies.own) if replies.hears(replies.own) else None

    def _until(self, deadline: float | None) -> float:
        return time.monotonic() + self.patience if deadline is None else deadline

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
