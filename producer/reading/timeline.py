"""A request's past, put together from its history and its hash.

Redis keeps only what is out of the ordinary (redeliveries, retries, restarts, ends that are no results); the
ordinary course follows from the dates in the job hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ...protocol.records import Event, RequestRecord
from ...protocol.states import State


def attempts_of(record: RequestRecord) -> int:
    """Attempts begun, from 1 once a worker had it. The hash counts those that ended by the request's own failure."""
    if not record.started_at:
        return record.attempt
    under_way = bool(record.execution) or record.status is State.FINISHED
    return max(1, record.attempt + under_way)


def complete(record: RequestRecord, history: Sequence[Event]) -> list[Event]:
    """The history with its ordinary part: submitted, started (the latest execution), finished. Oldest first."""
    events = [_event(record.created_at, "submitted"), *history]
    if record.started_at:
        events.append(_event(record.started_at, "started", record.worker, record.execution))
    if record.status is State.FINISHED and record.ended_at:
        events.append(_event(record.ended_at, "finished", record.worker))
    # By the millisecond, in which the history counts: what came in that of the submit came after it.
    return sorted((event for event in events if event is not None), key=lambda event: int(event.at * 1000 + 0.01))


def _event(date: str, name: str, worker: str = "", execution: str = "") -> Event | None:
    try:
        at = datetime.fromisoformat(date).timestamp()
    except ValueError:
        return None  # RQ blanks dates when it requeues
    return Event(at=at, event=name, worker=worker, execution=execution, offset=0, kind="", reason="")
