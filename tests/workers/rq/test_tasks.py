"""``Queue.enqueue(task, ...)``: a stock producer's job that calls one of our tasks becomes a request."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from rq import Queue, Retry

from perdure.protocol.errors import UnknownTask
from perdure.workers import Request, task
from tests.kit.lab import Lab
from tests.kit.places import TASKS


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The workers' module of tasks, in a producer."""
    import importlib

    monkeypatch.syspath_prepend(str(TASKS))
    yield importlib.import_module("lab_tasks")
    sys.modules.pop("lab_tasks", None)


def test_a_task_is_pickled_by_its_name(tasks: Any) -> None:
    """As a function is; one that no other process can import is refused."""
    assert pickle.loads(pickle.dumps(tasks.count)) is tasks.count

    @task
    def hidden(request: Request) -> Any:
        yield

    with pytest.raises(UnknownTask):
        pickle.dumps(hidden)


@pytest.mark.slow
def test_an_enqueued_task_becomes_a_request(lab: Lab, tasks: Any) -> None:
    """Task objects and paths, keywords and one payload; the result is RQ's, the outputs and options are ours."""
    queue = Queue("gpu", connection=lab.connection)
    jobs = [
        queue.enqueue(tasks.count, n=3),
        queue.enqueue(tasks.count, {"n": 3}, result_ttl=100, retry=Retry(max=7)),
        queue.enqueue("lab_tasks.count", n=3),
    ]
    batch = queue.enqueue("lab_tasks.model", n=3)
    plain = queue.enqueue("lab_tasks.double", 4)
    lab.worker("--max-jobs", "1", wait=False).end()
    assert lab.record(jobs[0].id).ended, "it was counted once"
    lab.worker("--burst").end()
    for job in jobs:
        assert lab.check(job.id, 3).executions == 1
        assert job.return_value() == {"counted": 3}
    assert lab.connection.ttl(jobs[1].key) <= 100
    assert lab.connection.hget(jobs[1].key, "max_retries") == b"7"
    assert lab.outputs(batch.id) == [0, 1, 2]
    assert plain.return_value() == 8
    assert lab.nothing_held()


@pytest.mark.slow
def test_an_enqueued_task_resumes(lab: Lab, tasks: Any) -> None:
    """It has what every request has: its worker is killed, and it goes on."""
    worker = lab.worker()
    job = Queue("gpu", connection=lab.connection).enqueue(tasks.count, n=100, sleep=0.02)
    lab.moved(job.id, 10)
    worker.kill()
    lab.worker("--max-jobs", "1")
    record = lab.check(job.id, 100)
    assert (record.executions, record.attempt) == (2, 0)
    assert job.return_value() == {"counted": 100}


def test_arguments_that_are_no_payload_are_refused(lab: Lab, tasks: Any) -> None:
    """Two arguments, or a value that msgpack cannot hold: a dead letter that says so, and the worker goes on."""
    queue = Queue("gpu", connection=lab.connection)
    cases = [(queue.enqueue(tasks.count, 1, 2), "one argument"), (queue.enqueue(tasks.count, n={1}), "set")]
    worker = lab.worker()
    lab.check(lab.submit("count", {"n": 3}), 3)
    for job, reason in cases:
        assert job.get_status() == "failed"
        result = job.latest_result()
        assert result is not None
        assert reason in (result.exc_string or "")
    assert worker.running
