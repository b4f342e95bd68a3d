"""Waiting and streaming: each output once and in order, whatever happens to workers, Redis and hints.

The worker's side is played by the tests themselves, with the calls that a worker makes.
"""

from __future__ import annotations

import asyncio
import math
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fakeredis
import msgpack
import pytest
import redis

from perdure.producer import AsyncClient, Client, Handle
from perdure.producer.lanes import LANES
from perdure.producer.reading import questions
from perdure.producer.reading.outputs import OutputReader
from perdure.producer.reading.steps import Call, Fetch, Join, Read, Sleep
from perdure.producer.reading.subscription import Hint
from perdure.producer.reading.watches import ReplyWatch
from perdure.protocol.codec import pack_entry, unpack_entry
from perdure.protocol.connection import connect
from perdure.protocol.errors import (
    InvalidRequest,
    OutputsLost,
    OutputsRestarted,
    PerdureError,
    RedisUnavailable,
    RequestCanceled,
    RequestFailed,
    UnknownRequest,
)
from perdure.protocol.keys import key
from perdure.protocol.reading.output_log import FIRST, LOST, MOST, LogPage, LogPlace, Outputs
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.protocol.states import State
from perdure.scripts.pool.server import Server
from tests.kit.hands import LONG, PATH, Hands, subscribed_anew, subscribers, until


class Reading:
    """A stream read by a thread of its own."""

    def __init__(self, handle: Handle, **options: Any) -> None:
        self._items: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(handle.stream(timeout=LONG, **options),), daemon=True)
        self._thread.start()

    def _read(self, stream: Iterator[Any]) -> None:
        try:
            for output in stream:
                self._items.put(output)
            self._items.put(StopIteration())
        except PerdureError as error:
            self._items.put(error)

    def take(self, number: int) -> list[Any]:
        return [self._items.get(timeout=LONG) for _ in range(number)]

    def rest(self) -> list[Any]:
        """All that is left; the last is how it ended."""
        items = []
        while not isinstance(item := self._items.get(timeout=LONG), Exception):
            items.append(item)
        self._thread.join()
        return [*items, item]


@pytest.fixture(params=["server", "fakeredis"])
def connections(request: pytest.FixtureRequest) -> Iterator[tuple[redis.Redis, redis.Redis]]:
    """Two clients of one empty Redis, the producer's and the worker's."""
    if request.param == "server":
        url = request.getfixturevalue("redis_url")
        with connect(url, name="perdure-client") as one, connect(url, name="hands") as two:
            yield one, two
    else:
        server = fakeredis.FakeServer()
        with fakeredis.FakeRedis(server=server) as one, fakeredis.FakeRedis(server=server) as two:
            yield one, two


@pytest.fixture
def client(connections: tuple[redis.Redis, redis.Redis]) -> Iterator[Client]:
    with Client(connection=connections[0], settings=Settings()) as client:
        yield client


@pytest.fixture
def hands(connections: tuple[redis.Redis, redis.Redis]) -> Hands:
    return Hands(connections[1])


def ended(items: list[Any]) -> list[Any]:
    """The outputs of a stream that came to its end."""
    assert isinstance(items[-1], StopIteration)
    return items[:-1]


# --- the ordinary course -------------------------------------------------------------------------


def test_outputs_come_as_they_are_stored(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    reading = Reading(handle)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    assert reading.take(1) == ["a"]
    hands.put(claim, 1, "b", {"c": b"\x00"})
    assert reading.take(2) == ["b", {"c": b"\x00"}]
    assert handle.outputs() == ["a", "b", {"c": b"\x00"}]
    assert (handle.offset(), handle.status(), handle.attempts()) == (3, "started", 1)
    hands.finish(claim, 3, {"total": 3})
    assert ended(reading.rest()) == []
    assert handle.result() == {"total": 3}
    assert handle.exception() is None
    assert [event.event for event in handle.history()] == ["submitted", "started", "finished"]


def test_a_stream_begins_where_it_is_told(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    (claim,) = hands.claim()
    for offset in range(0, 900, 3):  # more entries than one page
        hands.put(claim, offset, offset, offset + 1, offset + 2)
    hands.finish(claim, 900)
    assert list(handle.stream()) == handle.outputs() == list(range(900))
    assert list(handle.stream(start=877)) == list(range(877, 900))
    assert list(handle.stream(start=5000)) == []
    for wrong in (-1, True, 1.5):
        with pytest.raises(InvalidRequest, match="start"):
            handle.stream(start=wrong)  # type: ignore[arg-type]


def test_a_handle_of_another_client_hears_hints_too(client: Client, hands: Hands) -> None:
    """Polled, each wait would take seconds: 30 of them would not fit into the time limit of a test."""
    mine = client.submit(PATH, 1, id="mine")
    (claim,) = hands.claim()
    with Client(connection=connections_of(client), settings=Settings()) as other:
        reading = Reading(other.get(mine.id))
        for offset in range(300):
            hands.put(claim, offset, offset)
            assert reading.take(1) == [offset]
        hands.finish(claim, 300, "end")
        assert ended(reading.rest()) == []
        assert other.get("mine").result() == "end"


def connections_of(client: Client) -> redis.Redis:
    return client._session._connection


def test_a_failure_ends_stream_and_result_with_its_reason(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    reading = Reading(handle)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    hands.fail(claim, FailureKind.INVALID_REQUEST, "max_tokens must be at least 1")
    output, error = reading.rest()
    assert output == "a"
    assert isinstance(error, RequestFailed)
    assert (error.kind, error.reason, error.request_id) == (
        "INVALID_REQUEST",
        "max_tokens must be at least 1",
        handle.id,
    )
    assert [event["event"] for event in error.history] == ["failed"]
    with pytest.raises(RequestFailed):
        handle.result()
    assert isinstance(handle.exception(), RequestFailed)
    assert (handle.done(), handle.attempts()) == (True, 1)


def test_a_result_that_cannot_be_read_is_told(client: Client, hands: Hands, connections: Any) -> None:
    handle = client.submit(PATH, 1)
    (claim,) = hands.claim()
    hands.finish(claim, 0, "fine")
    connections[1].xadd(key("results", handle.id), {"return_value": b"bm8gcGlja2xl"})
    with pytest.raises(PerdureError, match="cannot be read"):
        handle.result()


# --- cancel --------------------------------------------------------------------------------------


def test_a_waiting_request_is_canceled_at_once(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    reading = Reading(handle)
    assert handle.cancel("no\nlonger needed")
    assert handle.cancel()
    assert isinstance(reading.rest()[-1], RequestCanceled)
    with pytest.raises(RequestCanceled, match="was canceled"):
        handle.result()
    assert hands.claim() == []
    assert [event.reason for event in handle.history() if event.event == "canceled"] == ["no longer needed"]


def test_a_running_request_is_canceled_by_its_worker(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    (claim,) = hands.claim()
    assert handle.cancel("enough")
    assert not handle.done()
    assert hands.store.renew("hands", [(claim.id, claim.execution)]) == ["cancel"]
    reading = Reading(handle)
    hands.store.cancel([(claim.id, claim.execution)], reason="enough", incarnation="hands", worker="hands")
    assert isinstance(reading.rest()[-1], RequestCanceled)
    assert handle.status() == "canceled"


def test_a_request_that_has_ended_cannot_be_canceled(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    hands.finish(hands.claim()[0], 0, 7)
    assert not handle.cancel()
    assert handle.result() == 7


# --- starting anew -------------------------------------------------------------------------------


def test_equal_outputs_of_a_restart_are_skipped(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    reading, late = Reading(handle), Reading(handle, start=2)
    (claim,) = hands.claim()
    for offset in range(4):
        hands.put(claim, offset, offset)
    assert (reading.take(4), late.take(2)) == ([0, 1, 2, 3], [2, 3])
    again = hands.restart(claim)
    hands.put(again, 0, 0, 1, 2)
    hands.put(again, 3, 3, 4, 5)
    assert (reading.take(2), late.take(2)) == ([4, 5], [4, 5])
    hands.finish(again, 6)
    assert ended(reading.rest()) == ended(late.rest()) == []
    assert handle.outputs() == [0, 1, 2, 3, 4, 5]


def test_different_outputs_of_a_restart_are_told(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    strict, lax = Reading(handle), Reading(handle, restarts=True)
    (claim,) = hands.claim()
    for offset, word in enumerate("abc"):
        hands.put(claim, offset, word)
    assert strict.take(3) == lax.take(3) == ["a", "b", "c"]
    again = hands.restart(claim)
    hands.put(again, 0, "a", "B")
    (error,) = strict.rest()
    assert isinstance(error, OutputsRestarted)
    assert error.offset == 3
    assert lax.take(2) == ["a", "B"]
    hands.finish(again, 2)
    assert ended(lax.rest()) == []


def test_a_restart_that_puts_out_less_is_told(client: Client, hands: Hands) -> None:
    """What a reader has must be the whole answer, not more than it."""
    handle = client.submit(PATH, 1)
    strict, lax = Reading(handle), Reading(handle, restarts=True)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a", "b")
    assert strict.take(2) == lax.take(2) == ["a", "b"]
    again = hands.restart(claim)
    hands.put(again, 0, "a")
    hands.finish(again, 1)
    assert isinstance(strict.rest()[-1], OutputsRestarted)
    assert ended(lax.rest()) == ["a"]
    assert handle.outputs() == ["a"]


def test_a_failed_request_that_is_requeued_goes_on(client: Client, hands: Hands, connections: Any) -> None:
    handle = client.submit(PATH, 1)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    hands.fail(claim, FailureKind.UNKNOWN, "a bug, since mended")
    output, error = Reading(handle).rest()
    assert (output, type(error)) == ("a", RequestFailed)
    connections[1].zrem(key("failed", "default"), handle.id)
    connections[1].hset(key("job", handle.id), "status", "queued")
    connections[1].rpush(key("queue", "default"), handle.id)
    assert not handle.done()
    (again,) = hands.claim()
    assert (again.epoch, again.offset) == (0, 1)
    hands.put(again, 1, "b")
    hands.finish(again, 2, "ab")
    assert list(handle.stream()) == ["a", "b"]
    assert handle.result() == "ab"


# --- a Redis that forgot its last second ---------------------------------------------------------


class Memory:
    """What Redis knew of a request at some moment; it can be made to know no more than that again."""

    KINDS = ("output", "checkpoint", "job", "results")

    def __init__(self, connection: redis.Redis, identifier: str) -> None:
        self.connection = connection
        self.names = [key(kind, identifier) for kind in self.KINDS]
        self.values = [connection.dump(name) for name in self.names]

    def return_(self) -> None:
        with self.connection.pipeline() as pipe:
            for name, value in zip(self.names, self.values, strict=True):
                pipe.delete(name)
                if value is not None:
                    pipe.restore(name, 0, value)
            pipe.execute()


LARGE = "x" * 5000
"""More than what a reader reads again with each page."""


@pytest.mark.parametrize("old", [False, True], ids=["tokens", "without"])
@pytest.mark.parametrize("size", ["", LARGE], ids=["small", "large"])
def test_equal_outputs_after_a_rollback_are_skipped(
    client: Client, hands: Hands, connections: Any, size: str, old: bool
) -> None:
    """Whatever the entries in which they come again."""
    handle = client.submit(PATH, 1)
    reading, late = Reading(handle), Reading(handle, start=2)
    (claim,) = hands.claim()
    words = [f"{number}{size}" for number in range(8)]
    hands.put(claim, 0, words[0], old=old)
    before = Memory(connections[1], handle.id)
    hands.put(claim, 1, words[1], old=old)
    hands.put(claim, 2, words[2], old=old)
    hands.put(claim, 3, words[3], words[4], old=old)
    assert (reading.take(5), late.take(3)) == (words[:5], words[2:5])
    before.return_()
    hands.put(claim, 1, words[1], words[2], words[3], old=old)
    hands.put(claim, 4, words[4], old=old)
    hands.put(claim, 5, words[5], words[6], old=old)
    assert (reading.take(2), late.take(2)) == (words[5:7], words[5:7])
    hands.put(claim, 7, words[7], old=old)
    hands.finish(claim, 8)
    assert ended(reading.rest()) == ended(late.rest()) == words[7:]
    assert handle.outputs() == list(handle.stream()) == words


@pytest.mark.parametrize("size", ["", LARGE], ids=["small", "large"])
def test_other_outputs_after_a_rollback_are_told(client: Client, hands: Hands, connections: Any, size: str) -> None:
    """Also when the last entry that was read is equal to the one that stands in its place now."""
    handle = client.submit(PATH, 1)
    strict, lax = Reading(handle), Reading(handle, restarts=True)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    before = Memory(connections[1], handle.id)
    hands.put(claim, 1, "b")
    hands.put(claim, 2, "c" + size)
    assert strict.take(3) == lax.take(3) == ["a", "b", "c" + size]
    before.return_()
    hands.put(claim, 1, "B")
    hands.put(claim, 2, "c" + size)
    hands.put(claim, 3, "d")
    (error,) = strict.rest()
    assert isinstance(error, OutputsLost)
    assert error.offset == 3
    assert "Redis has lost data" in str(error)
    assert lax.take(4) == ["a", "B", "c" + size, "d"]
    hands.finish(claim, 4)
    assert ended(lax.rest()) == []


@pytest.mark.parametrize("size", ["", LARGE], ids=["small", "large"])
def test_entries_that_are_equal_by_chance_are_no_proof(hands: Hands, client: Client, size: str) -> None:
    """What stands at the place that was read last is equal in everything but its token; what stands before is not."""
    handle = client.submit(PATH, 1)
    (claim,) = hands.claim()
    for offset, word in enumerate(("a", "b", "c" + size)):
        hands.put(claim, offset, word)
    reader = OutputReader(handle.id)
    assert reader.take(hands.store.output_page(handle.id, reader.place)) == ["a", "b", "c" + size]
    # Nobody reads while it is rolled back and grows again.
    hands.store.connection.delete(key("output", handle.id), key("checkpoint", handle.id))
    for offset, word in enumerate(("a", "B", "c" + size, "d")):
        hands.put(claim, offset, word)
    page = hands.store.output_page(handle.id, reader.place)
    assert page.lost
    assert reader.take(page) == []
    with pytest.raises(OutputsLost):
        reader.take(hands.store.output_page(handle.id, reader.place))


@pytest.mark.parametrize("size", ["", LARGE], ids=["small", "large"])
def test_a_rollback_after_which_less_is_put_out_is_told(
    client: Client, hands: Hands, connections: Any, size: str
) -> None:
    handle = client.submit(PATH, 1)
    strict, lax = Reading(handle), Reading(handle, restarts=True)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    before = Memory(connections[1], handle.id)
    hands.put(claim, 1, "b" + size)
    assert strict.take(2) == lax.take(2) == ["a", "b" + size]
    before.return_()
    hands.finish(claim, 1)
    assert isinstance(strict.rest()[-1], OutputsLost)
    assert ended(lax.rest()) == ["a"]


def test_a_rollback_to_before_a_restart(client: Client, hands: Hands, connections: Any) -> None:
    """The epoch grows, but for a store that forgets."""
    handle = client.submit(PATH, 1)
    same, other = Reading(handle), Reading(handle)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a", "b")
    before = Memory(connections[1], handle.id)
    again = hands.restart(claim)
    hands.put(again, 0, "a", "b", "c")
    assert same.take(3) == other.take(3) == ["a", "b", "c"]
    before.return_()
    hands.put(claim, 2, "c", "d")
    assert same.take(1) == other.take(1) == ["d"]
    hands.finish(claim, 4)
    assert ended(same.rest()) == ended(other.rest()) == []


def test_an_end_that_was_lost_comes_again(client: Client, hands: Hands, connections: Any) -> None:
    """A reader that has seen it has all there was; who asks later waits for the new one."""
    handle = client.submit(PATH, 1)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    before = Memory(connections[1], handle.id)
    hands.put(claim, 1, "b")
    hands.finish(claim, 2, "first")
    assert (handle.result(), list(handle.stream())) == ("first", ["a", "b"])
    before.return_()
    assert not handle.done()
    reading = Reading(handle)
    assert reading.take(1) == ["a"]
    hands.put(claim, 1, "B")
    hands.store.connection.hset(key("job", handle.id), "last", "")
    hands.finish(claim, 2, "second")
    assert ended(reading.rest()) == ["B"]
    assert handle.result() == "second"


def test_a_submit_that_was_lost_is_told(client: Client, hands: Hands, connections: Any) -> None:
    before = Memory(connections[1], "gone")
    handle = client.submit(PATH, 1, id="gone")
    reading = Reading(handle)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    assert reading.take(1) == ["a"]
    before.return_()
    error = reading.rest()[-1]
    assert isinstance(error, UnknownRequest)
    assert "or Redis has lost it" in str(error)
    with pytest.raises(UnknownRequest, match="Redis has lost it"):
        handle.result()


def test_an_older_release_reads_every_entry_of_the_log() -> None:
    """It cuts the token off, whatever the epoch."""
    for epoch in (0, 1, 7, 1000, 2**20, 2**40):
        one, other = pack_entry(epoch, 3, ["a"]), pack_entry(epoch, 3, ["a"])
        assert one != other
        read, offset, outputs = msgpack.unpackb(one, raw=False, strict_map_key=False, use_list=True)
        assert (int(read), int(offset), list(outputs)) == (epoch, 3, ["a"]) == unpack_entry(other)
    with pytest.raises(ValueError):
        unpack_entry(b"\xc1")


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["tokens", "without"])
def test_a_log_is_read_in_pages_that_are_bounded(client: Client, hands: Hands, connections: Any, old: bool) -> None:
    """A few entries of a large one at once; of one that is small as a whole, many."""
    handle = client.submit(PATH, 1)
    (claim,) = hands.claim()
    outputs = list(range(2 * MOST))
    for offset in outputs:
        hands.put(claim, offset, offset, old=old)
    whole, sizes = Outputs(), []
    while True:
        page = hands.store.output_page(handle.id, whole.place)
        sizes.append(len(page.entries))
        if not whole.take(page):
            break
    assert whole.values == outputs
    assert sizes[0] == FIRST
    connections[1].delete(key("output", handle.id))
    assert hands.store.output_page(handle.id, whole.place) is LOST
    assert whole.take(LOST)
    assert (whole.values, whole.place) == ([], LogPlace())


def log(epoch: int, *outputs: Any, size: int = 1) -> list[tuple[int, int, list[Any]]]:
    return [(epoch, at, list(outputs[at : at + size])) for at in range(0, len(outputs), size)]


def test_a_page_of_a_newer_log_is_read_again_from_the_start() -> None:
    reader = OutputReader("a")
    assert reader.feed(log(0, 1, 2, 3)) == [1, 2, 3]
    newer = log(1, 1, 2, 3, 4, 5)
    assert reader.feed(newer[reader.entry :]) == []
    assert reader.entry == 0
    assert reader.feed(newer) == [4, 5]
    assert reader.complete()


def test_a_log_with_a_hole_is_no_answer() -> None:
    with pytest.raises(PerdureError, match="lacks outputs 1 to 4"):
        OutputReader("a").feed([(0, 0, [1]), (0, 5, [2])])


def test_values_are_compared_as_values() -> None:
    for one, other in ((1, True), (0, False), (1, 1.0), ("a", b"a"), ([1], [[1]])):
        reader = OutputReader("a")
        assert reader.feed(log(0, one)) == [one]
        with pytest.raises(OutputsRestarted):
            reader.feed(log(1, other)) or reader.feed(log(1, other))
    reader = OutputReader("a")
    reader.feed(log(0, math.nan))
    reader.notice(1)
    assert reader.feed(log(1, math.nan)) == []


# --- time ----------------------------------------------------------------------------------------


def test_waiting_too_long_says_what_the_request_does(client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    with pytest.raises(TimeoutError, match=f"{handle.id} has not ended within 0 s: it is waiting in the queue default"):
        handle.result(timeout=0)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    stream = handle.stream(timeout=0.01)
    assert next(stream) == "a"
    with pytest.raises(TimeoutError, match=r"running on hands.*stream\(start=1, timeout=SECONDS\)"):
        next(stream)
    with pytest.raises(TimeoutError, match=f"perdure show {handle.id}"):
        handle.exception(timeout=0.01)
    for wrong in (-1, math.nan, "1", True):
        with pytest.raises(InvalidRequest, match="timeout"):
            handle.result(timeout=wrong)  # type: ignore[arg-type]
    hands.finish(claim, 1, "b")
    assert handle.result(timeout=math.inf) == "b"
    assert list(handle.stream(timeout=math.inf)) == ["a"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_without_a_timeout_an_end_is_waited_for_however_late(redis_url: str) -> None:
    """Longer than the 60 s that were once the default; a stream as well, though nothing new comes; on an event loop
    too.
    """

    async def wait(identifier: str) -> list[Any]:
        async with AsyncClient(redis_url, settings=Settings()) as client:
            handle = client.get(identifier)
            return [*await asyncio.gather(handle.result(), handle.wait()), [output async for output in handle.stream()]]

    with (
        connect(redis_url) as connection,
        ThreadPoolExecutor(5) as pool,
        Client(redis_url, settings=Settings()) as client,
    ):
        hands = Hands(connection)
        handle = client.submit(PATH, 1)
        (claim,) = hands.claim()
        waits = [
            pool.submit(handle.result), pool.submit(handle.result, None), pool.submit(handle.wait),
            pool.submit(lambda: list(handle.stream())), pool.submit(asyncio.run, wait(handle.id)),
        ]  # fmt: skip
        done, _ = futures.wait(waits, timeout=61, return_when=futures.FIRST_COMPLETED)
        assert not done
        hands.put(claim, 0, "late")
        hands.finish(claim, 1, "end")
        assert [one.result(LONG) for one in waits] == ["end", "end", True, ["late"], ["end", True, ["late"]]]


def test_an_endless_wait_hears_of_an_address_with_nobody() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
    with Client(url, settings=Settings(), patience=0.2) as client:
        handle = client.get("somebody")
        for call in (handle.result, handle.exception, handle.wait, lambda: list(handle.stream())):
            with pytest.raises(RedisUnavailable, match="connection refused"):
                call()


def test_an_endless_wait_outlasts_an_outage_beyond_patience(own_server: Server) -> None:
    with ThreadPoolExecutor(2) as pool, Client(own_server.url, settings=Settings(), patience=0.2) as client:
        handle = client.submit(PATH, 1)
        waits = [pool.submit(handle.result), pool.submit(lambda: list(handle.stream()))]
        until(lambda: len(client._session.replies._watches.get(handle.id, ())) == 2)
        own_server.kill()
        with pytest.raises(RedisUnavailable):
            handle.status()
        own_server.restart()
        with connect(own_server.url) as connection:
            hands = Hands(connection)
            (claim,) = hands.claim()
            hands.finish(claim, 0, "end")
        assert [one.result(LONG) for one in waits] == ["end", []]


def test_a_hint_that_is_lost_costs_time_and_nothing_else(client: Client, hands: Hands, connections: Any) -> None:
    """Nobody hears of this end: the job hash names a channel to which nobody listens."""
    handle = client.submit(PATH, 1)
    reading = Reading(handle)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    assert reading.take(1) == ["a"]
    connections[1].hset(key("job", handle.id), "client", "nobody")
    hands.put(claim, 1, "b")
    hands.finish(claim, 2)
    assert ended(reading.rest()) == ["b"]


def test_a_request_without_a_producer_can_be_waited_for(client: Client, hands: Hands, connections: Any) -> None:
    handle = client.submit(PATH, 1)
    connections[1].hset(key("job", handle.id), "client", "")
    reading = Reading(handle)
    (claim,) = hands.claim()
    hands.put(claim, 0, "a")
    hands.finish(claim, 1)
    assert ended(reading.rest()) == ["a"]


# --- many waiters, one listener ------------------------------------------------------------------


def test_all_waiters_share_one_listener(connection: redis.Redis, redis_url: str) -> None:
    hands = Hands(connection)
    with Client(redis_url, settings=Settings()) as client:
        handles = client.submit_many([(PATH, index) for index in range(50)])
        assert subscribers(connection) == []  # nobody waits yet
        results: dict[str, Any] = {}
        threads = [
            threading.Thread(target=lambda one=handle: results.update({one.id: one.result(timeout=LONG)}))
            for handle in handles
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(client._session.replies._watches) == 50)
        until(lambda: len(subscribers(connection)) == 1)
        claims = hands.claim(number=128)
        for number, claim in enumerate(claims):
            hands.finish(claim, 0, number)
        for thread in threads:
            thread.join(LONG)
        assert results == {claim.id: number for number, claim in enumerate(claims)}
        assert len(results) == 50
        assert len(subscribers(connection)) == 1
        mine: Any = connection.client_list()
        assert len([item for item in mine if item["name"] == "perdure-client"]) <= LANES + 2
    until(lambda: not subscribers(connection))


def test_a_channel_is_left_when_nobody_waits_there(connection: redis.Redis, redis_url: str) -> None:
    """A stream listens to two of each producer's: of ends, and of outputs."""
    hands = Hands(connection)
    with Client(redis_url, settings=Settings()) as one, Client(redis_url, settings=Settings()) as other:
        first, second = one.submit(PATH, 1), other.submit(PATH, 2)
        readings = [Reading(one.get(handle.id)) for handle in (first, second)]
        until(lambda: [item["sub"] for item in subscribers(connection)] == ["4"])
        claims = [*hands.claim(), *hands.claim()]
        hands.finish(claims[1], 0)
        assert ended(readings[1].rest()) == []
        until(lambda: [item["sub"] for item in subscribers(connection)] == ["2"])
        hands.finish(claims[0], 0)
        assert ended(readings[0].rest()) == []


def test_who_waits_for_an_end_is_not_told_of_outputs(
    connection: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of each of a thousand requests would wake a producer ten thousand times a second."""
    hands = Hands(connection)
    with Client(redis_url, settings=Settings()) as client, ThreadPoolExecutor(1) as pool:
        handle = client.submit(PATH, 1)
        waiting = pool.submit(handle.result)
        until(lambda: [item["sub"] for item in subscribers(connection)] == ["1"])
        (claim,) = hands.claim()
        heard: list[Hint] = []
        take = client._session.replies._take

        def taking(hints: Sequence[Hint]) -> None:
            heard.extend(hints)
            take(hints)

        monkeypatch.setattr(client._session.replies, "_take", taking)
        for offset in range(3):
            hands.put(claim, offset, offset)
        hands.finish(claim, 3)
        waiting.result(LONG)
    assert [(hint.request, hint.what) for hint in heard if hint.request] == [(handle.id, b"end")]


def test_who_claims_while_a_stream_subscribes_is_told(client: Client) -> None:
    """Between a look at the request and the subscription: that claim has seen nobody who listens."""
    handle = client.submit(PATH, 1)
    waiting = handle.record()
    running = replace(waiting, execution="e", worker="w", status=State.STARTED)
    watch = ReplyWatch(client._session.replies, handle.id, waiting.client, outputs=True)
    question = questions.stream(OutputReader(handle.id), handle.id, questions.Limit(math.inf), 1.0)
    heard = client._session.replies._heard

    def next_step(answer: Any = None) -> Any:
        step = question.send(answer)
        return question.send(LogPage()) if isinstance(step, Read) else step

    assert isinstance(next_step(), Fetch)
    assert isinstance(next_step(waiting), Join)
    assert isinstance(next_step(watch), Fetch)
    heard.update(watch.channels)  # while the request is read, as it still waits
    assert isinstance(next_step(waiting), Sleep)
    watch.look = True
    assert isinstance(next_step(), Fetch)
    told = next_step(running)
    assert isinstance(told, Call)
    assert told.operation.keywords == {"worker": "w", "identifier": handle.id}  # type: ignore[attr-defined]
    assert isinstance(next_step(), Sleep)
    question.close()
    heard.clear()


def test_a_listener_that_is_cut_off_comes_back(connection: redis.Redis, redis_url: str) -> None:
    hands = Hands(connection)
    with Client(redis_url, settings=Settings()) as client:
        handle = client.submit(PATH, 1)
        reading = Reading(handle)
        (claim,) = hands.claim()
        for offset in range(3):
            until(lambda: subscribers(connection))
            cut = subscribers(connection)[0]["addr"]
            connection.client_kill(cut)
            until(partial(subscribed_anew, connection, cut))
            hands.put(claim, offset, offset)
            assert reading.take(1) == [offset]
        hands.finish(claim, 3)
        assert ended(reading.rest()) == []


# --- Redis goes away -----------------------------------------------------------------------------


@pytest.fixture
def own_server(server_binary: Path) -> Iterator[Server]:
    """A server to be killed; it loses nothing that it has confirmed."""
    with Server(binary=server_binary, die_with_parent=True) as server:
        with connect(server.url) as connection:
            connection.config_set("appendfsync", "always")
        yield server


def test_streams_and_results_outlast_a_redis_that_crashes(own_server: Server) -> None:
    with Client(own_server.url, settings=Settings()) as client, connect(own_server.url) as connection:
        hands = Hands(connection)
        handle = client.submit(PATH, 1)
        reading = Reading(handle)
        results: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=lambda: results.put(handle.result(timeout=LONG)), daemon=True).start()
        (claim,) = hands.claim()
        hands.put(claim, 0, "a")
        assert reading.take(1) == ["a"]
        own_server.kill()
        submitted: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=lambda: submitted.put(client.submit(PATH, 2)), daemon=True).start()
        until(lambda: client._session.replies._deaf)
        own_server.restart()
        hands.put(claim, 1, "b")
        assert reading.take(1) == ["b"]
        hands.finish(claim, 2, "ab")
        assert ended(reading.rest()) == []
        assert results.get(timeout=LONG) == "ab"
        assert submitted.get(timeout=LONG).status() == "queued"


def test_in_an_outage_a_wait_ends_at_its_timeout(own_server: Server) -> None:
    with Client(own_server.url, settings=Settings(), patience=0.1) as client:
        handle = client.submit(PATH, 1)
        stream = handle.stream(timeout=0.2)
        own_server.kill()
        with pytest.raises(RedisUnavailable, match="Cannot reach Redis"):
            next(stream)
        with pytest.raises(RedisUnavailable, match="Cannot reach Redis"):
            handle.result(timeout=0.2)
        with pytest.raises(RedisUnavailable, match="Cannot reach Redis"):
            handle.status()


def test_ctrl_c_ends_the_waiting(connection: redis.Redis, redis_url: str) -> None:
    code = (
        "import sys, perdure.producer as p\n"
        "client = p.Client(sys.argv[1])\n"
        "handle = client.submit('app.tasks.count', 1)\n"
        "try: handle.result(timeout=float('inf'))\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "client.close()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, redis_url], stdout=subprocess.PIPE, text=True)
    until(lambda: subscribers(connection))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=LONG)[0] == "interrupted\n"
    assert process.returncode == 0


# --- listing -------------------------------------------------------------------------------------


def test_a_listing_turns_its_pages(client: Client, hands: Hands) -> None:
    client.submit_many([(PATH, index) for index in range(7)])
    failed, finished = hands.claim(), hands.claim()
    hands.fail(failed[0], FailureKind.UNKNOWN, "broken")
    hands.finish(finished[0], 0)
    (running,) = hands.claim()
    canceled = client.list(status="queued").items[-1].id
    client.get(canceled).cancel()
    everything, cursor = [], None
    while True:
        page = client.list(limit=2, cursor=cursor)
        everything += page.items
        cursor = page.cursor
        if cursor is None:
            break
    assert len({record.id for record in everything}) == len(everything) == 7
    words = [str(record.status) for record in everything]
    assert words == ["started", "queued", "queued", "queued", "failed", "canceled", "finished"]
    assert everything[0].id == running.id
    assert [record.id for record in client.list(status="canceled", queue="default").items] == [canceled]
    assert client.list(status="started", queue="other").items == []
    assert [record.id for record in client.list(text="BROK").items] == [failed[0].id]
    assert [record.id for record in client.list(text=running.id[12:].upper()).items] == [running.id]
    assert len(client.list(task=PATH, within=60).items) == 7
    assert client.list(task="app").items == client.list(within=0).items == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"status": "bogus"}, "status is one of"),
        ({"queue": "x" * 501}, "queue name"),
        ({"limit": 0}, "limit"),
        ({"limit": 10**6}, "limit"),
        ({"cursor": "junk"}, "cursor"),
        ({"cursor": "é"}, "cursor"),
        ({"within": -1}, "within"),
        ({"within": "1 h"}, "within"),
        ({"within": float("nan")}, "within"),
    ],
)
def test_a_listing_of_what_cannot_be_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        Client(connection=fakeredis.FakeRedis(), settings=Settings()).list(**options)
