"""Stopping a worker: nothing is charged, nothing is lost, and it leaves soon."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from rq import Queue
from rq import Worker as StockWorker

from perdure.protocol.keys import key
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, eventually, gone, laboratory


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_drain_hands_everything_back_in_order(lab: Lab, number: signal.Signals) -> None:
    """A stop signal: checkpoints kept, requests in front in their old order, nothing charged, exit 0 in a moment."""
    worker = lab.worker()
    running = [lab.submit("many", {"n": 80, "sleep": 0.005}) for _ in range(4)]
    waiting = [lab.submit("many", {"n": 5}) for _ in range(2)]
    for name in running:
        lab.moved(name, 3)
    began = time.monotonic()
    worker.send(number)
    assert worker.end() == 0
    assert time.monotonic() - began < 4, "2 s are promised for short steps; the rest is for a busy machine"
    assert lab.waiting() == running + waiting
    for name in running:
        record = lab.record(name)
        assert (record.status, record.attempt, lab.events(name)) == ("queued", 0, [("released", "")])
        checkpoint = lab.store.checkpoint(name)
        assert checkpoint is not None
        assert checkpoint.offset == len(lab.outputs(name)) >= 3
    assert lab.nothing_held()
    assert StockWorker.all(lab.connection) == []
    lab.worker("--burst").end()
    for name in running:
        assert lab.check(name, 80).executions == 2
    for name in waiting:
        lab.check(name, 5)


def test_an_idle_worker_leaves_at_once(lab: Lab) -> None:
    """SIGTERM while idle: exit 0, unregistered, and its guardian leaves with it."""
    worker = lab.worker()
    (guardian,) = worker.children()
    worker.send(signal.SIGTERM)
    assert worker.end(5) == 0
    eventually(lambda: gone(guardian))
    assert StockWorker.all(lab.connection) == []
    assert lab.store.workers() == []


@pytest.mark.slow
def test_a_step_in_native_code_is_left_after_the_drain_timeout(lab: Lab) -> None:
    """A step that no signal interrupts: the request goes back at its last checkpoint, and the process ends."""
    worker = lab.worker(drain_timeout=0.5)
    one = lab.submit("native", {"folder": str(lab.folder)})
    eventually((lab.folder / "native").exists)
    lab.moved(one, 3)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert "did not end in time" in worker.log
    assert (lab.waiting(), lab.record(one).attempt, lab.events(one)) == ([one], 0, [("released", "")])
    lab.worker("--burst").end()
    lab.check(one, 6)


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_step(lab: Lab) -> None:
    """A second signal a second later is a cold stop; one that follows at once is an echo of the first."""
    worker = lab.worker(drain_timeout=600)
    one = lab.submit("native", {"folder": str(lab.folder)})
    eventually((lab.folder / "native").exists)
    lab.moved(one, 3)
    began = time.monotonic()
    worker.send(signal.SIGINT)
    eventually(lambda: "warm shut down" in worker.log)
    worker.send(signal.SIGINT)
    eventually(lambda: time.monotonic() - began > 1.2)
    assert worker.running
    worker.send(signal.SIGINT)
    assert worker.end() == 0
    assert worker.log.count("cold shut down") == 1
    assert (lab.waiting(), lab.record(one).attempt) == ([one], 0)


def test_a_stop_while_a_model_loads(lab: Lab) -> None:
    """SIGTERM during a load that was started by a request: it is handed back untouched after the drain timeout."""
    worker = lab.worker(drain_timeout=0.5, environment={"LAB_LOAD": "600", "LAB_FOLDER": str(lab.folder)})
    one = lab.submit("model", {"n": 3})
    eventually((lab.folder / "loading").exists)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert (lab.waiting(), lab.record(one).attempt, lab.events(one)) == ([one], 0, [("released", "")])


def test_a_stop_while_the_first_tasks_load(lab: Lab) -> None:
    """SIGTERM while PERDURE_TASKS are loaded: nothing is held, so nothing is waited for."""
    worker = lab.worker(
        wait=False,
        tasks=("lab_tasks.model",),
        drain_timeout=600,
        environment={"LAB_LOAD": "600", "LAB_FOLDER": str(lab.folder)},
    )
    eventually((lab.folder / "loading").exists)
    lab.seen.update(worker.children())
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert StockWorker.all(lab.connection) == []


@pytest.mark.slow
def test_a_plain_job_is_let_end(lab: Lab) -> None:
    """RQ's warm stop: a plain job that runs ends first, however short the drain timeout is."""
    worker = lab.worker(drain_timeout=0.1)
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.nap", 1.5)
    eventually(lambda: "lab_tasks.nap(1.5)" in worker.log)  # RQ's own line: claimed alone, it would be handed back
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert job.return_value() == "rested"


@pytest.mark.slow
def test_a_stop_while_redis_is_down(server_binary: Path, tmp_path: Path) -> None:
    """SIGTERM during an outage: the worker gives up in bounded time, and its requests are handed on afterwards."""
    with Server(tmp_path / "redis", binary=server_binary) as server, laboratory(server.url, tmp_path) as lab:
        worker = lab.worker()
        one = lab.submit("count", {"n": 100, "sleep": 0.02})
        lab.moved(one, 5)
        server.kill()
        worker.send(signal.SIGTERM)
        assert worker.end(25) in (0, 1)
        assert "Traceback" not in worker.log
        server.restart()
        lab.reaper()
        lab.worker(wait=False)
        assert lab.check(one, 100).attempt == 0


@pytest.mark.slow
def test_a_guardian_signs_off_for_a_worker_that_cannot(server_binary: Path, tmp_path: Path) -> None:
    """It stopped while Redis was frozen: once Redis answers, the guardian clears away what is left, with no reaper."""
    with Server(tmp_path / "redis", binary=server_binary) as server, laboratory(server.url, tmp_path) as lab:
        worker = lab.worker(step_timeout=2)  # it also bounds how long one call waits
        one = lab.submit("count", {"n": 1000, "sleep": 0.02})
        lab.moved(one, 5)
        (guardian,) = worker.children()
        os.kill(server.pid, signal.SIGSTOP)
        worker.send(signal.SIGTERM)
        assert worker.end(25) in (0, 1)
        assert "its guardian will" in worker.log
        assert not gone(guardian)
        # Killed before it goes on: what the worker still sent must not be what clears up.
        server.kill()
        server.restart()
        eventually(lambda: gone(guardian))
        assert (lab.record(one).status, lab.record(one).attempt, lab.waiting()) == ("queued", 0, [one])
        assert lab.store.workers() == []
        assert lab.nothing_held()
        assert lab.connection.exists(key("worker", worker.name), key("beats")) == 0


def test_a_worker_that_ends_by_an_error_claims_nothing(lab: Lab) -> None:
    """Its courier has left before it signs off: nobody is lost with it, and it was not "declared dead"."""
    for _ in range(2):
        lab.submit("Untimely", max_retries=0)
    names = [lab.submit("count", {"n": 2}) for _ in range(8)]
    worker = lab.worker(wait=False)
    assert worker.end() == 1
    assert "ArithmeticError" in worker.log
    assert "declared dead" not in worker.log
    assert lab.nothing_held()
    for name in names:
        assert [kind for _, kind in lab.events(name) if kind] == []
