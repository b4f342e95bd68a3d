"""What commands share: options, the way to Redis, and how values are printed."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ...protocol.errors import SettingsError
from ...protocol.settings import Settings

if TYPE_CHECKING:
    from ...producer import Client

Function = TypeVar("Function", bound=Callable[..., Any])

url_option = click.option(
    "--url", "-u", metavar="URL", help="Redis; else PERDURE_REDIS_URL, RQ_REDIS_URL, or a running embedded server."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def timeout_option(text: str) -> Callable[[Function], Function]:
    return click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help=text)


def setting_options(*names: str) -> Callable[[Function], Function]:
    """One flag for each of these settings; those that are not given arrive as ``None``."""
    described = {item.name: item for item in fields(Settings)}

    def add(function: Function) -> Function:
        for name in reversed(names):
            item = described[name]
            kind = {float: float, int: int}.get(type(item.default), str)
            flag = f"--{name.replace('_', '-')}"
            text = item.metadata["help"]
            option = click.option(flag, type=kind, metavar=kind.__name__.upper(), help=f"{text[0].upper()}{text[1:]}.")
            function = option(function)
        return function

    return add


def read_settings(url: str | None = None, **changes: Any) -> Settings:
    """The settings from environment and flags. Raises ``SettingsError``, also for an unknown ``PERDURE_*``."""
    if isinstance(changes.get("tasks"), str):
        changes["tasks"] = tuple(part.strip() for part in changes["tasks"].split(",") if part.strip())
    return Settings.from_environment(strict=True).replace(redis_url=url, **changes)


@contextmanager
def open_client(url: str | None) -> Iterator[Client]:
    """A client of a Redis that answers now: a person should not wait for an outage to end unasked."""
    from ...producer import Client

    with Client(settings=read_settings(url)) as client:
        client.ping()
        yield client


def say_if_degraded(client: Client) -> None:
    """A line on stderr, above what a command prints, while the pool is degraded."""
    mode = client.mode()
    if mode.degraded:
        click.echo(str(mode), err=True)


def write(path: Path, text: str) -> None:
    """Write a file that a flag asked for; ``-`` is stdout. Raises :class:`SettingsError` where that cannot be."""
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from None


# --- printing ------------------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Without what could steer a terminal: reasons and outputs come from outside."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def one_line(value: object) -> str:
    return visible(" ".join(str(value).split()))


def plain(value: Any) -> Any:
    """A msgpack value as JSON can hold it: bytes become ``{"base64": …}``, keys become text."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else _key(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _key(name: Any) -> str:
    return base64.b64encode(name).decode() if isinstance(name, bytes) else str(name)


def print_json(value: Any, *, indent: int | None = None) -> None:
    click.echo(json.dumps(plain(value), indent=indent))


def print_value(value: Any) -> None:
    """For people: text as it is, anything else as JSON."""
    click.echo(visible(value) if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False))


def fitted(widths: Sequence[int], least: Sequence[int], columns: int) -> list[int]:
    """Widths of a table's columns that fit into so many: the widest give way, down to the width of their header."""
    result = list(widths)
    while sum(result) + 2 * (len(result) - 1) > columns:
        slack = [width - floor for width, floor in zip(result, least, strict=True)]
        wide = max(
            (place for place in range(len(result)) if slack[place] > 0), key=lambda place: result[place], default=None
        )
        if wide is None:
            break  # no header is cut: then it is the terminal that breaks lines
        result[wide] -= 1
    return result


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else cell[: width - 1] + "…"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *lines]) for column in range(len(header))]
    if sys.stdout.isatty():
        widths = fitted(widths, [len(name) for name in header], shutil.get_terminal_size().columns)
    for number, row in enumerate([list(header), *lines]):
        text = "  ".join(_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.secho(text, bold=number == 0)
