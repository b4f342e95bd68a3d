"""``--with-scheduler``: RQ's scheduler in a process of its own, which lives as long as its worker."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
from rq import Queue
from rq.job import Job
from rq.registry import ScheduledJobRegistry
from rq.scheduler import RQScheduler

from perdure.protocol.keys import key
from tests.kit.lab import Lab, Process, command_of, eventually, gone


def scheduler_of(worker: Process) -> int:
    """Process id of a worker's scheduler, once it runs."""

    def found() -> list[int]:
        names = {pid: command_of(pid) for pid in worker.children()}
        return [pid for pid, line in names.items() if "perdure.workers.rq.scheduler" in line]

    (pid,) = eventually(found)
    return pid


def later(lab: Lab, milliseconds: int = 300, serializer: str | None = None) -> Job:
    queue = Queue("gpu", connection=lab.connection, serializer=serializer)
    return queue.enqueue_in(timedelta(milliseconds=milliseconds), "lab_tasks.double", 4)


def finished(job: Job) -> None:
    eventually(lambda: job.get_status() == "finished")
    assert job.return_value(refresh=True) == 8


@pytest.mark.slow
def test_jobs_are_run_when_they_are_due(lab: Lab) -> None:
    """``enqueue_in`` runs its job, beside a request; SIGTERM ends the scheduler as well, and its locks are free."""
    worker = lab.worker("--with-scheduler")
    process = scheduler_of(worker)
    job, request = later(lab), lab.submit("count", {"n": 50, "sleep": 0.01})
    finished(job)
    lab.check(request, 50)
    # Spawned: nothing of the worker's is in it.
    assert "perdure.workers.rq.worker" not in " ".join(command_of(process))
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    eventually(lambda: gone(process))
    assert list(lab.connection.scan_iter("rq:scheduler*")) == []


@pytest.mark.slow
def test_a_scheduler_that_dies_is_replaced(lab: Lab) -> None:
    """SIGKILL to it: another one has its locks at once, and the worker goes on."""
    worker = lab.worker("--with-scheduler")
    old = scheduler_of(worker)
    finished(later(lab))
    os.kill(old, signal.SIGKILL)
    finished(later(lab))
    new = scheduler_of(worker)
    assert new != old
    assert "the scheduler" in worker.log
    worker.kill_tree()


@pytest.mark.slow
def test_a_scheduler_dies_with_its_worker(lab: Lab) -> None:
    """SIGKILL to the worker: its scheduler leaves, and the one of another worker takes over in seconds."""
    first = lab.worker("--with-scheduler")
    process = scheduler_of(first)
    finished(later(lab))
    second = lab.worker("--with-scheduler")
    other = scheduler_of(second)
    lock = RQScheduler.get_locking_key("gpu")
    old = lab.connection.get(lock)
    first.kill()
    eventually(lambda: gone(process))
    assert lab.connection.get(lock) != old, "it was ended before it could give its lock back"
    began = time.monotonic()
    finished(later(lab))
    assert time.monotonic() - began < 20, "10 s until it asks for the queue; the rest is for a busy machine"
    second.send(signal.SIGTERM)
    assert second.end() == 0
    eventually(lambda: gone(other))


@pytest.mark.slow
def test_a_scheduler_rides_out_outages(lab: Lab) -> None:
    """Its connection is cut: it, or one in its place, goes on."""
    worker = lab.worker("--with-scheduler")
    scheduler_of(worker)
    finished(later(lab))
    lab.connection.client_kill_filter(_type="normal", skipme=True)
    finished(later(lab))
    assert worker.running
    worker.send(signal.SIGTERM)
    assert worker.end() == 0


def test_a_burst_moves_what_is_due_first(lab: Lab) -> None:
    """As RQ does: what is due now runs, what is not stays, and no process is left."""
    due, not_yet = later(lab, 1), later(lab, 3_600_000)
    eventually(lambda: ScheduledJobRegistry("gpu", connection=lab.connection).get_jobs_to_schedule())
    worker = lab.worker("--with-scheduler", "--burst")
    assert worker.end() == 0
    finished(due)
    assert not_yet.get_status() == "scheduled"
    assert list(lab.connection.scan_iter("rq:scheduler*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("serializer", ["json", "rq.serializers.JSONSerializer"])
def test_the_workers_serializer_is_the_schedulers(lab: Lab, serializer: str) -> None:
    """``--serializer``: jobs of that kind are moved and run."""
    worker = lab.worker("--with-scheduler", "--serializer", serializer)
    job = later(lab, serializer=serializer)
    finished(job)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0


@pytest.mark.slow
def test_a_job_that_repeats_and_one_that_retries_come_again(lab: Lab) -> None:
    """RQ's ``Repeat`` and ``Retry`` with an interval both wait in RQ's scheduled registry."""
    from rq import Repeat, Retry

    worker = lab.worker("--with-scheduler")
    queue = Queue("gpu", connection=lab.connection)
    repeats = queue.enqueue("lab_tasks.double", 4, repeat=Repeat(times=2, interval=1))
    fails = queue.enqueue("lab_tasks.fail", 4, retry=Retry(max=1, interval=1))
    eventually(lambda: len(repeats.results()) == 3)
    eventually(lambda: fails.get_status() == "failed")
    assert lab.connection.zscore(key("failed", "gpu"), fails.id) is not None
    assert fails.get_status() == "failed"
    worker.send(signal.SIGTERM)
    assert worker.end() == 0


def test_a_task_may_be_enqueued_for_later(lab: Lab) -> None:
    """``enqueue_in`` with a task: the scheduler moves the job, and the worker makes a request of it."""
    queue = Queue("gpu", connection=lab.connection)
    job = queue.enqueue_in(timedelta(milliseconds=1), "lab_tasks.count", n=3)
    eventually(lambda: ScheduledJobRegistry("gpu", connection=lab.connection).get_jobs_to_schedule())
    assert lab.worker("--with-scheduler", "--burst").end() == 0
    lab.check(job.id, 3)
