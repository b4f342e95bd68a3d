"""Several requests in one worker: continuous batching, errors that stay with one request, foreign
entries, plain jobs.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.results import Result

from perdure.protocol.keys import key
from perdure.workers.pool.statuses import UNFIT
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool


def test_a_freed_slot_is_filled_while_others_run(lab: Lab) -> None:
    """Continuous batching: three slots run at once, and who leaves makes room for the next at once."""
    short = [lab.submit("Batch", {"n": 5}) for _ in range(2)]
    long = lab.submit("Batch", {"n": 100_000})
    late = [lab.submit("Batch", {"n": 5}) for _ in range(4)]
    lab.worker()
    for name in (*short, *late):
        assert lab.ended(name).status == "finished"
    assert not lab.record(long).ended, "the others did not wait for the long one"
    company = [mates for _, mates in lab.outputs(long)]
    assert max(company) == 3
    assert lab.store.cancel([(long, "")], reason="enough") == ["requested"]
    assert lab.ended(long).status == "canceled"
    eventually(lab.nothing_held)


def test_one_requests_fault_leaves_its_mates_alone(lab: Lab) -> None:
    """A failing admit or step, and an output that cannot be stored, end one request; its batch-mates do not notice."""
    faults = {"admit": {"admit": 1}} | {kind: {"kind": kind} for kind in ("error", "unpackable", "oversize")}
    good = lab.submit("Batch", {"n": 60})
    bad = {name: lab.submit("Batch", {"n": 60, **fault}, max_retries=0) for name, fault in faults.items()}
    lab.worker(max_payload=4000)
    for name, identifier in bad.items():
        record = lab.ended(identifier)
        assert record.status == "failed", name
        kind = "INVALID_REQUEST" if name in ("unpackable", "oversize") else "ERROR"
        assert record.error_kind == kind, (name, record)
        # What it had put out before is there to be read.
        assert len(lab.outputs(identifier)) == (0 if name == "admit" else 3), name
    record = lab.ended(good)
    assert (record.status, record.executions) == ("finished", 1)
    assert [index for index, _ in lab.outputs(good)] == list(range(60))
    assert lab.nothing_held()


@pytest.mark.parametrize("kind", ["raise", "no step"])
def test_a_raise_is_charged_to_a_lone_request(lab: Lab, kind: str) -> None:
    """One bad value beside five good requests without a retry: it fails with its traceback, they finish, uncharged."""
    good = [lab.submit("Batch", {"n": 10}, max_retries=0) for _ in range(2)]
    bad = lab.submit("Batch", {"n": 10, "kind": kind}, max_retries=0)
    good += [lab.submit("Batch", {"n": 10}, max_retries=0) for _ in range(3)]
    worker = lab.worker()
    record = lab.ended(bad)
    assert (record.status, record.error_kind, record.attempt) == ("failed", "ERROR", 1)
    assert {"raise": "the whole step", "no step": "step() gives Steps"}[kind] in lab.store.traceback(bad)
    for name in good:
        record = lab.ended(name)
        assert (record.status, record.attempt) == ("finished", 0)
        assert [index for index, _ in lab.outputs(name)] == list(range(10))
    assert worker.running
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_lone_poison_on_fresh_workers_ends_as_a_dead_letter(lab: Lab) -> None:
    """Where nothing proves the worker sound, a fresh one is to tell: the third that it raised on alone is the last."""
    bad = lab.submit("Batch", {"n": 10, "kind": "raise"})
    for _ in range(3):
        assert lab.worker(wait=False).end() == UNFIT
    record = lab.record(bad)
    assert (record.status, record.error_kind, record.attempt) == ("failed", "ERROR", 0)
    assert "alone with each of 3 workers" in record.error_reason
    assert "the whole step" in lab.store.traceback(bad)


def test_an_engine_that_always_raises_is_replaced(lab: Lab) -> None:
    """Whoever is in its step: after a few requests it is clear that it is not their fault."""
    names = [lab.submit("Broken", {"folder": str(lab.folder)}, max_retries=0) for _ in range(5)]
    Path(lab.folder, "broken").touch()
    assert lab.worker(wait=False).end() == UNFIT
    Path(lab.folder, "broken").unlink()
    lab.worker(wait=False)
    for name in names:
        record = lab.ended(name)
        assert (record.status, record.attempt) == ("finished", 0)


@pytest.mark.slow
@pytest.mark.parametrize(("probe", "status"), [(True, "failed"), (False, "queued")])
def test_a_task_s_own_probe_decides_at_once(lab: Lab, probe: bool, status: str) -> None:
    """Well: the request that raised alone is charged, on this worker. Not well: the worker leaves,
    nothing is charged.
    """
    Path(lab.folder, "broken").touch()
    worker = lab.worker()
    one = lab.submit("Broken", {"folder": str(lab.folder), "probe": probe}, max_retries=0)
    if probe:
        assert lab.ended(one).attempt == 1
        assert worker.running
    else:
        assert worker.end() == UNFIT
        assert lab.record(one).attempt == 0
    assert lab.record(one).status == status


def test_sys_exit_in_a_task_ends_its_request_only(lab: Lab) -> None:
    """sys.exit in a task is that request's failure: it takes no worker down."""
    worker = lab.worker()
    one = lab.submit("leave", max_retries=0)
    record = lab.ended(one)
    assert (record.status, record.error_kind, lab.outputs(one)) == ("failed", "ERROR", ["before"])
    assert worker.running


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "where"), [("starve", "generator"), ("Starving", "step"), ("Starving", "admit")], ids=lambda value: value
)
def test_a_worker_without_memory_leaves_and_its_request_goes_on(lab: Lab, task: str, where: str) -> None:
    """Whichever way the error came: such a process is not trusted any further, and says so in its status."""
    worker = lab.worker()
    one = lab.submit(task, {"folder": str(lab.folder), "error": "memory", "where": where})
    assert worker.end() == UNFIT
    assert "unfit after MemoryError" in worker.log
    successor = lab.worker(wait=False)
    record = lab.check(one, 1)
    assert (record.worker, record.attempt, lab.events(one)) == (
        successor.name,
        0,
        [("suspected", "HOST_OOM"), ("retry", "HOST_OOM")],
    )
    assert lab.nothing_held()


def test_a_worker_outlives_an_ordinary_error(lab: Lab) -> None:
    """An error of the request's own is retried, in the same process."""
    worker = lab.worker()
    one = lab.submit("starve", {"folder": str(lab.folder), "error": "ordinary"})
    record = lab.check(one, 1)
    assert (record.worker, record.attempt, lab.events(one)) == (worker.name, 1, [("retry", "ERROR")])
    assert worker.running


def test_another_task_waits_until_the_worker_is_empty(lab: Lab) -> None:
    """A worker runs one task at a time: a foreign entry stops the claim, and nothing overtakes it."""
    first = [lab.submit("many", {"n": 10, "sleep": 0.02}) for _ in range(2)]
    foreign = lab.submit("count", {"n": 3})
    last = [lab.submit("many", {"n": 3}) for _ in range(2)]
    lab.worker("--burst").end()
    starts = [lab.record(name).started_at for name in (*first, foreign, *last)]
    assert starts == sorted(starts)
    assert lab.record(foreign).started_at >= max(lab.record(name).ended_at for name in first)
    assert lab.record(last[0]).started_at >= lab.record(foreign).ended_at
    for name in first:
        lab.check(name, 10)


def test_a_durable_step_is_stored_before_the_task_goes_on(lab: Lab) -> None:
    """Step(durable=True) resumes the generator only once its output and checkpoint are in Redis."""
    lab.worker(checkpoint_interval=5.0)
    one = lab.submit("durable", {"url": lab.url})
    lab.check(one, 3)
    assert lab.store.result(one) == [1, 2, 3]


def test_plain_jobs_run_between_requests(lab: Lab) -> None:
    """Plain RQ jobs succeed, fail and time out as on RQ's own worker, and leave no lease behind."""
    queue = Queue("gpu", connection=lab.connection)
    before = lab.submit("count", {"n": 3})
    good = queue.enqueue("lab_tasks.double", 21)
    bad = queue.enqueue("lab_tasks.fail", 21)
    slow = queue.enqueue("lab_tasks.nap", 20, job_timeout=1)
    after = lab.submit("count", {"n": 3})
    lab.worker("--burst").end()
    assert (good.get_status(), good.return_value()) == ("finished", 42)
    for job, error in ((bad, "KeyError: 21"), (slow, "JobTimeoutException")):
        result = job.latest_result()
        assert job.get_status(refresh=True) == "failed"
        assert result is not None
        assert result.type == Result.Type.FAILED
        assert error in (result.exc_string or "")
    assert FailedJobRegistry(queue=queue).get_job_ids() == [bad.id, slow.id]
    for name in (before, after):
        lab.check(name, 3)
    assert lab.nothing_held()
    assert lab.connection.zcard(key("leases", "gpu")) == 0


@pytest.mark.slow
def test_a_plain_job_on_a_killed_worker_fails_as_with_rq(lab: Lab) -> None:
    """Without RQ's Retry a job whose worker was lost is failed; with it, it runs again. Both at once,
    not in minutes.
    """
    from rq import Retry

    queue = Queue("gpu", connection=lab.connection)
    for retry, status in ((None, "failed"), (Retry(max=1), "queued")):
        job = queue.enqueue("lab_tasks.nap", 60, retry=retry)
        worker = lab.worker()
        eventually(lambda job=job: job.get_status() == "started")  # type: ignore[misc]
        worker.kill()
        eventually(lambda job=job, status=status: job.get_status() == status)  # type: ignore[misc]
    assert lab.nothing_held()


def test_a_plain_job_that_cannot_be_read_is_failed(lab: Lab) -> None:
    """A damaged job hash ends in the failed registry; the worker neither dies nor claims it for ever."""
    queue = Queue("gpu", connection=lab.connection)
    job = queue.enqueue("lab_tasks.double", 1)
    lab.connection.hset(key("job", job.id), "created_at", "yesterday")
    after = lab.submit("count", {"n": 2})
    worker = lab.worker()
    lab.check(after, 2)
    assert lab.connection.hget(key("job", job.id), "status") == b"failed"
    assert lab.connection.zscore(key("failed", "gpu"), job.id) is not None
    assert worker.log.count("cannot read job") <= 2
    assert lab.nothing_held()


def test_a_plain_job_without_a_result_ttl_leaves_nothing(lab: Lab) -> None:
    """RQ deletes it at its end, and the end of its holding does not bring it back."""
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.double", 1, result_ttl=0)
    lab.worker("--burst").end()
    assert list(lab.connection.scan_iter(f"*{job.id}*")) == []
    assert lab.nothing_held()


def test_a_dead_plain_job_runs_when_enqueued_again(lab: Lab) -> None:
    """Under the same id, as RQ allows: what it was before does not stop it."""
    queue = Queue("gpu", connection=lab.connection)
    queue.enqueue("lab_tasks.double", 1, job_id="same")
    lost = Hand(Pool(lab.store))
    lost.take("same")
    lost.pool.reap(lost.incarnation)
    assert FailedJobRegistry(queue=queue).get_job_ids() == ["same"]
    job = queue.enqueue("lab_tasks.double", 21, job_id="same")
    lab.worker("--burst").end()
    assert (job.get_status(), job.return_value()) == ("finished", 42)
    assert FailedJobRegistry(queue=queue).get_job_ids() == []


def test_max_jobs_counts_requests(lab: Lab) -> None:
    """--max-jobs ends a worker after so many requests, also when a batch could take more."""
    names = [lab.submit("many", {"n": 2}) for _ in range(5)]
    assert lab.worker("--max-jobs", "3", wait=False).end() == 0
    assert [lab.record(name).status for name in names] == ["finished"] * 3 + ["queued"] * 2


def test_the_order_of_a_queue_is_kept(lab: Lab) -> None:
    """One slot: requests start in the order in which they were submitted, queues in the order of the command."""
    low = [lab.submit("count", {"n": 1}, queue="low") for _ in range(3)]
    high = [lab.submit("count", {"n": 1}, queue="high") for _ in range(3)]
    lab.worker("--burst", queues=("high", "low")).end()
    times = [lab.record(name).started_at for name in (*high, *low)]
    assert times == sorted(times)
    assert all(lab.record(name).status == "finished" for name in (*high, *low))


def test_a_request_is_an_rq_job(lab: Lab) -> None:
    """RQ's own eyes see it: status while it runs, the worker as busy, the return value afterwards."""
    worker = lab.worker()
    one = lab.submit("count", {"n": 30, "sleep": 0.02})
    lab.moved(one)
    job = Job.fetch(one, connection=lab.connection)
    assert job.get_status() == "started"
    assert lab.connection.hget(key("worker", worker.name), "state") == b"busy"
    lab.check(one, 30)
    assert job.return_value() == {"counted": 30}
    eventually(lambda: lab.connection.hget(key("worker", worker.name), "state") == b"idle")
    assert time.time() - job.latest_result().created_at.timestamp() < 60  # type: ignore[union-attr]


def test_a_worker_serves_the_priorities_of_its_queue_in_order(lab: Lab) -> None:
    """High before normal before low; RQ sees the worker under the name that it was given."""
    names = [lab.submit("count", {"n": 1}, queue=queue) for queue in ("gpu-low", "gpu", "gpu-high")]
    lab.worker("--burst", "--max-jobs", "3").end()
    records = [lab.check(name, 1) for name in names]
    assert [record.queue for record in sorted(records, key=lambda record: record.started_at)] == [
        "gpu-high",
        "gpu",
        "gpu-low",
    ]
    worker = lab.worker()
    assert lab.ready(worker.name)["queues"] == ["gpu"]  # type: ignore[index]
    for queue in ("gpu-high", "gpu", "gpu-low"):
        assert lab.connection.smembers(key("workers_of", queue)) == {key("worker", worker.name).encode()}
    lab.check(lab.submit("count", {"n": 1}, queue="gpu-low"), 1)


def test_a_queue_of_one_priority_can_be_served_alone(lab: Lab) -> None:
    """A worker for gpu-low takes nothing else."""
    low, normal = lab.submit("count", {"n": 1}, queue="gpu-low"), lab.submit("count", {"n": 1})
    lab.worker("--burst", queues=("gpu-low",)).end()
    lab.check(low, 1)
    assert lab.waiting() == [normal]
