"""Redis stops, dies, or swallows replies; workers are frozen: no output twice, none missing, nothing charged."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rq import Worker as StockWorker

from perdure.producer import Client
from perdure.protocol.keys import SCHEMA, key
from perdure.protocol.settings import Settings
from perdure.scripts.pool.server import Server
from tests.kit.lab import LONG, Lab, eventually, gone, laboratory, later, send
from tests.kit.workers.proxy import Proxy


@pytest.fixture
def own(server_binary: Path, tmp_path: Path) -> Iterator[tuple[Server, Lab]]:
    """A server that may be harmed, and a lab on it with every setting at its default."""
    with Server(tmp_path / "redis", binary=server_binary) as server, laboratory(server.url, tmp_path) as lab:
        lab.settings = {}
        yield server, lab


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["stop", "kill"])
def test_an_outage_costs_nothing(own: tuple[Server, Lab], harm: str) -> None:
    """3 s without Redis, frozen or dead and restarted from its file: all go on, gapless and uncharged."""
    server, lab = own
    worker = lab.worker()
    lab.reaper(reap_interval=0.5)
    names = [lab.submit("many", {"n": 150, "sleep": 0.005}) for _ in range(4)]
    for name in names:
        lab.moved(name, 10)
    if harm == "stop":
        os.kill(server.pid, signal.SIGSTOP)
        with later(3, lambda: os.kill(server.pid, signal.SIGCONT)):
            worker_ran = worker.running
            eventually(lambda: lab.connection.ping())
    else:
        server.kill()
        restarted = threading.Event()

        def restart() -> None:
            server.restart()
            restarted.set()

        with later(3, restart):
            worker_ran = worker.running
            eventually(restarted.is_set)
    assert worker_ran
    for name in names:
        record = lab.check(name, 150)
        assert (record.attempt, record.worker) == (0, worker.name)
        assert all(event == "released" for event, _ in lab.events(name)), "only a lost second of the file hands back"
    assert worker.running
    assert "Traceback" not in worker.log


@pytest.mark.slow
@pytest.mark.parametrize("script", ["claim", "progress", "finish", "release", "fail"])
def test_a_lost_reply_changes_nothing(server: Server, lab: Lab, script: str) -> None:
    """A script was applied and its reply got lost, twice: it is sent again, and nothing happens twice."""
    proxy = Proxy(server.port, script, drops=2)
    try:
        worker = lab.worker(url=proxy.url, queues=("gpu", "other"))
        names = [lab.submit("many", {"n": 40, "sleep": 0.005}) for _ in range(3)]
        bad = lab.submit("boom", max_retries=2, queue="other") if script == "fail" else ""
        if script == "release":
            for name in names:
                lab.moved(name, 3)
            worker.send(signal.SIGTERM)
            assert worker.end() == 0
            assert lab.waiting() == names
            lab.worker(wait=False)
        for name in names:
            record = lab.check(name, 40)
            assert (record.attempt, record.executions) == (0, 2 if script == "release" else 1)
        if bad:
            record = lab.ended(bad)
            assert (record.status, record.attempt, lab.outputs(bad)) == ("failed", 3, ["before"] * 3)
            assert [event for event, _ in lab.events(bad)] == ["retry", "retry", "failed"]
        # What was applied is seen before it is sent again.
        eventually(lambda: proxy.lost == 2)
        assert lab.nothing_held()
        assert lab.nothing_held("other")
    finally:
        lab.close()
        proxy.close()


@pytest.mark.slow
def test_a_frozen_worker_is_fenced_and_rejoins(lab: Lab) -> None:
    """Stopped longer than its heartbeat may be late: its writes are refused, and it works on under a new name."""
    lab.reaper()
    frozen = lab.worker()
    incarnation = lab.ready(frozen.name)["incarnation"]  # type: ignore[index]
    one = lab.submit("count", {"n": 60, "sleep": 0.02})
    lab.moved(one, 5)
    pids = [frozen.pid, *frozen.children()]
    for pid in pids:
        send(pid, signal.SIGSTOP)
    other = lab.worker()
    eventually(lambda: lab.record(one).worker == other.name)
    for pid in pids:
        send(pid, signal.SIGCONT)
    assert lab.check(one, 60).worker == other.name
    again = eventually(lambda: lab.ready(frozen.name) or {})
    assert again["incarnation"] != incarnation
    lab.seen.update(frozen.children())
    assert "declared dead" in frozen.log
    assert {worker.name for worker in StockWorker.all(lab.connection)} == {frozen.name, other.name}
    other.kill()
    two = lab.submit("count", {"n": 3})
    assert lab.check(two, 3).worker == frozen.name


@pytest.mark.slow
def test_a_frozen_worker_that_gets_its_request_back(lab: Lab) -> None:
    """Alone in the pool it claims its own request again: what its old step still puts out is not taken for new."""
    lab.reaper()
    worker = lab.worker()
    one = lab.submit("count", {"n": 12, "sleep": 0.25})
    lab.moved(one, 3)
    pids = [worker.pid, *worker.children()]
    for pid in pids:
        send(pid, signal.SIGSTOP)
    eventually(lambda: lab.record(one).status == "queued")
    for pid in pids:
        send(pid, signal.SIGCONT)
    lab.check(one, 12)
    assert [event for event, _ in lab.events(one)] == ["redelivered"]  # executions are counted anew after a second
    lab.seen.update(worker.children())
    assert int(lab.connection.hget(key("counters"), "fenced:gpu") or 0) >= 1


def test_a_full_worker_that_was_declared_dead_works_on(lab: Lab) -> None:
    """Nothing of it talks to Redis while its step lasts but its guardian, which leaves with the verdict, once."""
    worker = lab.worker(step_timeout=600)  # its leases are renewed by the minute, which would tell it as well
    one = lab.submit("gate", {"folder": str(lab.folder)})
    eventually((lab.folder / "gate").exists)
    lab.moved(one, 3)
    incarnation = lab.ready(worker.name)["incarnation"]  # type: ignore[index]
    (first,) = worker.children()
    lab.store.reap(incarnation=incarnation, kind="WORKER_LOST", reason="by mistake")
    again = eventually(lambda: lab.ready(worker.name) or {})
    assert again["incarnation"] != incarnation
    (second,) = eventually(lambda: [pid for pid in worker.children() if pid != first and not gone(pid)])
    lab.seen.add(second)
    (lab.folder / "open").touch()
    assert lab.check(one, 6).attempt == 0
    assert lab.events(one) == [("redelivered", "WORKER_LOST")]
    lab.check(lab.submit("count", {"n": 3}), 3)
    assert [pid for pid in worker.children() if not gone(pid)] == [second]
    assert (worker.log.count("declared dead"), worker.log.count("starting another")) == (1, 0)
    assert lab.nothing_held()


def test_a_worker_too_old_for_what_is_stored_stops(lab: Lab) -> None:
    """A newer release has taken over: the worker says so and leaves, and no guardian is started again and again."""
    worker = lab.worker()
    one = lab.submit("count", {"n": 100_000, "sleep": 0.01})
    lab.moved(one, 3)
    (guardian,) = worker.children()
    lab.connection.set(key("schema"), SCHEMA + 1)
    assert worker.end() in (0, 1)
    assert "Redis holds a newer protocol" in worker.log
    assert "starting another" not in worker.log
    eventually(lambda: gone(guardian))
    assert (lab.waiting(), lab.record(one).attempt) == ([one], 0)
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_store_that_forgets_its_last_second_three_times(lab: Lab) -> None:
    """As after a failover to a replica that lags: workers hand back and go on, open streams give each output once."""
    lab.reaper()
    for _ in range(2):
        lab.worker(wait=False)
    with Client(lab.url, settings=Settings()) as client, ThreadPoolExecutor(4) as pool:
        handles = [client.submit("lab_tasks.many", {"n": 150, "sleep": 0.01}, queue="gpu") for _ in range(4)]
        streams = [pool.submit(lambda handle: list(handle.stream(timeout=LONG)), handle) for handle in handles]
        for number in (10, 30, 50):
            for handle in handles:
                lab.moved(handle.id, number)
            before = {name: lab.connection.dump(name) for name in lab.connection.keys("rq:*")}
            for handle in handles:
                lab.moved(handle.id, number + 10)
            with lab.connection.pipeline() as pipe:
                pipe.delete(*lab.connection.keys("rq:*"))
                for name, value in before.items():
                    if value is not None:
                        pipe.restore(name, 0, value, replace=True)
                pipe.execute()
        for handle, stream in zip(handles, streams, strict=True):
            lab.check(handle.id, 150)
            assert stream.result(LONG) == list(range(150))
