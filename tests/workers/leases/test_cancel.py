"""Canceling, deleting and suspending while a worker runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rq.job import Job

from perdure.producer import Client
from perdure.protocol.errors import DeadlineExceeded
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from tests.kit.lab import Lab, eventually

FOREVER = {"n": 100_000, "sleep": 0.01}


@pytest.mark.parametrize("how", ["cancel", "job.cancel"])
def test_a_canceled_request_frees_its_slot(lab: Lab, how: str) -> None:
    """Our cancel and RQ's Job.cancel end a running request as canceled; the next one gets its slot."""
    worker = lab.worker()
    one, two = lab.submit("count", FOREVER), lab.submit("count", {"n": 3})
    lab.moved(one, 3)
    if how == "cancel":
        assert lab.store.cancel([(one, "")], reason="enough") == ["requested"]
    else:
        Job.fetch(one, connection=lab.connection).cancel()
    assert lab.ended(one).status == "canceled"
    lab.check(two, 3)
    assert lab.connection.zscore(key("canceled", "gpu"), one) is not None
    assert lab.nothing_held()
    assert worker.running


def test_a_deleted_request_is_dropped(lab: Lab) -> None:
    """Job.delete while it runs: the worker drops it and goes on; soon nothing of it is left."""
    lab.worker(step_timeout=0.5)
    one, two = lab.submit("count", FOREVER), lab.submit("count", {"n": 3})
    lab.moved(one, 3)
    Job.fetch(one, connection=lab.connection).delete()
    lab.check(two, 3)
    eventually(lab.nothing_held)
    eventually(lambda: [name for name in lab.connection.scan_iter(f"*{one}*") if b"execution:" not in name] == [])


def test_a_running_request_is_dropped_at_its_deadline(lab: Lab) -> None:
    """Its slot is free for the next one, and it is not run again."""
    lab.worker()
    with Client(lab.url, settings=Settings()) as client:
        handle = client.submit("lab_tasks.count", FOREVER, queue="gpu", deadline=1.5)
        two = lab.submit("count", {"n": 3})
        with pytest.raises(DeadlineExceeded, match="while it ran"):
            list(handle.stream(timeout=30))
    lab.check(two, 3)
    record = lab.record(handle.id)
    assert (record.status, record.error_kind, record.executions) == ("failed", "DEADLINE", 1)
    assert lab.nothing_held()


def test_a_request_that_nobody_takes_is_ended_by_the_reaper(lab: Lab) -> None:
    """Also when no worker is there at all."""
    lab.reaper()
    with Client(lab.url, settings=Settings()) as client:
        handle = client.submit("lab_tasks.count", FOREVER, queue="gpu", queue_timeout=0.2)
        with pytest.raises(DeadlineExceeded, match="queue_timeout"):
            handle.result(30)


def test_a_canceled_request_that_waits_is_never_run(lab: Lab) -> None:
    """What was canceled while it waited is dropped from the queue by the claim that meets it."""
    one, two = lab.submit("count", {"n": 3}), lab.submit("count", {"n": 3})
    assert lab.store.cancel([(one, "")], reason="no") == ["canceled"]
    lab.worker("--burst").end()
    lab.check(two, 3)
    assert (lab.record(one).status, lab.record(one).executions, lab.waiting()) == ("canceled", 0, [])


@pytest.mark.slow
def test_suspend_and_resume(lab: Lab) -> None:
    """``rq suspend`` lets what runs end and stops claims, ``rq resume`` starts them again."""

    def rq(command: str) -> None:
        subprocess.run([str(Path(sys.executable).with_name("rq")), command, "--url", lab.url], check=True)

    def asked() -> int:
        stats: dict[str, Any] = lab.connection.info("commandstats")
        return int(stats.get("cmdstat_blpop", {"calls": 0})["calls"])

    lab.worker()
    running = lab.submit("count", {"n": 50, "sleep": 0.02})
    lab.moved(running)
    rq("suspend")
    waiting = lab.submit("count", {"n": 2})
    lab.check(running, 50)
    before = asked()
    # An idle worker claims after each wait on its bells: two more waits, and one claim has been refused for certain.
    eventually(lambda: asked() >= before + 2)
    assert (lab.waiting(), lab.record(waiting).status) == ([waiting], "queued")
    rq("resume")
    lab.check(waiting, 2)
