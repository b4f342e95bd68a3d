"""What a producer, a worker and a person meet in a degraded pool: refusals, more time, half-filled workers."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fakeredis
import pytest
import redis

from perdure.producer import AsyncClient, Client
from perdure.producer.options import Submit, SubmitMany
from perdure.protocol.connection import connect
from perdure.protocol.errors import Degraded, IdempotencyConflict, InvalidRequest, QueueFull, TryAgainLater
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.scripts.main import main
from tests.kit.lab import Lab, Process, eventually, later

PATH = "app.tasks.count"


def degrade(connection: redis.Redis, *, dwell: int = 5000) -> None:
    """What a reaper declares, by hand."""
    now: Any = connection.time()
    mapping: dict[Any, Any] = {
        "mode": "degraded", "since": (now[0] - 60) * 1000, "until": (now[0] + 600) * 1000, "live": 1, "expected": 4,
        "dwell": dwell,
    }  # fmt: skip
    connection.hset(key("mode"), mapping=mapping)


def recover(connection: redis.Redis) -> None:
    connection.delete(key("mode"))


@pytest.fixture
def client(redis_client: redis.Redis) -> Iterator[Client]:
    with Client(connection=redis_client, settings=Settings(queue_limit=3), patience=5) as client:
        yield client


def test_low_priority_is_refused_with_the_time_to_come_again(client: Client, redis_client: redis.Redis) -> None:
    """An error that says why and what to do, keeps what it says when it is pickled, and is told in the
    caller's stack.
    """
    degrade(redis_client)
    with pytest.raises(Degraded) as caught:
        client.submit(PATH, 1, priority="low", id="a")
    error = caught.value
    assert isinstance(error, TryAgainLater)
    assert (error.retry_after, error.items) == (5.0, (0,))
    assert str(error) == (
        "the pool is degraded (1 of 4 workers) and takes no low priority; try again in 5 s or later, wait with "
        "retry_when_degraded, or give it a higher priority"
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.retry_after, copy.items) == (str(error), 5.0, (0,))
    assert client.submit(PATH, 1, id="b").status() == "queued"
    recover(redis_client)
    assert client.submit(PATH, 1, priority="low", id="a").status() == "queued"


def test_of_many_only_those_of_low_priority_are_refused(client: Client, redis_client: redis.Redis) -> None:
    """The rest is stored; a queue that is full as well, and ids that are taken, are told too."""
    client.submit_many([(PATH, 0), (PATH, 1)])
    client.submit(PATH, 0, id="taken", queue="other")
    degrade(redis_client)
    low = {"task": PATH, "payload": 2, "priority": "low"}
    items = [low, (PATH, 3), (PATH, 4), low, {"task": PATH, "payload": 5, "queue": "other", "id": "taken"}]
    with pytest.raises(Degraded) as caught:
        client.submit_many(items)
    assert caught.value.items == (0, 2, 3)
    assert caught.value.__notes__ == [
        "1 of 5 requests were stored",
        "1 of those that were not came to a full queue",
        "these ids belong to other requests: taken",
    ]
    recover(redis_client)
    with pytest.raises(QueueFull) as full:
        client.submit_many([(PATH, 6), low])
    assert full.value.items == (0,)
    with pytest.raises(IdempotencyConflict):
        client.submit_many([low, {"task": PATH, "payload": 5, "queue": "other", "id": "taken"}])


@pytest.mark.slow
def test_a_submit_that_waits_comes_again_when_it_was_told(client: Client, redis_client: redis.Redis) -> None:
    """Spread over half as long again, cut by the patience; then the last refusal is raised."""
    degrade(redis_client, dwell=1000)
    client._session.patience = 1.8
    waiting = client._submission(Submit(PATH, 1, priority="low", retry_when_degraded=True))
    pauses: list[float] = []

    def wait() -> None:
        for pause in waiting:
            pauses.append(pause)
            time.sleep(pause)

    with pytest.raises(Degraded):
        wait()
    assert 1.0 <= pauses[0] <= 1.5
    assert len(pauses) == 2
    assert pauses[1] <= 1.8 - pauses[0]
    client._session.patience = 60
    low = {"task": PATH, "payload": 1, "priority": "low"}
    firsts = {next(client._submissions(SubmitMany([low], retry_when_degraded=True))) for _ in range(6)}
    assert len(firsts) == 6
    assert all(1.0 <= pause <= 1.5 for pause in firsts)
    with pytest.raises(Degraded):
        next(client._submission(Submit(PATH, 1, priority="low")))


def test_waiting_submits_are_served_when_the_pool_recovers(redis_url: str) -> None:
    """One and many, in threads and on a loop; of many, only what was refused is sent again, and handles keep their
    order.
    """
    with connect(redis_url) as connection, Client(redis_url, settings=Settings(), patience=60) as client:
        degrade(connection, dwell=1)
        items = [{"task": PATH, "payload": n, "priority": ("low", "normal")[n % 2], "id": f"m{n}"} for n in range(4)]

        async def scene() -> list[Any]:
            async with AsyncClient(redis_url, settings=Settings(), patience=60) as other:
                waiting = [
                    other.submit(PATH, n, priority="low", retry_when_degraded=True, id=f"a{n}") for n in range(20)
                ]
                many = other.submit_many([{**item, "id": f"b{item['id']}"} for item in items], retry_when_degraded=True)
                gathered = asyncio.gather(many, asyncio.gather(*waiting))
                # More wait than there are threads: they keep none.
                await asyncio.to_thread(eventually, lambda: refused(connection) >= 22 + 2 + 1)
                assert (await asyncio.wait_for(other.submit(PATH, 1), 30)).id
                assert (await other.mode()).degraded
                recover(connection)
                return [handle.id for handles in await gathered for handle in handles]

        with ThreadPoolExecutor(3) as pool:
            one = pool.submit(lambda: client.submit(PATH, 1, priority="low", retry_when_degraded=True))
            many = pool.submit(lambda: client.submit_many(items, retry_when_degraded=True))
            ids = pool.submit(lambda: asyncio.run(scene()))
            assert ids.result(60) == [f"bm{n}" for n in range(4)] + [f"a{n}" for n in range(20)]
            assert one.result(60).status() == "queued"
            assert [handle.id for handle in many.result(60)] == ["m0", "m1", "m2", "m3"]
        assert connection.hget(key("counters"), "submitted:default") == b"5"
        assert not client.mode().degraded


def refused(connection: redis.Redis) -> int:
    number: Any = connection.hget(key("counters"), "refused:default-low")
    return int(number or 0)


def test_it_is_true_or_false(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="retry_when_degraded must be True or False"):
        client.submit(PATH, 1, retry_when_degraded=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword"):
        client.submit(PATH, 1, retry_when_degrade=True)  # type: ignore[call-arg]

    async def scene() -> None:
        async with AsyncClient(connection=fakeredis.FakeRedis(), settings=Settings()) as other:
            with pytest.raises(TypeError, match="unexpected keyword"):
                await other.submit(PATH, 1, retry_when_degrade=True)  # type: ignore[call-arg]

    asyncio.run(scene())


def test_a_wait_without_a_timeout_is_twice_as_long(redis_url: str) -> None:
    """For what was submitted to a degraded pool, in any process and in every way of waiting; a timeout that is given
    rules.
    """
    settings = Settings(response_timeout=0.1)
    with connect(redis_url) as connection, Client(redis_url, settings=settings) as client:
        degrade(connection)
        stretched = client.submit(PATH, 1, id="stretched")
        recover(connection)
        plain = client.submit(PATH, 1, id="plain")
        assert (stretched.record().stretched, plain.record().stretched) == (True, False)
        for handle, seconds in ((stretched, "0.2 s"), (plain, "0.1 s")):
            with pytest.raises(TimeoutError, match=f"within {seconds}"):
                handle.result()
            with pytest.raises(TimeoutError, match=f"for {seconds}"):
                list(handle.stream())
            with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
                handle.result(0.05)
            with pytest.raises(TimeoutError, match=r"for 0\.05 s"):
                list(handle.stream(timeout=0.05))

    async def scene() -> None:
        async with AsyncClient(redis_url, settings=settings) as other:
            for name, seconds in (("stretched", "0.2 s"), ("plain", "0.1 s")):
                with pytest.raises(TimeoutError, match=f"within {seconds}"):
                    await (await other.get(name))
                with pytest.raises(TimeoutError, match=f"for {seconds}"):
                    [output async for output in other.get(name).stream()]

    asyncio.run(scene())


def test_the_mode_is_read_as_the_scripts_read_it(client: Client, redis_client: redis.Redis) -> None:
    """Nothing, a live word, one that has run out, and garbage."""
    assert str(client.mode()) == "the pool is normal; no worker was ready in the last hour"
    degrade(redis_client)
    mode = client.mode()
    assert (mode.degraded, mode.live, mode.expected) == (True, 1, 4)
    assert mode.since is not None
    assert str(mode).startswith("the pool is degraded: 1 of 4 workers since 20")
    redis_client.hset(key("mode"), "until", 1)
    assert not client.mode().degraded
    redis_client.hset(key("mode"), mapping=dict.fromkeys(("until", "live", "expected", "since"), b"\xff1e999"))
    assert str(client.mode()) == "the pool is normal; no worker was ready in the last hour"
    redis_client.hset(key("mode"), mapping={"until": 2**53, "since": 2**62})
    assert str(client.mode()) == "the pool is degraded: 0 of 0 workers since a date that is none"


def test_commands_say_that_the_pool_is_degraded(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line above, on stderr; what is printed for programs stays as it is. Refused is exit status 4."""
    monkeypatch.setenv("PERDURE_REDIS_URL", redis_url)
    with connect(redis_url) as connection:
        degrade(connection)
        for arguments in (["submit", PATH, "1", "--id", "a"], ["list"], ["show", "a"], ["list", "--json"]):
            assert main(arguments) == 0
            out, err = capsys.readouterr()
            assert err.startswith("the pool is degraded: 1 of 4 workers since "), arguments
            assert len(err.splitlines()) == 1
            assert "degraded" not in out
        assert main(["submit", PATH, "1", "--priority", "low"]) == 4
        assert "perdure: the pool is degraded (1 of 4 workers) and takes no low priority" in capsys.readouterr().err
        degrade(connection, dwell=1)
        with later(0.2, lambda: recover(connection)):
            assert main(["submit", PATH, "1", "--priority", "low", "--retry-when-degraded"]) == 0
        capsys.readouterr()
        assert main(["list"]) == 0
        assert capsys.readouterr().err == ""


# --- by real processes -----------------------------------------------------------------------------


def held(lab: Lab, worker: Process) -> int:
    return next((len(item["held"]) for item in lab.store.workers() if item["worker"] == worker.name), -1)


@pytest.mark.slow
def test_a_worker_that_drains_a_long_step_is_not_missed(lab: Lab) -> None:
    """``perdure up`` on Ctrl-C: its reaper sweeps while the worker waits for the step, and has nothing to complain
    of.
    """
    lab.reaper()
    worker = lab.worker(drain_timeout=60)
    eventually(lambda: lab.store.mode().expected == 1)
    lab.submit("native", {"folder": str(lab.folder)})
    eventually((lab.folder / "native").exists)
    worker.process.terminate()
    eventually(lambda: lab.store.mode().live == 0)
    assert [(item["leaving"], len(item["held"])) for item in lab.store.workers()] == [(True, 1)]
    assert (lab.store.mode().degraded, lab.store.mode().expected) == (False, 0)
    assert lab.connection.hget(key("counters"), "degraded") is None
    worker.kill_tree()


@pytest.mark.slow
def test_five_workers_one_stopped_and_three_killed(lab: Lab) -> None:
    """The stopped one is not missed. Then: low priority is refused, the last one fills half of its slots; with three
    new ones all is as before.
    """
    lab.reaper()
    workers = [lab.worker(wait=False) for _ in range(5)]
    eventually(lambda: all(lab.ready(worker.name) for worker in workers))
    lab.seen.update(child for worker in workers for child in worker.children())
    with Client(lab.url, settings=Settings(response_timeout=60), patience=60) as client:
        eventually(lambda: client.mode().expected == 5)
        workers[4].process.terminate()
        assert workers[4].end() == 0
        eventually(lambda: client.mode().expected == 4)
        assert not client.mode().degraded
        for worker in workers[1:4]:
            worker.kill_tree()
        eventually(lambda: client.mode().degraded)
        assert (client.mode().live, client.mode().expected) == (1, 4)
        with pytest.raises(Degraded, match="1 of 4 workers"):
            client.submit("lab_tasks.many", {"n": 1}, queue="gpu", priority="low")
        payload = {"n": 400, "sleep": 0.01}
        many = [client.submit("lab_tasks.many", payload, queue="gpu", degraded={"n": 300}) for _ in range(4)]
        eventually(lambda: held(lab, workers[0]) == 2)
        for handle in many[:2]:
            lab.moved(handle.id, 20)
        assert held(lab, workers[0]) == 2
        assert "at most half of the slots are filled" in workers[0].log
        assert many[0].degraded()
        for _ in range(3):
            lab.worker(wait=False)
        low = client.submit("lab_tasks.count", {"n": 1}, queue="gpu", priority="low", retry_when_degraded=True)
        assert low.result() == {"counted": 1}
        assert not client.mode().degraded
        for handle in many:
            assert handle.result() in ({"counted": 300}, {"counted": 400})
        assert [event.event for event in many[0].history()] == ["submitted", "degraded", "started", "finished"]
        counters: Any = lab.connection.hmget(key("counters"), "degraded", "recovered")
        assert counters == [b"1", b"1"]
