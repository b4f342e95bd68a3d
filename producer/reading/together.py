"""Reading together: what any number of tasks of a loop want to know is read in as few round trips as there are turns.

One thread reads. While it does, further wishes gather, and go into the next round trip. Ten thousand streams that have
news cost some twenty round trips, and no thread for each.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

from ...protocol.errors import RedisUnavailable
from ...protocol.reading.output_log import LogPage, LogPlace
from ...protocol.records import RequestRecord
from ...protocol.store import Store
from ...protocol.transport.patience import Waiting, pause

MOST: Final = 512
"""Records and pages that are read in one round trip."""


class Wish(NamedTuple):
    """What somebody wants to know until ``deadline`` (monotonic): a record, or the page at a ``place`` of a log."""

    id: str
    place: LogPlace | None
    deadline: float
    future: asyncio.Future[Any]


class Together:
    """For one loop."""

    def __init__(
        self,
        attempt: Callable[[Callable[[Store], Any]], Awaitable[Any]],
        unavailable: Callable[[Exception], RedisUnavailable],
    ) -> None:
        """``attempt`` runs an operation, or raises :class:`Waiting`; ``unavailable`` makes a user's error of it."""
        self._attempt = attempt
        self._unavailable = unavailable
        self._wishes: list[Wish] = []
        self._reading: asyncio.Task[None] | None = None

    async def record(self, identifier: str, deadline: float) -> RequestRecord | None:
        """Read a record."""
        future: asyncio.Future[RequestRecord | None] = asyncio.get_running_loop().create_future()
        self._want(Wish(identifier, None, deadline, future))
        return await future

    async def page(self, identifier: str, place: LogPlace, deadline: float) -> LogPage:
        """Read a page of a log."""
        future: asyncio.Future[LogPage] = asyncio.get_running_loop().create_future()
        self.give_page(identifier, place, deadline, future)
        return await future

    def give_page(self, identifier: str, place: LogPlace, deadline: float, future: asyncio.Future[Any]) -> None:
        """The same, for who waits for this future already."""
        self._want(Wish(identifier, place, deadline, future))

    def _want(self, wish: Wish) -> None:
        self._wishes.append(wish)
        if self._reading is None:
            self._begin(wish.future.get_loop())

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reading = loop.create_task(self._read(), name="perdure-reads")
        self._reading.add_done_callback(self._again)

    def _again(self, task: asyncio.Task[None]) -> None:
        """Go on if something is wanted still: it came in the last moment, or somebody canceled what is not theirs."""
        self._reading = None
        self._forget_canceled()
        if self._wishes:
            self._begin(task.get_loop())

    async def _read(self) -> None:
        """Read all that is wanted; ends when nothing is. Each wish lasts until its own deadline."""
        tries = 0
        while True:
            self._forget_canceled()
            if not self._wishes:
                return
            part = self._wishes[:MOST]
            try:
                await self._grant(part)
            except Waiting as waiting:
                nearest = self._give_up(waiting.error)
                await asyncio.sleep(min(nearest, pause(tries)))
                tries += 1
                continue
            tries = 0
            del self._wishes[: len(part)]  # what came meanwhile stands behind it

    async def _grant(self, wishes: list[Wish]) -> None:
        records = list(dict.fromkeys(wish.id for wish in wishes if wish.place is None))
        pages = [wish for wish in wishes if wish.place is not None]
        places = [(wish.id, wish.place) for wish in wishes if wish.place is not None]
        try:
            found, read = await self._attempt(partial(Store.look, identifiers=records, places=places))
        except Waiting:
            raise
        except Exception as error:
            if len(wishes) == 1:
                _refuse(wishes[0], error)
            else:  # one of them may be to blame, and is not to cost the others their answers
                for wish in wishes:
                    await self._grant([wish])
            return
        known = dict(zip(records, found, strict=True))
        for wish in wishes:
            if wish.place is None and not wish.future.done():
                wish.future.set_result(known[wish.id])
        for wish, page in zip(pages, read, strict=True):
            if not wish.future.done():
                wish.future.set_result(page)

    def _forget_canceled(self) -> None:
        self._wishes = [wish for wish in self._wishes if not wish.future.done()]

    def _give_up(self, error: Exception) -> float:
        """Tell those whose deadline has passed; returns seconds until the next one's does."""
        now = time.monotonic()
        for wish in self._wishes:
            if wish.deadline <= now:
                _refuse(wish, self._unavailable(error))
        self._forget_canceled()
        return min((wish.deadline for wish in self._wishes), default=now) - now


def _refuse(wish: Wish, error: Exception) -> None:
    if not wish.future.done():
        # Each gets one of its own: raising the same one in many tasks would string their tracebacks together.
        wish.future.set_exception(copy.copy(error))
