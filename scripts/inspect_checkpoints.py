"""``perdure checkpoints``: what is stored to go on from. Also ``python scripts/inspect_checkpoints.py``."""

from __future__ import annotations

from dataclasses import asdict

import click

from perdure.protocol.queries.inspection import checkpoints as read_checkpoints
from perdure.scripts.main import run_file
from perdure.scripts.present.console import json_option, print_json, print_table, url_option
from perdure.scripts.present.reading import duration, open_store, size


@click.command(
    epilog="\b\nExamples:\n"
    "  perdure checkpoints\n"
    "  perdure checkpoints --newest --limit 10\n"
    "  perdure checkpoints --json"
)
@click.option("--newest", is_flag=True, help="Newest first; default: oldest first.")
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(1, 1000), metavar="N", help="Checkpoints on a page."
)
@click.option("--cursor", default=0, type=click.IntRange(0), metavar="N", help="Continue after the previous page.")
@json_option
@url_option
def checkpoints(newest: bool, limit: int, cursor: int, as_json: bool, url: str | None) -> None:
    """List checkpoints by age, with the size of their states.

    One is stale when it is older than PERDURE_CHECKPOINT_TTL: its request, if nobody holds it, starts from zero, and
    the next sweep removes it.
    """
    with open_store(url) as store:
        found, number = read_checkpoints(store, begin=cursor, limit=limit, newest=newest)
        limit_of_age = store.settings.checkpoint_ttl
    items = [
        asdict(item) | {"age": round(item.age, 3), "stale": item.age > limit_of_age and not item.held} for item in found
    ]
    following = cursor + len(items) if cursor + len(items) < number and items else None
    if as_json:
        print_json({"items": items, "cursor": following, "number": number})
        return
    if items:
        rows = [
            [
                item["id"],
                item["queue"],
                item["status"],
                item["seq"],
                item["offset"],
                size(item["bytes"]),
                item["chunks"] or "-",
                duration(item["age"]) + (" STALE" if item["stale"] else ""),
            ]
            for item in items
        ]
        print_table(("ID", "QUEUE", "STATUS", "SEQ", "OUTPUTS", "STATE", "CHUNKS", "AGE"), rows)
    else:
        click.echo("No checkpoint is stored here.", err=True)
    if following:
        click.echo(f"{number - following} more; next with: --cursor {following}", err=True)


if __name__ == "__main__":
    run_file("checkpoints")
