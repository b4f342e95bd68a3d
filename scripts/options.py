"""The options of a submit as flags of commands, and values in JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, NoReturn

import click

from ..producer.options import Options, sentence
from .present.console import Function, visible

_KINDS: dict[str, dict[str, Any]] = {
    "str": {"metavar": "TEXT"},
    "Priority": {"metavar": "WORD"},
    "Seconds": {"metavar": "SECONDS", "type": float},
    "int": {"metavar": "N", "type": int},
    "bool": {"is_flag": True},
    "Mapping[str, Any]": {"metavar": "JSON"},
}
"""How an option is given on a command line, by the first word of its type."""


def option_flags(*names: str) -> Callable[[Function], Function]:
    """One flag for each of these options; its name, default and help are the option's."""
    known = {item.name: item for item in fields(Options)}

    def add(function: Function) -> Function:
        for item in map(known.__getitem__, reversed(names)):
            function = click.option(
                f"--{item.name.replace('_', '-')}",
                default=item.default,
                show_default=isinstance(item.default, str),
                help=sentence(item),
                **_KINDS[_kind(item)],
            )(function)
        return function

    return add


def read_options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags give, as a submit takes it. Raises ``click.UsageError`` for what is not JSON and should be."""
    given = dict(flags)
    for item in fields(Options):
        if _kind(item).startswith("Mapping") and given.get(item.name) is not None:
            given[item.name] = read_json(given[item.name], f"--{item.name.replace('_', '-')}")
    return given


def _kind(item: Field[Any]) -> str:
    return str(item.type).partition(" | ")[0]


def read_json(argument: str, what: str = "the payload") -> Any:
    """The payload. Raises ``click.UsageError`` that shows where it is wrong."""
    text = argument
    if argument == "-":
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{what} on stdin is not UTF-8: byte {error.start}") from None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text.strip() else ""
        begin = max(0, error.colno - 30)
        shown, place = visible(line[begin : error.colno + 30]), " " * (error.colno - 1 - begin)
        picture = f"\n  {shown}\n  {place}^" if line else ""
        raise click.UsageError(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{picture}"
        ) from None
    except RecursionError:
        raise click.UsageError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise click.UsageError(f"{what} is not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
