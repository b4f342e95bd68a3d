"""The history of a request, read in pages: a line may have the stacks of a crash."""

from __future__ import annotations

from typing import Any, Final

import redis

from ..keys import key
from ..records import Event

FIRST: Final = 8
MOST: Final = 128
"""Lines that are read at once, at first and at most; one has at most some ten kilobytes."""

PAGE: Final = 64 * 1024
"""Bytes that a page should have."""


def read_history(connection: redis.Redis, identifier: str) -> list[Event]:
    """What happened to a request, oldest first; its ordinary course is not in it."""
    events = []
    start, limit = 0, FIRST
    while True:
        lines: Any = connection.lrange(key("history", identifier), start, start + limit - 1)
        for line in lines:
            try:
                events.append(Event.parse(line))
            except ValueError:
                pass  # nobody of ours wrote it
        if len(lines) < limit:
            return events
        start += limit
        fitting = PAGE * limit // max(1, sum(map(len, lines)))
        limit = max(FIRST, min(MOST, 2 * limit, fitting))
