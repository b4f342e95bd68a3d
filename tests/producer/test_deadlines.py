"""Deadlines where nobody sweeps: no worker and no reaper runs, and whoever waits returns all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from perdure.producer import AsyncClient, Client, Handle, as_completed, as_completed_async
from perdure.protocol.errors import DeadlineExceeded
from perdure.protocol.settings import Settings
from tests.kit.hands import LONG, PATH, Hands


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, settings=Settings()) as client:
        yield client


async def _all(client: Client, *names: str) -> list[str]:
    async with AsyncClient(client._session._url, settings=Settings()) as other:
        return [handle.id async for handle in as_completed_async(map(other.get, names))]


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["deadline", "queue_timeout"])
@pytest.mark.parametrize(
    "wait", [Handle.result, lambda handle: list(handle.stream()), lambda handle: next(as_completed([handle])).result()]
)
def test_what_waits_ends_at_its_deadline(client: Client, limit: str, wait: Callable[[Handle], Any]) -> None:
    """As a sweep would end it: the record and its history say so."""
    limits: dict[str, Any] = {limit: 0.5}
    handle = client.submit(PATH, 1, **limits)
    with pytest.raises(DeadlineExceeded):
        wait(handle)
    assert (handle.status(), handle.record().error_kind) == ("failed", "DEADLINE")
    assert [event.event for event in handle.history()] == ["submitted", "failed"]


def test_it_does_on_an_event_loop(redis_url: str) -> None:
    async def waits() -> list[Any]:
        async with AsyncClient(redis_url, settings=Settings()) as client:
            one, two = [await client.submit(PATH, n, deadline=0.5) for n in range(2)]
            return list(await asyncio.gather(one.result(), anext(two.stream()), return_exceptions=True))

    assert [type(error) for error in asyncio.run(waits())] == [DeadlineExceeded] * 2


def test_who_hears_of_nothing_ends_it_too(client: Client) -> None:
    """Another process waits for it: its hints go elsewhere."""
    with Client(client._session._url, settings=Settings()) as other:
        handle = other.submit(PATH, 1, deadline=0.5)
        with pytest.raises(DeadlineExceeded):
            client.get(handle.id).result()


@pytest.mark.slow
def test_what_runs_is_left_to_its_worker_for_a_while(client: Client, connection: redis.Redis) -> None:
    """Nobody but a sweep may take a request from a worker; who waits is told, and the answer may come later."""
    hands = Hands(connection)
    handle = client.submit(PATH, 1, deadline=0.5)
    (claim,) = hands.claim()
    words = rf"{handle.id} has not ended \d+ s after its deadline: it is running on hands"
    with pytest.raises(TimeoutError, match=words):
        handle.result()
    with pytest.raises(TimeoutError, match=words):
        list(handle.stream())
    with pytest.raises(TimeoutError, match="1 of 1 requests have not ended by their deadlines"):
        asyncio.run(_all(client, handle.id))
    assert not handle.wait(timeout=0.05)
    hands.finish(claim, 0, "late")
    assert handle.result() == "late"


def test_a_deadline_that_lies_ahead_is_waited_for(client: Client, connection: redis.Redis) -> None:
    hands = Hands(connection)
    handle = client.submit(PATH, 1, deadline=600)
    assert not handle.wait(timeout=0.2)
    (claim,) = hands.claim()
    hands.finish(claim, 0, "in time")
    assert handle.result(LONG) == "in time"
