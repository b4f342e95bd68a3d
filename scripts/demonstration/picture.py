"""The run of a demonstration as a chart: which worker had which request when, and what the kills did to that. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..present.drawing import Bar, Chart, Cross, Link
from ..present.timeline import executions_of, seconds
from .run import DemoKill, Record
from .verdict import DemoVerdict

TOGETHER: Final = 0.005
"""Seconds: outputs that a client gets closer together than this were stored by one checkpoint."""

KINDS: Final = {"worker": "kill -9", "tree": "kill -9 of its whole process tree"}


def picture(record: Record, verdict: DemoVerdict) -> Chart:
    """Lanes are workers, bars are executions; an execution that was killed ends with its kill."""
    title = f"kill -9 in the middle of {len(record.answers)} generations"
    chart = Chart(title=title, subtitle=_subtitle(verdict), origin=0.0, end=0.0)
    kills = {kill.worker: kill for kill in record.kills}
    for number, answer in enumerate(record.answers):
        name = answer.handle.id
        if name in record.ends:
            _add(chart, record, kills, number, name, answer.times)
    for kill in record.kills:
        lane = _lane(record, kill.worker)
        chart.crosses.append(Cross(at=record.clock + kill.at, lane=lane, text=KINDS[kill.kind], line=True))
    created = [date for end in record.ends.values() if (date := seconds(end.created_at)) is not None]
    chart.origin = min(created, default=0.0)
    chart.end = max((bar.end for bar in chart.bars), default=1.0)
    chart.bars.sort(key=lambda bar: (bar.lane, bar.begin, bar.color))
    return chart


def _add(
    chart: Chart, record: Record, kills: dict[str, DemoKill], number: int, name: str, times: Sequence[float]
) -> None:
    end = record.ends[name]
    previous: Bar | None = None
    first = 0
    executions = executions_of(end, record.histories.get(name, []), offset=len(times), point=None, now=0.0)
    for item in executions:
        if item.began is None or item.ended is None:
            continue
        kill = kills.get(item.worker) if item.lost else None
        until = item.ended if kill is None else min(item.ended, record.clock + kill.at)
        seen = [record.clock + at for at in times[first : item.offset]]
        bar = Bar(
            lane=_lane(record, item.worker),
            begin=item.began,
            end=until,
            shape="lost" if item.lost else "finished",
            title=f"request {number + 1}: outputs {first} to {item.offset} on {item.worker}",
            label=str(number + 1),
            color=number,
            ticks=_checkpoints([at for at in seen if at <= until]),
        )
        chart.bars.append(bar)
        if previous is not None:
            chart.links.append(Link(previous, bar))
        previous, first = bar, item.offset


def _checkpoints(times: Sequence[float]) -> tuple[float, ...]:
    """One tick for outputs that came together."""
    ticks: list[float] = []
    last = float("-inf")
    for at in times:
        if at - last > TOGETHER:
            ticks.append(at)
        last = at
    return tuple(ticks)


def _lane(record: Record, worker: str) -> str:
    letter = record.names.get(worker)
    return f"worker {letter}" if letter else worker


def _subtitle(verdict: DemoVerdict) -> str:
    recovered = " and ".join(
        f"{kill['recovery_ms']:,.0f} ms" for kill in verdict.kills if kill["recovery_ms"] is not None
    )
    tokens, twice = sum(row.tokens for row in verdict.rows), sum(row.recomputed for row in verdict.rows)
    ends = (
        f"{tokens} tokens, {twice} computed twice; "
        f"lost {verdict.lost}, duplicated {verdict.duplicated}, different {verdict.different}"
    )
    return f"first token elsewhere after {recovered}. {ends}" if recovered else ends
