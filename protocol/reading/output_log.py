"""The output log of a request: how a reader finds out that it was rolled back.

Each entry (:func:`..codec.pack_entry`) has a random token.

A store that forgot its last second (a failover to a replica that lagged, a restored file) may get other entries in
place of those that it has lost. The log only grows. So as long as the last entry that was read still stands in its
place, with its token, everything before it is what was read, and everything behind it follows. Else the log is to be
read again from its beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

import redis

from ..codec import unpack_entry
from ..errors import OutputsDamaged
from ..keys import key

FIRST: Final = 8
"""Entries that are read at once as long as it is not known how large the log is: one may have megabytes."""

MOST: Final = 512
"""Entries that are read at once of a log that is small as a whole."""

SMALL: Final = 32 * 1024 * 1024
"""Bytes of a log up to which it counts as small."""

PAGE: Final = 256 * 1024
"""Bytes that a page of a small log should have: what is made of them takes some milliseconds."""

SHORT: Final = 4096
"""Bytes of an entry up to which it is read again with those behind it, to see that it is still there."""

TINY: Final = 64
"""Bytes of an entry up to which it is its own mark."""


class LogPlace(NamedTuple):
    """Where a reader is in a log: after ``entry`` entries, the last of which has this mark."""

    entry: int = 0
    mark: bytes = b""
    short: bool = True
    """The last entry is read again with those behind it."""
    outputs: int = 0
    """How many there are up to this place."""
    limit: int = FIRST

    @property
    def brief(self) -> bool:
        """Whether one command reads on from here."""
        return self.short or not self.mark


class LogPage(NamedTuple):
    """Some entries from a place on. ``lost``: what was read before does not stand there any more, and these are none.

    ``more``: there may be more behind them. ``next``: the place behind them.
    """

    entries: Sequence[tuple[int, int, list[Any]]] = ()
    more: bool = False
    lost: bool = False
    next: LogPlace = LogPlace()

    @classmethod
    def after(cls, place: LogPlace, raw: Sequence[bytes], limit: int) -> Self:
        """The page of these entries; ``limit`` is how many are to be read next time, if there may be more."""
        more = len(raw) >= place.limit
        limit = limit if more else FIRST
        if not raw:
            return cls(more=more, next=place._replace(limit=limit))
        entries = [unpack_entry(item) for item in raw]
        _, offset, outputs = entries[-1]
        last = raw[-1]
        found = LogPlace(place.entry + len(raw), _mark(last), len(last) <= SHORT, offset + len(outputs), limit)
        return cls(entries, more, next=found)


LOST: Final = LogPage(lost=True, more=True)


@dataclass(slots=True)
class Outputs:
    """All outputs of a log's newest epoch, page by page."""

    values: list[Any] = field(default_factory=list)
    place: LogPlace = field(default_factory=LogPlace)
    _epoch: int = -1

    def take(self, page: LogPage) -> bool:
        """Take the page that was read at :attr:`place`; False if it was the last."""
        if page.lost:
            self.values, self._epoch = [], -1
        for epoch, offset, outputs in page.entries:
            if epoch != self._epoch:
                self._epoch, self.values = epoch, []
            self.values[offset:] = outputs
        self.place = page.next
        return page.more


def read_page(connection: redis.Redis, identifier: str, place: LogPlace, *, check: bool = False) -> LogPage:
    """Read on from a place. One command for a short page.

    The page after an entry that is not short may be empty although another one with as many outputs stands in its
    place; ``check`` asks for certain. Plain reads: a user who may do nothing else can follow a log.

    Raises :class:`OutputsDamaged`.
    """
    name = key("output", identifier)
    raw: list[bytes]
    first, last = place.entry, place.entry + place.limit - 1
    if place.brief:
        return page_of(connection, identifier, place, ask_page(connection, identifier, place))
    with connection.pipeline(transaction=False) as pipe:
        pipe.llen(name)
        pipe.hget(key("checkpoint", identifier), "offset")
        number, stored = pipe.execute()
    if number < first:
        return LOST
    if number == first and not check and stored == b"%d" % place.outputs:
        return LogPage(next=place)
    # In this order, over one connection: what stands there afterwards stood there before. A log that was rolled
    # back does not get its old entries back.
    with connection.pipeline(transaction=False) as pipe:
        pipe.lrange(name, first, last)
        pipe.lrange(name, first - 1, first - 1)
        raw, before = pipe.execute()
    if not before or _mark(before[0]) != place.mark:
        return LOST
    return _page(connection, identifier, place, raw)


def ask_page(connection: redis.Redis, identifier: str, place: LogPlace) -> Any:
    """The command that reads on from a place that is ``brief``; in a pipeline, it answers later."""
    first = place.entry - bool(place.mark)  # with the last entry that was read, to see that it is still there
    return connection.lrange(key("output", identifier), first, place.entry + place.limit - 1)


def page_of(connection: redis.Redis, identifier: str, place: LogPlace, raw: list[bytes]) -> LogPage:
    """What :func:`ask_page` was answered, as a page."""
    if place.mark:
        if not raw or _mark(raw[0]) != place.mark:
            return LOST
        del raw[0]
    return _page(connection, identifier, place, raw)


def _page(connection: redis.Redis, identifier: str, place: LogPlace, raw: Sequence[bytes]) -> LogPage:
    limit = _next_limit(connection, key("output", identifier), place, raw)
    try:
        return LogPage.after(place, raw, limit)
    except (ValueError, TypeError) as error:
        raise OutputsDamaged(
            f"the output log of request {identifier} cannot be read behind its entry {place.entry}: {error}; "
            "somebody else has written to it"
        ) from None


def _next_limit(connection: redis.Redis, name: str, place: LogPlace, raw: Sequence[bytes]) -> int:
    """How many entries to read next, so that a page stays small."""
    if len(raw) < place.limit or place.limit > FIRST:
        return place.limit
    try:
        # All of it, not a sample; a log of a hundred thousand outputs has some hundred nodes.
        size: Any = connection.memory_usage(name, samples=0)
    except redis.ResponseError:
        size = None  # this server does not know the command, or does not allow it
    if size is None or size > SMALL:
        return FIRST
    return max(FIRST, min(MOST, PAGE * len(raw) // max(1, sum(map(len, raw)))))


def _mark(raw: bytes) -> bytes:
    return raw if len(raw) <= TINY else hashlib.blake2b(raw, digest_size=16).digest()
