"""``perdure workers``: who works, on what, and why a device has nobody."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from ...protocol.connection import connect, resolve_url
from ...protocol.store import Store
from ...protocol.transport.explaining import explained
from ..present.console import json_option, one_line, print_json, print_table, read_settings, url_option
from ..present.reading import duration


@click.command(
    epilog="\b\nExamples:\n  perdure workers\n  perdure workers --json | jq '.items[] | select(.ready | not)'"
)
@json_option
@url_option
def workers(as_json: bool, url: str | None) -> None:
    """List living workers, and devices that workers left because they must not be used.

    A worker that is not ready still loads its tasks, or is leaving. A device is dropped from the list when a worker
    is ready on it again, or after a day.
    """
    settings = read_settings(url)
    address = resolve_url(settings)
    with connect(address, name="perdure-workers") as connection:
        store = Store(connection, settings)
        with explained(address):
            store.check_protocol()
            items = [as_item(worker) for worker in store.workers()]
            unfit = store.unfit_devices()
    items.sort(key=lambda item: (item["host"], item["name"]))
    if as_json:
        print_json({"items": items, "unfit_devices": unfit})
        return
    if items:
        print_table(HEADER, [row(item) for item in items])
    else:
        click.echo("No worker lives.", err=True)
    for item in items:
        if item["unfit"]:
            click.secho(one_line(f"{item['name']} leaves its device: {item['unfit']}"), fg="red")
        if item["stale"]:
            text = f"{item['name']} runs old code: {item['stale']} was edited after it had been loaded; restart it"
            click.secho(one_line(text), fg="yellow")
        for lack in item["unable"]:
            text = f"{item['name']} could not load {lack['task']} ({duration(lack['seconds'])} ago): {lack['reason']}"
            click.secho(one_line(text), fg="red")
    for entry in unfit:
        at = datetime.fromtimestamp(entry["at"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        text = f"{entry['device']} on {entry['host']} is not used: {entry['reason']} ({entry['worker']}, {at})"
        click.secho(one_line(text), fg="red")


HEADER = ("NAME", "HOST", "PID", "DEVICE", "READY", "QUEUES", "BEAT", "HELD")


def as_item(worker: dict[str, Any]) -> dict[str, Any]:
    """A worker as ``--json`` prints it. ``beat_age`` and ``dead_in`` are seconds, the latter below 0 if overdue."""
    age = worker["age"]
    return {
        "name": worker["worker"],
        "incarnation": worker["incarnation"],
        "host": worker["host"],
        "pid": worker["pid"],
        "device": worker["device"],
        "ready": worker["ready"],
        "leaving": worker["leaving"],
        "queues": worker["queues"],
        "beat_age": None if age is None else round(age, 3),
        "dead_in": round(worker["dead_in"], 3),
        "held": len(worker["held"]),
        "slots": worker["slots"],
        "checkpoint_interval": worker["interval"],
        "usual_checkpoint_interval": worker["usual"],
        "task": worker["task"] or None,
        "unfit": worker["unfit"] or None,
        "unable": worker["unable"],
        "model": worker["model"] or None,
        "stale": worker["stale"] or None,
        "health": worker["health"] or None,
    }


def row(item: dict[str, Any]) -> list[object]:
    beat = "-" if item["beat_age"] is None else f"{item['beat_age']:.1f} s"
    state = "leaving" if item["leaving"] else "no" if not item["ready"] else "not for all" if item["unable"] else "yes"
    overdue = " late" if item["dead_in"] < 0 else ""
    return [
        item["name"], item["host"], item["pid"], item["device"], state, ",".join(item["queues"]), beat + overdue,
        item["held"] if item["slots"] is None else f"{item['held']} of {item['slots']}",
    ]  # fmt: skip
