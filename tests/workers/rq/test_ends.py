"""What RQ does at a job's end besides storing it: webhooks, callbacks, rate limits, dependents, groups, repeats.

For plain jobs as RQ does it, also when their worker is lost; and for requests that were enqueued with RQ's options.
"""

from __future__ import annotations

from typing import Any

import pytest
import redis
from rq import Callback, Queue, Repeat, Retry
from rq.command import send_stop_job_command
from rq.group import Group
from rq.job import Dependency, Job
from rq.rate_limit import RateLimit, RateLimitRegistry

from perdure.protocol.keys import key
from perdure.workers.rq.dependents import Dependents
from perdure.workers.rq.notices import Notices
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.receiver import receiving

ONE = RateLimit("lab", 1)


def called(lab: Lab, name: str) -> str:
    value: Any = lab.connection.get(f"called:{name}")
    return (value or b"").decode()


def slots(connection: redis.Redis) -> tuple[list[str], list[str]]:
    """Who has a slot, and who waits for one."""
    registry = RateLimitRegistry(ONE.key, connection)
    return registry.get_allowed_job_ids(), registry.get_rate_limited_job_ids()


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
def test_webhooks_and_rate_limits_of_plain_jobs(lab: Lab, ours: bool) -> None:
    """A slot is passed on after a success and after a failure, and every webhook is sent once."""
    queue = Queue("gpu", connection=lab.connection)
    with receiving() as receiver:
        options: dict[str, Any] = {"rate_limit": ONE, "webhooks": receiver.hooks()}
        names = ["double", "fail", "double"]
        jobs = [queue.enqueue(f"lab_tasks.{name}", 4, **options) for name in names]
        allowed, waiting = slots(lab.connection)
        assert (allowed, set(waiting)) == ([jobs[0].id], {jobs[1].id, jobs[2].id})
        assert lab.worker("--burst", ours=ours).end() == 0
        assert [receiver.of(job.id) for job in jobs] == [["finished"], ["failed"], ["finished"]]
    assert [job.get_status() for job in jobs] == ["finished", "failed", "finished"]
    assert slots(lab.connection) == ([], [])


@pytest.mark.slow
def test_the_end_of_a_plain_job_whose_worker_was_lost(lab: Lab) -> None:
    """As RQ ends an abandoned job: failed, its callback and webhook called, its slot passed on, its dependents run."""
    queue = Queue("gpu", connection=lab.connection)
    with receiving() as receiver:
        worker = lab.worker()
        options: dict[str, Any] = {"rate_limit": ONE, "webhooks": receiver.hooks()}
        lost = queue.enqueue("lab_tasks.nap", 60, on_failure=Callback("lab_tasks.failed"), **options)
        waits = queue.enqueue("lab_tasks.double", 4, **options)
        after = queue.enqueue("lab_tasks.double", 5, depends_on=Dependency(lost, allow_failure=True))
        eventually(lambda: lost.get_status() == "started")
        worker.kill()
        eventually(lambda: lost.get_status() == "failed")
        assert lab.worker("--burst", "--exception-handler", "lab_tasks.handled").end() == 0
        assert (receiver.of(lost.id), receiver.of(waits.id)) == (["failed"], ["finished"])
        assert "WORKER_LOST" in next(item["exc_info"] for item in receiver.received if item["job_id"] == lost.id)
    assert called(lab, lost.id) == "failure AbandonedJobError"
    assert lab.connection.get(f"handled:{lost.id}") == b"AbandonedJobError"
    assert (waits.return_value(), after.return_value()) == (8, 10)
    assert slots(lab.connection) == ([], [])
    assert lab.connection.exists(key("notices"), key("parents")) == 0


@pytest.mark.slow
def test_a_lost_plain_job_with_retries_goes_on_to_repeat(lab: Lab) -> None:
    """``Retry`` runs it again, the failure callback hears of the loss, and ``Repeat`` is not forgotten by it."""
    worker = lab.worker()
    job = Queue("gpu", connection=lab.connection).enqueue(
        "lab_tasks.second_time",
        str(lab.folder),
        retry=Retry(max=1),
        repeat=Repeat(times=1),
        on_failure=Callback("lab_tasks.failed"),
    )
    eventually((lab.folder / "first").exists)
    worker.kill()
    lab.worker()
    eventually(lambda: len(job.results()) == 2 and job.get_status() == "finished")
    eventually(lambda: called(lab, job.id) == "failure AbandonedJobError")


@pytest.mark.slow
def test_a_retry_waits_without_its_slot(lab: Lab) -> None:
    """Under a rate limit, what waits for its retry lets another one run, and gets a slot again when it is due."""
    queue = Queue("gpu", connection=lab.connection)
    worker = lab.worker()
    first = queue.enqueue("lab_tasks.second_time", str(lab.folder), retry=Retry(max=1, interval=1), rate_limit=ONE)
    second = queue.enqueue("lab_tasks.double", 4, rate_limit=ONE)
    eventually((lab.folder / "first").exists)
    worker.kill()
    lab.worker()
    eventually(lambda: first.get_status() == "finished" and second.get_status() == "finished")
    eventually(lambda: slots(lab.connection) == ([], []))


def helpers(connection: redis.Redis) -> tuple[Dependents, Notices]:
    return Dependents(connection, ["gpu"], Queue, Job, None), Notices(connection, Job, None)


@pytest.mark.parametrize("free", [False, True], ids=["taken", "free"])
def test_a_due_retry_has_no_slot_before_its_turn(connection: redis.Redis, free: bool) -> None:
    """Its slot was given to another job meanwhile: it waits until that one has ended, if it has not yet."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    dependents, _ = helpers(connection)
    queue = Queue("gpu", connection=connection)
    one = queue.enqueue("operator.neg", 1, rate_limit=ONE, retry=Retry(max=1, interval=600))
    two = queue.enqueue("operator.neg", 1, rate_limit=ONE)
    hand.claim()
    pool.reap(hand.incarnation)
    assert (one.get_status(), slots(connection)) == ("scheduled", ([one.id], [two.id]))
    dependents.enqueue()
    assert (pool.waiting(), slots(connection)) == ([two.id], ([two.id], []))
    pool.let_pass(700)
    if free:
        two.cancel()
        assert slots(connection) == ([], [])
        RateLimitRegistry(ONE.key, connection).cleanup()  # RQ forgets a limit that nobody is under
    pool.store.promote(["gpu"])
    assert one.get_status() == "rate_limited"
    dependents.enqueue()
    if free:
        assert (one.get_status(), pool.waiting(), slots(connection)) == ("queued", [one.id], ([one.id], []))
        return
    assert (one.get_status(), pool.waiting(), slots(connection)) == ("rate_limited", [two.id], ([two.id], [one.id]))
    two.cancel()
    assert (one.get_status(), pool.waiting(), slots(connection)) == ("queued", [one.id], ([one.id], []))


def test_a_slot_that_was_left_behind_is_found(connection: redis.Redis) -> None:
    """RQ ended the job and its worker died before it gave the slot back: the reaper's note, or the next look."""
    pool = Pool.over(connection)
    dependents, _ = helpers(connection)
    queue = Queue("gpu", connection=connection)
    for noted in (True, False):
        hand = Hand(pool)
        one, two = (queue.enqueue("operator.neg", 1, rate_limit=ONE) for _ in range(2))
        hand.take(one.id)
        one.set_status("finished")  # type: ignore[arg-type]
        pool.reap(hand.incarnation)
        if noted:
            dependents.enqueue()
        else:
            connection.delete(key("parents"))
            dependents._clean()
        assert (pool.waiting(), slots(connection)) == ([two.id], ([two.id], []))
        two.delete()


def test_what_rq_tells_of_a_requests_end(lab: Lab) -> None:
    """``Queue.enqueue(task, …)`` with callbacks, webhooks, a rate limit, a group and dependents: all hold."""
    queue = Queue("gpu", connection=lab.connection)
    group = Group.create(connection=lab.connection)
    with receiving() as receiver:
        options: dict[str, Any] = {"rate_limit": ONE, "webhooks": receiver.hooks()}
        good = queue.enqueue(
            "lab_tasks.count",
            n=3,
            on_success=Callback("lab_tasks.succeeded"),
            description="three",
            meta={"who": "me"},
            result_ttl=100,
            **options,
        )
        bad = queue.enqueue("lab_tasks.refuse", n=0, on_failure=Callback("lab_tasks.failed"), **options)
        chained = queue.enqueue("lab_tasks.count", n=2, depends_on=good)
        last = queue.enqueue("lab_tasks.double", 4, depends_on=[chained, Dependency(bad, allow_failure=True)])
        member, counted = group.enqueue_many(
            queue, [Queue.prepare_data("lab_tasks.double", (5,)), Queue.prepare_data("lab_tasks.count", ({"n": 4},))]
        )
        first = queue.enqueue("lab_tasks.count", n=1, at_front=True)
        assert lab.worker("--burst").end() == 0
        assert (receiver.of(good.id), receiver.of(bad.id)) == (["finished"], ["failed"])
        assert {item["func_name"] for item in receiver.received} == {"lab_tasks.count", "lab_tasks.refuse"}
    lab.check(good.id, 3)
    lab.check(chained.id, 2)
    lab.check(counted.id, 4)
    assert called(lab, good.id) == "success {'counted': 3}"
    assert called(lab, bad.id) == "failure RequestFailed"
    assert (last.return_value(), member.return_value()) == (8, 10)
    assert {job.id for job in group.get_jobs()} == {member.id, counted.id}
    stored = Job.fetch(good.id, connection=lab.connection)
    assert (stored.description, stored.get_meta()) == ("three", {"who": "me"})
    assert lab.connection.ttl(stored.key) <= 100
    assert (lab.record(first.id).started_at or "") < (lab.record(good.id).started_at or "")
    assert slots(lab.connection) == ([], [])


def test_a_stopped_request_calls_its_callback(lab: Lab) -> None:
    """``on_stopped``, by a worker that knows the task by its name."""
    lab.worker()
    job = Queue("gpu", connection=lab.connection).enqueue(
        "lab_tasks.count", n=100_000, sleep=0.01, on_stopped=Callback("lab_tasks.stopped")
    )
    lab.moved(job.id, 2)
    send_stop_job_command(lab.connection, job.id)
    eventually(lambda: called(lab, job.id) == "stopped lab_tasks.count")
    assert job.get_status() == "stopped"


def test_what_a_request_will_not_do_is_said(lab: Lab) -> None:
    """``repeat``, ``job_timeout`` and ``Retry(interval)``: in the worker's log and in the request's history."""
    job = Queue("gpu", connection=lab.connection).enqueue(
        "lab_tasks.count", n=2, job_timeout=7, repeat=Repeat(times=2), retry=Retry(max=2, interval=9)
    )
    worker = lab.worker("--burst")
    assert worker.end() == 0
    lab.check(job.id, 2)
    (event,) = lab.store.history(job.id)
    assert event.event == "adopted"
    for word in ("repeat", "job_timeout=7", "Retry(interval)"):
        assert word in event.reason
        assert word in worker.log


def test_the_last_of_max_jobs_is_told_of(lab: Lab) -> None:
    """A worker that leaves by itself does not leave it to a worker that may never come; under another
    serializer, too.
    """
    with receiving() as receiver:
        job = Queue("gpu", connection=lab.connection, serializer="json").enqueue(
            "lab_tasks.count", n=1, webhooks=receiver.hooks(), on_success=Callback("lab_tasks.succeeded")
        )
        assert lab.worker("--max-jobs", "1", "--serializer", "json", wait=False).end() == 0
        assert receiver.of(job.id) == ["finished"]
    assert called(lab, job.id) == "success {'counted': 1}"


def broken(job: Job, connection: redis.Redis, *error: Any) -> None:
    """A callback that fails."""
    raise ArithmeticError("broken callback")


def test_a_note_is_acted_upon_once(connection: redis.Redis) -> None:
    """Others keep away while somebody does; a callback that fails does not keep the webhooks; a deleted job is passed
    over.
    """
    pool = Pool.over(connection)
    hand = Hand(pool)
    _, notices = helpers(connection)
    with receiving() as receiver:
        queue = Queue("gpu", connection=connection)
        job = queue.enqueue("operator.neg", 1, webhooks=receiver.hooks(), on_failure=Callback(broken))
        gone = queue.enqueue("operator.neg", 1, webhooks=receiver.hooks())
        for item in (job, gone):
            hand.take(item.id)
            pool.reap(hand.incarnation)
            hand = Hand(pool)
        gone.delete()
        notes: Any = connection.smembers(key("notices"))
        assert len(notes) == 2
        for note in notes:
            connection.set(key("notice", note.decode()), 1)
        assert (notices.tell(), receiver.received) == (0, [])
        for note in notes:
            connection.delete(key("notice", note.decode()))
        assert [notices.tell(), notices.tell()] == [2, 0]
        assert receiver.of(job.id) == ["failed"]
        assert receiver.of(gone.id) == []
    assert connection.exists(key("notices")) == 0
    assert list(connection.scan_iter(f"{key('notice')}*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
def test_plain_jobs_that_are_taken_back_while_they_wait(lab: Lab, ours: bool) -> None:
    """``Job.cancel`` and ``Job.delete`` of a waiting job: it never runs."""
    queue = Queue("gpu", connection=lab.connection)
    canceled, deleted, runs = (queue.enqueue("lab_tasks.double", number) for number in range(3))
    canceled.cancel()
    deleted.delete()
    assert lab.worker("--burst", ours=ours).end() == 0
    assert (canceled.get_status(), canceled.results(), runs.return_value()) == ("canceled", [], 4)
    assert not lab.connection.exists(deleted.key)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_plain_jobs_that_are_taken_back_while_they_run(lab: Lab, how: str) -> None:
    """As with RQ it runs to its end, which then counts; the worker goes on, and nothing of ours is left."""
    worker = lab.worker()
    job = Queue("gpu", connection=lab.connection).enqueue("held_jobs.hold", str(lab.folder), "job")
    eventually((lab.folder / "job.runs").exists)
    getattr(job, how)()
    (lab.folder / "job.goes").touch()
    lab.check(lab.submit("count", {"n": 3}), 3)
    eventually(lab.nothing_held)
    assert worker.running
    assert "Traceback" not in worker.log


def test_a_deleted_request_does_not_keep_its_slot(lab: Lab) -> None:
    """RQ leaves the slot to what still runs; once the worker has dropped it, maintenance passes it on."""
    worker = lab.worker(step_timeout=0.5)
    queue = Queue("gpu", connection=lab.connection)
    job = queue.enqueue("lab_tasks.count", n=100_000, sleep=0.01, rate_limit=ONE)
    waits = queue.enqueue("lab_tasks.double", 4, rate_limit=ONE)
    lab.moved(job.id, 2)
    assert slots(lab.connection) == ([job.id], [waits.id])
    job.delete()
    eventually(lambda: not lab.connection.exists(key("executions", job.id)))
    helpers(lab.connection)[0]._clean()
    eventually(lambda: waits.get_status() == "finished")
    assert worker.running
