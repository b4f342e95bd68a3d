"""``perdure redis``: how hard the server has it. Also ``python scripts/inspect_redis.py``."""

from __future__ import annotations

from typing import Any

import click

from perdure.protocol.queries.server_load import pressure
from perdure.scripts.main import run_file
from perdure.scripts.present.console import json_option, print_json, url_option
from perdure.scripts.present.reading import clock, duration, open_store, size

_WIDTH = 14


@click.command(name="redis", epilog="\b\nExamples:\n  perdure redis\n  perdure redis --json | jq .memory.ratio")
@click.option(
    "--slow", default=10, show_default=True, type=click.IntRange(0, 128), metavar="N", help="Slow commands shown."
)
@json_option
@url_option
def redis_(slow: int, as_json: bool, url: str | None) -> None:
    """Show memory, persistence, latency and the slowest commands of the server.

    What the user has no permission to read (INFO, CONFIG, SLOWLOG) is shown as "-". Slow commands are shown without
    their arguments.
    """
    with open_store(url) as store:
        facts = pressure(store.connection, slow=slow)
    if as_json:
        print_json(facts, indent=2)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    memory, disk, load, latency = (facts[name] for name in ("memory", "persistence", "load", "latency"))
    share = "no limit" if memory["limit"] is None else f"of {size(memory['limit'])}, {100 * memory['ratio']:.0f} %"
    _line("server", f"{_or(facts['version'])}, up {duration(facts['uptime'])}, {facts['keys']} keys")
    _line(
        "memory",
        f"{size(memory['used'])} {share}; peak {size(memory['peak'])}, fragmentation {_or(memory['fragmentation'])}",
    )
    _line("policy", f"{_or(memory['policy'])}, {_or(memory['evicted'])} keys evicted")
    on = {True: "on", False: "off", None: "-"}[disk["aof"]]
    _line(
        "AOF",
        f"{on}, fsync {_or(disk['fsync'])}, last write {_or(disk['last_write'])}, "
        f"delayed {_or(disk['delayed_fsyncs'])} times",
    )
    _line(
        "load",
        f"{_or(load['commands_per_s'])} commands/s, {_or(load['clients'])} clients, "
        f"{_or(load['blocked'])} of them blocked",
    )
    _line("round trip", ", ".join(f"{name} {1000 * latency[name]:.2f} ms" for name in ("min", "median", "max")))
    for number, entry in enumerate(facts["slow"] or []):
        _line("" if number else "slow", f"{clock(entry['at'])}  {1000 * entry['seconds']:8.1f} ms  {entry['command']}")
    if facts["slow"] is None:
        _line("slow", "-")


def _line(name: str, text: str) -> None:
    click.echo(f"{name:<{_WIDTH}}{text}")


def _or(value: object) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    run_file("redis")
