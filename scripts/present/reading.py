"""How the commands that only look read: one short connection, errors as one line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from ...protocol.connection import connect, resolve_url
from ...protocol.keys import check_queue, served
from ...protocol.settings import Settings
from ...protocol.store import Store
from ...protocol.transport.explaining import explained
from .console import read_settings


@contextmanager
def open_store(url: str | None, settings: Settings | None = None) -> Iterator[Store]:
    """A store on a Redis that answers now. Raises ``RedisUnavailable`` also when the answers end in between."""
    settings = read_settings(url) if settings is None else settings
    address = resolve_url(settings)
    with connect(address, name="perdure-inspect") as connection:
        store = Store(connection, settings)
        with explained(address):
            store.check_protocol()
            yield store


def chosen_queues(store: Store, queue: str | None) -> list[str]:
    """The queue with its priorities, or all that there are."""
    there = store.queues()
    if queue is None:
        return there
    return [name for name in served(check_queue(queue)) if name in there] or [queue]


def duration(seconds: float | None) -> str:
    """For people: 0.4 s, 12 s, 3 min, 2 h, 5 d."""
    if seconds is None:
        return "-"
    sign, left = ("-", -seconds) if seconds < 0 else ("", seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if left >= 2 * size:
            return f"{sign}{left / size:.0f} {unit}"
    return f"{sign}{left:.1f} s" if left < 10 else f"{sign}{left:.0f} s"


def size(number: float | None) -> str:
    """Bytes for people."""
    if number is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def clock(at: float) -> str:
    """A date in UTC, to the second."""
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "a date that is none"


class Rates:
    """Events a second between two looks at counters that only grow."""

    def __init__(self) -> None:
        self._before: dict[str, dict[str, int]] = {}
        self._at = 0.0

    def since_last(self, counters: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
        """For each queue and event; empty at the first look. A counter that was reset counts as nothing."""
        now, before, at = time.monotonic(), self._before, self._at
        self._before, self._at = counters, now
        if not at or now <= at:
            return {}
        return {
            queue: {
                event: max(0, number - before.get(queue, {}).get(event, 0)) / (now - at)
                for event, number in events.items()
            }
            for queue, events in counters.items()
        }
