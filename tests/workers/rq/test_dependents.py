"""Plain jobs that wait for a request (RQ's ``depends_on``), as RQ enqueues them after a job of its own."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Dependency, Job
from rq.registry import DeferredJobRegistry, ReadyJobRegistry

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.workers.rq.dependents import Dependents
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool


def after(lab: Lab, request: str, number: int = 4, *, queue: str = "gpu", allow_failure: bool = False) -> Job:
    """A job that waits for a request."""
    dependency = Dependency(Job.fetch(request, connection=lab.connection), allow_failure=allow_failure)
    return Queue(queue, connection=lab.connection).enqueue("lab_tasks.double", number, depends_on=dependency)


@pytest.mark.slow
def test_a_job_runs_once_its_request_has_finished(lab: Lab) -> None:
    """Not before; a chain goes on; one that is enqueued after the end runs at once."""
    worker = lab.worker()
    one = lab.submit("count", {"n": 60, "sleep": 0.02})
    first = after(lab, one)
    second = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.double", 5, depends_on=first)
    lab.moved(one, 3)
    assert (first.get_status(), second.get_status()) == ("deferred", "deferred")
    lab.check(one, 60)
    eventually(lambda: second.get_status() == "finished")
    assert (first.return_value(), second.return_value()) == (8, 10)
    late = after(lab, one, 6)
    eventually(lambda: late.get_status() == "finished")
    assert len(DeferredJobRegistry("gpu", connection=lab.connection)) == 0
    assert lab.connection.exists(key("parents")) == 0
    worker.send(signal.SIGTERM)
    assert worker.end() == 0


def test_a_burst_runs_what_depends_on_its_requests(lab: Lab) -> None:
    """``--burst``: done means that the dependents are done too, in whichever of its queues they are."""
    one = lab.submit("count", {"n": 3})
    jobs = [after(lab, one), after(lab, one, 5, queue="other")]
    lab.worker("--burst", queues=("gpu", "other")).end()
    assert [job.return_value() for job in jobs] == [8, 10]


@pytest.mark.slow
def test_after_a_failure_only_those_run_that_allow_it(lab: Lab) -> None:
    """``allow_failure``; after a cancel nobody runs, as with RQ."""
    failing, canceled = lab.submit("boom", max_retries=0), lab.submit("count", {"n": 3})
    allowed, waiting = after(lab, failing, allow_failure=True), after(lab, failing)
    never = after(lab, canceled, allow_failure=True)
    assert lab.store.cancel([(canceled, "")], reason="no") == ["canceled"]
    lab.worker("--burst").end()
    assert (allowed.return_value(), waiting.get_status(), never.get_status()) == (8, "deferred", "deferred")
    # Requeued by hand, and better this time: whoever still waits runs.
    lab.connection.hset(key("job", failing), "task", "lab_tasks.refuse")
    lab.connection.hset(key("job", failing), "payload", b"\x81\xa1n\x01")
    Job.fetch(failing, connection=lab.connection).requeue()
    lab.worker("--burst").end()
    assert lab.record(failing).status == "finished"
    assert waiting.return_value() == 8


def dependents(connection: redis.Redis) -> Dependents:
    return Dependents(connection, ["gpu"], Queue, Job, None)


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_an_end_is_noted_until_it_is_acted_upon(connection: redis.Redis, end: str) -> None:
    """Its worker is gone right after: another one finds the note, does it once, and twice is as good."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    queue = Queue("gpu", connection=connection)
    job = queue.enqueue("operator.add", 1, 2, depends_on=Dependency("a", allow_failure=True))
    if end == "finish":
        hand.finish(first, 1)
    else:
        hand.fail(first, FailureKind.INVALID_REQUEST)
    hand.finish(second, 2)
    assert connection.smembers(key("parents")) == {b"a"}
    assert 0 < _ttl(connection, f"{key('job', 'a')}:dependents") <= 2000
    for _ in range(2):
        dependents(connection).enqueue()
        assert pool.waiting() == [job.id]
    assert connection.exists(key("parents")) == 0


def test_enqueuing_that_was_cut_off_is_finished(connection: redis.Redis) -> None:
    """Between RQ's two steps the job stands in its ready registry: a worker looks there as well."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    pool.submit("a")
    claim = hand.take("a")
    queue = Queue("gpu", connection=connection)
    job = queue.enqueue("operator.add", 1, 2, depends_on="a")
    hand.finish(claim, 1)
    queue.move_dependents_to_ready(Job.fetch("a", connection=connection))
    assert ReadyJobRegistry("gpu", connection=connection).get_job_ids(cleanup=False) == [job.id]
    dependents(connection)._clean()
    assert pool.waiting() == [job.id]


def test_a_deleted_request_leaves_no_note(connection: redis.Redis) -> None:
    """Deleted between its end and the look: the note goes, and nothing is enqueued."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    pool.submit("a")
    claim = hand.take("a")
    Queue("gpu", connection=connection).enqueue("operator.add", 1, 2, depends_on="a")
    hand.finish(claim, 1)
    connection.delete(key("job", "a"))
    dependents(connection).enqueue()
    assert (pool.waiting(), connection.exists(key("parents"))) == ([], 0)


def _ttl(connection: redis.Redis, name: str) -> Any:
    return connection.ttl(name)
