"""Workers that are killed: whatever they held goes on elsewhere at its last checkpoint."""

from __future__ import annotations

import signal

import pytest
from rq import Worker as StockWorker

from perdure.protocol.keys import key
from tests.kit.lab import Lab, eventually, gone, send


def test_a_killed_worker_costs_at_most_a_checkpoint_interval(lab: Lab) -> None:
    """Kill -9 of a plain rq worker: the request goes on elsewhere, gapless, uncharged, and nothing of it is left."""
    first = lab.worker()
    one = lab.submit("count", {"n": 60, "sleep": 0.02})
    lab.moved(one, 10)
    incarnation = lab.ready(first.name)["incarnation"]  # type: ignore[index]
    (guardian,) = first.children()
    second = lab.worker(wait=False)
    first.kill()
    stored = len(lab.outputs(one))
    record = lab.check(one, 60)
    (event,) = lab.store.history(one)
    assert (event.event, event.kind, event.worker) == ("redelivered", "WORKER_LOST", first.name)
    assert event.offset == stored, "it went on from its last checkpoint"
    assert (record.attempt, record.executions, record.worker) == (0, 2, second.name)
    eventually(lambda: gone(guardian))
    assert lab.nothing_held()
    assert not lab.connection.zscore(key("beats"), incarnation)
    assert lab.connection.exists(key("worker", first.name)) == 0
    assert [worker.name for worker in StockWorker.all(lab.connection)] == [second.name]


def test_a_killed_guardian_is_replaced(lab: Lab) -> None:
    """Kill -9 of the guardian alone: the worker starts another one, and no request notices."""
    worker = lab.worker()
    one = lab.submit("count", {"n": 100, "sleep": 0.02})
    lab.moved(one, 3)
    (guardian,) = worker.children()
    send(guardian, signal.SIGKILL)
    (other,) = eventually(lambda: [pid for pid in worker.children() if pid != guardian and not gone(pid)])
    lab.seen.add(other)
    assert lab.check(one, 100).executions == 1
    eventually(lambda: (lab.ready(worker.name) or {}).get("dead_in", 0) > 0.5)
    assert lab.events(one) == []


@pytest.mark.slow
def test_without_a_guardian_a_reaper_hands_on_what_was_lost(lab: Lab) -> None:
    """A worker killed with its guardian is found by its missing heartbeats; the reaper moves what it held."""
    reaper = lab.reaper()
    first = lab.worker()
    one = lab.submit("count", {"n": 40, "sleep": 0.02})
    lab.moved(one, 5)
    first.kill_tree()
    eventually(lambda: lab.record(one).status == "queued")
    assert lab.connection.exists(key("worker", first.name)) == 0
    lab.worker(wait=False)
    assert lab.check(one, 40).attempt == 0
    assert lab.events(one) == [("redelivered", "WORKER_LOST")]
    assert one in reaper.log


@pytest.mark.slow
def test_without_any_reaper_the_guardians_sweep(lab: Lab) -> None:
    """With no reaper process, the guardian of a living worker hands on what a lost process tree held."""
    first, second = lab.worker(), lab.worker()
    one, two = (lab.submit("count", {"n": 40, "sleep": 0.02}) for _ in range(2))
    lab.moved(one, 5)
    lab.moved(two, 5)
    assert lab.record(one).worker != lab.record(two).worker
    first.kill_tree()
    for name in (one, two):
        assert lab.check(name, 40).worker == second.name
    assert lab.nothing_held()
    assert sorted(lab.events(one) + lab.events(two)) == [("redelivered", "WORKER_LOST")]
