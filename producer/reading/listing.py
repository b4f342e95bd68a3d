"""Listing requests page by page, from RQ's own lists and our leases and retries.

A page is bounded work, whatever is stored: payloads are never read, and no key is read as a whole.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ...protocol.errors import InvalidRequest
from ...protocol.keys import check_queue, key, served
from ...protocol.records import RequestRecord
from ...protocol.states import State
from ...protocol.store import Store
from ..arguments import waited, whole

MOST: Final = 1000
"""Requests that one page can have, and ids that are looked at for one page."""

_STEP = 200  # ids read at a time

# What is listed, in this order: (key, the states of what stands there). Whatever has another state now is left
# out there: a canceled request stays in its queue's list until a worker meets it.
_SECTIONS: Final[tuple[tuple[str, frozenset[State]], ...]] = (
    ("leases", frozenset({State.STARTED})),
    ("retries", frozenset({State.SCHEDULED})),
    ("suspects", frozenset({State.QUEUED})),
    ("queue", frozenset({State.QUEUED})),
    ("failed", frozenset({State.FAILED})),
    ("canceled", frozenset({State.CANCELED, State.STOPPED})),
    ("finished", frozenset({State.FINISHED})),
)


@dataclass(frozen=True, slots=True)
class Listing:
    """One page. ``cursor`` is for the next one, ``None`` after the last; a page may be shorter than its limit."""

    items: list[RequestRecord]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a listing shows of the requests that it looks at; ``None`` is any."""

    worker: str | None = None
    """Who has it, or had it last."""
    kind: str | None = None
    """Of its failure."""
    task: str | None = None
    """Its dotted path."""
    text: str | None = None
    """Part of its id, its task or the reason of its failure, in any case."""
    within: float | None = None
    """Seconds since it was submitted, at most."""

    def __post_init__(self) -> None:
        if self.within is not None:
            waited(self.within, "within")

    def fits(self, record: RequestRecord) -> bool:
        """Whether this one is shown."""
        equal = ((self.worker, record.worker), (self.kind, record.error_kind), (self.task, record.task))
        if any(asked is not None and asked != found for asked, found in equal):
            return False
        if self.text is not None:
            searched = "\n".join((record.id, record.task, record.error_reason))
            if self.text.casefold() not in searched.casefold():
                return False
        return self.within is None or time.time() - _submitted(record) <= self.within


EVERY: Final = Wanted()


def _submitted(record: RequestRecord) -> float:
    try:
        return datetime.fromisoformat(record.created_at).timestamp()
    except ValueError:
        return 0.0  # somebody else wrote it


def read_listing(
    call: Callable[[Callable[[Store], Any]], Any],
    *,
    status: str | None,
    queue: str | None,
    limit: int,
    cursor: str | None,
    wanted: Wanted = EVERY,
) -> Listing:
    """Read one page; ``call`` runs an operation on a store. Raises :class:`InvalidRequest`."""
    limit = whole(limit, "limit", 1, MOST)
    states = _states(status)
    queues = call(Store.queues) if queue is None else sorted(served(check_queue(queue)))
    begin_section, begin_queue, begin = _parse(cursor)
    items: list[RequestRecord] = []
    looked = 0
    for section, name in _places(states, queues):
        if (section, name) < (begin_section, begin_queue):
            continue
        position = begin if (section, name) == (begin_section, begin_queue) else 0
        stem, here = _SECTIONS[section]
        while True:
            if len(items) >= limit or looked >= MOST:
                return Listing(items, _cursor(section, name, position))
            number = min(_STEP, limit - len(items))
            identifiers, records = call(_page(stem, name, position, number))
            items += [
                record
                for record in records
                if record is not None and _belongs(record, here & states) and wanted.fits(record)
            ]
            position += len(identifiers)
            looked += len(identifiers)
            if len(identifiers) < number:
                break
    return Listing(items, None)


def _states(status: str | None) -> frozenset[State]:
    listed = frozenset().union(*(states for _, states in _SECTIONS))
    if status is None:
        return listed
    if status not in listed:
        names = ", ".join(sorted(listed))
        raise InvalidRequest(f"status is one of {names}, not {status!r}", "status")
    return frozenset({State(status)})


def _places(states: frozenset[State], queues: Sequence[str]) -> Iterator[tuple[int, str]]:
    for section, (_, here) in enumerate(_SECTIONS):
        if here & states:
            for queue in queues:
                yield section, queue


def _page(
    stem: str, queue: str, position: int, number: int
) -> Callable[[Store], tuple[list[str], list[RequestRecord | None]]]:
    def read(store: Store) -> tuple[list[str], list[RequestRecord | None]]:
        name, last = key(stem, queue), position + number - 1
        # Newest first, but for the queue and what waits for its time: there, the next first.
        raw: Any
        if stem == "queue":
            raw = store.connection.lrange(name, position, last)
        elif stem in ("retries", "leases", "suspects"):
            raw = store.connection.zrange(name, position, last)
        else:
            raw = store.connection.zrevrange(name, position, last)
        identifiers = [value.decode(errors="replace") for value in raw]
        return identifiers, store.fetch_many(identifiers) if identifiers else []

    return read


def _belongs(record: RequestRecord, states: frozenset[State]) -> bool:
    # Whether a request is held is decided by its execution: RQ's tools write the status of running ones, too.
    state = State.STARTED if record.execution else record.status
    return state in states


def _cursor(section: int, queue: str, position: int) -> str:
    return base64.urlsafe_b64encode(f"{section}:{position}:{queue}".encode()).decode().rstrip("=")


def _parse(cursor: str | None) -> tuple[int, str, int]:
    if not cursor:
        return 0, "", 0
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        section, position, queue = text.split(":", 2)
        return int(section), queue, max(0, int(position))
    except (ValueError, UnicodeDecodeError):
        raise InvalidRequest("this is not a cursor of a listing", "cursor") from None
