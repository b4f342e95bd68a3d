"""``perdure doctor``: what is wrong with a deployment, and the line that changes it."""

from __future__ import annotations

from dataclasses import asdict

import click

from ...recovery.strays import STUCK, find, find_everywhere, take_back
from ..main import OK, UNHEALTHY
from ..present.console import json_option, one_line, print_json, read_settings, url_option
from ..present.reading import open_store
from .findings import Finding, Level, examine_pool, examine_server, strays_found
from .host_findings import examine_host

_COLORS = {Level.FAIL: "red", Level.WARN: "yellow", Level.OK: "green"}


@click.command(
    epilog="\b\nExamples:\n"
    "  perdure doctor\n"
    "  perdure doctor --fix\n"
    "  perdure doctor --json | jq '.findings[] | select(.level != \"ok\")'"
)
@click.option("--fix", is_flag=True, help="Requeue the requests that RQ's own worker was killed with.")
@click.option("--deep", is_flag=True, help="Look for them among all jobs too; takes about a minute for a million.")
@click.option(
    "--stuck",
    default=STUCK,
    show_default=True,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Time that RQ's own worker may have a request; it hands it on at once.",
)
@click.option("--strict", is_flag=True, help="Exit with 4 for a warning too.")
@json_option
@url_option
def doctor(fix: bool, deep: bool, stuck: float, strict: bool, as_json: bool, url: str | None) -> int:
    """Check the server, the pool and this machine, and name the line to change for each finding.

    Exit codes: 0 all is well, or there are warnings only; 3 Redis cannot be reached; 4 something is to be changed.
    Nothing is changed without --fix.
    """
    settings = read_settings(url)
    with open_store(url, settings) as store:
        found = [*examine_server(store.connection), *examine_pool(store, settings)]
        queues = store.queues()
        strays = list(find(store, queues, stuck=stuck))
        if deep:
            strays += find_everywhere(store, queues)
        fixed = take_back(store, strays) if fix else []
    found += strays_found(strays, fixed, deep=deep)
    found += examine_host(settings)
    if as_json:
        print_json(
            {
                "findings": [asdict(item) for item in found],
                "strays": [asdict(stray) for stray in strays],
                "fixed": fixed,
            },
            indent=2,
        )
    else:
        for item in found:
            _print(item)
    worst = {item.level for item in found}
    return UNHEALTHY if Level.FAIL in worst or (strict and Level.WARN in worst) else OK


def _print(item: Finding) -> None:
    click.echo(f"{click.style(f'{item.level:<5}', fg=_COLORS[item.level])} {one_line(item.what)}")
    if item.why:
        click.echo(f"      {one_line(item.why)}")
    if item.change:
        click.echo(f"      change: {one_line(item.change)}")
