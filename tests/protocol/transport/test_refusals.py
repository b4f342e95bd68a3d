"""Refusals that pass: whoever asks Redis for something waits for them as for a Redis that is away, and finds a new
primary.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import redis

from perdure.producer import AsyncClient, Client
from perdure.protocol.connection import connect
from perdure.protocol.errors import RedisUnavailable
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.transport.explaining import explain
from perdure.protocol.transport.patience import be_patient
from perdure.protocol.transport.refusals import PASSING, code_of, memory_full, passing, waited_for
from perdure.scripts.pool.server import Server
from tests.kit.hands import Hands
from tests.kit.lab import eventually, laboratory

PATH = "app.tasks.count"
MOMENT = 1.0
"""Seconds for which a server refuses: far below any patience, far above what a call takes."""

# --- the table -----------------------------------------------------------------------------------

BUSY = "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (redis.ResponseError(BUSY), "BUSY"),
        (redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "LOADING"),
        (redis.exceptions.ReadOnlyError("You can't write against a read only replica. script: a, on 1"), "READONLY"),
        (redis.ResponseError("Error running script (call to f_1): @user_script:1: -READONLY You can't"), "READONLY"),
        (redis.ResponseError("ERR Error running script (call to f_1): @user_script:1: -MISCONF Redis"), "MISCONF"),
        (redis.exceptions.ExecAbortError("Transaction discarded because of: NOREPLICAS Not enough"), "NOREPLICAS"),
        (redis.ResponseError("Command # 2 (SET a ERR) of pipeline caused error: MISCONF Redis is"), "MISCONF"),
        (redis.ResponseError("UNBLOCKED force unblock from blocking operation"), "UNBLOCKED"),
    ],
)
def test_a_passing_refusal_is_known_in_any_words(error: Exception, code: str) -> None:
    assert code_of(error) == code
    assert passing(error)
    assert waited_for(error)
    assert PASSING[code] in str(explain(error, "redis://host"))


@pytest.mark.parametrize(
    "error",
    [
        redis.ResponseError(
            "Command # 1 (SET a of pipeline caused error: BUSY b) of pipeline caused error: WRONGTYPE x"
        ),
        redis.ResponseError("ERR value is BUSY or -READONLY or"),
        redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        redis.AuthenticationError("invalid username-password pair"),
        redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        ValueError("BUSY at work"),
    ],
)
def test_what_does_not_pass_is_not_waited_for(error: Exception) -> None:
    assert not waited_for(error)


def test_noscript_is_left_to_the_sender(redis_url: str) -> None:
    """RQ's code, and ours, send a script's name first, and the script when the server has not got it."""
    with connect(redis_url) as connection:
        be_patient(connection)
        assert connection.register_script("return 7")() == 7


def test_full_memory_is_known_in_old_and_new_words() -> None:
    assert memory_full(
        redis.ResponseError("Error running script (call to f_1): @user_script:1: -OOM command not allowed")
    )
    assert memory_full(redis.exceptions.OutOfMemoryError("command not allowed"))
    assert not memory_full(redis.ResponseError("ERR some text with -OOM in it"))


# --- a server that refuses for a moment ------------------------------------------------------------


@pytest.fixture
def own(server_binary: Path, tmp_path: Path) -> Iterator[Server]:
    """A server whose settings may be changed."""
    with Server(tmp_path / "redis", binary=server_binary, die_with_parent=True) as server:
        yield server


@contextmanager
def busy(server: Server) -> Iterator[Callable[[], None]]:
    """Somebody's script that does not end; what is given ends it."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(connect(server.url, timeout=60)) for _ in range(2))
        one.config_set("busy-reply-threshold", 50)

        def spin() -> None:
            with suppress(redis.ResponseError):  # it is killed
                one.eval("while true do end", 0)

        thread = threading.Thread(target=spin)
        thread.start()

        def refused() -> bool:
            try:
                return not other.ping()
            except redis.ResponseError as error:
                return code_of(error) == "BUSY"

        def end() -> None:
            with suppress(redis.ResponseError):  # it was killed already
                other.script_kill()

        try:
            eventually(refused)
            yield end
        finally:
            end()
            thread.join()


@contextmanager
def configured(server: Server, before: dict[str, str], after: dict[str, str]) -> Iterator[Callable[[], None]]:
    with connect(server.url) as connection:

        def change(values: dict[str, str]) -> None:
            for name, value in values.items():
                connection.config_set(name, value)

        change(before)
        yield lambda: change(after)
        change(after)


@contextmanager
def without_replicas(server: Server) -> Iterator[Callable[[], None]]:
    with configured(server, {"min-replicas-to-write": "1"}, {"min-replicas-to-write": "0"}) as end:
        yield end


@contextmanager
def without_disk(server: Server) -> Iterator[Callable[[], None]]:
    """A snapshot has failed: a folder stands where its file should."""
    with connect(server.url) as connection:
        folder = Path(connection.config_get("dir")["dir"], connection.config_get("dbfilename")["dbfilename"])
        (folder / "something").mkdir(parents=True, exist_ok=True)
        before = {"save": "3600 1", "stop-writes-on-bgsave-error": "yes"}
        with configured(server, before, {"save": "", "stop-writes-on-bgsave-error": "no"}) as end:
            connection.bgsave()
            eventually(lambda: connection.info("persistence")["rdb_last_bgsave_status"] == "err")
            yield end


@contextmanager
def replica(server: Server, *, stale: bool) -> Iterator[Callable[[], None]]:
    """A replica of nobody; without ``stale`` it does not even read."""
    with connect(server.url) as connection:
        connection.config_set("replica-serve-stale-data", "yes" if stale else "no")

        def end() -> None:
            connection.replicaof("NO", "ONE")

        connection.replicaof("127.0.0.1", "1")
        yield end
        end()


REFUSALS: dict[str, Callable[[Server], AbstractContextManager[Callable[[], None]]]] = {
    "BUSY": busy,
    "NOREPLICAS": without_replicas,
    "MISCONF": without_disk,
    "READONLY": lambda server: replica(server, stale=True),
    "MASTERDOWN": lambda server: replica(server, stale=False),
}


@contextmanager
def for_a_moment(server: Server, code: str) -> Iterator[None]:
    """The server refuses what it can, and stops doing so after a moment."""
    with REFUSALS[code](server) as end:
        timer = threading.Timer(MOMENT, end)
        timer.start()
        yield
        timer.join()


@pytest.mark.parametrize("code", REFUSALS)
def test_a_client_waits_for_what_passes(own: Server, code: str) -> None:
    """Submits, streams and results, and the calls for one page or many requests."""
    with Client(own.url, settings=Settings()) as client, connect(own.url) as connection:
        handle = client.submit(PATH, 1)
        hands = Hands(connection)
        (claim,) = hands.claim()
        hands.put(claim, 0, "a")
        hands.finish(claim, 1, "end")
        calls: list[Callable[[], object]] = [
            lambda: client.submit(PATH, 1),
            lambda: client.submit_many([(PATH, 1)] * 3),
            handle.cancel,
            handle.result,
            lambda: list(handle.stream()),
            client.list,
        ]
        with for_a_moment(own, code):
            began = time.monotonic()
            answers = [call() for call in calls]
            assert time.monotonic() - began > MOMENT / 2
        assert answers[2:5] == [False, "end", ["a"]]
        assert connection.llen(key("queue", "default")) == 4


@pytest.mark.parametrize("code", REFUSALS)
def test_an_async_client_waits_for_what_passes(own: Server, code: str) -> None:
    async def main() -> list[object]:
        async with AsyncClient(own.url, settings=Settings()) as client:
            handle = await client.submit(PATH, 1)
            with connect(own.url) as connection:
                hands = Hands(connection)
                (claim,) = hands.claim()
                hands.put(claim, 0, "a")
                hands.finish(claim, 1, "end")
            await asyncio.to_thread(lambda: stack.enter_context(for_a_moment(own, code)))
            outputs = [output async for output in handle.stream()]
            return [outputs, await handle, await (await client.submit(PATH, 1)).status(), await handle.cancel()]

    with ExitStack() as stack:
        assert asyncio.run(main()) == [["a"], "end", "queued", False]


def test_what_outlasts_the_patience_is_told_in_plain_words(own: Server) -> None:
    with Client(own.url, settings=Settings(), patience=0.3) as client:
        for code, begin in REFUSALS.items():
            with begin(own), pytest.raises(RedisUnavailable) as caught:
                client.submit(PATH, 1)
            assert PASSING[code] in str(caught.value)


def test_no_error_of_redis_py_reaches_a_user(connection: redis.Redis, redis_url: str) -> None:
    """Whatever stands in Redis, and whatever the URL names."""
    connection.set(key("queue", "default"), "no list")
    connection.set(key("job", "odd"), "no hash")
    with Client(redis_url, settings=Settings()) as client:
        for call in (lambda: client.submit(PATH, 1), client.get("odd").status, client.get("odd").cancel):
            with pytest.raises(RedisUnavailable, match="refused a call"):
                call()
    with Client(redis_url.rpartition("/")[0] + "/99", settings=Settings()) as client:
        more: list[Callable[[], object]] = [
            lambda: client.submit(PATH, 1), client.ping, client.get("a").result, client.list,
        ]  # fmt: skip
        for one in more:
            with pytest.raises(RedisUnavailable, match="/99 has no database of this number"):
                one()


# --- processes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("database", [0, 3])
def test_a_worker_that_starts_while_redis_refuses_waits(own: Server, tmp_path: Path, database: int) -> None:
    """In database 3, not even a connection can be made while a script runs."""
    url = own.url.rpartition("/")[0] + f"/{database}"
    with laboratory(url, tmp_path) as lab:
        with busy(own):
            worker = lab.worker(wait=False)
            eventually(lambda: f"{PASSING['BUSY']}. Waiting for it." in worker.log or not worker.running)
            assert worker.running, worker.log
        eventually(lambda: lab.ready(worker.name))
        lab.check(lab.submit("count", {"n": 2}), 2)


def test_a_reaper_that_starts_while_redis_refuses_waits(own: Server, tmp_path: Path) -> None:
    with laboratory(own.url, tmp_path) as lab:
        with busy(own):
            command = [sys.executable, "-m", "perdure.recovery"]
            reaper = lab._start("reaper", command, {"reap_interval": 0.1}, {"RQ_REDIS_URL": own.url})
            eventually(lambda: "Waiting for it" in reaper.log or not reaper.running)
        eventually(lambda: "sweeping" in reaper.log or not reaper.running)
        assert reaper.running, reaper.log


@pytest.mark.parametrize("place", ["/99", "closed"])
@pytest.mark.parametrize("command", ["rq worker -w perdure.workers.Worker", "perdure worker", "perdure list"])
def test_a_start_that_cannot_be_is_told_in_our_words(own: Server, place: str, command: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"redis://:s3cret@127.0.0.1:{probe.getsockname()[1]}/0"
    url, words = (
        (closed, "connection refused")
        if place == "closed"
        else (own.url.rpartition("/")[0] + place, "no database of this number")
    )
    program, *arguments = command.split()
    queues = ["gpu"] if "worker" in command else []
    done = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments, "--url", url, *queues],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert words in text
    assert done.returncode in (1, 3)
    assert "Traceback" not in text
    assert "s3cret" not in text
