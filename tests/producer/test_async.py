"""The asynchronous client: the same questions on an event loop, ten thousand waiters on one connection.

The worker's side is played by the tests themselves, as in ``tests/producer/test_streams.py``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import redis

from perdure.producer import AsyncClient, AsyncHandle, Client, Handle, as_completed_async
from perdure.producer.lanes import LANES
from perdure.producer.reading import questions
from perdure.protocol.connection import connect
from perdure.protocol.errors import (
    IdempotencyConflict,
    InvalidRequest,
    OutputsRestarted,
    PerdureError,
    RedisUnavailable,
    RequestCanceled,
    RequestFailed,
    UnknownRequest,
    UsageError,
)
from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.scripts.pool.server import Server
from tests.kit.hands import LONG, PATH, Hands, subscribed_anew, subscribers, until


@pytest.fixture
def hands(connection: redis.Redis) -> Hands:
    return Hands(connection)


@pytest.fixture
def play(redis_url: str) -> Callable[..., None]:
    """Runs a scene with a client on a loop of its own; nothing may be left of it."""

    def run(scene: Callable[[AsyncClient], Awaitable[None]], *, debug: bool = True) -> None:
        async def main() -> None:
            async with asyncio.timeout(2 * LONG), AsyncClient(redis_url, settings=Settings()) as client:
                await scene(client)
                await gone(client)

        asyncio.run(main(), debug=debug)
        until(lambda: not [one for one in threading.enumerate() if one.name.startswith("perdure-")])

    return run


async def soon(condition: Callable[[], object]) -> None:
    """Wait for a condition that something else brings about."""
    async with asyncio.timeout(LONG):
        while not condition():  # noqa: ASYNC110  (a server's state rings no event)
            await asyncio.sleep(0.005)


async def gone(client: AsyncClient) -> None:
    """Whatever waited has left nothing behind."""
    await soon(lambda: len(asyncio.all_tasks()) == 1)
    assert not watches(client)
    assert not client._session._together._wishes


def watches(client: AsyncClient) -> Any:
    return client._client._session.replies._watches


async def told(coroutine: Coroutine[Any, Any, Any]) -> BaseException:
    """The error with which it ends."""
    try:
        value = await coroutine
    except PerdureError as error:
        return error
    raise AssertionError(f"it returned {value!r}")


async def first(handle: AsyncHandle, timeout: float = LONG) -> Any:  # noqa: ASYNC109  (of the stream)
    """The first output."""
    async with aclosing(handle.stream(timeout=timeout)) as stream:
        return await anext(stream)


async def collected(handle: AsyncHandle) -> list[Any]:
    """All outputs, as they are streamed."""
    return [output async for output in handle.stream(timeout=LONG)]


# --- the ordinary course -------------------------------------------------------------------------


def test_outputs_come_as_they_are_stored(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        handle = await client.submit(PATH, 1)
        stream = handle.stream(timeout=LONG)
        first = asyncio.ensure_future(anext(stream))
        await soon(lambda: watches(client))
        (claim,) = hands.claim()
        hands.put(claim, 0, "a")
        assert await first == "a"
        hands.put(claim, 1, "b", {"c": b"\x00"})
        assert [await anext(stream), await anext(stream)] == ["b", {"c": b"\x00"}]
        assert await handle.outputs() == ["a", "b", {"c": b"\x00"}]
        assert (await handle.offset(), await handle.status(), await handle.attempts()) == (3, "started", 1)
        assert not await handle.done()
        checkpoint = await handle.checkpoint()
        assert checkpoint is not None
        assert checkpoint.offset == 3
        assert await handle.wait(timeout=0) is False
        waiting = asyncio.ensure_future(handle.result(timeout=LONG))
        await soon(lambda: len(watches(client)[handle.id]) == 2)
        hands.finish(claim, 3, {"total": 3})
        assert [output async for output in stream] == []
        assert await waiting == await handle == {"total": 3}
        assert await handle.exception() is None
        assert await handle.wait() is True
        assert [event.event for event in await handle.history()] == ["submitted", "started", "finished"]
        assert (await handle.record()).id == handle.id
        assert [output async for output in handle.stream(start=2)] == [{"c": b"\x00"}]

    play(scene)


def test_every_output_of_many_streams_comes_once_and_in_order(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(20)])
        readings = [asyncio.ensure_future(collected(handle)) for handle in handles]
        claims = hands.claim(number=20)
        for offset in range(30):
            for claim in claims:
                hands.put(claim, offset, offset)
            await asyncio.sleep(0)
        for claim in claims:
            hands.finish(claim, 30)
        assert await asyncio.gather(*readings) == [list(range(30))] * 20

    play(scene)


def test_ends_that_are_no_results_are_raised(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        failing = await client.submit(PATH, 1)
        (claim,) = hands.claim()
        hands.put(claim, 0, "a")
        hands.fail(claim, FailureKind.INVALID_REQUEST, "max_tokens must be at least 1")
        stream = failing.stream()
        assert await anext(stream) == "a"
        with pytest.raises(RequestFailed, match="max_tokens"):
            await anext(stream)
        with pytest.raises(RequestFailed) as caught:
            await failing
        assert caught.value.kind == "INVALID_REQUEST"
        assert isinstance(await failing.exception(), RequestFailed)
        canceled = await client.submit(PATH, 2)
        assert await canceled.cancel("no longer needed")
        assert isinstance(await told(canceled.result()), RequestCanceled)
        for question in (client.get("nobody").result(), client.get("nobody").cancel(), client.get("nobody").wait()):
            assert isinstance(await told(question), UnknownRequest)

    play(scene)


def test_a_restart_is_told_or_followed(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        handle = await client.submit(PATH, 1)
        (claim,) = hands.claim()
        hands.put(claim, 0, "a", "b")
        strict, lax = handle.stream(timeout=LONG), handle.stream(restarts=True, timeout=LONG)
        for stream in (strict, lax):
            assert [await anext(stream), await anext(stream)] == ["a", "b"]
        again = hands.restart(claim)
        hands.put(again, 0, "a", "B")
        hands.finish(again, 2)
        with pytest.raises(OutputsRestarted):
            await anext(strict)
        assert [output async for output in lax] == ["a", "B"]

    play(scene)


def test_requests_are_stored_as_by_the_other_client(play: Any) -> None:
    async def scene(client: AsyncClient) -> None:
        await client.ping()
        one = await client.submit(PATH, {"n": 1}, id="one", queue="gpu")
        assert one == client.get("one") != Handle("one", None)
        assert repr(one) == "<AsyncHandle one>"
        assert pickle.loads(pickle.dumps(one)) == one
        assert isinstance(await told(pickle.loads(pickle.dumps(one)).status()), UsageError)
        options: dict[str, Any] = {"degraded": {"n": 0}, "step_timeout": 3, "meta": {"a": 1}, "delay": 60}
        small = await client.submit(PATH, {"n": 1}, **options)
        details = await small.details()
        assert (details.degraded, details.step_timeout, details.meta) == (False, 3.0, {"a": 1})
        assert details.due is not None
        assert 0 < details.due - details.now <= 60
        assert await small.degraded() is False
        assert isinstance(await told(client.get("nobody").details()), UnknownRequest)
        many = await client.submit_many([(PATH, index) for index in range(300)])
        assert len({handle.id for handle in many}) == 300
        assert isinstance(await told(client.submit(PATH, {"n": 2}, id="one")), IdempotencyConflict)
        assert isinstance(await told(client.submit(PATH, object())), InvalidRequest)
        assert [record.id for record in (await client.list(queue="gpu")).items] == ["one"]
        with pytest.raises(InvalidRequest, match="start"):
            one.stream(start=-1)

    play(scene)


def test_both_kinds_take_the_same_arguments() -> None:
    for blocking, awaitable, without in (
        (Client, AsyncClient, set()),
        (Handle, AsyncHandle, {"add_done_callback"}),
    ):
        names = {name for name in vars(blocking) if not name.startswith("_")} - without
        assert names == {name for name in vars(awaitable) if not name.startswith("_")}
        for name in names:
            one, other = getattr(blocking, name), getattr(awaitable, name)
            if callable(one):
                assert list(inspect.signature(one).parameters.values()) == list(
                    inspect.signature(other).parameters.values()
                ), name


# --- time ----------------------------------------------------------------------------------------


def test_waiting_too_long_says_what_the_request_does(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        handle = await client.submit(PATH, 1)
        with pytest.raises(TimeoutError, match="has not ended within 0 s: it is waiting in the queue default"):
            await handle.result(timeout=0)
        (claim,) = hands.claim()
        hands.put(claim, 0, "a")
        stream = handle.stream(timeout=0.01)
        assert await anext(stream) == "a"
        with pytest.raises(TimeoutError, match=r"running on hands.*stream\(start=1, timeout=SECONDS\)"):
            await anext(stream)
        with pytest.raises(InvalidRequest, match="timeout"):
            await handle.result(timeout=-1)

    play(scene)


def test_a_found_handle_is_awaited_like_a_submitted_one(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        submitted = await client.submit(PATH, 1, id="one")
        (claim,) = hands.claim()
        hands.finish(claim, 0, "end")
        found = await client.get("one")
        assert type(found) is type(submitted) is AsyncHandle
        assert found == submitted == client.get("one")
        assert client.get("one") == found
        assert len({found, submitted, client.get("one")}) == 1
        assert [await found, await found.result(), await client.get("one").result()] == ["end"] * 3
        assert type(pickle.loads(pickle.dumps(client.get("one")))) is AsyncHandle

    play(scene)


def test_lost_hints_cost_time_and_nothing_else(
    play: Any, hands: Hands, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody hears of these ends: the job hashes name a channel to which nobody listens."""
    monkeypatch.setattr(questions, "RESULT_SILENCE", 0.5)

    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(100)])
        results = [asyncio.ensure_future(handle.result(timeout=LONG)) for handle in handles]
        stream = asyncio.ensure_future(collected(handles[0]))
        await soon(lambda: len(watches(client)) == 100)
        for handle in handles:
            connection.hset(key("job", handle.id), "client", "nobody")
        for claim in hands.claim(number=100):
            if claim.id == handles[0].id:
                hands.put(claim, 0, "a")
            hands.finish(claim, int(claim.id == handles[0].id), claim.id)
        assert await asyncio.gather(*results) == [handle.id for handle in handles]
        assert await stream == ["a"]

    play(scene)


def test_a_request_without_a_producer_can_be_waited_for(play: Any, hands: Hands, connection: redis.Redis) -> None:
    async def scene(client: AsyncClient) -> None:
        handle = await client.submit(PATH, 1)
        connection.hset(key("job", handle.id), "client", "")
        waiting = asyncio.ensure_future(handle.result(timeout=LONG))
        await soon(lambda: client._session._together._reading is None)
        hands.finish(hands.claim()[0], 0, 7)
        assert await waiting == 7

    play(scene)


# --- many waiters, one listener ------------------------------------------------------------------


@pytest.mark.slow
def test_thousands_wait_on_one_connection(
    play: Any, hands: Hands, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 2000
    calls: list[int] = []
    fetch_many = Store.fetch_many

    def counted(self: Store, identifiers: Any) -> Any:
        calls.append(len(identifiers))
        return fetch_many(self, identifiers)

    monkeypatch.setattr(Store, "fetch_many", counted)

    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(number)])
        assert subscribers(connection) == []  # nobody waits yet
        waiting = [asyncio.ensure_future(handle.result(timeout=math.inf)) for handle in handles]
        await soon(lambda: len(watches(client)) == number and subscribers(connection))
        await soon(lambda: client._session._together._reading is None)
        assert len(calls) <= number / 10
        threads = [one for one in threading.enumerate() if one.name.startswith("perdure-")]
        assert len(threads) <= 2 * LANES + 1
        results: dict[str, int] = {}
        while len(results) < number:
            claims = hands.claim(number=128)
            for claim in claims:
                results[claim.id] = len(results)
                hands.finish(claim, 0, results[claim.id])
                hands.held.discard(claim.id)
            await asyncio.sleep(0)
        assert await asyncio.gather(*waiting) == [results[handle.id] for handle in handles]
        mine: Any = connection.client_list()
        assert len([item for item in mine if item["name"] == "perdure-client"]) <= LANES + 2
        assert len(subscribers(connection)) == 1

    play(scene, debug=False)


def test_a_listener_that_is_cut_off_comes_back(play: Any, hands: Hands, connection: redis.Redis) -> None:
    async def scene(client: AsyncClient) -> None:
        handle = await client.submit(PATH, 1)
        stream = handle.stream(timeout=LONG)
        (claim,) = hands.claim()
        for offset in range(3):
            output = asyncio.ensure_future(anext(stream))
            await soon(lambda: subscribers(connection))
            cut = subscribers(connection)[0]["addr"]
            connection.client_kill(cut)
            await soon(lambda cut=cut: subscribed_anew(connection, cut))  # type: ignore[misc]
            hands.put(claim, offset, offset)
            assert await output == offset
        hands.finish(claim, 3)
        assert [output async for output in stream] == []

    play(scene)


def test_handles_come_in_the_order_of_their_ends(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(4)])
        claims = {claim.id: claim for claim in hands.claim(number=4)}
        found = as_completed_async([*handles, *handles], timeout=math.inf)
        for index in (2, 0, 3):
            hands.finish(claims[handles[index].id], 0)
            assert await anext(found) == handles[index]
        hands.fail(claims[handles[1].id], FailureKind.UNKNOWN, "broken")
        assert [handle async for handle in found] == [handles[1]]
        assert {handle async for handle in as_completed_async(handles)} == set(handles)
        last = await client.submit(PATH, 5)
        found = as_completed_async([last, handles[0]], timeout=0)
        assert await anext(found) == handles[0]
        with pytest.raises(TimeoutError, match="1 of 2 requests have not ended within 0 s"):
            await anext(found)
        with pytest.raises(UnknownRequest):
            await anext(as_completed_async([last, client.get("nobody")]))

    play(scene)


# --- ends that come early ------------------------------------------------------------------------


def test_a_canceled_task_leaves_nothing_behind(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(50)])
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(handle.result(timeout=LONG)) for handle in handles]
        tasks += [asyncio.ensure_future(collected(handle)) for handle in handles]
        for turns in range(len(tasks)):  # at whatever point each of them is
            tasks[turns].cancel()
            await asyncio.sleep(0)
        await soon(lambda: all(task.done() for task in tasks))
        assert all(task.cancelled() for task in tasks)
        await gone(client)
        async with asyncio.timeout(LONG):
            waiting = asyncio.ensure_future(handles[0].result(timeout=LONG))
            await soon(lambda: watches(client))
            waiting.cancel()
            await asyncio.wait([waiting])
        await gone(client)
        assert await handles[0].status() == "queued"

    play(scene)


def test_streams_are_read_together(play: Any, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has news comes in few round trips, however many streams there are, and one thread after the other reads."""
    number = 120
    looks: list[int] = []
    look = Store.look

    def counted(self: Store, identifiers: Any, places: Any) -> Any:
        looks.append(len(places))
        return look(self, identifiers, places)

    monkeypatch.setattr(Store, "look", counted)

    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(number)])
        tasks = [asyncio.ensure_future(first(handle)) for handle in handles]
        await soon(lambda: len(watches(client)) == number and client._session._together._reading is None)
        claims = hands.claim(number=number)
        await soon(lambda: all(watch.heard for found in watches(client).values() for watch in found))
        looks.clear()
        hands.put_all(claims)
        assert await asyncio.gather(*tasks) == [handle.id for handle in handles]
        assert sum(looks) >= number
        assert len(looks) <= number / 4

    play(scene)


def test_a_log_that_cannot_be_read_costs_only_its_own_stream(play: Any, hands: Hands, connection: redis.Redis) -> None:
    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(5)])
        connection.set(key("output", handles[2].id), "no list")
        connection.set(key("job", "broken"), "no hash")
        connection.rpush(key("output", handles[3].id), b"no entry")
        tasks = [asyncio.ensure_future(first(handle)) for handle in handles]
        asked = [asyncio.ensure_future(client.get(name).status()) for name in ("broken", handles[0].id)]
        for claim in hands.claim(number=5):
            if claim.id not in (handles[2].id, handles[3].id):
                hands.put(claim, 0, claim.id)
        found = await asyncio.gather(*tasks, *asked, return_exceptions=True)
        assert [isinstance(item, PerdureError) for item in found] == [False, False, True, True, False, True, False]
        assert [found[index] for index in (0, 1, 4)] == [handles[index].id for index in (0, 1, 4)]
        assert f"the output log of request {handles[3].id} cannot be read" in str(found[3])

    play(scene)


def test_many_that_are_silent_look_seldom(play: Any) -> None:
    """All together some hundred times a second, and each at its deadline all the same."""

    async def scene(client: AsyncClient) -> None:
        handles = await client.submit_many([(PATH, index) for index in range(1000)])
        tasks = [asyncio.ensure_future(first(handle)) for handle in handles]
        await soon(lambda: len(watches(client)) == 1000)
        (watch,) = watches(client)[handles[0].id]
        assert 9.0 <= watch.patience(1.0, math.inf) <= 10.0
        assert watch.patience(1.0, 0.25) == 0.25
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        alone = asyncio.ensure_future(first(handles[0], 0.3))
        assert isinstance((await asyncio.gather(alone, return_exceptions=True))[0], TimeoutError)

    play(scene)


def test_canceling_one_task_takes_no_answer_from_others(play: Any) -> None:
    async def scene(client: AsyncClient) -> None:
        handle = await client.submit(PATH, 1)
        for turns in range(5):
            asking = asyncio.ensure_future(handle.status())
            await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            if client._session._together._reading is not None:
                client._session._together._reading.cancel()
            assert await asking == "queued"

    play(scene)


def test_a_stream_may_be_left_early(play: Any, hands: Hands) -> None:
    async def scene(client: AsyncClient) -> None:
        handle = await client.submit(PATH, 1)
        (claim,) = hands.claim()
        hands.put(claim, 0, "a", "b")
        async with aclosing(handle.stream(timeout=LONG)) as stream:
            async for output in stream:
                assert output == "a"
                assert watches(client)
                break
        assert not watches(client)

    play(scene)


def test_closing_the_client_ends_what_waits(redis_url: str, hands: Hands) -> None:
    async def main() -> None:
        client = AsyncClient(redis_url, settings=Settings())
        handles = await client.submit_many([(PATH, index) for index in range(30)])
        tasks = [asyncio.ensure_future(handle.result(timeout=math.inf)) for handle in handles]
        tasks += [asyncio.ensure_future(anext(handle.stream(timeout=math.inf))) for handle in handles]
        await soon(lambda: len(watches(client)) == 30)
        tasks += [asyncio.ensure_future(handle.result(timeout=math.inf)) for handle in handles]
        await asyncio.sleep(0)
        await client.close()
        await client.close()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, UsageError)
            assert "closed" in str(error)
        for question in (client.submit(PATH, 1), client.ping(), handles[0].status(), handles[0].result()):
            assert "closed" in str(await told(question))
        await gone(client)

    asyncio.run(main(), debug=True)


def test_a_client_belongs_to_one_loop(redis_url: str) -> None:
    client = AsyncClient(redis_url, settings=Settings())
    handle = asyncio.run(client.submit(PATH, 1))
    with pytest.raises(UsageError, match="another event loop"):
        asyncio.run(client.submit(PATH, 2))
    with pytest.raises(UsageError, match="another event loop"):
        asyncio.run(handle.result())
    asyncio.run(client.close())
    with pytest.raises(UsageError, match="closed"):
        asyncio.run(handle.result())


# --- Redis goes away -----------------------------------------------------------------------------


@pytest.fixture
def own_server(server_binary: Any) -> Iterator[Server]:
    """A server to be killed; it loses nothing that it has confirmed."""
    with Server(binary=server_binary, die_with_parent=True) as server:
        with connect(server.url) as connection:
            connection.config_set("appendfsync", "always")
        yield server


def test_streams_and_results_outlast_a_redis_that_crashes(own_server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(own_server.url, settings=Settings()) as client:
            with connect(own_server.url) as connection:
                hands = Hands(connection)
                handle = await client.submit(PATH, 1)
                stream = handle.stream(timeout=LONG)
                (claim,) = hands.claim()
                hands.put(claim, 0, "a")
                assert await anext(stream) == "a"
                result = asyncio.ensure_future(handle.result(timeout=LONG))
                await soon(lambda: len(watches(client)[handle.id]) == 2)
                await asyncio.to_thread(own_server.kill)
                submitted = asyncio.ensure_future(client.submit(PATH, 2))
                output = asyncio.ensure_future(anext(stream))
                await soon(lambda: client._client._session.replies._deaf)
                await asyncio.to_thread(own_server.restart)
                hands.put(claim, 1, "b")
                assert await output == "b"
                hands.finish(claim, 2, "ab")
                assert [output async for output in stream] == []
                assert await result == "ab"
                assert await (await submitted).status() == "queued"

    asyncio.run(main())


def test_in_an_outage_each_wait_ends_at_its_own_timeout(own_server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(own_server.url, settings=Settings(), patience=0.1) as client:
            handle = await client.submit(PATH, 1)
            await asyncio.to_thread(own_server.kill)
            patient = [asyncio.ensure_future(handle.result(timeout=math.inf)) for _ in range(20)]
            await soon(lambda: client._session._together._wishes)
            for question in (handle.result(timeout=0.2), anext(handle.stream(timeout=0.2)), handle.status()):
                error = await told(question)
                assert isinstance(error, RedisUnavailable)
                assert "Cannot reach Redis" in str(error)
            assert isinstance(await told(client.submit(PATH, 2)), RedisUnavailable)
            assert isinstance(await told(client.ping()), RedisUnavailable)
            assert not any(task.done() for task in patient)
        for error in await asyncio.gather(*patient, return_exceptions=True):
            assert isinstance(error, UsageError)

    asyncio.run(main())


@pytest.mark.parametrize("closing", ["async with client:", "if True:"])
def test_ctrl_c_ends_the_waiting_without_a_word(connection: redis.Redis, redis_url: str, closing: str) -> None:
    code = (
        "import asyncio, sys, perdure.producer as p\n"
        "async def main():\n"
        "    client = p.AsyncClient(sys.argv[1])\n"
        f"    {closing}\n"
        "        handle = await client.submit('app.tasks.count', 1)\n"
        "        await asyncio.gather(*[handle.result(timeout=float('inf')) for _ in range(10)])\n"
        "try: asyncio.run(main())\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, redis_url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: subscribers(connection))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=LONG) == ("interrupted\n", "")
    assert process.returncode == 0
