"""The ordinary course: order of queues, whole requests, cancel, requeue, age; and what RQ's own tools do to it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.registry import CanceledJobRegistry, FailedJobRegistry

from perdure.protocol.errors import ProtocolMismatch
from perdure.protocol.keys import SCHEMA, key
from perdure.protocol.records import FailureKind
from perdure.protocol.states import ENDED, TRANSITIONS, State
from perdure.protocol.transitions.calls import Claim
from tests.kit.protocol.pool import OTHER, Hand, Pool, dump, plain


def rq(url: str, *arguments: str) -> str:
    """Run RQ's own command; its output."""
    command = [str(Path(sys.executable).with_name("rq")), *arguments, "--url", url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


# --- claims ------------------------------------------------------------------------------------------


def test_requests_are_served_in_the_order_of_their_submit(pool: Pool, hand: Hand):
    """A queue is a queue."""
    pool.submit("a", "b", "c")
    assert [claim.id for claim in hand.claim(2).claims] == ["a", "b"]
    assert [claim.id for claim in hand.claim(2).claims] == ["c"]


def test_queues_are_served_in_the_order_of_the_worker(pool: Pool):
    """The first queue first, the next when it is empty: RQ's order."""
    pool.submit("low", queue="low")
    pool.submit("high-1", "high-2", queue="high")
    hand = Hand(pool, queues=["high", "low"])
    assert [claim.id for claim in hand.claim(2).claims] == ["high-1", "high-2"]
    assert [(claim.id, claim.queue) for claim in hand.claim(2).claims] == [("low", "low")]


def test_a_claim_says_when_work_is_left(pool: Pool, hand: Hand):
    """Another idle worker is woken for what the first one did not take."""
    pool.submit("a", "b")
    assert hand.claim(1).status == "more"
    assert pool.connection.llen(key("bell", "gpu")) > 0
    assert hand.claim(3).status == "ok"
    assert pool.connection.exists(key("bell", "gpu")) == 0


def test_a_claim_carries_what_the_worker_needs(pool: Pool, hand: Hand):
    """Payload, attempt, and where to go on from."""
    pool.submit("a")
    claim = hand.take("a")
    assert claim.payload == pool.new("a").payload
    assert (claim.attempt, claim.seq, claim.offset, claim.epoch, claim.client) == (1, 0, 0, 0, "me")
    hand.step(claim, ["x", "y"])
    hand.release(claim)
    again = hand.take("a")
    assert (again.attempt, again.seq, again.offset, again.epoch, again.fingerprint) == (1, 1, 2, 0, "model-1")
    assert again.execution != claim.execution
    assert pool.store.state("a") == ({"upto": 2}, True)


def test_a_request_of_another_task_waits_for_an_empty_worker(pool: Pool, hand: Hand):
    """A worker runs one task at a time, and what it cannot take keeps its place."""
    pool.submit("a")
    pool.submit("b", task=OTHER)
    pool.submit("c")
    claims = hand.claim(4)
    assert (claims.status, [claim.id for claim in claims.claims]) == ("blocked", ["a"])
    assert pool.waiting() == ["b", "c"]
    hand.finish(claims.claims[0], 1)
    assert [claim.task for claim in hand.claim(4).claims] == [OTHER]


def test_a_plain_job_is_claimed_alone(pool: Pool, hand: Hand):
    """RQ's own jobs run by RQ's own code, with nothing beside them."""
    queue = Queue("gpu", connection=pool.connection)
    first = queue.enqueue("operator.add", 1, 2)
    pool.submit("a")
    claims = hand.claim(4)
    assert [(claim.id, claim.plain, claim.timeout) for claim in claims.claims] == [(first.id, True, 180)]
    other = Hand(pool, "w2")
    pool.submit("b")
    taken = other.claim(1).claims
    queue.enqueue("operator.add", 3, 4, at_front=True)
    assert [claim.id for claim in taken] == ["a"]
    assert other.claim(3).status == "blocked"


def test_a_suspended_pool_claims_nothing(pool: Pool, hand: Hand):
    """`rq suspend` holds for requests too."""
    pool.submit("a")
    pool.connection.set(key("suspended"), 1)
    assert hand.claim().status == "suspended"
    assert pool.waiting() == ["a"]


def test_an_id_that_is_listed_twice_is_claimed_once(pool: Pool, hand: Hand):
    """The lease that tells is written when all are known: the script remembers what it takes."""
    pool.submit("a", "b")
    pool.connection.rpush(key("queue", "gpu"), "a")
    assert [claim.id for claim in hand.claim(4).claims] == ["a", "b"]
    assert pool.waiting() == []


def test_an_id_that_stands_twice_in_the_queue_runs_once(pool: Pool, hand: Hand):
    """The second entry is dropped, whether the first one is running, waits for a retry, or has ended."""
    pool.submit("a")
    pool.connection.rpush(key("queue", "gpu"), "a")
    claim = hand.take("a")
    assert hand.claim(3).claims == []
    pool.connection.rpush(key("queue", "gpu"), "a")
    hand.finish(claim, 1)
    assert hand.claim(3).claims == []
    assert pool.status("a") is State.FINISHED
    assert pool.store.result("a") == 1


def test_a_stale_writer_cannot_revive_what_has_ended(pool: Pool, hand: Hand):
    """Somebody with an old copy of the job pushes it again: its status is mended, it does not run."""
    pool.submit("a")
    hand.finish(hand.take("a"), "once")
    pool.connection.hset(key("job", "a"), "status", "queued")
    pool.connection.rpush(key("queue", "gpu"), "a")
    assert hand.claim(1).claims == []
    assert pool.status("a") is State.FINISHED


def test_an_overwritten_status_is_repaired_by_the_next_write(pool: Pool, hand: Hand):
    """The status is for display: only lease and execution decide."""
    pool.submit("a")
    claim = hand.take("a")
    pool.connection.hset(key("job", "a"), "status", "queued")
    assert hand.step(claim, ["x"]) == "ok"
    assert pool.status("a") is State.STARTED


def test_a_reply_stays_bounded(pool: Pool, hand: Hand):
    """A claim stops taking once enough bytes are in its reply, but always takes one."""
    pool.submit("a", "b", "c")
    claims = pool.store.claim(
        incarnation=hand.incarnation, worker="w1", queues=["gpu"], task="", free=3, slots={}, known=[], max_bytes=1
    )
    assert [claim.id for claim in claims.claims] == ["a"]
    assert claims.status == "more"


def test_dropped_entries_are_bounded_too(pool: Pool, hand: Hand):
    """A queue full of entries that lead nowhere cannot keep the server busy."""
    pool.connection.rpush(key("queue", "gpu"), *[f"gone-{number}" for number in range(200)])
    pool.submit("a")
    assert (hand.claim().status, hand.held) == ("more", {})
    assert [claim.id for claim in hand.claim().claims] == ["a"]


def delay(pool: Pool, identifier: str, seconds: float) -> None:
    request = dataclasses.replace(pool.new(identifier), delay=seconds)
    assert pool.store.enqueue([request], client="me") == ["accepted"]
    assert pool.store.enqueue([request], client="me") == ["already"]


def test_a_delayed_request_enters_its_queue_when_it_is_due(pool: Pool, hand: Hand):
    """Nobody can claim it before; then it stands behind what waits already. It is no attempt and no retry."""
    delay(pool, "late", 5)
    pool.submit("first")
    assert pool.status("late") is State.SCHEDULED
    assert Job.fetch("late", connection=pool.connection).enqueued_at is None
    assert pool.due_in("late") == pytest.approx(5, abs=2)
    assert pool.store.promote(["gpu"]) == 0
    assert pool.waiting() == ["first"]
    pool.make_due("late")
    assert pool.store.promote(["gpu"]) == 1
    assert pool.waiting() == ["first", "late"]
    assert pool.connection.llen(key("bell", "gpu")) > 0
    assert [(claim.id, claim.attempt) for claim in hand.claim(2).claims] == [("first", 1), ("late", 1)]
    assert pool.events("late") == []
    assert Job.fetch("late", connection=pool.connection).enqueued_at is not None


def test_a_delayed_request_that_is_canceled_never_runs(pool: Pool, hand: Hand):
    """Also by RQ's own hand, which knows nothing of where it waits."""
    for name in ("ours", "theirs", "deleted"):
        delay(pool, name, 5)
    assert pool.cancel("ours") == "canceled"
    fetch(pool, "theirs").cancel()
    fetch(pool, "deleted").delete()
    for name in ("ours", "theirs", "deleted"):
        pool.make_due(name)
    assert hand.claim().claims == []
    assert pool.status("ours") is pool.status("theirs") is State.CANCELED
    assert pool.connection.zcard(key("retries", "gpu")) == 0


# --- deadlines ---------------------------------------------------------------------------------------


def limited(pool: Pool, identifier: str, **limits: Any) -> None:
    assert pool.store.enqueue([dataclasses.replace(pool.new(identifier), **limits)], client="me") == ["accepted"]


def miss_deadline(pool: Pool, identifier: str, field: str = "deadline") -> None:
    """The time is over; where it waits, the sweep's set knows it too."""
    pool.connection.hset(key("job", identifier), field, 1)
    if not pool.field(identifier, "execution"):
        pool.connection.zadd(key("deadlines", "gpu"), {identifier: 1})


def assert_late(pool: Pool, identifier: str, reason: str) -> None:
    record = pool.store.fetch(identifier)
    assert record is not None
    assert (record.status, record.error_kind, record.ended) == (State.FAILED, "DEADLINE", True)
    assert reason in record.error_reason
    assert "DEADLINE" in pool.store.traceback(identifier)
    assert pool.events(identifier)[-1] == "failed"
    assert pool.connection.zcard(key("deadlines", "gpu")) == 0
    assert FailedJobRegistry("gpu", connection=pool.connection).get_job_ids() == [identifier]


@pytest.mark.parametrize("how", ["sweep", "claim"])
@pytest.mark.parametrize(
    ("field", "reason"), [("deadline", "its deadline passed"), ("queue_deadline", "queue_timeout")]
)
def test_a_waiting_request_ends_at_its_deadline(pool: Pool, hand: Hand, how: str, field: str, reason: str):
    """By the reaper; and without any, by the claim that pops it. The next in the queue is served."""
    limited(pool, "late", deadline=60, queue_timeout=50)
    pool.submit("next")
    assert pool.store.promote(["gpu"]) == 0
    assert pool.status("late") is State.QUEUED
    miss_deadline(pool, "late", field)
    if how == "sweep":
        pool.store.promote(["gpu"])
        assert_late(pool, "late", reason)
    assert [claim.id for claim in hand.claim().claims] == ["next"]
    assert_late(pool, "late", reason)
    assert pool.field("late", "last") == "-:failed"


def test_a_queue_timeout_is_over_once_a_worker_has_it(pool: Pool, hand: Hand):
    """Handed back, it waits as long as its deadline allows; that stands in the set again."""
    limited(pool, "a", deadline=60, queue_timeout=50)
    claim = hand.take("a")
    assert pool.connection.zcard(key("deadlines", "gpu")) == 0
    assert hand.release(claim) == ["queued"]
    assert pool.field("a", "queue_deadline") == ""
    assert pool.connection.zscore(key("deadlines", "gpu"), "a") == float(pool.field("a", "deadline"))


@pytest.mark.parametrize("delayed", [False, True])
def test_a_scheduled_request_ends_at_its_deadline(pool: Pool, hand: Hand, delayed: bool):
    """Whether it waits for its first time or for a retry."""
    limited(pool, "a", deadline=60, delay=5.0 if delayed else 0.0)
    if not delayed:
        assert hand.fail(hand.take("a")) == "scheduled"
    miss_deadline(pool, "a")
    assert pool.store.promote(["gpu"]) == 0
    assert_late(pool, "a", "its deadline passed while it waited")
    assert pool.connection.zcard(key("retries", "gpu")) == 0


@pytest.mark.parametrize("sign", ["progress", "renew"])
def test_a_running_request_ends_at_its_next_sign(pool: Pool, hand: Hand, sign: str):
    """What it has put out is kept; a resend hears that it is lost; nothing is retried."""
    limited(pool, "a", deadline=60)
    claim = hand.take("a")
    assert hand.step(claim, ["x"]) == "ok"
    miss_deadline(pool, "a")
    pool.store.promote(["gpu"])
    assert pool.status("a") is State.STARTED
    answer = hand.step(claim, ["y"], offset=1, seq=2) if sign == "progress" else hand.renew(claim)
    assert answer == "deadline"
    assert_late(pool, "a", "its deadline passed while it ran")
    assert pool.store.all_outputs("a") == (["x", "y"] if sign == "progress" else ["x"])
    assert hand.step(claim, ["y"], offset=1, seq=2) == "lost"
    left = dump(pool.connection)
    for name in ("leases", "wip"):
        assert key(name, "gpu") not in left
    assert key("held", hand.incarnation) not in left


def test_an_answer_that_comes_first_wins_over_the_deadline(pool: Pool, hand: Hand):
    """Throwing it away helps nobody."""
    limited(pool, "a", deadline=60)
    claim = hand.take("a")
    miss_deadline(pool, "a")
    assert hand.finish(claim, "answer") == "ok"
    assert pool.store.result("a") == "answer"


def test_a_requeue_takes_the_deadline_away(pool: Pool, hand: Hand):
    """Somebody wants it all the same."""
    limited(pool, "a", deadline=60)
    miss_deadline(pool, "a")
    pool.store.promote(["gpu"])
    FailedJobRegistry("gpu", connection=pool.connection).requeue("a")
    assert hand.take("a").attempt == 1
    assert pool.field("a", "deadline") == ""


def test_a_deleted_or_canceled_request_leaves_the_deadlines(pool: Pool):
    """Also what RQ's own hand ended, which knows nothing of them."""
    for name in ("deleted", "theirs", "ours"):
        limited(pool, name, deadline=60)
    fetch(pool, "deleted").delete()
    fetch(pool, "theirs").cancel()
    assert pool.cancel("ours") == "canceled"
    for name in ("deleted", "theirs"):
        pool.connection.zadd(key("deadlines", "gpu"), {name: 1})
    pool.store.promote(["gpu"])
    assert pool.connection.zcard(key("deadlines", "gpu")) == 0
    assert pool.status("theirs") is pool.status("ours") is State.CANCELED
    assert not pool.connection.exists(key("job", "deleted"))


# --- ends and retries --------------------------------------------------------------------------------


def test_promoted_retries_go_behind_what_waits_already(pool: Pool, hand: Hand):
    """A retry neither overtakes fresh work nor starves behind work that comes later."""
    pool.submit("retried", "waiting")
    hand.fail(hand.take("retried"))
    assert pool.status("retried") is State.SCHEDULED
    assert pool.store.promote(["gpu"]) == 0
    pool.make_due("retried")
    assert pool.store.promote(["gpu"]) == 1
    pool.submit("later")
    assert pool.waiting() == ["waiting", "retried", "later"]


def test_a_claim_promotes_by_itself(pool: Pool, hand: Hand):
    """Retries come back without any reaper."""
    pool.submit("a")
    hand.fail(hand.take("a"))
    pool.make_due("a")
    assert hand.take("a").attempt == 2


@pytest.mark.parametrize("status", ["queued", "started", "nonsense"])
def test_a_retry_is_promoted_whatever_its_status_says(pool: Pool, hand: Hand, status: str):
    """A stale writer of RQ's status must not lose a request that waits for its retry."""
    pool.submit("a")
    hand.fail(hand.take("a"))
    pool.connection.hset(key("job", "a"), "status", status)
    pool.make_due("a")
    assert [claim.id for claim in hand.claim().claims] == ["a"]


def test_a_request_fails_after_its_last_retry(pool: Pool, hand: Hand):
    """max_retries 3 is 4 attempts; then a dead letter with reason and traceback."""
    pool.submit("a")
    outcomes = []
    for attempt in range(1, 5):
        pool.make_due("a")
        claim = hand.take("a")
        assert claim.attempt == attempt
        outcomes.append(hand.fail(claim, reason=f"broken {attempt}"))
    assert outcomes == ["scheduled"] * 3 + ["failed"]
    record = pool.store.fetch("a")
    assert record is not None
    assert (record.status, record.error_kind, record.error_reason) == (State.FAILED, "UNKNOWN", "broken 4")
    assert pool.store.traceback("a") == "Traceback\nbroken 4"
    assert pool.events("a") == ["retry"] * 3 + ["failed"]


def test_an_invalid_request_is_never_retried(pool: Pool, hand: Hand):
    """Running it again cannot help."""
    pool.submit("a")
    assert hand.fail(hand.take("a"), FailureKind.INVALID_REQUEST) == "failed"
    assert pool.field("a", "error_kind") == "INVALID_REQUEST"


def test_a_dead_letter_has_the_whole_shape_of_an_rq_failure(pool: Pool, hand: Hand):
    """Status, dates, registry, result of type failed, one TTL for all; and nothing is left of the holding."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.fail(claim, FailureKind.INVALID_REQUEST, "wrong")
    connection = pool.connection
    job = Job.fetch("a", connection=connection)
    assert job.is_failed
    assert job.ended_at is not None
    result = job.latest_result()
    assert result is not None
    assert result.type is result.Type.FAILED
    assert result.exc_string == "Traceback\nwrong"
    assert FailedJobRegistry("gpu", connection=connection).get_job_ids() == ["a"]
    for name in ("job", "output", "history", "results"):
        assert 1990 <= connection.ttl(key(name, "a")) <= 2000
    left = dump(connection)
    for name in ("leases", "wip"):
        assert key(name, "gpu") not in left
    for name in ("held", "executions"):
        assert not [other for other in left if other.startswith(key(name))]


def test_a_finished_request_leaves_nothing_but_its_answer(pool: Pool, hand: Hand):
    """Lease, holding, executions and checkpoint are gone; job, outputs, history and result share one TTL."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    claim = hand.take("a")
    hand.finish(claim, {"n": 1}, offset=1, outputs=["y"])
    connection = pool.connection
    left = dump(connection)
    assert {name for name in left if name.endswith(":a")} == {
        key(name, "a") for name in ("job", "output", "history", "results")
    }
    for name in ("job", "output", "history", "results"):
        assert 990 <= connection.ttl(key(name, "a")) <= 1000
    assert set(left) - {name for name in left if name.endswith(":a")} == {
        key("queues"),
        key("aside"),
        key("finished", "gpu"),
        key("beats"),
        key("incarnation", hand.incarnation),
        key("schema"),
        key("bell", "gpu"),
    } - ({key("bell", "gpu")} - set(left))
    assert pool.store.all_outputs("a") == ["x", "y"]


def test_released_requests_keep_their_order_and_their_attempts(pool: Pool, hand: Hand):
    """A drain costs nobody anything: same order, in front of those who came later, nothing charged."""
    pool.submit("a", "b", "c", "d")
    claims = hand.claim(3).claims
    assert hand.release(*claims) == ["queued"] * 3
    assert pool.waiting() == ["a", "b", "c", "d"]
    again = Hand(pool, "w2").claim(3).claims
    assert [(claim.id, claim.attempt) for claim in again] == [("a", 1), ("b", 1), ("c", 1)]
    assert pool.events("a") == ["released"]


def test_a_release_with_a_delay_waits(pool: Pool, hand: Hand):
    """A worker that cannot run a request hands it back uncharged, for later."""
    pool.submit("a")
    assert hand.release(hand.take("a"), delay=5.0) == ["scheduled"]
    assert pool.due_in("a") == pytest.approx(5.0, abs=2)
    pool.make_due("a")
    assert hand.take("a").attempt == 1


@pytest.mark.parametrize("longest", [30.0, 1.0], ids=["grows", "stays"])
def test_the_delay_of_releases_grows_to_its_limit(pool: Pool, hand: Hand, longest: float):
    """One that a broken worker may have failed waits for a moment, each time anew."""
    pool.submit("a")
    for _ in range(7):
        pool.make_due("a")
        mine = ("a", hand.take("a").execution)
        pool.store.release(hand.incarnation, hand.name, [mine], reason="no", delay=1.0, longest=longest)
    assert longest / 2 < pool.due_in("a") <= longest


@pytest.mark.parametrize(("delay", "outcome"), [(0.0, "queued"), (5.0, "scheduled")])
def test_a_request_that_is_always_handed_back_ends_some_day(connection: redis.Redis, delay: float, outcome: str):
    """Executions without progress are capped, releases too: in a drain, and where a task cannot be loaded."""
    pool = Pool.over(connection, max_executions=3)
    hand = Hand(pool)
    pool.submit("a")
    outcomes = []
    for _ in range(3):
        pool.make_due("a")
        outcomes += hand.release(hand.take("a"), delay=delay)
    assert outcomes == [outcome, outcome, "failed"]
    assert "3 times without progress" in pool.field("a", "error_reason")


def test_a_request_waits_for_a_busy_worker_that_lives(pool: Pool, hand: Hand):
    """Handed back again and again because another model began it: never a dead letter, and less and less often."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    busy, other = Hand(pool, "busy"), Hand(pool, "other")
    delays = []
    for _ in range(60):
        busy.beat(["model-1"])
        assert other.release(other.take("a"), delay=1.0, fingerprints=["model-1"]) == ["scheduled"]
        delays.append(pool.due_in("a"))
        pool.make_due("a")
    assert [round(delay, 1) for delay in delays[:3]] == sorted({round(delay, 1) for delay in delays[:3]}), "it doubles"
    assert 3.7 < min(delays[8:]) <= max(delays) <= 5
    assert pool.store.all_outputs("a") == ["x"]
    claim = hand.take("a")
    assert (claim.attempt, claim.offset, claim.epoch) == (1, 1, 0)
    # What it waited says nothing about what it does: its failures are retried as any other's.
    assert hand.fail(claim) == "scheduled"


@pytest.mark.parametrize(
    ("served", "queue", "answer"),
    [
        ("cpu", "gpu", "queued"), ("gpu", "gpu", "scheduled"), ("gpu", "gpu-low", "scheduled"),
        ("gpu-low", "gpu", "queued"),
        ("gpu-low", "gpu-low", "scheduled"), ("gpu-lowest", "gpu", "queued"),
    ],
)  # fmt: skip
def test_a_model_counts_only_where_its_worker_serves_the_queue(pool: Pool, served: str, queue: str, answer: str):
    """A worker of another queue never takes the request, however alive it is; one of the queue takes its priorities
    too.
    """
    pool.submit("a", queue=queue)
    first, other = Hand(pool, "w1", queues=(queue,)), Hand(pool, "w2", queues=(queue,))
    claim = first.take("a")
    first.step(claim, ["x"])
    first.release(claim)
    Hand(pool, "w3", queues=(served,)).beat(["model-1"])
    assert other.release(other.take("a"), delay=1.0, fingerprints=["model-1"]) == [answer]


def test_a_request_whose_model_is_gone_restarts_in_a_new_epoch(pool: Pool, hand: Hand):
    """No living worker shows the fingerprint: waiting would be for ever. A living one: it waits for it."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    other = Hand(pool, "w2")
    claim = other.take("a")
    Hand(pool, "w3").beat(["model-1"])
    assert other.release(claim, delay=5.0, fingerprints=["model-1"]) == ["scheduled"]
    assert pool.field("a", "epoch") in ("", "0")
    pool.make_due("a")
    claim = other.take("a")
    pool.connection.zadd(key("fingerprints"), {"gpu model-1": 1})
    assert other.release(claim, delay=5.0, fingerprints=["model-1"]) == ["queued"]
    assert pool.events("a")[-1] == "restart"
    claim = other.take("a")
    assert (claim.epoch, claim.offset, claim.seq, claim.attempt) == (1, 0, 0, 1)
    other.step(claim, ["new"])
    assert pool.store.all_outputs("a") == ["new"]


# --- age ---------------------------------------------------------------------------------------------


def test_a_stale_checkpoint_is_deleted_with_its_outputs(pool: Pool, hand: Hand):
    """An hour after its last write the request starts from zero, in a new epoch, and its history says so."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    pool.age_checkpoint("a", 3590)
    assert pool.store.expire(["gpu"]) == 0
    pool.age_checkpoint("a", 3610)
    assert pool.store.expire(["gpu"]) == 1
    assert pool.store.checkpoint("a") is None
    assert pool.store.all_outputs("a") == []
    assert pool.events("a") == ["released", "restart"]
    assert hand.take("a").epoch == 1


def test_a_claim_looks_at_the_age_itself(pool: Pool, hand: Hand):
    """Also when no reaper has looked, nothing goes on from a stale checkpoint; from a young one it does."""
    pool.submit("a", "b")
    for claim in hand.claim(2).claims:
        hand.step(claim, ["x"])
        hand.release(claim)
    pool.age_checkpoint("a", 3610)
    pool.age_checkpoint("b", 3590)
    assert {claim.id: (claim.offset, claim.epoch) for claim in hand.claim(2).claims} == {"a": (0, 1), "b": (1, 0)}


def test_a_lease_keeps_a_checkpoint_young(pool: Pool, hand: Hand):
    """A request that runs for hours without a new checkpoint, but renews, does not lose the old one."""
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    hand.step(first, ["x"])
    hand.step(second, ["x"])
    pool.age_checkpoint("a", 4000)
    pool.age_checkpoint("b", 4000)
    hand.renew(first)
    assert pool.store.expire(["gpu"]) == 0
    for identifier in ("a", "b"):
        point = pool.store.checkpoint(identifier)
        assert point is not None
        assert point.age < 60
    pool.age_checkpoint("a", 4000)
    hand.renew(first)
    hand.release(first)
    assert pool.store.expire(["gpu"]) == 0, "renewed a moment ago, it is young although nobody holds it now"


@pytest.mark.parametrize("sign", ["renew", "state"])
def test_what_a_running_request_has_written_does_not_expire(pool: Pool, hand: Hand, sign: str):
    """A renewal, or a checkpoint without outputs: checkpoint, outputs and history live on for a day."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    claim = hand.take("a")
    names = [key(name, "a") for name in ("checkpoint", "output", "history")]
    for name in names:
        assert pool.connection.expire(name, 100)
    assert (hand.renew(claim) if sign == "renew" else hand.step(claim, [])) == "ok"
    assert all(pool.connection.ttl(name) > 86_000 for name in names)


def test_resuming_can_be_turned_off(pool: Pool, hand: Hand):
    """The demonstration proves that it can fail: without resuming, the request starts from zero."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    (again,) = hand.claim(1, resume=False).claims
    assert (again.offset, again.epoch) == (0, 1)


def test_old_entries_leave_the_registries(pool: Pool, hand: Hand):
    """What has expired is not shown for ever, even if nobody runs RQ's own clean-up."""
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    hand.finish(first, 1)
    hand.fail(second, FailureKind.INVALID_REQUEST)
    pool.connection.zadd(key("finished", "gpu"), {"a": 1})
    pool.connection.zadd(key("failed", "gpu"), {"b": 1})
    pool.store.expire(["gpu"])
    assert not pool.connection.exists(key("finished", "gpu"), key("failed", "gpu"))


# --- cancel ------------------------------------------------------------------------------------------


def test_what_ended_may_be_kept_for_ever(pool: Pool, hand: Hand):
    """A negative TTL is RQ's way to say so: no key expires, and no clean-up takes the entry out of its registry."""
    ends: dict[str, Callable[[Claim], str]] = {
        "finished": hand.finish,
        "failed": lambda claim: hand.fail(claim, FailureKind.INVALID_REQUEST),
    }
    for registry, end in ends.items():
        request = dataclasses.replace(pool.new(registry), result_ttl=-1, failure_ttl=-1)
        assert pool.store.enqueue([request]) == ["accepted"]
        claim = hand.take(registry)
        assert hand.step(claim, ["x"]) == "ok"
        end(claim)
        assert pool.connection.zscore(key(registry, "gpu"), registry) == -1
        pool.store.expire(["gpu"])
        assert pool.connection.zscore(key(registry, "gpu"), registry) == -1
        assert pool.status(registry) is State(registry)
        for name in ("job", "output", "results"):
            assert pool.connection.ttl(key(name, registry)) == -1


def test_a_waiting_request_is_canceled_at_once(pool: Pool, hand: Hand):
    """Queued or scheduled: it never runs, and its id is dropped by the claim that pops it."""
    pool.submit("retry", "queued", "next")
    claim = hand.take("retry")
    hand.step(claim, ["x"])
    hand.fail(claim)
    assert pool.cancel("queued") == "canceled"
    assert pool.cancel("retry") == "canceled"
    assert pool.store.promote(["gpu"]) == 0
    pool.make_due("retry")
    assert [claim.id for claim in hand.claim().claims] == ["next"]
    assert pool.store.checkpoint("retry") is None
    for identifier in ("queued", "retry"):
        assert pool.status(identifier) is State.CANCELED
        assert 1990 <= pool.connection.ttl(key("job", identifier)) <= 2000
    assert sorted(CanceledJobRegistry("gpu", connection=pool.connection).get_job_ids()) == ["queued", "retry"]


def test_a_canceled_request_ends_when_its_worker_says_so(pool: Pool, hand: Hand):
    """The flag stays until the end; every answer to the worker repeats it."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    assert pool.cancel("a") == "requested"
    assert pool.status("a") is State.STARTED
    assert hand.step(claim, ["y"], offset=1, seq=2) == "cancel"
    assert hand.renew(claim) == "cancel"
    assert hand.confirm_cancel(claim) == "canceled"
    record = pool.store.fetch("a")
    assert record is not None
    assert (record.status, record.ended, record.execution) == (State.CANCELED, True, "")
    assert key("held", hand.incarnation) not in dump(pool.connection)


def test_a_finish_wins_over_a_cancel_that_nobody_has_acted_upon(pool: Pool, hand: Hand):
    """The answer is there: throwing it away helps nobody."""
    pool.submit("a")
    claim = hand.take("a")
    assert pool.cancel("a") == "requested"
    assert hand.finish(claim, "answer") == "ok"
    assert (pool.status("a"), pool.store.result("a")) == (State.FINISHED, "answer")
    assert pool.cancel("a") == "ended"
    record = pool.store.fetch("a")
    assert record is not None
    assert not record.canceling


def test_a_finish_wins_over_rqs_cancel_and_clean_up(pool: Pool, hand: Hand):
    """Whatever registry somebody put a running request into: after the end it stands in one, that of the finished."""
    pool.submit("a")
    claim = hand.take("a")
    fetch(pool, "a").cancel()
    pool.connection.zadd(key("failed", "gpu"), {"a": 9_999_999_999})
    assert hand.finish(claim, "answer") == "ok"
    names = [name for name in ("finished", "failed", "canceled") if pool.connection.zcard(key(name, "gpu"))]
    assert names == ["finished"]
    assert pool.status("a") is State.FINISHED


@pytest.mark.parametrize("end", ["fail", "release", "reap"])
def test_a_canceled_request_is_not_tried_again(pool: Pool, hand: Hand, end: str):
    """However its execution ends, if not by a result: the end is the cancel."""
    pool.submit("a")
    claim = hand.take("a")
    pool.cancel("a")
    if end == "fail":
        assert hand.fail(claim) == "canceled"
    elif end == "release":
        assert hand.release(claim) == ["canceled"]
    else:
        assert [item.outcome for item in pool.reap(hand.incarnation)] == ["canceled", "gone"]
    record = pool.store.fetch("a")
    assert record
    assert record.status is State.CANCELED
    assert not record.canceling
    assert hand.claim().claims == []


def test_what_has_ended_or_never_was_cannot_be_canceled(pool: Pool, hand: Hand):
    """The answer says which it is."""
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    hand.finish(first, 1)
    hand.fail(second, FailureKind.INVALID_REQUEST)
    before = dump(pool.connection)
    assert [pool.cancel(identifier) for identifier in ("a", "b", "c")] == ["ended", "ended", "unknown"]
    assert dump(pool.connection) == before


def test_a_requeued_request_can_be_canceled_while_it_waits(pool: Pool, hand: Hand):
    """Its old verdict is no more than history once somebody has requeued it."""
    pool.submit("a")
    hand.fail(hand.take("a"), FailureKind.INVALID_REQUEST)
    FailedJobRegistry("gpu", connection=pool.connection).requeue("a")
    assert pool.cancel("a") == "canceled"
    assert hand.claim().claims == []
    assert pool.status("a") is State.CANCELED


# --- what RQ's own tools do --------------------------------------------------------------------------


def fetch(pool: Pool, identifier: str) -> Job:
    return Job.fetch(identifier, connection=pool.connection)


def test_a_job_deleted_while_it_waits_leaves_nothing(pool: Pool, hand: Hand):
    """Job.delete: the id is dropped, and what belongs to it is deleted."""
    pool.submit("a", "b")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    pool.connection.rpush(key("queue", "gpu"), "a")  # an entry that RQ does not see
    fetch(pool, "a").delete()
    pool.connection.rpush(key("queue", "gpu"), "a")
    assert [claim.id for claim in hand.claim().claims] == ["b"]
    assert [name for name in dump(pool.connection) if name.endswith(":a")] == []


def test_a_job_deleted_while_it_runs_is_lost_to_its_worker(pool: Pool, hand: Hand):
    """Job.delete: the worker is told at its next write, the sweep clears the lease, nothing comes back."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    fetch(pool, "a").delete()
    assert hand.step(claim, ["y"], offset=1, seq=2) == "lost"
    assert hand.finish(claim, 1) == "lost"
    pool.expire_lease("a")
    assert pool.sweep().reaped == []
    left = dump(pool.connection)
    assert [name for name in left if name.endswith(":a")] == []
    assert key("leases", "gpu") not in left
    assert key("held", hand.incarnation) not in left


def test_an_emptied_queue_leaves_nothing_to_run(pool: Pool, hand: Hand):
    """Queue.empty deletes what waits; what runs goes on; a retry whose job is gone is dropped."""
    pool.submit("runs", "retries", "waits")
    running, retried = hand.claim(2).claims
    hand.step(retried, ["x"])
    hand.fail(retried)
    queue = Queue("gpu", connection=pool.connection)
    queue.empty()
    assert hand.finish(running, 1) == "ok"
    pool.make_due("retries")
    assert pool.store.promote(["gpu"]) == 1
    queue.empty()
    assert hand.claim().claims == []
    pool.age_checkpoint("retries", 4000)
    pool.store.expire(["gpu"])
    assert [name for name in dump(pool.connection) if name.endswith((":retries", ":waits"))] == []


def test_rq_cancels_a_waiting_request(pool: Pool, hand: Hand):
    """Job.cancel while it is queued or waits for a retry: it never runs."""
    pool.submit("retries", "waits")
    hand.fail(hand.take("retries"))
    fetch(pool, "waits").cancel()
    fetch(pool, "retries").cancel()
    pool.make_due("retries")
    assert hand.claim().claims == []
    for identifier in ("waits", "retries"):
        record = pool.store.fetch(identifier)
        assert record is not None
        assert (record.status, record.ended) == (State.CANCELED, True)
        assert pool.cancel(identifier) == "canceled"


def test_rq_cancels_a_running_request(pool: Pool, hand: Hand):
    """Job.cancel while it runs is answered to the worker as a cancel; not ended before the worker says so."""
    pool.submit("a")
    claim = hand.take("a")
    fetch(pool, "a").cancel()
    record = pool.store.fetch("a")
    assert record is not None
    assert not record.ended
    assert hand.step(claim, ["x"]) == "cancel"
    assert hand.confirm_cancel(claim) == "canceled"
    assert pool.status("a") is State.CANCELED
    assert CanceledJobRegistry("gpu", connection=pool.connection).get_job_ids() == ["a"]


@pytest.mark.parametrize("end", ["fail", "release", "reap"])
def test_what_rq_canceled_while_it_ran_is_not_tried_again(pool: Pool, hand: Hand, end: str):
    """The worker fails, drains or dies before it heard of RQ's cancel: it ends canceled all the same."""
    pool.submit("a")
    claim = hand.take("a")
    fetch(pool, "a").cancel()
    moves: dict[str, Callable[[], Any]] = {
        "fail": lambda: hand.fail(claim),
        "release": lambda: hand.release(claim),
        "reap": lambda: pool.reap(hand.incarnation),
    }
    moves[end]()
    assert pool.status("a") is State.CANCELED
    assert pool.waiting() == []
    assert pool.connection.zcard(key("retries", "gpu")) == 0


def test_a_stop_ends_as_stopped(pool: Pool, hand: Hand):
    """RQ's stop command writes `stopped` on the running job: that is the word it ends with."""
    pool.submit("a")
    claim = hand.take("a")
    pool.connection.hset(key("job", "a"), "status", "stopped")
    assert hand.renew(claim) == "cancel"
    assert hand.confirm_cancel(claim) == "canceled"
    record = pool.store.fetch("a")
    assert record is not None
    assert (record.status, record.verdict, record.ended) == (State.STOPPED, "stopped", True)


def test_a_requeued_failure_resumes_with_new_attempts(pool: Pool, hand: Hand):
    """FailedJobRegistry.requeue: four more attempts, no TTL, the same epoch, the outputs so far."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    assert hand.fail(claim, FailureKind.INVALID_REQUEST) == "failed"
    FailedJobRegistry("gpu", connection=pool.connection).requeue("a")
    assert pool.status("a") is State.QUEUED
    again = hand.take("a")
    assert (again.attempt, again.epoch, again.offset, again.seq) == (1, 0, 1, 1)
    assert pool.events("a") == ["failed", "requeued"]
    assert pool.field("a", "retries_left") == "3"
    assert pool.field("a", "error_kind") == ""
    assert pool.connection.ttl(key("job", "a")) == -1
    for name in ("output", "history"):
        ttl = pool.connection.ttl(key(name, "a"))
        assert ttl == -1 or ttl > 80_000, "what belongs to a living request is kept for a day at least"
    hand.finish(again, 1, offset=1, outputs=["y"])
    assert pool.store.all_outputs("a") == ["x", "y"]


def test_the_real_rq_requeue_command_restarts_what_is_too_old(pool: Pool, hand: Hand, redis_url: str):
    """`rq requeue`: with a stale checkpoint the request starts from zero, in a new epoch, and says so."""
    pool.submit("a", "b")
    for claim in hand.claim(2).claims:
        hand.step(claim, ["x"])
        hand.fail(claim, FailureKind.INVALID_REQUEST)
    pool.age_checkpoint("a", 4000)
    pool.store.expire(["gpu"])
    pool.age_checkpoint("b", 4000)  # nobody swept this one
    assert "Requeueing 2 jobs" in rq(redis_url, "requeue", "--queue", "gpu", "--all")
    claims = {claim.id: claim for claim in hand.claim(2).claims}
    assert {name: (claim.epoch, claim.offset, claim.attempt) for name, claim in claims.items()} == {
        "a": (1, 0, 1),
        "b": (1, 0, 1),
    }
    assert pool.events("a") == ["failed", "requeued", "restart"]


# --- versions ----------------------------------------------------------------------------------------


def test_a_newer_protocol_stops_everything_that_is_older(pool: Pool, hand: Hand):
    """An old process must not touch what it may misread: it is told so, and nothing is written."""
    pool.connection.set(key("schema"), SCHEMA + 1)
    before = dump(pool.connection)
    with pytest.raises(ProtocolMismatch, match="upgrade"):
        pool.store.enqueue([pool.new("a")])
    with pytest.raises(ProtocolMismatch, match="upgrade"):
        pool.store.check_protocol()
    assert hand.beat() == "newer"
    assert dump(pool.connection) == before


def test_the_first_of_a_newer_protocol_stops_the_older_ones(pool: Pool, hand: Hand):
    """By the request of a producer, or the heartbeat of a worker: the number rises, and never falls."""
    name = key("schema")
    for move in (lambda: pool.submit("a"), hand.beat):
        pool.connection.set(name, SCHEMA - 1)
        move()
        assert pool.connection.get(name) == str(SCHEMA).encode()
    pool.connection.delete(name)
    assert hand.beat() == "ok"
    assert pool.connection.get(name) == str(SCHEMA).encode()


# --- the table of states -----------------------------------------------------------------------------

Edge = tuple[State, State, str]


def edges(pool: Pool) -> Iterator[Edge]:
    """Drive every move that the scripts make, each on a pool of its own; what each did to the status."""
    hand = Hand(pool)

    def move(script: str, act: Callable[[Any], object], *before: Callable[[Any], object], claimed: bool = True) -> Edge:
        pool.connection.flushall()
        pool.submit("r")
        hand.held.clear()
        subject: Any = hand.take("r") if claimed else "r"
        for prepare in before:
            prepare(subject)
        first = pool.status("r")
        act(subject)
        return first, pool.status("r"), script

    def cancel(claim: Any) -> None:
        pool.cancel("r")

    def lose(claim: Any) -> None:
        pool.reap(hand.incarnation)

    def hang(claim: Any) -> None:
        pool.expire_lease("r")
        pool.sweep()

    def stop(claim: Any) -> None:
        pool.connection.hset(key("job", "r"), "status", "stopped")

    def due(claim: Any) -> None:
        pool.make_due("r")

    def miss(claim: Any) -> None:
        miss_deadline(pool, "r")

    def invalid(claim: Any) -> None:
        hand.fail(claim, FailureKind.INVALID_REQUEST)

    def exhaust(claim: Any) -> None:
        pool.connection.hset(key("job", "r"), "executions", 1000)

    def confirm_stop(claim: Any) -> None:
        stop(claim)
        hand.confirm_cancel(claim)

    pool.submit("r")
    yield State.CREATED, pool.status("r"), "enqueue"
    pool.connection.flushall()
    delay(pool, "r", 5)
    yield State.CREATED, pool.status("r"), "enqueue"
    yield move("claim", hand.take, claimed=False)
    yield move("cancel", cancel, claimed=False)
    yield move("promote", lambda _: pool.store.promote(["gpu"]), miss, claimed=False)
    yield move("claim", lambda _: hand.claim(), miss, claimed=False)
    yield move("promote", lambda _: pool.store.promote(["gpu"]), hand.fail, miss)
    yield move("claim", lambda _: hand.claim(), hand.fail, due, miss)
    yield move("progress", lambda claim: hand.step(claim, ["x"]), miss)
    yield move("renew", hand.renew, miss)
    yield move("promote", lambda _: pool.store.promote(["gpu"]), hand.fail, due)
    yield move("cancel", cancel, hand.fail)
    yield move("finish", hand.finish)
    yield move("fail", hand.fail)
    yield move("fail", invalid)
    yield move("fail", lambda claim: hand.fail(claim, FailureKind.WORKER_LOST))
    yield move("fail", hand.fail, cancel)
    yield move("release", hand.release)
    yield move("release", lambda claim: hand.release(claim, delay=9))
    yield move("release", hand.release, exhaust)
    yield move("release", hand.release, cancel)
    yield move("cancel", hand.confirm_cancel, cancel)
    yield move("cancel", confirm_stop)
    yield move("reap", lose)
    yield move("reap", hang)
    yield move("reap", lose, exhaust)
    yield move("reap", lose, cancel)


def test_the_scripts_make_only_moves_of_the_table(pool: Pool):
    """TRANSITIONS is what readers and other tests are told: no script may do anything else."""
    for before, after, script in edges(pool):
        assert after in TRANSITIONS[before], f"{script}: {before} -> {after}"


def test_the_table_names_the_script_of_each_move(pool: Pool):
    """Who wants to know who may end a request finds all of them there."""
    unnamed = {f"{script}: {a} -> {b}" for a, b, script in edges(pool) if script not in TRANSITIONS[a].get(b, ())}
    assert unnamed == set()


def test_every_move_of_the_table_is_made_by_some_script(pool: Pool):
    """The table promises no move that does not exist."""
    made = {(before, after) for before, after, _ in edges(pool)}
    promised = {(before, after) for before, row in TRANSITIONS.items() if before not in ENDED for after in row}
    assert promised - made == set()


def test_only_a_requeue_leaves_an_end(pool: Pool):
    """P1: a request ends once, unless a person asks for it again."""
    for state in State:
        if state.ended:
            assert TRANSITIONS[state] == {State.QUEUED: ("rq requeue",)}
        assert set(TRANSITIONS) == set(State)


def test_what_a_viewer_reads_is_text(pool: Pool, hand: Hand):
    """redis-cli shows a history as it is: one line per event, tabs between, no line break from a user's text."""
    pool.submit("a")
    hand.fail(hand.take("a"), FailureKind.INVALID_REQUEST, "two\nlines\tand a tab")
    (line,) = plain(pool.connection.lrange(key("history", "a"), 0, -1))
    assert line.count("\t") == 7
    assert "\n" not in line
    (event,) = pool.store.history("a")
    assert event.began == pytest.approx(event.at, abs=60)
    assert (event.seq, event.stored) == (None, None)
    assert (event.event, event.kind, event.reason) == ("failed", "INVALID_REQUEST", "two lines and a tab")
    assert event.at == pytest.approx(pool.now(), abs=60)
