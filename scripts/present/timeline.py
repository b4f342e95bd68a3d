"""The executions of requests in time: who had them from when to when, and what ended each.

Redis keeps the beginning and the last checkpoint of each execution that ended without a result, in the line of the
history that ended it; the rest is in the job hash. Pure: records in, executions and charts out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ...protocol.records import Checkpoint, Event, FailureKind, RequestRecord
from ...protocol.states import State
from .drawing import Bar, Chart, Cross, Link

LOSSES: Final = frozenset(
    {
        FailureKind.WORKER_LOST, FailureKind.CRASH, FailureKind.HANG, FailureKind.HOST_OOM, FailureKind.GPU_ERROR,
    }
)  # fmt: skip
"""Kinds of failure in which the request lost its worker; the others are its own."""

ENDS: Final = frozenset({"redelivered", "retry", "released", "failed", "canceled", "stopped", "finished"})

WAITING = "waiting"
"""The lane of the time in which nobody had it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One worker's turn with a request. Dates are seconds since 1970 by the server's clock.

    ``began`` is ``None`` if a release before this one ended it, ``ended`` while it runs. ``outcome`` is running,
    finished, redelivered, retry, released, failed, canceled or stopped; ``offset`` the outputs that were stored at its
    end, ``seq`` and ``stored`` the checkpoint that it left.
    """

    execution: str
    worker: str
    began: float | None
    ended: float | None
    outcome: str
    kind: str = ""
    reason: str = ""
    offset: int = 0
    seq: int | None = None
    stored: float | None = None

    @property
    def lost(self) -> bool:
        """Whether it ended because its worker did."""
        return self.kind in LOSSES and self.outcome in ("redelivered", "retry", "failed")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__} | {"lost": self.lost}


def executions_of(
    record: RequestRecord, history: Sequence[Event], *, offset: int, point: Checkpoint | None, now: float
) -> list[Execution]:
    """Known executions of a request, in order; ``offset`` counts its outputs, ``now`` is the server's clock."""
    found = [
        Execution(
            execution=event.execution,
            worker=event.worker,
            began=event.began,
            ended=event.at,
            outcome=event.event,
            kind=event.kind,
            reason=event.reason,
            offset=event.offset,
            seq=event.seq,
            stored=event.stored,
        )
        for event in history
        if event.event in ENDS and event.execution
    ]
    found.sort(key=lambda item: item.ended or 0.0)
    began = seconds(record.started_at)
    if record.execution and all(item.execution != record.execution for item in found):
        stored = None if point is None else now - point.age
        # The checkpoint may be that of the execution before.
        fresh = stored is not None and began is not None and stored >= began
        found.append(
            Execution(
                execution=record.execution,
                worker=record.worker,
                began=began,
                ended=None,
                outcome="running",
                offset=offset,
                seq=point.seq if point and fresh else None,
                stored=stored if fresh else None,
            )
        )
    elif record.status is State.FINISHED and began is not None:
        found.append(
            Execution(
                execution="",
                worker=record.worker,
                began=began,
                ended=seconds(record.ended_at),
                outcome="finished",
                offset=offset,
            )
        )
    return found


def seconds(date: str) -> float | None:
    """RQ's date as seconds since 1970; ``None`` for what is none."""
    try:
        return datetime.fromisoformat(date).timestamp()
    except ValueError:
        return None


def chart_of(record: RequestRecord, executions: Sequence[Execution], *, now: float) -> Chart:
    """One request: a lane for each worker in the order in which they had it, and one for the waiting."""
    begin = seconds(record.created_at)
    known = [item.began for item in executions if item.began is not None]
    origin = min([*known, *([] if begin is None else [begin])], default=now)
    until = seconds(record.ended_at) if record.ended else now
    chart = Chart(
        title=f"request {record.id}",
        subtitle=f"{record.task} on {record.queue}: {record.status}",
        origin=origin,
        end=max([origin, until or now, *(item.ended or now for item in executions)]),
    )
    free = begin if begin is not None else origin
    previous: Bar | None = None
    for item in executions:
        # Where the beginning is not known, only the end is drawn.
        start = item.began if item.began is not None else item.ended or now
        if start > free:
            chart.bars.append(
                Bar(lane=WAITING, begin=free, end=start, shape="waiting", title=f"waited {start - free:.1f} s")
            )
        end = item.ended if item.ended is not None else now
        bar = Bar(
            lane=item.worker or "?",
            begin=start,
            end=end,
            shape=_shape(item),
            title=_title(item),
            label=f"{item.offset} outputs" if item.offset else "",
            ticks=() if item.stored is None else (item.stored,),
        )
        chart.bars.append(bar)
        if item.lost:
            chart.crosses.append(Cross(at=end, lane=bar.lane, text=item.kind, title=item.reason))
        if previous is not None:
            chart.links.append(Link(previous, bar))
        previous, free = bar, end
    if not record.ended and not record.execution:
        chart.bars.append(Bar(lane=WAITING, begin=free, end=max(free, now), shape="waiting", title="waits"))
    return chart


def _shape(item: Execution) -> str:
    if item.lost:
        return "lost"
    return item.outcome if item.outcome in ("running", "finished", "failed") else "ended"


def _title(item: Execution) -> str:
    parts = [f"{item.outcome} on {item.worker}"]
    if item.began is not None and item.ended is not None:
        parts.append(f"{item.ended - item.began:.1f} s")
    if item.seq is not None:
        parts.append(f"checkpoint {item.seq}")
    parts += [text for text in (item.kind, item.reason) if text]
    return ", ".join(parts)
