"""Waiting for many requests at once: what ``as_completed`` stands on, and the thread that calls the callbacks.

Hints say which of them to look at. All are looked at, many in one round trip, whenever hints may have been
lost; so ten thousand cost a handful of calls every few seconds.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Protocol, TypeVar

from ...protocol.errors import PerdureError, RedisUnavailable, UsageError
from ...protocol.reading.output_log import LogPage, LogPlace
from ...protocol.records import RequestRecord
from ...protocol.store import Store
from .questions import RESULT_SILENCE
from .replies import Replies
from .watches import DEAF_POLL, ReplyWatch

Answer = TypeVar("Answer")

MOST: Final = 512
"""Records that are read in one round trip."""

_log = logging.getLogger("perdure.producer")


class Asks(Protocol):
    """What is needed of a session, which has callbacks of its own and so imports from here."""

    replies: Replies

    def call(self, operation: Callable[[Store], Answer], *, deadline: float | None = None) -> Answer: ...


class Gathering:
    """Requests of one client, of which the next to end is waited for. One thread waits; any may add."""

    def __init__(self, session: Asks, bell: threading.Event) -> None:
        self._session = session
        self._bell = bell
        self._waiting: dict[str, Interest | None] = {}
        self._hints: deque[str] = deque()
        self._lost = False
        self._poll = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def due(self) -> float:
        """When to look again at the latest (monotonic)."""
        return self._poll

    def add(self, identifier: str) -> None:
        self._waiting.setdefault(identifier, None)
        self.hint(identifier)

    def hint(self, identifier: str, *, lost: bool = False) -> None:
        """Look at this one next; ``lost``: others may have been missed."""
        self._hints.append(identifier)
        self._lost = self._lost or lost
        self._bell.set()

    def look(self, deadline: float | None) -> Iterator[tuple[str, RequestRecord | None]]:
        """Give those that have ended, or are not known (``None``); they are waited for no longer."""
        now = time.monotonic()
        if self._lost:
            self._lost, self._poll = False, min(self._poll, now + DEAF_POLL)
        if polls := now >= self._poll:
            self._hints.clear()
            wanted = list(self._waiting)
            heard = all(interest is not None and interest.heard for interest in list(self._waiting.values()))
            self._poll = now + (RESULT_SILENCE if heard else DEAF_POLL) * random.uniform(0.9, 1)
        else:
            hints = [self._hints.popleft() for _ in range(len(self._hints))]
            wanted = [identifier for identifier in dict.fromkeys(hints) if identifier in self._waiting]
        for start in range(0, len(wanted), MOST):
            page = wanted[start : start + MOST]
            try:
                records = self._session.call(partial(Store.fetch_many, identifiers=page), deadline=deadline)
                due = [record for record in records if record is not None and record.due and not record.ended]
                if polls and due:
                    self._session.call(partial(Store.end_late, records=due), deadline=deadline)
            except PerdureError:
                self._hints.extend(wanted[start:])
                raise
            for identifier, record in zip(page, records, strict=True):
                if record is None or record.ended:
                    self._leave(identifier)
                    yield identifier, record
                elif self._waiting[identifier] is None:
                    self._join(identifier, record.client)

    def close(self) -> None:
        for identifier in list(self._waiting):
            self._leave(identifier)

    def _join(self, identifier: str, channel: str) -> None:
        interest = Interest(self, self._session.replies, identifier, channel)
        self._waiting[identifier] = interest
        if self._session.replies.register(interest):
            self._session.replies.tell()
        if interest.heard:
            self.hint(identifier)  # what came between reading and registering

    def _leave(self, identifier: str) -> None:
        interest = self._waiting.pop(identifier, None)
        if interest is not None:
            self._session.replies.forget(interest)


class Interest(ReplyWatch):
    """One request of a gathering."""

    def __init__(self, gathering: Gathering, replies: Replies, identifier: str, channel: str) -> None:
        super().__init__(replies, identifier, channel)
        self._gathering = gathering

    def wake(self, what: bytes = b"", place: LogPlace | None = None, page: LogPage | None = None) -> None:
        if not what.isdigit():  # new outputs are no end
            self._gathering.hint(self.identifier, lost=not what)

    def subscribed(self) -> None:
        self._gathering.hint(self.identifier)


class Callbacks:
    """Calls what waits for the end of requests: one thread for a client, from the first until none is left."""

    def __init__(self, session: Asks) -> None:
        self._session = session
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """As new, and in a child that was forked: the thread and its callbacks stayed behind."""
        self._lock = threading.Lock()
        self._bell = threading.Event()
        self._gathering = Gathering(self._session, self._bell)
        self._calls: dict[str, list[Callable[[], object]]] = {}
        self._thread: threading.Thread | None = None

    def add(self, identifier: str, call: Callable[[], object]) -> None:
        """Have ``call()`` called once the request has ended."""
        with self._lock:
            if self._closed:
                raise UsageError("this Client is closed; make a new one")
            self._calls.setdefault(identifier, []).append(call)
            self._gathering.add(identifier)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="perdure-callbacks", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Call no more of them. The one that is being called goes on."""
        self._closed = True
        self._bell.set()

    def _run(self) -> None:
        while True:
            self._bell.clear()
            try:
                for identifier, _ in self._gathering.look(None):
                    self._call(identifier)
            except RedisUnavailable:
                self._bell.wait(DEAF_POLL)  # it may be back some time; nobody is there to be told
            except UsageError:
                pass  # closed
            except Exception:
                _log.exception("waiting for the ends of requests failed; it goes on")
                self._bell.wait(DEAF_POLL)
            with self._lock:
                if self._closed or not self._calls:
                    self._gathering.close()
                    self._thread = None
                    return
            self._bell.wait(max(0.0, self._gathering.due - time.monotonic()))

    def _call(self, identifier: str) -> None:
        with self._lock:
            calls = self._calls.pop(identifier, [])
        for call in calls:
            if self._closed:
                return
            try:
                call()
            except Exception:
                _log.exception("a callback of request %s raised", identifier)
