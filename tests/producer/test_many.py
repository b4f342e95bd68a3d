"""Waiting for many requests: ``wait``, ``as_completed`` and callbacks, all on hints that may get lost."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from perdure.producer import Client, Handle, as_completed
from perdure.producer.reading import gathering as gathering_module
from perdure.producer.reading.replies import SLICE
from perdure.protocol.connection import connect
from perdure.protocol.errors import InvalidRequest, RedisUnavailable, UnknownRequest, UsageError
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.scripts.pool.server import Server
from tests.kit.hands import LONG, PATH, Hands, subscribers, until


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, settings=Settings()) as client:
        yield client


@pytest.fixture
def hands(connection: redis.Redis) -> Hands:
    return Hands(connection)


def completing(handles: list[Handle], timeout: float | None = LONG) -> queue.Queue[Any]:
    """What ``as_completed`` gives, read by a thread of its own; at the end its error or ``None``."""
    found: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            for handle in as_completed(handles, timeout):
                found.put(handle)
            found.put(None)
        except Exception as error:
            found.put(error)

    threading.Thread(target=read, daemon=True).start()
    return found


# --- wait ----------------------------------------------------------------------------------------


def test_waiting_tells_whether_it_has_ended(client: Client, hands: Hands) -> None:
    good, bad = client.submit_many([(PATH, 1), (PATH, 2)])
    assert good.wait(timeout=0) is False
    assert good.wait(timeout=0.01) is False
    hands.finish(hands.claim()[0], 0)
    bad.cancel()
    assert (good.wait(timeout=math.inf), bad.wait()) == (True, True)
    with pytest.raises(UnknownRequest):
        client.get("nobody").wait()


# --- as_completed --------------------------------------------------------------------------------


def test_handles_come_in_the_order_of_their_ends(client: Client, hands: Hands) -> None:
    handles = client.submit_many([(PATH, index) for index in range(6)])
    claims = {claim.id: claim for claim in hands.claim(number=6)}
    hands.finish(claims[handles[4].id], 0)
    found = completing([*handles, *handles])
    assert found.get(timeout=LONG) == handles[4]
    for index in (2, 5, 0):
        hands.finish(claims[handles[index].id], 0)
        assert found.get(timeout=LONG) == handles[index]
    for index in (1, 3):
        client.get(handles[index].id).cancel()
        assert hands.store.cancel(
            [(handles[index].id, claims[handles[index].id].execution)], reason="x", incarnation="hands", worker="hands"
        ) == ["canceled"]
        assert found.get(timeout=LONG) == handles[index]
    assert found.get(timeout=LONG) is None
    until(lambda: not client._session.replies._watches)


def test_handles_may_be_of_several_clients(client: Client, hands: Hands, redis_url: str) -> None:
    with Client(redis_url, settings=Settings()) as other:
        one, two = client.submit(PATH, 1), other.submit(PATH, 2)
        found = completing([one, two])
        for claim in [*hands.claim(), *hands.claim()]:
            hands.finish(claim, 0)
        assert {found.get(timeout=LONG), found.get(timeout=LONG)} == {one, two}
        assert found.get(timeout=LONG) is None
    assert list(as_completed([])) == []


def test_waiting_for_many_ends_at_its_timeout(client: Client, hands: Hands) -> None:
    handles = client.submit_many([(PATH, index) for index in range(3)])
    hands.finish(hands.claim()[0], 0)
    found = as_completed(handles, timeout=0)
    assert next(found) == handles[0]
    with pytest.raises(TimeoutError, match="2 of 3 requests have not ended within 0 s"):
        next(found)
    assert not client._session.replies._watches
    with pytest.raises(InvalidRequest, match="timeout"):
        as_completed(handles, timeout=-1)
    with pytest.raises(UnknownRequest, match="nobody"):
        next(as_completed([client.get("nobody")]))


def test_lost_hints_cost_time_and_nothing_else(
    client: Client, hands: Hands, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody hears of these ends: the job hashes name a channel to which nobody listens."""
    monkeypatch.setattr(gathering_module, "RESULT_SILENCE", 0.5)
    handles = client.submit_many([(PATH, index) for index in range(100)])
    found = completing(handles)
    until(lambda: len(client._session.replies._watches) == 100)
    for handle in handles:
        connection.hset(key("job", handle.id), "client", "nobody")
    for claim in hands.claim(number=100):
        hands.finish(claim, 0)
    assert {found.get(timeout=LONG) for _ in handles} == set(handles)


def test_closing_the_client_ends_the_waiting(client: Client) -> None:
    found = completing([client.submit(PATH, 1)])
    until(lambda: client._session.replies._watches)
    client.close()
    error = found.get(timeout=LONG)
    assert isinstance(error, UsageError)
    assert "closed" in str(error)


def test_a_call_that_the_close_cuts_short_says_so(client: Client) -> None:
    """redis-py raises nearly anything when its connection is taken away in the middle of a call."""

    def cut(store: Any) -> None:
        client.close()
        raise AttributeError("'NoneType' object has no attribute 'readline'")

    with pytest.raises(UsageError, match="closed"):
        client._session.attempt(cut)


def test_closing_takes_no_slice_of_the_listener(redis_url: str) -> None:
    """The listener is told, and stops at once; ten clients in a row show it, however busy the machine is."""
    began = time.monotonic()
    for _ in range(10):
        with Client(redis_url, settings=Settings()) as client:
            assert not client.submit(PATH, 1).wait(timeout=0.05)
    assert time.monotonic() - began < 5 * SLICE


# --- callbacks -----------------------------------------------------------------------------------


def test_callbacks_are_called_once_each_by_one_thread(
    client: Client, hands: Hands, connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    called: queue.Queue[tuple[str, Any, str]] = queue.Queue()

    def note(handle: Handle) -> None:
        called.put((handle.id, handle.result(), threading.current_thread().name))

    def fail(handle: Handle) -> None:
        raise RuntimeError("the callback's own mistake")

    handles = client.submit_many([(PATH, index) for index in range(300)])
    with caplog.at_level(logging.ERROR, "perdure.producer"):
        for handle in handles:
            handle.add_done_callback(fail)
            handle.add_done_callback(note)
        until(lambda: len(client._session.replies._watches) == 300)
        until(lambda: len(subscribers(connection)) == 1)
        numbers: dict[str, int] = {}
        for _ in range(3):
            for claim in hands.claim(number=100):
                numbers[claim.id] = len(numbers)
                hands.finish(claim, 0, numbers[claim.id])
        got = [called.get(timeout=LONG) for _ in handles]
    assert {(identifier, result) for identifier, result, _ in got} == set(numbers.items())
    assert {name for _, _, name in got} == {"perdure-callbacks"}
    assert len([record for record in caplog.records if "callback" in record.message]) == 300
    until(lambda: client._session.callbacks._thread is None)
    assert called.empty()
    handles[0].add_done_callback(note)  # the thread is gone, and the request has ended
    assert called.get(timeout=LONG)[0] == handles[0].id


def test_the_callback_of_an_unknown_request_is_called(client: Client) -> None:
    called: queue.Queue[Handle] = queue.Queue()
    client.get("nobody").add_done_callback(called.put)
    with pytest.raises(UnknownRequest):
        called.get(timeout=LONG).status()


def test_callbacks_outlast_a_connection_that_is_cut_off(client: Client, hands: Hands, connection: redis.Redis) -> None:
    called: queue.Queue[Handle] = queue.Queue()
    handle = client.submit(PATH, 1)
    handle.add_done_callback(called.put)
    until(lambda: subscribers(connection))
    connection.client_kill(subscribers(connection)[0]["addr"])
    hands.finish(hands.claim()[0], 0)
    assert called.get(timeout=LONG) == handle


def test_callbacks_outlast_an_outage_longer_than_the_patience(server_binary: Path) -> None:
    called: queue.Queue[Handle] = queue.Queue()
    with Server(binary=server_binary, die_with_parent=True) as server:
        with connect(server.url) as connection:
            connection.config_set("appendfsync", "always")
        with Client(server.url, settings=Settings(), patience=0) as client:
            handle = client.submit(PATH, 1)
            handle.add_done_callback(called.put)
            until(lambda: client._session.replies._watches)
            server.kill()
            with pytest.raises(RedisUnavailable):
                handle.status()
            until(lambda: client._session.replies._deaf)
            server.restart()
            with connect(server.url) as connection:
                hands = Hands(connection)
                hands.finish(hands.claim()[0], 0)
            assert called.get(timeout=LONG) == handle


def test_a_callback_may_add_another(client: Client, hands: Hands) -> None:
    called: queue.Queue[Handle] = queue.Queue()
    first, second = client.submit_many([(PATH, 1), (PATH, 2)])
    first.add_done_callback(lambda _: second.add_done_callback(called.put))
    for claim in [*hands.claim(), *hands.claim()]:
        hands.finish(claim, 0)
    assert called.get(timeout=LONG) == second


def test_no_callback_after_the_client_was_closed(client: Client, hands: Hands) -> None:
    called: queue.Queue[Handle] = queue.Queue()
    handle = client.submit(PATH, 1)
    handle.add_done_callback(called.put)
    thread = client._session.callbacks._thread
    assert thread is not None
    client.close()
    hands.finish(hands.claim()[0], 0)
    thread.join(LONG)
    assert called.empty()
    with pytest.raises(UsageError, match="closed"):
        handle.add_done_callback(called.put)


def test_many_are_looked_at_in_few_calls(client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = client.submit_many([(PATH, index) for index in range(1000)])
    calls: list[int] = []
    fetch_many = Store.fetch_many

    def counted(self: Store, identifiers: Any) -> Any:
        calls.append(len(identifiers))
        return fetch_many(self, identifiers)

    monkeypatch.setattr(Store, "fetch_many", counted)
    found = completing(handles)
    until(lambda: len(client._session.replies._watches) == 1000)
    assert len(calls) <= 100
    handles[7].cancel()
    assert found.get(timeout=LONG) == handles[7]
