"""An id that is used again: deleted and submitted anew, enqueued once more, taken by another job, while it runs and
after.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.registry import FinishedJobRegistry

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.states import State
from tests.kit.protocol.pool import OTHER, TASK, Hand, Pool, packed, plain


@pytest.fixture
def queue(connection: redis.Redis) -> Queue:
    return Queue("gpu", connection=connection)


def counted(pool: Pool, event: str, name: str = "gpu") -> int:
    return int(pool.connection.hget(key("counters"), f"{event}:{name}") or 0)


def lists(pool: Pool, identifier: str) -> set[str]:
    """The sets and lists of ours and of RQ's in which an id stands."""
    found = set()
    for name in ("queue", "leases", "retries", "suspects", "ended", "finished", "failed", "canceled"):
        whole: Any = (
            pool.connection.lrange(key(name, "gpu"), 0, -1)
            if name == "queue"
            else pool.connection.zrange(key(name, "gpu"), 0, -1)
        )
        if identifier.encode() in whole:
            found.add(name)
    return found


def test_a_deleted_id_is_claimed_again_beside_its_old_run(pool: Pool, hand: Hand) -> None:
    """Its lease stands until it runs out, and says nothing: only execution and holder's index say that
    a request runs.
    """
    pool.submit("a")
    old = hand.take("a")
    hand.step(old, ["old"])
    Job.fetch("a", connection=pool.connection).delete()
    pool.submit("a")
    other = Hand(pool, "w2")
    new = other.take("a")
    assert new.offset == 0
    assert hand.step(old, ["old"], offset=1, seq=2) == "lost"
    assert hand.finish(old, "old") == "lost"
    assert other.step(new, ["new"]) == "ok"
    assert other.finish(new, "new", offset=1) == "ok"
    assert pool.store.result("a") == "new"
    assert pool.store.all_outputs("a") == ["new"]
    assert lists(pool, "a") == {"finished"}


@pytest.mark.parametrize("write", ["progress", "renew", "fail", "reap"])
def test_a_job_deleted_while_it_runs_leaves_no_lease(pool: Pool, hand: Hand, queue: Queue, write: str) -> None:
    """A plain one's may last for years. Its worker's next word, or its worker's end, removes it."""
    queue.enqueue("operator.add", 3, 4, job_id="a", job_timeout=-1)
    claim = hand.take("a")
    hand.beat()
    Job.fetch("a", connection=pool.connection).delete()
    if write == "progress":
        hand.step(claim, ["x"])
    elif write == "renew":
        hand.renew(claim)
    elif write == "fail":
        hand.fail(claim)
    else:
        pool.reap(hand.incarnation)
    assert lists(pool, "a") == set()
    left = [key("leases", "gpu"), key("wip", "gpu"), key("held", hand.incarnation)]
    assert pool.connection.exists(*left) == 0


@pytest.mark.parametrize("write", ["progress", "renew", "reap", "sweep"])
def test_what_the_old_run_does_harms_no_new_request_that_waits(pool: Pool, hand: Hand, write: str) -> None:
    """Neither a late write, nor the death of the old worker, nor its lease takes anything from the new one."""
    pool.submit("a")
    old = hand.take("a")
    hand.step(old, ["old"])
    Job.fetch("a", connection=pool.connection).delete()
    pool.submit("a")
    if write == "progress":
        assert hand.step(old, ["old"], offset=1, seq=2) == "lost"
    elif write == "renew":
        assert hand.renew(old) == "lost"
    elif write == "reap":
        assert [item.outcome for item in pool.reap(hand.incarnation)] == ["gone"]
    else:
        pool.expire_lease("a")
        assert pool.sweep().reaped == []
    assert pool.waiting() == ["a"]
    assert Hand(pool, "w2").take("a").offset == 0
    assert pool.connection.exists(key("held", hand.incarnation)) == (write == "sweep"), "until it writes, or is gone"


def test_the_lease_of_an_old_run_in_another_queue_takes_nothing(pool: Pool, hand: Hand) -> None:
    """Run out, it is removed; the request that has the id now, in another queue, runs on."""
    pool.submit("a")
    hand.take("a")
    Job.fetch("a", connection=pool.connection).delete()
    pool.submit("a", queue="cpu")
    other = Hand(pool, "w2", queues=("cpu",))
    new = other.take("a")
    pool.expire_lease("a")
    assert pool.sweep("gpu", "cpu").reaped == []
    assert lists(pool, "a") == set()
    assert other.finish(new, 1) == "ok"


def test_a_claim_that_was_cut_short_is_taken_up_by_the_next(pool: Pool, hand: Hand) -> None:
    """The hash has an execution, and no worker's index has it: the id in the queue is to be run."""
    pool.submit("a")
    pool.connection.hset(
        key("job", "a"), mapping={"execution": "cut", "holder": "nobody", "started_at": "2026-01-01T00:00:00.000000Z"}
    )
    pool.connection.zadd(key("leases", "gpu"), {"a": 10**15})
    claim = hand.take("a")
    assert claim.execution != "cut"
    assert hand.finish(claim, 1) == "ok"


@pytest.mark.parametrize("end", ["finished", "failed", "canceled"])
def test_what_has_ended_and_is_enqueued_again_runs_again(pool: Pool, hand: Hand, queue: Queue, end: str) -> None:
    """`Queue.enqueue_job` of any ended request, as rq-scheduler does it, as often as it is asked to;
    each run is told.
    """
    pool.submit("a")
    for number in range(1, 4):
        claim = hand.take("a")
        if end == "finished":
            hand.finish(claim, number)
        elif end == "failed":
            hand.fail(claim, FailureKind.INVALID_REQUEST)
        else:
            pool.cancel("a")
            hand.confirm_cancel(claim)
        assert lists(pool, "a") == {end}
        queue.enqueue_job(Job.fetch("a", connection=pool.connection))
    claim = hand.take("a")
    assert lists(pool, "a") == {"leases"}
    assert claim.attempt == 1
    assert pool.connection.ttl(key("job", "a")) == -1
    hand.finish(claim, "last")
    assert pool.store.result("a") == "last"
    assert pool.events("a").count(end) == 3
    assert pool.events("a").count("requeued") == counted(pool, "requeued") == 3
    assert counted(pool, "dropped") == 0


def test_a_running_request_enqueued_again_runs_once_more(pool: Pool, hand: Hand, queue: Queue) -> None:
    """Its entry keeps its place until then, and holds nobody else up."""
    pool.submit("a", "b")
    claim = hand.take("a")
    queue.enqueue_job(Job.fetch("a", connection=pool.connection), at_front=True)
    other = Hand(pool, "w2")
    assert [item.id for item in other.claim(2).claims] == ["b"]
    assert pool.waiting() == ["a"]
    assert hand.step(claim, ["x"]) == "ok"
    assert hand.finish(claim, 1, offset=1) == "ok"
    again = hand.take("a")
    assert (again.offset, again.epoch) == (0, 1)
    assert hand.finish(again, 2) == "ok"
    assert other.claim(1).claims == []
    assert counted(pool, "dropped") == 0


def test_a_second_run_can_be_canceled_after_the_first(pool: Pool, hand: Hand, queue: Queue) -> None:
    """It waits, whatever status the run's end has written. Canceled, it does not run, and does not count as waiting."""
    pool.submit("a")
    claim = hand.take("a")
    queue.enqueue_job(Job.fetch("a", connection=pool.connection))
    hand.finish(claim)
    assert [pool.cancel("a"), pool.cancel("a")] == ["canceled", "canceled"]
    assert pool.status("a") is State.CANCELED
    assert lists(pool, "a") == {"queue", "ended", "canceled"}
    assert hand.claim(1).claims == []
    assert lists(pool, "a") == {"canceled"}


def test_a_cancel_before_a_second_run_cancels_both(pool: Pool, hand: Hand, queue: Queue) -> None:
    pool.submit("a")
    claim = hand.take("a")
    queue.enqueue_job(Job.fetch("a", connection=pool.connection))
    assert pool.cancel("a") == "requested"
    assert hand.step(claim, ["x"]) == "cancel"
    hand.confirm_cancel(claim)
    assert hand.claim(1).claims == []
    assert (pool.status("a"), lists(pool, "a")) == (State.CANCELED, {"canceled"})


def test_a_cancel_means_the_job_that_has_the_id_now(pool: Pool, hand: Hand, queue: Queue) -> None:
    """Another one was saved over a request that runs: it waits, and the old run is heard no more."""
    pool.submit("a")
    claim = hand.take("a")
    queue.enqueue("operator.add", 1, 2, job_id="a")
    assert pool.cancel("a") == "canceled"
    assert hand.step(claim, ["x"]) == "lost"
    assert Hand(pool, "w2").claim(1).claims == []


def test_another_job_under_the_id_has_no_old_deadline(pool: Pool, hand: Hand, queue: Queue) -> None:
    """Nor is it given up because no worker can load the request's task."""
    pool.store.enqueue([replace(pool.new("a"), deadline_at=1.0)])
    queue.enqueue("operator.add", 1, 2, job_id="a")
    pool.store.promote(["gpu"])
    assert pool.store.give_up("gpu", TASK, kind="INVALID_REQUEST", reason="no such module", workers=[]) == 0
    assert [(claim.id, claim.plain) for claim in hand.claim(1).claims] == [("a", True)]


def test_an_old_copy_of_a_job_starts_nothing_again(pool: Pool, hand: Hand) -> None:
    """Somebody saves what they have read before, and pushes the id: dropped, which its history and a counter say."""
    pool.submit("a")
    copy = Job.fetch("a", connection=pool.connection)
    hand.finish(hand.take("a"), "once")
    copy.save()
    pool.connection.rpush(key("queue", "gpu"), "a")
    assert hand.claim(1).claims == []
    assert pool.status("a") is State.FINISHED
    assert pool.store.result("a") == "once"
    last = pool.store.history("a")[-1]
    assert (last.event, last.reason) == ("dropped", "it has ended, and was not enqueued again since")
    assert counted(pool, "dropped") == 1
    assert 0 < pool.connection.ttl(key("history", "a")) <= 1000


@pytest.mark.parametrize("made", ["submitted", "enqueued by RQ"])
@pytest.mark.parametrize("when", ["running", "released", "retried"])
def test_a_producer_that_saves_its_copy_disturbs_nothing(
    pool: Pool, hand: Hand, queue: Queue, made: str, when: str
) -> None:
    """`job.meta[...] = ...; job.save()`, as RQ's documentation has it: the copy has never begun, and is
    no other job.
    """
    if made == "submitted":
        pool.submit("a")
        copy = Job.fetch("a", connection=pool.connection)
    else:
        copy = queue.enqueue("app.tasks.count", n=3, job_id="a")
        plain_claim = hand.take("a")
        assert (
            pool.store.adopt(
                hand.incarnation, hand.name, "a", plain_claim.execution, task=TASK, payload=packed({"n": 3})
            )
            == "ok"
        )
        hand.held.clear()
    claim = hand.take("a")
    assert hand.step(claim, ["x"]) == "ok"
    if when == "released":
        hand.release(claim)
    elif when == "retried":
        hand.fail(claim, FailureKind.NETWORK)
        pool.make_due("a")
    copy.meta["progress"] = 1
    copy.save()
    if when != "running":
        claim = hand.take("a")
        assert (claim.task, claim.offset) == (TASK, 1)
    assert hand.step(claim, ["y"], offset=1, seq=claim.seq + 1 if when != "running" else 2) == "ok"
    assert hand.finish(claim, "done", offset=2) == "ok"
    assert pool.store.result("a") == "done"
    assert hand.claim().claims == []


def test_what_stands_twice_is_dropped_once_and_says_so(pool: Pool, hand: Hand) -> None:
    """In one claim, and while the first entry's run goes on."""
    pool.submit("a")
    pool.connection.rpush(key("queue", "gpu"), "a", "a")
    hand.take("a")
    assert Hand(pool, "w2").claim(2).claims == []
    assert [event.reason for event in pool.store.history("a")] == ["it runs already", "it runs already"]
    assert counted(pool, "dropped") == 2


@pytest.mark.parametrize("when", ["running", "finished", "waiting for a retry", "canceled after a requeue"])
def test_another_job_under_the_id_of_a_request_is_that_job(pool: Pool, hand: Hand, queue: Queue, when: str) -> None:
    """RQ's `enqueue(job_id=)` saves it over the hash: nothing of the request is left, and its run is not the job's."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["old"])
    if when == "finished":
        hand.finish(claim, "old", offset=1)
    elif when == "waiting for a retry":
        hand.fail(claim)
    elif when == "canceled after a requeue":
        hand.fail(claim, FailureKind.INVALID_REQUEST)
        queue.failed_job_registry.requeue("a")
        pool.cancel("a")
    job = queue.enqueue("operator.add", 3, 4, job_id="a", result_ttl=100)
    if when == "running":
        assert hand.step(claim, ["late"], offset=1, seq=2) == "lost"
        assert hand.finish(claim, "old") == "lost"
    other = Hand(pool, "w2")
    taken = other.claim(1).claims
    if not taken:  # the entry of what ended while it waited stands before
        taken = other.claim(1).claims
    assert [(item.id, item.plain) for item in taken] == [("a", True)]
    hash_ = plain(pool.connection.hgetall(job.key))
    assert not {"task", "payload", "nonce", "last", "company", "retries_left"} & set(hash_)
    assert (hash_["execution"], hash_["status"]) == (taken[0].execution, "started")
    assert pool.store.all_outputs("a") == []
    assert job.return_value(refresh=True) is None
    assert lists(pool, "a") == {"leases"}
    assert not pool.connection.hexists(key("held", hand.incarnation), "a")


def test_a_running_plain_job_enqueued_again_moves_on(pool: Pool, hand: Hand, queue: Queue) -> None:
    """As in RQ. The first run's end touches neither the second one's lease nor its hash."""
    job = queue.enqueue("operator.add", 3, 4, job_id="nightly")
    first = hand.take("nightly")
    queue.enqueue("operator.add", 5, 6, job_id="nightly")
    other = Hand(pool, "w2")
    second = other.take("nightly")
    assert second.execution != first.execution
    with pool.connection.pipeline() as pipe:
        hand.settle(first, pipe)
        assert pipe.execute()[-1] == b"lost"
    assert lists(pool, "nightly") == {"leases"}
    assert pool.connection.hget(job.key, "execution") == second.execution.encode()


def test_what_is_requeued_and_ends_waiting_is_no_new_job(pool: Pool, hand: Hand, queue: Queue) -> None:
    """RQ's requeue empties started_at, as a new job does. A cancel, and somebody's push afterwards, revive nothing."""
    pool.submit("a")
    hand.fail(hand.take("a"), FailureKind.INVALID_REQUEST)
    queue.failed_job_registry.requeue("a")
    assert pool.cancel("a") == "canceled"
    assert lists(pool, "a") == {"queue", "ended", "canceled"}
    pool.connection.rpush(key("queue", "gpu"), "a")
    assert hand.claim(2).claims == []
    assert (pool.status("a"), lists(pool, "a")) == (State.CANCELED, {"canceled"})
    assert pool.field("a", "task") == TASK


def test_a_requeued_request_behind_another_stays_a_request(pool: Pool, hand: Hand, queue: Queue) -> None:
    """It is met, and left in its place, before it is claimed: the second meeting is no other than the first."""
    pool.submit("b", task=OTHER)
    pool.submit("a")
    busy = hand.take("b")
    other = Hand(pool, "w2")
    other.fail(other.take("a"), FailureKind.INVALID_REQUEST)
    queue.failed_job_registry.requeue("a")
    assert [hand.claim(1).status for _ in range(2)] == ["blocked", "blocked"]
    hand.finish(busy)
    assert hand.take("a").task == TASK


def test_enqueue_again_in_another_queue(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    """The run counts there; the old queue's registry is left by age."""
    pool.submit("a")
    hand.finish(hand.take("a"), 1)
    Queue("cpu", connection=connection).enqueue_job(Job.fetch("a", connection=connection))
    other = Hand(pool, "w2", queues=("cpu",))
    other.finish(other.take("a"), 2)
    assert pool.store.result("a") == 2
    assert "a" in FinishedJobRegistry("cpu", connection=connection).get_job_ids()


# --- found by strangers ------------------------------------------------------------------------------


def drained(pool: Pool, hand: Hand) -> list[str]:
    """What a worker is given one after another until there is nothing more, each of which it finishes."""
    given = []
    for _ in range(6):
        for claim in hand.claim(1).claims:
            hand.finish(claim, 2)
            given.append(claim.id)
    return given


@pytest.mark.parametrize("at_front", [False, True])
@pytest.mark.parametrize("met", [True, False], ids=["its entry was met", "its entry stands there"])
@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_what_ended_unclaimed_and_is_enqueued_again_runs(
    pool: Pool, hand: Hand, queue: Queue, end: str, met: bool, at_front: bool
) -> None:
    """Whichever of its entries is met first."""
    pool.submit("a")
    if end == "cancel":
        pool.cancel("a")
    else:
        pool.connection.hset(key("job", "a"), "deadline", 1)
        pool.connection.zadd(key("deadlines", "gpu"), {"a": 1})
        pool.store.promote(["gpu"])
    if met:
        assert hand.claim(1).claims == []
    queue.enqueue_job(Job.fetch("a", connection=pool.connection), at_front=at_front)
    pool.store.promote(["gpu"])
    assert drained(pool, hand) == ["a"]
    assert pool.store.result("a") == 2


def test_the_mark_of_an_ended_entry_is_not_its_successors(pool: Pool, hand: Hand, queue: Queue) -> None:
    """The first one was canceled and deleted; the one that has its id ended with a result, and is enqueued again."""
    pool.submit("a")
    pool.cancel("a")
    Job.fetch("a", connection=pool.connection).delete()
    pool.submit("a", "b")
    hand.finish(hand.take("a"), 1)
    queue.enqueue_job(Job.fetch("a", connection=pool.connection))
    assert drained(pool, hand) == ["b", "a"]


@pytest.mark.parametrize("aside", ["retries", "suspects"])
def test_a_deleted_ids_place_aside_moves_no_successor(pool: Pool, hand: Hand, aside: str) -> None:
    """Submitted again to another queue, it runs there."""
    pool.submit("a")
    hand.take("a")
    if aside == "retries":
        hand.fail(hand.held["a"])
    else:
        pool.submit("x")
        hand.take("x")
        pool.reap(hand.incarnation, FailureKind.CRASH)
    Job.fetch("a", connection=pool.connection).delete()
    pool.submit("a", queue="cpu")
    pool.make_due("a")
    pool.store.promote(["gpu", "cpu"])
    gpu, cpu = Hand(pool, "w2"), Hand(pool, "w3", queues=["cpu"])
    assert "a" not in [item.id for item in gpu.claim(1).claims]
    assert [item.id for item in cpu.claim(1).claims] == ["a"]
    assert not pool.connection.zscore(key(aside, "gpu"), "a")


def test_another_job_over_an_unclaimed_request_is_that_job(pool: Pool, hand: Hand, queue: Queue) -> None:
    pool.submit("a")
    queue.enqueue("operator.add", 3, 4, job_id="a")
    assert [item.plain for item in hand.claim(1).claims] == [True]


@pytest.mark.parametrize("fetched", ["before the first claim", "after the end"])
def test_a_copy_that_is_enqueued_again_is_the_same_request(pool: Pool, hand: Hand, queue: Queue, fetched: str) -> None:
    """A copy from before has not begun either; it is no new job."""
    pool.submit("a")
    early = Job.fetch("a", connection=pool.connection)
    hand.finish(hand.take("a"), 1)
    queue.enqueue_job(early if fetched == "before the first claim" else Job.fetch("a", connection=pool.connection))
    claim = hand.take("a")
    assert (claim.plain, claim.task) == (False, TASK)
    hand.finish(claim, 2)
    assert pool.store.result("a") == 2
