"""A worker that is a group, through plain rq worker and a real Redis: whichever process is lost, the answer is the
same.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest

from perdure.workers.pool.statuses import UNFIT
from perdure.workers.text.parameters import complete
from tests.kit.lab import LONG, Lab, Process, command_of, eventually, gone, send

pytest.importorskip("torch")

TEXT = "perdure.workers.text.generate"
PAYLOAD: dict[str, Any] = {
    "prompt": "What outlives its process? " * 3,
    "max_tokens": 80,
    "temperature": 1.0,
    "seed": 3,
}

SLOW_START = 4 * LONG
"""Seconds: two processes import torch on a machine that does other things as well."""


def ranks(worker: Process) -> list[int]:
    """Process ids of a worker's followers."""
    return [pid for pid in worker.children() if "perdure.workers.ranks.rank" in command_of(pid)]


def grouped(lab: Lab, task: str, **settings: Any) -> Process:
    """A worker that has formed its group."""
    worker = lab.worker(tasks=(task,), wait=False, **settings)
    eventually(lambda: lab.ready(worker.name) or not worker.running, SLOW_START)
    assert worker.running, worker.log
    return worker


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_or_stopped_rank_changes_no_byte(lab: Lab):
    """Two ranks generate; one is killed, then its successor is stopped. The request stays where it is, uncharged."""
    lab.settings |= {"model": "tiny", "device": "cpu", "threads": 1, "collective_timeout": 4.0, "ranks": 2}
    worker = grouped(lab, TEXT)
    payload = complete(PAYLOAD)
    whole = lab.submit(TEXT, payload)
    lab.ended(whole, SLOW_START)
    expected = lab.outputs(whole), lab.store.result(whole)
    assert len(expected[0]) == PAYLOAD["max_tokens"]
    for how in (signal.SIGKILL, signal.SIGSTOP):
        identifier = lab.submit(TEXT, payload)
        lab.moved(identifier, 5)
        (follower,) = ranks(worker)
        send(follower, how)
        assert not lab.record(identifier).ended
        record = lab.ended(identifier, SLOW_START)
        assert (lab.outputs(identifier), lab.store.result(identifier)) == expected
        assert (record.status, record.worker, record.attempt, record.executions) == ("finished", worker.name, 0, 1)
        assert gone(follower)
    assert "rank 1 was ended by SIGKILL; epoch 1 is over, 1 request(s) go on" in worker.log
    assert "rank 1 did not answer in time; epoch 2 is over, 1 request(s) go on" in worker.log
    (follower,) = ranks(worker)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    eventually(lambda: gone(follower))
    assert lab.nothing_held()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_requests_of_a_lost_leader_go_to_another_group(lab: Lab):
    """kill -9 of the leader leaves no rank behind; what it held goes on in another group, where it was."""
    workers = [grouped(lab, "group_tasks.Shares") for _ in range(2)]
    identifier = lab.submit("group_tasks.Shares", {"n": 60, "sleep": 0.02})
    lab.moved(identifier, 5)
    holder = lab.record(identifier).worker
    first, second = sorted(workers, key=lambda worker: worker.name != holder)
    (follower,) = ranks(first)
    first.kill()
    eventually(lambda: gone(follower))
    record = lab.ended(identifier)
    assert (record.status, record.worker, len(lab.outputs(identifier))) == ("finished", second.name, 60)
    # The other group cannot be made whole: it hands back what it holds, and says with its status that it is unfit.
    identifier = lab.submit("group_tasks.Shares", {"n": 10_000, "sleep": 0.02})
    stored = lab.moved(identifier, 5)
    (lab.folder / "doomed").touch()
    (follower,) = ranks(second)
    send(follower, signal.SIGKILL)
    assert second.end(SLOW_START) == UNFIT
    assert "were lost 4 times; the last time, rank 1 was ended by SIGKILL while it loaded" in second.log
    record = lab.record(identifier)
    assert (record.status, record.attempt) == ("queued", 0), lab.events(identifier)
    assert len(lab.outputs(identifier)) >= stored
    assert lab.waiting() == [identifier]
    assert lab.nothing_held()
