"""``perdure queues``: what waits, for how long, and how fast it ends. Also ``python scripts/inspect_queues.py``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from perdure.protocol.queries.inspection import queue_facts
from perdure.protocol.store import Store
from perdure.scripts.main import run_file
from perdure.scripts.present.console import json_option, print_json, print_table, url_option
from perdure.scripts.present.reading import Rates, chosen_queues, duration, open_store

EVENTS = ("submitted", "finished", "failed")


@click.command(
    epilog="\b\nExamples:\n  perdure queues\n  perdure queues gpu --sample 10\n  perdure queues --json --sample 0"
)
@click.argument("queue", required=False, metavar="[QUEUE]")
@click.option(
    "--sample",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 3600),
    metavar="SECONDS",
    help="Time over which rates are measured; 0 measures none.",
)
@json_option
@url_option
def queues(queue: str | None, sample: float, as_json: bool, url: str | None) -> None:
    """List queues, or one with its priorities.

    OLDEST is how long the first of a queue has waited. LATER counts delayed requests and retries, WORKERS those that
    serve the queue. Rates come from two looks at the counters in Redis: they count every producer and worker.
    """
    with open_store(url) as store:
        rates = Rates()
        items = read(store, queue, rates)
        if sample and items:
            time.sleep(sample)  # this is the measurement
            items = read(store, queue, rates)
    if as_json:
        print_json({"items": items})
    elif items:
        print_table(HEADER, [row(item) for item in items])
    else:
        click.echo("No queue has ever had a request here.", err=True)


HEADER = ("QUEUE", "WAITING", "OLDEST", "LATER", "RUNNING", "FAILED", "WORKERS", "IN/S", "DONE/S", "FAILED/S")


def read(store: Store, queue: str | None, rates: Rates) -> list[dict[str, Any]]:
    """Queues as ``--json`` prints them; ``per_second`` is ``null`` at the first look with these ``rates``."""
    return read_these(store, chosen_queues(store, queue), rates)


def read_these(store: Store, names: Sequence[str], rates: Rates) -> list[dict[str, Any]]:
    """The same of queues that are known."""
    facts = queue_facts(store, names)
    measured = rates.since_last({item.name: item.counters for item in facts})
    items = []
    for item in facts:
        rate = measured.get(item.name)
        per_second = None if rate is None else {name: round(rate.get(name, 0.0), 3) for name in EVENTS}
        oldest = None if item.oldest is None else round(item.oldest, 3)
        items.append(asdict(item) | {"oldest": oldest, "per_second": per_second})
    return items


def row(item: dict[str, Any]) -> list[object]:
    """One line of the table."""
    rate = item["per_second"]
    shown = ["-"] * 3 if rate is None else [f"{rate[name]:.1f}" for name in EVENTS]
    waiting = f"{item['waiting']} ({item['suspects']} suspect)" if item["suspects"] else item["waiting"]
    return [
        item["name"], waiting, duration(item["oldest"]), item["due_later"], item["running"], item["failed"],
        item["workers"], *shown,
    ]  # fmt: skip


if __name__ == "__main__":
    run_file("queues")
