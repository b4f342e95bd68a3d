"""The table of stored fields says where each option of a submit stands in Redis, under the names of 0.1.0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from perdure.producer import Client
from perdure.producer.options import Options
from perdure.protocol.keys import key
from perdure.protocol.records import STORED, NewRequest
from perdure.protocol.scripts import load
from perdure.protocol.settings import Settings
from perdure.protocol.transitions.rows import enqueued

PATH = "app.tasks.count"

OPTIONS: dict[str, tuple[str, Any]] = {
    "queue": ("queue", "gpu"),
    "delay": ("delay", 60),
    "deadline": ("deadline", 60),
    "deadline, a date": ("deadline_at", datetime.now(UTC) + timedelta(hours=1)),
    "queue_timeout": ("queue_timeout", timedelta(minutes=1)),
    "step_timeout": ("step_timeout", 1.5),
    "max_retries": ("max_retries", 7),
    "result_ttl": ("result_ttl", 60),
    "failure_ttl": ("failure_ttl", 60),
    "meta": ("meta", {"a": 1}),
    "degraded": ("degraded_payload", {"n": 1}),
    "idempotency_key": ("digest", "k"),
}
"""Option -> its field of a new request, and a value that is not its default."""


@pytest.fixture
def client(connection: redis.Redis) -> Iterator[Client]:
    with Client(connection=connection, settings=Settings()) as client:
        yield client


def stored(client: Client, connection: redis.Redis, **options: Any) -> dict[str, bytes]:
    found: Any = connection.hgetall(key("job", client.submit(PATH, {"n": 3}, **options).id))
    # What two requests never share, and where they are now.
    others = {"created_at", "enqueued_at", "nonce", "status"}
    return {name: value for raw, value in found.items() if (name := raw.decode()) not in others}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_stored_where_the_table_says(client: Client, connection: redis.Redis, name: str) -> None:
    """With the option and without it, those fields of the job hash differ and no others."""
    field, value = OPTIONS[name]
    plain, given = stored(client, connection), stored(client, connection, **{name.partition(",")[0]: value})
    assert {name for name in plain | given if plain.get(name) != given.get(name)} == set(STORED[field])


def test_every_option_and_every_field_is_in_the_table() -> None:
    unstored = {
        "priority",
        "id",
        "durable",
        "retry_when_degraded",
    }  # names of queue and key, and what ends with the call
    assert {item.name for item in fields(Options)} == {name.partition(",")[0] for name in OPTIONS} | unstored
    assert {item.name for item in fields(NewRequest)} - {"id", "durable"} == set(STORED) - {"data"}


def test_stored_names_are_those_of_the_first_release() -> None:
    """Workers of 0.1.0 read them, and so does whoever reads the protocol's page."""
    assert STORED["queue_timeout"] == ("queue_deadline", "counted_from")
    assert (STORED["step_timeout"], STORED["degraded_payload"][0]) == (("step_ms",), "payload_aside")


def test_what_is_stored_as_it_is_costs_two_words() -> None:
    """Every word of a call is made, sent and read; that of a bare submit had 33 of them."""
    request = NewRequest(
        id="a",
        nonce="b",
        queue="gpu",
        task=PATH,
        payload=b"",
        max_retries=3,
        result_ttl=1,
        failure_ttl=1,
        description="",
    )

    def words(*requests: NewRequest) -> int:
        return len(load("enqueue").arguments({"schema": 1, "client": "", "limit": 0}, enqueued(requests)))

    assert words(replace(request, meta=b"m")) - words(request) == 2
    assert words(request, replace(request, id="c")) - words(request) == 6
