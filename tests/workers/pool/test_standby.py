"""Spares: workers that have loaded and claim only when they are told to."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from tests.kit.lab import Lab, Process, eventually, gone


def spare(lab: Lab, **settings: Any) -> Process:
    """A plain ``rq worker`` with PERDURE_SPARE=1, once its heartbeat says that it waits."""
    worker = lab.worker(wait=False, spare=True, tasks=("lab_tasks.count",), **settings)
    eventually(lambda: standing(lab, worker) or not worker.running)
    lab.seen.update(worker.children())
    assert worker.running, worker.log
    return worker


def standing(lab: Lab, worker: Process) -> bool:
    return any(item["spare"] and not item["ready"] for item in lab.store.workers() if item["worker"] == worker.name)


@pytest.mark.slow
def test_a_spare_claims_when_it_is_told_to(lab: Lab) -> None:
    """Under plain ``rq worker``: loaded and visible, it leaves the queue alone until SIGUSR1."""
    worker = spare(lab)
    one = lab.submit("count", {"n": 3})
    assert lab.waiting() == [one]
    worker.send(signal.SIGUSR1)
    lab.check(one, 3)
    eventually(lambda: lab.ready(worker.name))
    worker.send(signal.SIGUSR1)  # again, by mistake: it must not kill
    two = lab.submit("count", {"n": 3})
    lab.check(two, 3)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert worker.log.count("loaded lab_tasks.count") == 1


@pytest.mark.slow
def test_a_spare_that_was_declared_dead_waits_on(lab: Lab) -> None:
    """An outage took its incarnation: it beats under a new one, and SIGTERM ends it while it waits."""
    worker = spare(lab)
    (first,) = [item["incarnation"] for item in lab.store.workers()]
    lab.store.reap(incarnation=first, kind="WORKER_LOST", reason="a mistake")
    eventually(lambda: [item for item in lab.store.workers() if item["spare"] and item["incarnation"] != first])
    assert lab.connection.exists(key("worker", worker.name))
    below = worker.children()
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    eventually(lambda: all(gone(pid) for pid in below))
    assert lab.store.workers() == []


def test_the_setting_is_one_like_any_other() -> None:
    assert Settings.from_environment({"PERDURE_SPARE": "1"}).spare
    assert Settings(spare=True).environment() == {"PERDURE_SPARE": "1"}
    with pytest.raises(ValueError, match="PERDURE_SPARE must be yes or no"):
        Settings.from_environment({"PERDURE_SPARE": "later"})
