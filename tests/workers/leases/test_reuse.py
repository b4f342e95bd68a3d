"""An id that is used again while its old run goes on, with real workers."""

from __future__ import annotations

import pytest
from rq import Queue
from rq.job import Job

from perdure.protocol.keys import key
from tests.kit.lab import Lab, eventually


@pytest.mark.slow
@pytest.mark.parametrize("how", ["another job", "the same job", "deleted before"])
def test_a_running_plain_job_enqueued_again_has_its_result(lab: Lab, how: str) -> None:
    """RQ saves the first job over the second at the first one's end. The second runs, and its result stays."""
    workers = [lab.worker(), lab.worker()]
    queue = Queue("gpu", connection=lab.connection)
    folder = str(lab.folder)
    first = queue.enqueue("held_jobs.hold", folder, "first", job_id="nightly")
    eventually((lab.folder / "first.runs").exists)
    second = "first" if how == "the same job" else "second"
    (lab.folder / "first.runs").unlink()
    if how == "the same job":
        queue.enqueue_job(Job.fetch("nightly", connection=lab.connection))
    else:
        if how == "deleted before":
            first.delete()
        queue.enqueue("held_jobs.hold", folder, "second", job_id="nightly")
    eventually((lab.folder / f"{second}.runs").exists)
    (lab.folder / "first.goes").touch()
    dropped = "was enqueued again while it ran; this result is dropped"
    eventually(lambda: any(dropped in worker.log for worker in workers))
    (lab.folder / "second.goes").touch()
    job = _finished(lab, "nightly")
    assert job.return_value() == second
    assert len(job.results()) == 1
    eventually(lab.nothing_held)
    assert not lab.waiting()


def _finished(lab: Lab, identifier: str) -> Job:
    job = Job.fetch(identifier, connection=lab.connection)
    eventually(lambda: job.get_status(refresh=True) == "finished")
    return job


@pytest.mark.slow
def test_a_task_enqueued_again_by_rq_runs_with_the_last(lab: Lab) -> None:
    """A cron's usual way: one fixed job id, another payload each time, also while the last run goes on."""
    lab.worker()
    lab.worker()
    queue = Queue("gpu", connection=lab.connection)
    queue.enqueue("lab_tasks.count", n=100_000, sleep=0.05, job_id="nightly")
    lab.moved("nightly", 3)
    for number in (3, 4):
        queue.enqueue("lab_tasks.count", n=number, job_id="nightly")
        job = _finished(lab, "nightly")
        assert job.return_value() == {"counted": number}
        lab.check("nightly", number)
    eventually(lab.nothing_held)
    assert lab.connection.hget(key("counters"), "dropped:gpu") is None
