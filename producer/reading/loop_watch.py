"""Waiting on an event loop: one wake-up of it for a bunch of hints, and one check of silence for all that wait."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from ...protocol.reading.output_log import LogPage, LogPlace
from .together import Together
from .watches import Listener, ReplyWatch

TICK: Final = 0.2
"""Seconds between two checks of who has waited long enough; shorter waits have a timer of their own."""


class Bell:
    """Brings what the listener's thread hears to the watches of one loop, and ends waits that nothing has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, together: Together) -> None:
        self.loop = loop
        self.together = together
        self.waiting: set[LoopWatch] = set()
        self._phase = random.uniform(0, TICK)  # not the same as another client's
        self._rung: list[tuple[LoopWatch, LogPlace | None, LogPage | None]] = []
        self._ringing = False
        self._checks = False

    def ring(self, watch: LoopWatch, place: LogPlace | None = None, page: LogPage | None = None) -> None:
        """A hint for this watch has come, with the ``page`` at ``place``. Called by other threads too."""
        self._rung.append((watch, place, page))
        if not self._ringing:
            self._ringing = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                pass  # the loop was closed, and nobody waits any more

    def _deliver(self) -> None:
        self._ringing = False  # first: what comes from here on rings again
        rung, self._rung = self._rung, []
        for watch, place, page in rung:
            watch.rung(place, page)

    def check(self) -> None:
        """See to it that silence is looked after, as long as anybody waits."""
        if not self._checks:
            self._checks = True
            now = self.loop.time()
            self.loop.call_at(now + TICK - (now - self._phase) % TICK, self._check)

    def _check(self) -> None:
        self._checks = False
        soon = self.loop.time() + TICK / 2
        for watch in [watch for watch in self.waiting if watch.when <= soon]:
            watch.expire()
        if self.waiting:
            self.check()


class LoopWatch(ReplyWatch):
    """A watch whose waiter is a task. Woken by other threads, awaited on its loop only."""

    def __init__(self, replies: Listener, identifier: str, channel: str, bell: Bell, *, outputs: bool = False) -> None:
        super().__init__(replies, identifier, channel, outputs=outputs)
        self.when = 0.0
        """Until when its waiter waits, by the loop's clock."""
        self._bell = bell
        self._rung = False
        self._ahead = False
        self._future: asyncio.Future[LogPage | None] | None = None
        self._deadline = 0.0
        self._reading = False

    def ahead(self) -> LogPlace | None:
        """Nowhere while a page is on its way to the loop already."""
        place = None if self._ahead or self._reading else super().ahead()
        self._ahead = self._ahead or place is not None
        return place

    async def hint(
        self, silence: float, most: float, place: LogPlace | None = None, deadline: float = 0.0
    ) -> LogPage | None:
        """:meth:`ReplyWatch.wait` for a task. With a ``place``, a hint brings the page that stands there; ``None``
        where none was read. ``deadline`` (monotonic) is that of the reading.
        """
        if self._rung:
            self._rung = False
            return None
        bell = self._bell
        self._future = bell.loop.create_future()
        self._place, self._deadline = place, deadline
        seconds = self.patience(silence, most)
        self.when = bell.loop.time() + seconds
        bell.waiting.add(self)
        timer = bell.loop.call_at(self.when, self.expire) if seconds < TICK else None
        bell.check()
        try:
            return await self._future
        finally:
            bell.waiting.discard(self)
            self._future, self._place, self._reading = None, None, False
            if timer is not None:
                timer.cancel()

    def wake(self, what: bytes = b"", place: LogPlace | None = None, page: LogPage | None = None) -> None:
        if not what.isdigit():
            self.look = True
        self._bell.ring(self, place, page)

    def subscribed(self) -> None:
        self.wake()

    def rung(self, place: LogPlace | None, page: LogPage | None) -> None:
        """A hint came; on the loop."""
        if place is not None:
            self._ahead = False
        future = self._future
        if future is None or future.done() or self._reading:
            self._rung = True
        elif self._place is None:
            future.set_result(None)
        elif page is not None and place is self._place:
            future.set_result(page)
        else:
            self._reading = True
            self._bell.waiting.discard(self)
            self._bell.together.give_page(self.identifier, self._place, self._deadline, future)

    def expire(self) -> None:
        """Nothing came for as long as was to be waited."""
        self.look = True
        if self._future is not None and not self._future.done() and not self._reading:
            self._future.set_result(None)
