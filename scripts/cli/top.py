"""``perdure top``: a pool, live. With a terminal it draws, without one it prints a screen at every turn."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from ...protocol.connection import resolve_url
from ...protocol.errors import RedisUnavailable, SettingsError
from ...protocol.queries.inspection import leases
from ...protocol.queries.server_load import pressure
from ...protocol.settings import Settings, redact
from ...protocol.store import Store
from ..inspect_leases import as_item
from ..inspect_queues import HEADER, read, row
from ..present.console import one_line, print_table, read_settings, url_option
from ..present.reading import Rates, clock, duration, open_store, size
from .workers import HEADER as WORKERS_HEADER
from .workers import as_item as worker_item
from .workers import row as worker_row

REQUESTS_HEADER = ("ID", "QUEUE", "WORKER", "TASK", "EXECUTION", "EXPIRES IN")


@click.command(epilog="\b\nExamples:\n  perdure top\n  perdure top --every 5 --queue gpu\n  perdure top --once")
@click.option(
    "--every",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Seconds between two refreshes.",
)
@click.option("--queue", metavar="NAME", help="Only this queue, with its priorities.")
@click.option(
    "--rows", default=12, show_default=True, type=click.IntRange(1, 200), metavar="N", help="Running requests shown."
)
@click.option("--once", is_flag=True, help="Measure rates for --every seconds, print once, and exit.")
@url_option
def top(every: float, queue: str | None, rows: int, once: bool, url: str | None) -> None:
    """Watch queues, workers and the requests whose leases end first. Ends with Ctrl-C.

    While Redis does not answer, the last screen stays and a line says so.
    """
    settings = read_settings(url)
    looks = Looks(settings, queue, rows)
    screen = looks.take()
    if once:
        time.sleep(every)  # this is the measurement
        _print(looks.take())
    elif sys.stdout.isatty():
        _live(looks, screen, every)
    else:
        while True:
            _print(screen)
            sys.stdout.flush()
            time.sleep(every)
            screen = looks.retake(screen)


class Looks:
    """Reads a pool again and again; rates are those between two looks."""

    def __init__(self, settings: Settings, queue: str | None, rows: int) -> None:
        self._settings = settings
        self._queue = queue
        self._rows = rows
        self._rates = Rates()

    def take(self) -> dict[str, Any]:
        """One look. Raises ``RedisUnavailable``."""
        with open_store(None, self._settings) as store:
            return self._read(store)

    def retake(self, before: dict[str, Any]) -> dict[str, Any]:
        """One look; while Redis does not answer, what was seen ``before`` and why there is nothing newer."""
        try:
            return self.take()
        except RedisUnavailable as error:
            return before | {"trouble": str(error)}

    def _read(self, store: Store) -> dict[str, Any]:
        queues = read(store, self._queue, self._rates)
        held = leases(store, [item["name"] for item in queues], within=None, limit=self._rows)
        server = pressure(store.connection, slow=0, pings=3)
        return {
            "at": time.time(), "where": redact(resolve_url(self._settings)), "mode": str(store.mode()),
            "queues": queues, "workers": [worker_item(worker) for worker in store.workers()],
            "requests": [as_item(lease) for lease in held],
            "unfit": store.unfit_devices(), "server": server, "trouble": "",
        }  # fmt: skip


def headline(screen: dict[str, Any]) -> list[str]:
    """The lines above the tables."""
    memory, load = screen["server"]["memory"], screen["server"]["load"]
    limit = "" if memory["limit"] is None else f" of {size(memory['limit'])}"
    commands = load["commands_per_s"]
    redis_line = (
        f"Redis {size(memory['used'])}{limit}, {'-' if commands is None else commands} commands/s, "
        f"round trip {1000 * screen['server']['latency']['median']:.2f} ms"
    )
    lines = [f"perdure top  {screen['where']}  {clock(screen['at'])}", one_line(screen["mode"]), redis_line]
    lines += [one_line(f"{item['device']} on {item['host']} is not used: {item['reason']}") for item in screen["unfit"]]
    return lines + ([one_line(screen["trouble"])] if screen["trouble"] else [])


def tables(screen: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[object]]]]:
    """Title, header and rows of each table."""
    requests = [
        [
            item["id"],
            item["queue"],
            item["worker"] or "-",
            item["task"] or "(plain job)",
            (item["execution"] or "-")[:8],
            duration(item["expires_in"]),
        ]
        for item in screen["requests"]
    ]
    return [
        ("queues", HEADER, [row(item) for item in screen["queues"]]),
        ("workers", WORKERS_HEADER, [worker_row(item) for item in screen["workers"]]),
        ("running, next lease to end first", REQUESTS_HEADER, requests),
    ]


def _print(screen: dict[str, Any]) -> None:
    for line in headline(screen):
        click.echo(line)
    for title, header, rows in tables(screen):
        click.echo()
        if rows:
            print_table(header, rows)
        else:
            click.echo(f"{title}: none")
    click.echo()


def _live(looks: Looks, screen: dict[str, Any], every: float) -> None:
    try:
        from rich.live import Live
    except ImportError:
        raise SettingsError("the live screen needs rich: pip install rich, or use --once") from None
    with Live(drawn(screen), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(every)
            screen = looks.retake(screen)
            live.update(drawn(screen), refresh=True)


def drawn(screen: dict[str, Any]) -> Any:
    """The screen for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first, *others = headline(screen)
    parts: list[Any] = [Text(first, "bold")]
    parts += [
        Text(line, "bold red" if "degraded" in line or line == screen["trouble"] or "is not used" in line else "dim")
        for line in others
    ]
    for title, header, rows in tables(screen):
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            header_style="dim",
            expand=False,
        )
        for name in header:
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for cells in rows:
            table.add_row(*(Text(one_line(cell)) for cell in cells))
        parts += [Text(), table if rows else Text(f"{title}: none", "dim")]
    return Group(*parts)
