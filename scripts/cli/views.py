"""``perdure show``, ``list`` and ``result``: what stands in Redis, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...protocol.keys import priority_of
from ...protocol.records import RequestRecord
from ...protocol.states import State
from ..present.console import (
    json_option,
    one_line,
    open_client,
    plain,
    print_json,
    print_table,
    say_if_degraded,
    timeout_option,
    url_option,
    visible,
    write,
)
from ..present.drawing import draw
from ..present.timeline import Execution, chart_of, executions_of
from .submitting import follow

if TYPE_CHECKING:
    from ...producer import Handle

_COLORS = {"finished": "green", "failed": "red", "canceled": "yellow", "stopped": "yellow", "started": "cyan"}
_WIDTH = 14


@click.command(
    epilog="\b\nExamples:\n"
    "  perdure show ID\n"
    "  perdure show ID --json | jq .checkpoint.offset\n"
    "  perdure show ID --svg id.svg"
)
@click.argument("identifier", metavar="ID")
@click.option(
    "--svg",
    "svg_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Draw its executions into FILE (- is stdout), and print nothing else.",
)
@json_option
@url_option
def show(identifier: str, svg_file: Path | None, as_json: bool, url: str | None) -> None:
    """Show one request: its state, its checkpoint, and what happened to it.

    Of each execution: its worker, when it began and ended, and the checkpoint that it left. The drawing has a lane for
    each worker; a red cross is the loss of one. Redis keeps only the newest checkpoint of each execution.
    """
    if svg_file is not None and as_json:
        raise click.UsageError("give --svg or --json, not both")
    with open_client(url) as client:
        say_if_degraded(client)
        handle = client.get(identifier)
        facts = describe(handle)
        now = handle.details().now
        if svg_file is not None:
            write(svg_file, draw(chart_of(handle.record(), executions(handle, now), now=now)))
            return
    if as_json:
        print_json(facts, indent=2)
    else:
        _print_facts(facts, now)


def describe(handle: Handle) -> dict[str, Any]:
    """A request as ``show --json`` prints it. ``offset`` counts stored outputs; ages are seconds, dates since 1970."""
    from ...producer.reading.timeline import attempts_of

    record = handle.record()
    point = handle.checkpoint()
    given = handle.details()
    turns = executions(handle, given.now)
    # Returns at once: it has ended. RQ may have failed it, and says why in its own way.
    error: Any = handle.exception() if record.ended and record.status is State.FAILED else None
    return {
        "id": record.id,
        "status": str(record.status),
        "queue": record.queue,
        "priority": priority_of(record.queue),
        "task": record.task,
        "attempt": attempts_of(record),
        "retries_left": given.retries_left,
        # The hash counts those since the last progress.
        "executions": max(record.executions, len(turns)),
        "worker": record.worker or None,
        "due": given.due,
        "deadline": given.deadline,
        "queue_deadline": given.queue_deadline,
        "step_timeout": given.step_timeout,
        "degraded": given.degraded,
        "idempotent": given.idempotent,
        "meta": given.meta,
        "offset": handle.offset(),
        "checkpoint": point
        and {"seq": point.seq, "offset": point.offset, "age": round(point.age, 3), "bytes": point.bytes},
        "error": error and {"kind": error.kind, "reason": error.reason},
        "traceback": (handle.traceback() or None) if error else None,
        "timeline": [item.as_dict() for item in turns],
        "history": [event.as_dict() for event in handle.history()],
    }


def executions(handle: Handle, now: float) -> list[Execution]:
    """Who has had a request, in order; ``now`` is the server's clock."""
    return executions_of(handle.record(), handle.history(), offset=handle.offset(), point=handle.checkpoint(), now=now)


def _print_facts(facts: dict[str, Any], now: float) -> None:
    def line(name: str, text: object) -> None:
        click.echo(f"{name:<{_WIDTH}}{text}")

    status = facts["status"]
    line("request", facts["id"])
    line("status", click.style(status, fg=_COLORS.get(status)) + _status_note(facts))
    for name in ("queue", "task", "attempt", "executions", "worker"):
        value = facts[name]
        line(name, "-" if value is None else one_line(value))
    # What only some requests have: no lines that say "none".
    for label, name in (("due", "due"), ("deadline", "deadline"), ("claim until", "queue_deadline")):
        if facts[name] is not None:
            line(label, _date(facts[name], now))
    if facts["step_timeout"] is not None:
        line("step timeout", f"{facts['step_timeout']:g} s")
    if facts["degraded"] is not None:
        line("degraded", "yes, it has its overrides" if facts["degraded"] else "no, but it has overrides for that")
    if facts["idempotent"]:
        line("idempotent", "yes, its id is made from a key")
    if facts["meta"] is None:
        line("meta", "not of plain values")
    elif facts["meta"]:
        line("meta", one_line(json.dumps(plain(facts["meta"]), ensure_ascii=False)))
    line("outputs", facts["offset"])
    point = facts["checkpoint"]
    if point:
        text = f"{point['seq']}, {point['offset']} outputs, {point['bytes']} bytes of state, {point['age']:.1f} s old"
        line("checkpoint", text)
    if facts["error"]:
        line("error", f"{facts['error']['kind']}: {one_line(facts['error']['reason'])}")
    for number, turn in enumerate(facts["timeline"]):
        line("" if number else "timeline", _turn(turn))
    if facts["traceback"]:
        lines = visible(facts["traceback"]).strip().splitlines()
        line("traceback", lines[0])
        for text in lines[1:]:
            click.echo(f"{'':<{_WIDTH}}{text}")
    for number, event in enumerate(facts["history"]):
        at = _clock(event["at"])
        place = f" at {event['offset']}" if event["offset"] else ""
        worker = f" on {one_line(event['worker'])}" if event["worker"] else ""
        reason = ": ".join(one_line(event[name]) for name in ("kind", "reason") if event[name])
        line("" if number else "history", f"{at}  {event['event']}{worker}{place}  {reason}".rstrip())
    _print_stacks(facts["history"])


def _print_stacks(events: Sequence[dict[str, Any]]) -> None:
    """Where the threads stood of the last worker that crashed or hung with it; earlier ones are in --json."""
    left = [event for event in events if event["evidence"]]
    if not left:
        return
    more = f" ({len(left) - 1} earlier: --json)" if len(left) > 1 else ""
    click.echo(f"\nstacks of {one_line(left[-1]['worker'])} at its end{more}:")
    for text in left[-1]["evidence"].splitlines():
        click.echo(f"  {visible(text)}")


def _turn(turn: dict[str, Any]) -> str:
    """One execution on one line: when, where, for how long, and what it left."""
    at = "an older release's" if turn["began"] is None else _clock(turn["began"])
    parts = [f"{at}  {one_line(turn['worker'])}"]
    if turn["ended"] is None:
        parts.append("runs")
    else:
        lasted = "" if turn["began"] is None else f" after {turn['ended'] - turn['began']:.1f} s"
        parts.append(f"{turn['kind'] or turn['outcome']}{lasted}")
    parts.append(f"{turn['offset']} outputs")
    if turn["seq"] is not None:
        parts.append(f"checkpoint {turn['seq']}")
    return ", ".join(parts)


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _status_note(facts: dict[str, Any]) -> str:
    """What the number of attempts does not say: how many more there may be."""
    left = facts["retries_left"]
    if facts["status"] in ("finished", "canceled", "stopped") or facts["attempt"] < 2:
        return ""
    return f", {left} {'retry' if left == 1 else 'retries'} left"


def _date(at: float, now: float) -> str:
    """A date, and how far away it is on the server's clock."""
    date = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    away = timedelta(seconds=round(abs(at - now)))
    return f"{date}, in {away}" if at > now else f"{date}, {away} ago"


@click.command(
    name="list",
    epilog="\b\nExamples:\n"
    "  perdure list --status failed --queue gpu\n"
    "  perdure list --status failed --kind GPU_OOM\n"
    "  perdure list --text timeout --within 3600\n"
    "  perdure list --json --limit 200",
)
@click.option("--status", help="Only these: queued, started, scheduled, finished, failed, canceled, stopped.")
@click.option("--queue", metavar="NAME", help="Only this queue.")
@click.option("--worker", metavar="NAME", help="Only requests that this worker runs, or ran last.")
@click.option("--kind", metavar="KIND", help="Only failures of this kind, such as GPU_OOM.")
@click.option("--task", metavar="PATH", help="Only requests of this task.")
@click.option("--text", metavar="TEXT", help="Only requests with this in their id, task or reason of failure.")
@click.option("--within", type=float, metavar="SECONDS", help="Only requests submitted at most so long ago.")
@click.option("--limit", default=50, show_default=True, type=int, metavar="N", help="Requests on a page.")
@click.option("--cursor", metavar="CURSOR", help="Continue after the previous page.")
@json_option
@url_option
def list_(as_json: bool, url: str | None, **filters: Any) -> None:
    """List requests: running, waiting, then ended ones from the newest.

    A page reads no payloads and at most 1000 requests, even if few of them match.
    """
    with open_client(url) as client:
        say_if_degraded(client)
        page = client.list(**filters)
    items = [as_item(record) for record in page.items]
    if as_json:
        print_json({"items": items, "cursor": page.cursor})
        return
    columns = ("id", "status", "queue", "task", "attempt", "worker", "created_at")
    if items:
        rows = [["-" if item[name] is None else item[name] for name in columns] for item in items]
        print_table([name.removesuffix("_at").upper() for name in columns], rows)
    else:
        click.echo("No requests here.", err=True)
    if page.cursor:
        click.echo(f"More with: --cursor {page.cursor}", err=True)


def as_item(record: RequestRecord) -> dict[str, Any]:
    """A request as ``list --json`` prints it."""
    from ...producer.reading.timeline import attempts_of

    error = {"kind": record.error_kind, "reason": record.error_reason} if record.error_kind else None
    return {
        "id": record.id,
        "status": str(record.status),
        "queue": record.queue,
        "task": record.task,
        "attempt": attempts_of(record),
        "executions": record.executions,
        "worker": record.worker or None,
        "created_at": record.created_at or None,
        "started_at": record.started_at or None,
        "ended_at": record.ended_at or None,
        "error": error,
    }


@click.command(epilog="\b\nExamples:\n  perdure result ID --timeout 5\n  perdure result ID --stream --start 12")
@click.argument("identifier", metavar="ID")
@click.option("--stream", is_flag=True, help="Print outputs as they come, instead of the result.")
@click.option("--start", default=0, type=click.IntRange(min=0), metavar="N", help="Skip the first N outputs.")
@timeout_option("Longest time to wait; by default until it ends. 0 only looks.")
@json_option
@url_option
def result(identifier: str, stream: bool, start: int, timeout: float | None, as_json: bool, url: str | None) -> None:
    """Wait for a request and print its result.

    Exit code 4 means that it has not ended in time; it goes on.
    """
    with open_client(url) as client:
        handle = client.get(identifier)
        follow(handle, wait=not stream, stream=stream, timeout=timeout, as_json=as_json, start=start)
