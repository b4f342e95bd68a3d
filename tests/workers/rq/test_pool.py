"""RQ's own ways of starting several of our workers."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rq import Queue
from rq import Worker as StockWorker

from tests.kit.lab import Lab, Process, eventually, gone, send

RQ = str(Path(sys.executable).with_name("rq"))


def start(lab: Lab, *arguments: str, environment: dict[str, str] | None = None) -> Process:
    """An ``rq`` command in the background, under the lab's settings."""
    return lab._start(f"rq-{len(lab.processes)}", [RQ, *arguments, "--url", lab.url], {}, environment)


def ready(lab: Lab) -> list[dict[str, Any]]:
    return [item for item in lab.store.workers() if item["ready"]]


def test_the_class_may_come_from_the_environment(lab: Lab) -> None:
    """``RQ_WORKER_CLASS=perdure.workers.Worker rq worker gpu`` runs requests."""
    worker = start(lab, "worker", "gpu", "--burst", environment={"RQ_WORKER_CLASS": "perdure.workers.Worker"})
    one = lab.submit("count", {"n": 3})
    lab.check(one, 3)
    assert worker.end() == 0


@pytest.mark.slow
def test_rqs_worker_pool_runs_and_drains(lab: Lab) -> None:
    """``rq worker-pool -n 2``: both work, one that is killed is replaced, SIGTERM hands everything back unharmed."""
    pool = start(lab, "worker-pool", "-w", "perdure.workers.Worker", "-n", "2", "gpu")
    try:
        eventually(lambda: len(ready(lab)) == 2)
        requests = [lab.submit("count", {"n": 150, "sleep": 0.02}) for _ in range(3)]
        for name in requests[:2]:
            lab.moved(name, 3)
        lab.seen.update(pool.children())
        first = lab.connection.hget(f"rq:job:{requests[0]}", "worker_name")
        (victim,) = [item["pid"] for item in ready(lab) if item["worker"].encode() == first]
        send(victim, signal.SIGKILL)
        eventually(lambda: len(ready(lab)) == 2 and victim not in [item["pid"] for item in ready(lab)])
        lab.moved(requests[0], 20)
        lab.seen.update(pool.children())
        pool.send(signal.SIGTERM)
        assert pool.end() == 0, pool.log
    finally:
        lab.seen.update(pool.children())
    eventually(lambda: all(gone(pid) for pid in lab.seen))  # guardians and schedulers too
    assert StockWorker.all(lab.connection) == []
    assert lab.nothing_held()
    assert "Traceback" not in pool.log
    lab.worker("--burst").end()
    for name in requests:
        assert lab.check(name, 150).attempt == 0
    assert "redelivered" in [event for event, _ in lab.events(requests[0])]


@pytest.mark.slow
def test_a_pool_in_burst_mode_ends_by_itself(lab: Lab) -> None:
    """Requests and plain jobs, and no worker is left."""
    requests = [lab.submit("many", {"n": 5}) for _ in range(6)]
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.double", 4)
    pool = start(lab, "worker-pool", "-w", "perdure.workers.Worker", "-n", "2", "--burst", "gpu")
    assert pool.end() == 0
    for name in requests:
        lab.check(name, 5)
    assert job.return_value() == 8
    assert StockWorker.all(lab.connection) == []
