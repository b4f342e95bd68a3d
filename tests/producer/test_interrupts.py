"""What comes out of the middle of a client's calls: forks, signal handlers that raise, Ctrl-C, canceled tasks,
greenlets.

Neither connection nor lane is lost, and no call reads the answer to an earlier one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import redis

from perdure.producer import AsyncClient, Client, Handle, as_completed
from perdure.producer.lanes import LANES
from perdure.protocol.connection import connect
from perdure.protocol.settings import Settings
from perdure.scripts.pool.server import Server
from tests.kit.hands import Hands
from tests.kit.lab import eventually, later

PATH = "app.tasks.count"
CHILD = 20.0
"""Seconds within which a child has to be done."""


@pytest.fixture
def own(server_binary: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that may be stopped."""
    with Server(tmp_path / "redis", binary=server_binary, die_with_parent=True) as server:
        yield server


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def in_child(work: Callable[[], object]) -> int:
    """Fork, and do this in the child; its process id. It exits with 0 if the work returns, and ends soon."""
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, CHILD)
    try:
        work()
    except BaseException as error:
        sys.stderr.write(f"child: {error!r}\n")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def waiting(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()


# --- forks -----------------------------------------------------------------------------------------


def test_a_child_works_whatever_was_in_flight_at_the_fork(own: Server) -> None:
    """Every lane of the parent waits for an answer, and so does its listener; in the child nobody ever ends that."""
    with Client(own.url, settings=Settings()) as client, connect(own.url) as connection:
        hands = Hands(connection)
        handle = client.submit(PATH, "first")
        waiter = threading.Thread(target=lambda: handle.result(timeout=CHILD))
        calls = [threading.Thread(target=client.submit, args=(PATH, n)) for n in range(LANES)]
        waiter.start()
        eventually(lambda: client._session.replies._heard)

        def work() -> None:
            client.submit(PATH, "child")
            assert handle.result(timeout=CHILD) == "end"
            assert list(handle.stream(timeout=CHILD)) == []
            assert next(as_completed([handle])) == handle
            client.close()

        with stopped(own):
            waiting(calls)
            eventually(lambda: sum(lane.owner is not None for lane in client._session._lanes._lanes) == LANES)
            child = in_child(work)
        (claim,) = hands.claim()
        hands.finish(claim, 0, "end")
        assert ended(child) == 0
        for thread in [waiter, *calls]:
            thread.join()
        assert client.submit(PATH, "parent").status() == "queued"
        assert connection.llen("rq:queue:default") == LANES + 2


def test_children_work_while_threads_use_the_client(own: Server) -> None:
    """Whatever lock a thread of the parent holds at the fork."""
    with Client(own.url, settings=Settings()) as client, connect(own.url) as connection:
        done = client.submit(PATH, "done")
        hands = Hands(connection)
        (claim,) = hands.claim()
        hands.finish(claim, 0, "end")
        stop = threading.Event()

        def use() -> None:
            while not stop.is_set():
                assert done.result() == "end"
                assert done.wait()
                done.add_done_callback(lambda _: None)

        threads = [threading.Thread(target=use) for _ in range(4)]
        waiting(threads)

        def work() -> None:
            assert done.result(timeout=CHILD) == "end"
            handle = client.submit(PATH, "child")
            called = threading.Event()
            handle.add_done_callback(lambda _: called.set())
            assert handle.wait(timeout=0.05) is False
            assert handle.cancel()
            assert called.wait(CHILD)

        try:
            children = [in_child(work) for _ in range(10)]
            assert [ended(child) for child in children] == [0] * len(children)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_stream_goes_on_in_the_child(own: Server) -> None:
    """Half is read in the parent; both read the rest."""
    with Client(own.url, settings=Settings()) as client, connect(own.url) as connection:
        hands = Hands(connection)
        stream = client.submit(PATH, 1).stream(timeout=CHILD)
        (claim,) = hands.claim()
        hands.put(claim, 0, "a")
        assert next(stream) == "a"

        def work() -> None:
            assert list(stream) == ["b"]

        child = in_child(work)
        hands.put(claim, 1, "b")
        hands.finish(claim, 2, None)
        assert ended(child) == 0
        assert list(stream) == ["b"]


def test_an_async_client_works_in_a_child(own: Server) -> None:
    client = AsyncClient(own.url, settings=Settings())

    async def main() -> int:
        handle = await client.submit(PATH, 1)
        tasks = [asyncio.ensure_future(handle.result(timeout=CHILD)) for _ in range(20)]
        with connect(own.url) as connection:
            await asyncio.to_thread(eventually, connection.pubsub_channels)

        async def there() -> None:
            assert await (await client.submit(PATH, 2)).status() == "queued"
            assert await handle.cancel()
            await client.close()

        child = in_child(lambda: asyncio.run(there()))
        assert await asyncio.to_thread(ended, child) == 0
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
        return child

    assert asyncio.run(main())


# --- exceptions out of the middle --------------------------------------------------------------------


class Interrupted(Exception):
    """What a signal handler raises."""


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGUSR1 raises :class:`Interrupted` in this thread. (SIGALRM is the test runner's.)"""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    yield
    signal.signal(signal.SIGUSR1, before)


def cut_off(call: Callable[[], object]) -> None:
    """Make this call, and interrupt it while it waits for Redis."""
    with later(0.03, lambda: os.kill(os.getpid(), signal.SIGUSR1)), pytest.raises(Interrupted):
        call()


def lanes_in_use(client: Client) -> int:
    return sum(not lane.free for lane in client._session._lanes._lanes)


def connections_of(connection: redis.Redis) -> int:
    return sum(item["name"] == "perdure-client" for item in connection.client_list())


def test_calls_that_are_interrupted_while_redis_is_slow(own: Server, interrupts: None) -> None:
    """More often than there are lanes; their answers come when the next calls read theirs."""
    with Client(own.url, settings=Settings()) as client, connect(own.url) as connection:
        one, other = client.submit(PATH, 1, id="one"), client.submit(PATH, 2, id="other")
        with stopped(own):
            for number in range(2 * LANES):
                cut_off((one if number % 2 else other).record)
        assert (one.record().id, other.record().id) == ("one", "other")
        assert lanes_in_use(client) == 0
        assert connections_of(connection) <= 2


INTERRUPTS = """
import gc, random, signal, sys
from perdure.producer import Client
from perdure.protocol.connection import connect
url, chance = sys.argv[1], random.Random(int(sys.argv[2]))
class Interrupted(Exception): pass
def handler(number, frame): raise Interrupted
signal.signal(signal.SIGALRM, handler)
client = Client(url)
handles = [client.get(f"request-{number}") for number in range(5)]
interrupted = 0
for number in range(1500):
    handle = handles[number % 5]
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1.5e-3))
        found = handle.record().id if number % 3 else next(handle.stream())
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        interrupted += 1
    except RuntimeError as error:
        # The interrupt itself: Python's Condition may be cut off where it holds no lock, and says that then.
        assert "un-acquired lock" in str(error) and isinstance(error.__context__, Interrupted), repr(error)
    else:
        assert found == handle.id, (found, handle.id)
assert 150 < interrupted < 1499, interrupted
for handle in handles:
    assert handle.record().id == next(handle.stream()) == handle.id
gc.collect()
session = client._session
assert all(lane.free for lane in session._lanes._lanes)
assert not any(map(len, session.replies._watches.values())), session.replies._watches
with connect(url) as connection:
    mine = [item for item in connection.client_list() if item["name"] == "perdure-client"]
    assert len(mine) <= 9, mine
client.close()
print("well")
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_interrupts_at_any_instruction_lose_nothing(own: Server, seed: int) -> None:
    """Thousands of calls, each cut off after another number of microseconds, or not."""
    with Client(own.url, settings=Settings()) as client, connect(own.url) as connection:
        hands = Hands(connection)
        for number in range(5):
            client.submit(PATH, number, id=f"request-{number}")
            (claim,) = hands.claim()
            hands.put(claim, 0, claim.id)
    run(INTERRUPTS, own.url, seed)


def run(script: str, *arguments: object) -> None:
    """In a process of its own, which may do with signals and threads what it likes."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "well\n", done.stderr


def test_ctrl_c_in_threads_that_wait_for_a_lane(own: Server, interrupts: None) -> None:
    """Who waits for a lane is interrupted as well; the others get theirs."""
    with Client(own.url, settings=Settings()) as client:
        done: list[str] = []
        threads = [threading.Thread(target=lambda: done.append(client.submit(PATH, 1).id)) for _ in range(3 * LANES)]
        with stopped(own):
            waiting(threads)
            eventually(lambda: lanes_in_use(client) == LANES)
            for _ in range(5):
                cut_off(lambda: client.submit(PATH, 2))
        for thread in threads:
            thread.join()
        assert len(set(done)) == 3 * LANES
        assert lanes_in_use(client) == 0


@pytest.mark.parametrize(
    "wait", [Handle.result, lambda handle: list(handle.stream()), lambda handle: handle.add_done_callback(print)]
)
def test_ctrl_c_before_a_thread_of_the_client_has_started(own: Server, wait: Callable[[Handle], object]) -> None:
    """The client can be closed then, as ``with`` does; and another one waits as ever."""

    def interrupt(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code is threading.Thread.start.__code__:
            raise KeyboardInterrupt

    def scene() -> None:
        with Client(own.url) as client:
            handle = client.submit(PATH, 1, id="mine")
            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                wait(handle)
            finally:
                sys.settrace(before)

    with pytest.raises(KeyboardInterrupt):
        scene()
    with Client(own.url) as client, pytest.raises(TimeoutError):
        client.get("mine").result(timeout=0.1)


def test_canceled_tasks_leave_the_client_as_it_was(own: Server) -> None:
    async def main() -> None:
        async with AsyncClient(own.url, settings=Settings()) as client:
            with connect(own.url) as connection:
                handles = [await client.submit(PATH, number, id=f"request-{number}") for number in range(3)]
                with stopped(own):
                    calls: list[Any] = [client.submit(PATH, 1), client.list(), handles[0].result(), handles[1].cancel()]
                    tasks = [asyncio.ensure_future(call) for call in calls] + [
                        asyncio.ensure_future(handle.record()) for handle in handles * LANES
                    ]
                    await asyncio.sleep(0.05)  # to cancel some calls in the middle, and some that have not begun
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                records = await asyncio.gather(*(handle.record() for handle in handles))
                assert [record.id for record in records] == [handle.id for handle in handles]
                await asyncio.to_thread(eventually, lambda: lanes_in_use(client._client) == 0)
                assert connections_of(connection) <= LANES + 1

    asyncio.run(main())


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import os, signal, sys
import gevent
from perdure.producer import Client
url, pid = sys.argv[1], int(sys.argv[2])
client = Client(url)
handles = [client.submit("app.tasks.count", number, id=f"request-{number}") for number in range(5)]
os.kill(pid, signal.SIGSTOP)
def cut(number):
    try:
        with gevent.Timeout(0.2):
            handles[number % 5].record()
    except gevent.Timeout:
        return "cut"
cuts = [gevent.spawn(cut, number) for number in range(40)]
gevent.joinall(cuts)
os.kill(pid, signal.SIGCONT)
assert [one.value for one in cuts] == ["cut"] * 40, [one.value for one in cuts]
reads = [gevent.spawn(handles[number % 5].record) for number in range(100)]
gevent.joinall(reads, raise_error=True)
assert [one.value.id for one in reads] == [f"request-{number % 5}" for number in range(100)]
waits = [gevent.spawn(handle.wait, 0.3) for handle in handles]
gevent.joinall(waits, raise_error=True)
client.close()
print("well")
"""


@pytest.mark.slow
def test_timeouts_of_greenlets(own: Server) -> None:
    run(GREENLETS, own.url, own.pid)
