"""Every script may be sent twice, and only the holder's writes count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import redis
from rq import Queue, Retry

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.states import State
from perdure.protocol.transitions.calls import Claim
from tests.kit.protocol.clock import CLOCKS
from tests.kit.protocol.pool import Hand, Pool, dump


def without_clock(connection: redis.Redis) -> dict[str, object]:
    return dump(connection, without=CLOCKS)


def test_an_enqueue_sent_twice_stores_one_request(pool: Pool):
    """A producer whose reply was lost sends the call again and hears that its request is in."""
    request = pool.new("a")
    assert pool.store.enqueue([request], client="me") == ["accepted"]
    before = dump(pool.connection, without=())
    assert pool.store.enqueue([request], client="me") == ["already"]
    assert dump(pool.connection, without=()) == before
    assert pool.waiting() == ["a"]


def test_an_enqueue_sent_again_after_the_end_changes_nothing(pool: Pool, hand: Hand):
    """A very late resend neither revives a request nor reports a conflict."""
    request = pool.new("a")
    pool.store.enqueue([request], client="me")
    hand.finish(hand.take("a"), 1)
    before = dump(pool.connection, without=())
    assert pool.store.enqueue([request], client="me") == ["already"]
    assert dump(pool.connection, without=()) == before


def test_an_enqueue_sent_again_is_known_in_a_full_queue(connection: redis.Redis):
    """Identity comes before admission."""
    pool = Pool.over(connection, queue_limit=1)
    assert pool.store.enqueue([pool.new("a")]) == ["accepted"]
    assert pool.store.enqueue([pool.new("a"), pool.new("b")]) == ["already", "full"]
    assert pool.waiting() == ["a"]


def test_a_taken_id_is_a_conflict_and_others_are_accepted(pool: Pool):
    """The id of another request, or of a plain RQ job, is never overwritten."""
    pool.submit("a")
    pool.connection.hset(key("job", "rq-job"), "created_at", "2026-01-01")
    before = dump(pool.connection)
    intruders = [replace(pool.new("a"), nonce="other"), replace(pool.new("rq-job"), nonce="other")]
    assert pool.store.enqueue(intruders) == ["conflict", "conflict"]
    assert dump(pool.connection) == before
    assert pool.store.enqueue([replace(pool.new("a"), nonce="other"), pool.new("b")]) == ["conflict", "accepted"]


def test_a_lost_reply_of_a_claim_is_given_again(pool: Pool, hand: Hand):
    """What a worker holds without knowing it comes back with the execution that it has."""
    pool.submit("a", "b", "c")
    given = hand.claim(2).claims
    before = without_clock(pool.connection)
    again = hand.claim(4, forget=True)
    assert again.status == "ok"
    assert sorted(again.claims, key=lambda claim: claim.id) == given
    assert without_clock(pool.connection) == before
    assert pool.waiting() == ["c"]


def test_a_claim_with_everything_known_takes_the_next(pool: Pool, hand: Hand):
    """Only what the worker lacks is given again."""
    pool.submit("a", "b", "c")
    hand.claim(2)
    assert [claim.id for claim in hand.claim(2).claims] == ["c"]


def test_a_lost_claim_of_a_plain_job_keeps_its_long_lease(pool: Pool, hand: Hand):
    """A plain job may run up to its timeout; to be given again must not shorten that."""
    pool.connection.hset(key("job", "p"), mapping={"created_at": "x", "origin": "gpu", "timeout": "600", "data": ""})
    pool.connection.rpush(key("queue", "gpu"), "p")
    assert hand.take("p").plain
    assert [claim.id for claim in hand.claim(1, forget=True).claims] == ["p"]
    deadline = pool.connection.zscore(key("leases", "gpu"), "p")
    assert isinstance(deadline, float)
    assert deadline / 1000 - pool.now() > 600


def test_a_progress_sent_twice_stores_once(pool: Pool, hand: Hand):
    """Outputs of a resent call are in the log once; its answer is ok."""
    pool.submit("a")
    claim = hand.take("a")
    assert hand.step(claim, ["x", "y"]) == "ok"
    before = dump(pool.connection, without=(*CLOCKS, "checkpoint"))
    assert hand.step(claim, ["x", "y"]) == "ok"
    assert dump(pool.connection, without=(*CLOCKS, "checkpoint")) == before
    assert pool.store.all_outputs("a") == ["x", "y"]


def test_late_progress_changes_nothing(pool: Pool, hand: Hand):
    """A checkpoint never goes back."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"], seq=1)
    hand.step(claim, ["y"], offset=1, seq=2)
    before = without_clock(pool.connection)
    assert hand.step(claim, ["x"], seq=1) == "ok"
    assert without_clock(pool.connection) == before
    assert pool.store.state("a") == ({"upto": 2}, True)


def test_a_gap_in_the_outputs_is_refused(pool: Pool, hand: Hand):
    """Outputs are absolute: what would leave a hole, or overlap by half, is not stored."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x", "y"])
    before = without_clock(pool.connection)
    assert hand.step(claim, ["z"], offset=3, seq=2) == "gap 2"
    assert hand.step(claim, ["y", "z"], offset=1, seq=2) == "gap 2"
    assert hand.finish(claim, 1, offset=5, outputs=["z"]) == "gap 2"
    assert without_clock(pool.connection) == before


def test_a_renew_sent_twice_changes_nothing_but_the_clock(pool: Pool, hand: Hand):
    """Renewing is a lease and, the first time, RQ's record of the execution; nothing else."""
    pool.submit("a")
    claim = hand.take("a")
    hand.renew(claim)
    before = without_clock(pool.connection)
    pool.expire_lease("a")
    assert [hand.renew(claim), hand.renew(claim)] == ["ok", "ok"]
    assert without_clock(pool.connection) == before
    deadline = pool.connection.zscore(key("leases", "gpu"), "a")
    assert isinstance(deadline, float)
    assert deadline / 1000 - pool.now() == pytest.approx(pool.store.settings.lease, abs=5)


def test_a_finish_sent_twice_finishes_once(pool: Pool, hand: Hand):
    """One result, one count, one end."""
    pool.submit("a")
    claim = hand.take("a")
    assert hand.finish(claim, {"n": 1}, outputs=["x"]) == "ok"
    before = dump(pool.connection, without=())
    assert hand.finish(claim, {"n": 1}, outputs=["x"]) == "already"
    assert dump(pool.connection, without=()) == before
    assert pool.store.all_outputs("a") == ["x"]


@pytest.mark.parametrize("kind", [FailureKind.UNKNOWN, FailureKind.INVALID_REQUEST, FailureKind.WORKER_LOST])
def test_a_fail_sent_twice_fails_once(pool: Pool, hand: Hand, kind: FailureKind):
    """One attempt, one history line, whether it ends in a retry, a dead letter or a redelivery."""
    pool.submit("a")
    claim = hand.take("a")
    assert hand.fail(claim, kind) in ("scheduled", "failed", "queued")
    before = dump(pool.connection, without=())
    assert hand.fail(claim, kind) == "already"
    assert dump(pool.connection, without=()) == before


@pytest.mark.parametrize("delay", [0.0, 5.0])
def test_a_release_sent_twice_releases_once(pool: Pool, hand: Hand, delay: float):
    """The id is in the queue, or among the retries, once."""
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    hand.release(first, second, delay=delay)
    before = dump(pool.connection, without=())
    assert hand.release(first, second, delay=delay) == ["already", "already"]
    assert dump(pool.connection, without=()) == before


def test_a_cancel_sent_twice_cancels_once(pool: Pool, hand: Hand):
    """Waiting, running and confirmed: the second call answers the same and writes nothing."""
    pool.submit("waits", "runs")
    assert pool.cancel("waits") == "canceled"
    before = dump(pool.connection, without=())
    assert pool.cancel("waits") == "canceled"
    assert dump(pool.connection, without=()) == before
    claim = hand.take("runs")
    assert pool.cancel("runs") == "requested"
    before = dump(pool.connection, without=())
    assert pool.cancel("runs") == "requested"
    assert dump(pool.connection, without=()) == before
    assert hand.confirm_cancel(claim) == "canceled"
    before = dump(pool.connection, without=())
    assert hand.confirm_cancel(claim) == "canceled"
    assert dump(pool.connection, without=()) == before


def test_a_heartbeat_sent_twice_changes_nothing_but_the_clock(pool: Pool, hand: Hand):
    """A heartbeat is liveness and nothing else."""
    pool.submit("a")
    hand.take("a")
    assert hand.beat(["model-1"]) == "ok"
    before = dump(pool.connection, without=(*CLOCKS, "fingerprints"))
    assert hand.beat(["model-1"]) == "ok"
    assert dump(pool.connection, without=(*CLOCKS, "fingerprints")) == before


def test_a_reap_with_evidence_sent_twice_takes_once(pool: Pool, hand: Hand):
    """A guardian whose reply was lost reaps again: nothing is redelivered a second time."""
    pool.submit("a", "b")
    hand.claim(2)
    assert {item.id for item in pool.reap(hand.incarnation)} == {"a", "b", ""}
    before = dump(pool.connection, without=())
    assert pool.reap(hand.incarnation) == []
    assert dump(pool.connection, without=()) == before


def test_a_reap_sent_again_leaves_the_new_holder_alone(pool: Pool, hand: Hand):
    """Evidence is about an incarnation: whoever holds the request now is another one."""
    pool.submit("a")
    hand.take("a")
    pool.reap(hand.incarnation)
    claim = Hand(pool, "w2").take("a")
    before = dump(pool.connection, without=())
    assert pool.reap(hand.incarnation) == []
    assert dump(pool.connection, without=()) == before
    assert pool.field("a", "execution") == claim.execution


def test_a_sweep_sent_twice_takes_once(pool: Pool, hand: Hand):
    """Two reapers at once are as good as one."""
    pool.submit("a")
    hand.take("a")
    pool.stop_heart(hand.incarnation)
    assert [item.outcome for item in pool.sweep().reaped] == ["queued", "gone"]
    before = without_clock(pool.connection)
    assert pool.sweep().reaped == []
    assert without_clock(pool.connection) == before


def test_a_promote_and_an_expire_sent_twice_move_once(pool: Pool, hand: Hand):
    """What was due is moved by the first call."""
    pool.submit("a", "b")
    for claim in hand.claim(2).claims:
        hand.step(claim, ["x"])
        hand.fail(claim)
    pool.make_due("a")
    pool.age_checkpoint("b", 4000)
    assert pool.store.promote(["gpu"]) == 1
    assert pool.store.expire(["gpu"]) == 1
    before = dump(pool.connection, without=())
    assert pool.store.promote(["gpu"]) == 0
    assert pool.store.expire(["gpu"]) == 0
    assert dump(pool.connection, without=()) == before


# Every write of a worker, as one that was reaped meanwhile sends it; and the answer.
STALE: dict[str, tuple[Callable[[Hand, Claim], object], object]] = {
    "progress": (lambda hand, claim: hand.step(claim, ["stale"], offset=1, seq=9), "lost"),
    "progress at the old place": (lambda hand, claim: hand.step(claim, ["x"]), "lost"),
    "renew": (lambda hand, claim: hand.renew(claim), "lost"),
    "finish": (lambda hand, claim: hand.finish(claim, "stale", offset=1, outputs=["stale"]), "lost"),
    "fail": (lambda hand, claim: hand.fail(claim), "already"),
    "invalid": (lambda hand, claim: hand.fail(claim, FailureKind.INVALID_REQUEST), "already"),
    "release": (lambda hand, claim: hand.release(claim), ["already"]),
    "cancel": (lambda hand, claim: hand.confirm_cancel(claim), "lost"),
}


@pytest.mark.parametrize("write", STALE)
def test_a_stale_execution_writes_nothing_for_a_new_holder(pool: Pool, hand: Hand, write: str):
    """P2: whatever a worker sends after it was reaped, the new holder's request stays as it is."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    pool.reap(hand.incarnation)
    other = Hand(pool, "w2")
    new = other.take("a")
    assert (new.offset, new.seq) == (1, 1)
    before = dump(pool.connection)
    send, answer = STALE[write]
    assert send(hand, claim) == answer
    assert dump(pool.connection) == before
    assert other.finish(new, "right", offset=1, outputs=["y"]) == "ok"
    assert pool.store.all_outputs("a") == ["x", "y"]
    assert pool.store.result("a") == "right"


@pytest.mark.parametrize("write", STALE)
def test_a_stale_execution_writes_nothing_after_the_end(pool: Pool, hand: Hand, write: str):
    """P1: a request ends once; the loser of the race can change neither result nor state."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    pool.reap(hand.incarnation)
    other = Hand(pool, "w2")
    other.finish(other.take("a"), "right", offset=1, outputs=["y"])
    before = dump(pool.connection)
    send, _ = STALE[write]
    assert send(hand, claim) in ("lost", ["lost"])
    assert dump(pool.connection) == before


@pytest.mark.parametrize("write", STALE)
def test_a_stale_execution_writes_nothing_to_a_waiting_one(pool: Pool, hand: Hand, write: str):
    """Reaped and not yet claimed again: the request is nobody's, also not the old holder's."""
    pool.submit("a")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    pool.reap(hand.incarnation)
    before = dump(pool.connection)
    send, answer = STALE[write]
    assert send(hand, claim) == answer
    assert dump(pool.connection) == before


def test_an_empty_execution_holds_nothing(pool: Pool, hand: Hand):
    """A waiting request has no execution; a caller without one must not pass for its holder."""
    pool.submit("a")
    pool.submit("b")
    nobody = replace(hand.take("a"), id="b", execution="")
    before = dump(pool.connection)
    assert hand.step(nobody, ["x"]) == "lost"
    assert hand.renew(nobody) == "lost"
    assert hand.finish(nobody, 1) == "lost"
    assert hand.fail(nobody) == "lost"
    assert hand.release(nobody) == ["lost"]
    assert dump(pool.connection) == before


def test_a_deadline_never_refuses_a_write(pool: Pool, hand: Hand):
    """Expired but not reaped is still owned: slowness alone loses nothing."""
    pool.submit("a")
    claim = hand.take("a")
    pool.expire_lease("a")
    pool.stop_heart(hand.incarnation)
    assert hand.step(claim, ["x"]) == "ok"
    assert hand.finish(claim, 1, offset=1) == "ok"
    assert pool.status("a") is State.FINISHED


def test_one_lost_request_does_not_refuse_its_neighbours(pool: Pool, hand: Hand):
    """Answers are per request: a batch goes on without the one that was lost."""
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    pool.expire_lease("a")
    pool.sweep()
    items = [hand.progress(claim, ["x"], 0, 1) for claim in (first, second)]
    assert pool.store.progress(hand.incarnation, items) == ["lost", "ok"]
    assert pool.store.all_outputs("b") == ["x"]


# --- the end of plain jobs ---------------------------------------------------------------------------


def settle(pool: Pool, hand: Hand, claim: Claim) -> None:
    """What RQ's transaction at a job's end does to the holding."""
    with pool.connection.pipeline() as pipeline:
        hand.settle(claim, pipeline)
        pipeline.execute()


def test_a_settle_sent_twice_settles_once(pool: Pool, hand: Hand):
    """The job's end is RQ's; ours is only the holding's, and the second end finds nothing."""
    job = Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2)
    claim = hand.take(job.id)
    settle(pool, hand, claim)
    after = dump(pool.connection)
    assert not [name for name in after if name.startswith((key("leases"), key("held")))]
    settle(pool, hand, claim)
    assert dump(pool.connection) == after


def test_a_settle_brings_no_deleted_job_back(pool: Pool, hand: Hand):
    """With result_ttl=0 RQ deletes the job at its end: nothing may be written to its hash afterwards."""
    job = Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2)
    claim = hand.take(job.id)
    pool.connection.delete(key("job", job.id))
    settle(pool, hand, claim)
    after = dump(pool.connection)
    assert not [name for name in after if name.startswith((key("job"), key("leases"), key("held")))]


def test_a_stale_settle_leaves_the_new_holder_alone(pool: Pool, hand: Hand):
    """A zombie ends its plain job while another worker runs it again: that one's lease and holding stay."""
    job = Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2, retry=Retry(max=1))
    stale = hand.take(job.id)
    pool.reap(hand.incarnation)
    other = Hand(pool, "w2")
    claim = other.take(job.id)
    before = dump(pool.connection)
    settle(pool, hand, stale)
    assert dump(pool.connection) == before
    assert pool.field(job.id, "execution") == claim.execution
    assert pool.connection.zscore(key("leases", "gpu"), job.id) is not None
