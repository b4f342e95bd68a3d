"""Watches: one for each waiter, who is woken by hints (:mod:`.replies`)."""

from __future__ import annotations

import random
import threading
from types import TracebackType
from typing import Final, Protocol, Self

from ...protocol.reading.output_log import LogPage, LogPlace

OUTPUTS: Final = ":outputs"
"""Behind a request's id: the channel on which its new outputs are told. Redis knows by it who listens to a request, and
a worker stores at once what somebody listens to. Who waits for ends only is not woken by checkpoints."""

LOOKS: Final = 100
"""Looks a second at the keys that all waiters of a client take together for hints that may have been lost. None is lost
but with its connection, after which all look at once.
"""

DEAF_POLL: Final = 0.5
"""Seconds between two looks at the keys while no hints can be heard."""


class Listener(Protocol):
    """What a watch needs of who hears the hints."""

    @property
    def waiters(self) -> int: ...
    def hears(self, channel: str) -> bool: ...
    def forget(self, watch: ReplyWatch) -> None: ...


class ReplyWatch:
    """One waiter's interest in one request. A context manager: the interest ends with the block."""

    def __init__(self, replies: Listener, identifier: str, channel: str, *, outputs: bool = False) -> None:
        """``channel``: of the producer, empty if it listens to none. ``outputs``: new outputs are told as well."""
        self.identifier = identifier
        self.channel = channel
        self.channels = (channel,) * bool(channel) + (identifier + OUTPUTS,) * outputs
        self.look = True
        """Whether more may have happened than new outputs; for the waiter to clear before it reads."""
        self._replies = replies
        self._event = threading.Event()
        self._place: LogPlace | None = None
        self._page: LogPage | None = None

    def ahead(self) -> LogPlace | None:
        """Where its waiter reads on, if the listener is to read there what a hint is about."""
        place = self._place
        return place if place is not None and place.brief else None

    @property
    def listens(self) -> bool:
        """Whether it is subscribed to all that there is to hear."""
        return all(map(self._replies.hears, self.channels))

    @property
    def heard(self) -> bool:
        """Whether hints about it arrive now, its end included, as far as anybody can know."""
        return bool(self.channel) and self.listens

    def patience(self, silence: float, most: float) -> float:
        """Seconds to wait for a hint before the keys are read anyhow: ``silence``, longer where many wait, and sooner
        if hints cannot come; at most ``most``. Spread, so that not all ask in the same moment.
        """
        usual = silence if self.heard else min(silence, DEAF_POLL)
        return max(0.0, min(max(usual, self._replies.waiters / LOOKS) * (1 - random.random() / 10), most))

    def wait(self, silence: float, most: float, place: LogPlace | None = None) -> LogPage | None:
        """Return when a hint came since the last call, or after :meth:`patience`: the page at ``place`` of the log, if
        the hint was of new outputs and they were read along.

        Else read the keys afterwards, whatever the reason: what comes while they are read ends the next wait.
        """
        self._page, self._place = None, place
        try:
            if not self._event.wait(self.patience(silence, most)):
                self.look = True
        finally:
            self._place = None
        self._event.clear()
        return self._page

    def wake(self, what: bytes = b"", place: LogPlace | None = None, page: LogPage | None = None) -> None:
        """End the wait. ``what`` is a hint's: ``end``, or how many outputs there are; none if hints were lost.

        ``page``: what stands at ``place``.
        """
        if not what.isdigit():
            self.look = True
        if page is not None and place is self._place:
            self._page = page
        self._event.set()

    def subscribed(self) -> None:
        """Hints begin to arrive. Nothing to do for a waiter that came by :meth:`Replies.watch`: it waited for this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._replies.forget(self)
