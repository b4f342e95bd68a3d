"""``perdure cancel`` and ``requeue``: what a person does to requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import redis

from ...protocol.codec import RestrictedPickle
from ...protocol.connection import connect, resolve_url
from ...protocol.errors import UnknownRequest
from ...protocol.keys import check_id, check_queue, key
from ...protocol.settings import Settings
from ...protocol.store import Store
from ...protocol.transport.explaining import explained
from ..present.console import json_option, open_client, print_json, read_settings, url_option


@click.command(epilog='\b\nExamples:\n  perdure cancel ID\n  perdure cancel ID1 ID2 --reason "wrong model"')
@click.argument("identifiers", required=True, metavar="ID...", nargs=-1)
@click.option("--reason", default="", metavar="TEXT", help="For the history.")
@json_option
@url_option
def cancel(identifiers: tuple[str, ...], reason: str, as_json: bool, url: str | None) -> None:
    """Cancel requests.

    A waiting one ends at once, a running one when its worker next writes. One that has ended stays as it is.
    """
    items: list[dict[str, Any]] = []
    unknown: list[UnknownRequest] = []
    with open_client(url) as client:
        handles = [client.get(identifier) for identifier in identifiers]
        for handle in handles:
            try:
                canceled = handle.cancel(reason)
                items.append({"id": handle.id, "canceled": canceled, "status": handle.status()})
            except UnknownRequest as error:
                unknown.append(error)
    if as_json:
        print_json({"items": items})
    for item in items if not as_json else []:
        said = item["status"] if not item["canceled"] or item["status"] == "canceled" else "cancel requested"
        click.echo(f"{item['id']}  {said}")
    _complain(unknown)


@click.command(epilog="\b\nExamples:\n  perdure requeue ID\n  perdure requeue --all --queue gpu")
@click.argument("identifiers", metavar="ID...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All failed requests and jobs, instead of ids.")
@click.option("--queue", metavar="NAME", help="With --all: only those of this queue.")
@json_option
@url_option
def requeue(identifiers: tuple[str, ...], everything: bool, queue: str | None, as_json: bool, url: str | None) -> None:
    """Send failed requests back to their queues, as "rq requeue" does.

    Attempts are reset. A checkpoint younger than an hour is kept and resumed, with its outputs.
    """
    if bool(identifiers) == everything:
        raise click.UsageError("give ids, or --all")
    if queue is not None and not everything:
        raise click.UsageError("--queue goes with --all; a request knows its queue")
    settings = read_settings(url)
    address = resolve_url(settings)
    with connect(address, name="perdure-requeue") as connection, explained(address):
        done, missing = _requeue(connection, settings, identifiers, queue)
    if as_json:
        print_json({"items": [{"id": identifier} for identifier in done]})
    else:
        for identifier in done:
            click.echo(identifier)
    if everything and not done:
        click.echo("Nothing has failed.", err=True)
    _complain(missing)


def _requeue(
    connection: redis.Redis, settings: Settings, identifiers: tuple[str, ...], queue: str | None
) -> tuple[list[str], list[Exception]]:
    store = Store(connection, settings)
    store.check_protocol()
    done: list[str] = []
    missing: list[Exception] = []
    if identifiers:
        for identifier, record in zip(identifiers, store.fetch_many([*map(check_id, identifiers)]), strict=True):
            if record is None:
                missing.append(UnknownRequest(identifier))
            elif requeue_one(connection, record.queue, identifier):
                done.append(identifier)
            else:
                missing.append(click.UsageError(f"request {identifier} is {record.status}, not failed"))
    else:
        for name in store.queues() if queue is None else [check_queue(queue)]:
            done += [
                identifier for identifier in _failed(connection, name) if requeue_one(connection, name, identifier)
            ]
    return done, missing


def requeue_one(connection: redis.Redis, queue: str, identifier: str) -> bool:
    """RQ's own requeue; False if the id is not in its failed registry, or its job is gone."""
    from rq.exceptions import InvalidJobOperation, NoSuchJobError
    from rq.registry import FailedJobRegistry

    registry = FailedJobRegistry(queue, connection=connection, serializer=RestrictedPickle)
    try:
        registry.requeue(identifier)
    except (InvalidJobOperation, NoSuchJobError):
        return False
    # It may wait longer than a failed one is kept.
    for name in ("job", "output", "history", "results"):
        connection.persist(key(name, identifier))
    return True


def _failed(connection: redis.Redis, queue: str) -> Iterator[str]:
    """All ids that are in the registry now, in pages; what fails again meanwhile is left alone."""
    name = key("failed", queue)
    number: Any = connection.zcard(name)
    identifiers: list[bytes] = []
    for begin in range(0, number, 1000):
        page: Any = connection.zrange(name, begin, begin + 999)
        identifiers += page
    for identifier in identifiers[:number]:
        yield identifier.decode(errors="replace")


def _complain(errors: list[Any]) -> None:
    """Say what could not be done, after all that could was. A mistake in the call: exit code 2."""
    for error in errors:
        click.echo(f"perdure: {error}", err=True)
    if errors:
        raise click.exceptions.Exit(2)
