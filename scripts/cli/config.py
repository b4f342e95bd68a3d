"""``perdure config show``: every setting, its value, and where that came from. Asks no Redis."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click

from ...protocol.connection import running_server
from ...protocol.keys import PREFIX
from ...protocol.settings import Settings, redact, variable
from ..present.console import json_option, print_json, print_table


@click.group(epilog="\b\nExamples:\n  perdure config show\n  perdure config show --changed")
def config() -> None:
    """Look at the settings."""


@config.command(
    epilog="\b\nExamples:\n"
    "  perdure config show\n"
    "  perdure config show --changed\n"
    "  PERDURE_SLOTS=4 perdure config show --json"
)
@click.option("--changed", is_flag=True, help="Only what is not a default.")
@json_option
def show(changed: bool, as_json: bool) -> None:
    """Show every setting, its value and its origin, as any command started here would see it.

    Origins: default, a PERDURE_... variable, RQ_REDIS_URL, or the embedded server that runs on this machine. Flags of a
    command go before all of them. Passwords are left out.
    """
    items = [item for item in described(os.environ) if not changed or item["origin"] != "default"]
    if as_json:
        print_json({"items": items})
    elif items:
        print_table(
            ("SETTING", "VALUE", "ORIGIN", "FLAG"),
            [[item["name"], _shown(item["value"]), item["origin"], item["flag"]] for item in items],
        )
    else:
        click.echo("All settings are defaults.", err=True)


def described(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each setting with ``name, value, origin, flag, help``. Raises ``SettingsError`` as every command does."""
    settings = Settings.from_environment(environment, strict=True)
    items = []
    for item in fields(settings):
        name, value = variable(item.name), getattr(settings, item.name)
        origin = name if name in environment and value != item.default else "default"
        # Set to what is its default: said all the same, for somebody meant it.
        if name in environment and "://" not in environment[name] and origin == "default":
            origin = name
        if item.name == "redis_url":
            value, origin = _address(settings, environment)
        items.append(
            {
                "name": name,
                "value": list(value) if isinstance(value, tuple) else value,
                "origin": origin,
                "flag": "--" + item.name.replace("_", "-"),
                "help": item.metadata["help"],
            }
        )
    given = "RQ_KEY_PREFIX" in environment
    items.append(
        {
            "name": "RQ_KEY_PREFIX",
            "value": PREFIX,
            "origin": "RQ_KEY_PREFIX" if given else "default",
            "flag": "",
            "help": "what all keys begin with",
        }
    )
    return items


def _address(settings: Settings, environment: Mapping[str, str]) -> tuple[str, str]:
    if settings.redis_url:
        own = environment.get(variable("redis_url"))
        return redact(settings.redis_url), variable("redis_url") if own else "RQ_REDIS_URL"
    server = running_server(environment)
    return (redact(server.url), f"embedded server, process {server.pid}") if server else ("", "default")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)
