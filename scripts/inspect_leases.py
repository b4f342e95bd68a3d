"""``perdure leases``: who holds what, and who has been silent longest. Also ``python scripts/inspect_leases.py``."""

from __future__ import annotations

from typing import Any

import click

from perdure.protocol.queries.inspection import Lease
from perdure.protocol.queries.inspection import leases as read_leases
from perdure.scripts.main import run_file
from perdure.scripts.present.console import json_option, print_json, print_table, url_option
from perdure.scripts.present.reading import chosen_queues, duration, open_store


@click.command(
    epilog="\b\nExamples:\n  perdure leases\n  perdure leases --within 5\n  perdure leases --queue gpu --json"
)
@click.option("--within", type=float, metavar="SECONDS", help="Only leases that expire within so many seconds.")
@click.option("--queue", metavar="NAME", help="Only this queue, with its priorities.")
@click.option(
    "--limit",
    default=50,
    show_default=True,
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Maximum number of leases.",
)
@json_option
@url_option
def leases(within: float | None, queue: str | None, limit: int, as_json: bool, url: str | None) -> None:
    """List the leases that expire first.

    Each step that a request makes renews its lease for one and a half step timeouts. A lease that is about to expire
    belongs to a slow step; one that is overdue waits for a reaper. A plain RQ job has one lease for all of its
    timeout.
    """
    with open_store(url) as store:
        found = read_leases(store, chosen_queues(store, queue), within=within, limit=limit)
    items = [as_item(lease) for lease in found]
    if as_json:
        print_json({"items": items})
    elif items:
        rows = [
            [
                item["id"],
                item["queue"],
                item["worker"] or "-",
                item["task"] or "(plain job)",
                "overdue " + duration(-item["expires_in"]) if item["expires_in"] < 0 else duration(item["expires_in"]),
            ]
            for item in items
        ]
        print_table(("ID", "QUEUE", "WORKER", "TASK", "EXPIRES IN"), rows)
    else:
        click.echo("Nothing is held." if within is None else f"No lease ends within {within:g} s.", err=True)


def as_item(lease: Lease) -> dict[str, Any]:
    """A lease as ``--json`` prints it."""
    record = lease.record
    return {
        "id": lease.id,
        "queue": lease.queue,
        "expires_in": round(lease.expires_in, 3),
        "worker": (record.worker or None) if record else None,
        "task": record.task if record else None,
        "execution": record.execution if record else None,
    }


if __name__ == "__main__":
    run_file("leases")
