"""``perdure inspect-key``: one key of ours or RQ's, decoded. Also ``python scripts/inspect_key.py``."""

from __future__ import annotations

import json
from typing import Any

import click

from perdure.protocol.errors import UsageError
from perdure.protocol.keys import NAMES, key
from perdure.protocol.store import Store
from perdure.scripts.cli.decoding import read_key
from perdure.scripts.main import run_file
from perdure.scripts.present.console import json_option, one_line, plain, print_json, url_option
from perdure.scripts.present.reading import duration, open_store, size

_WIDTH = 14


@click.command(
    name="inspect-key",
    epilog="\b\nExamples:\n  perdure inspect-key rq:job:ID\n  perdure inspect-key output:ID --limit 3\n"
    "  perdure inspect-key mode --json",
)
@click.argument("name", metavar="KEY")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), metavar="N", help="Elements shown."
)
@json_option
@url_option
def inspect_key(name: str, limit: int, as_json: bool, url: str | None) -> None:
    """Decode one key: msgpack as values, scores as dates, tracebacks as text.

    KEY is the whole name (rq:perdure:checkpoint:ID) or its end (checkpoint:ID). Nothing is unpickled: of a pickle
    only the constants are shown. Of values above 1 MiB only the size is shown.
    """
    with open_store(url) as store:
        facts = _find(store, name, limit)
    if facts is None:
        raise UsageError(f"there is no key {name}; the names of keys begin with {', '.join(sorted(NAMES)[:4])}, …")
    if as_json:
        print_json(facts, indent=2)
    else:
        _print(facts)


def _find(store: Store, name: str, limit: int) -> dict[str, Any] | None:
    facts = read_key(store.connection, name, limit)
    kind, colon, identifier = name.partition(":")
    if facts is None and kind in NAMES and bool(colon) == NAMES[kind].endswith(":"):
        facts = read_key(store.connection, key(kind, identifier), limit)
    return facts


def _print(facts: dict[str, Any]) -> None:
    for label in ("key", "what", "type"):
        click.echo(f"{label:<{_WIDTH}}{one_line(facts[label] or 'none of ours or of RQ')}")
    click.echo(f"{'expires in':<{_WIDTH}}{'never' if facts['expires_in'] is None else duration(facts['expires_in'])}")
    click.echo(f"{'memory':<{_WIDTH}}{size(facts['memory'])}")
    click.echo(f"{'number':<{_WIDTH}}{facts['number']}")
    content = facts["content"]
    if isinstance(content, dict):
        for name, value in content.items():
            click.echo(
                f"  {one_line(name):<{_WIDTH - 2}}{_shown(value)}"
                if len(name) < _WIDTH - 2
                else f"  {one_line(name)}  {_shown(value)}"
            )
        return
    for value in content if isinstance(content, list) else [content]:
        if isinstance(value, dict) and "member" in value:
            date = f"  {value['date']}" if value["date"] else ""
            click.echo(f"  {_shown(value['member'])}  {value['score']:.15g}{date}")
        else:
            click.echo(f"  {_shown(value)}")


def _shown(value: Any) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False))


if __name__ == "__main__":
    run_file("inspect-key")
