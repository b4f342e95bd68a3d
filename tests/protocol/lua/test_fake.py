"""Each script's plain path on a pretended server: what users' own tests run on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import fakeredis
import pytest
from rq import Queue

from perdure.protocol import scripts
from perdure.protocol.keys import key
from perdure.protocol.packed_state import pack_state
from perdure.protocol.states import State
from tests.kit.protocol.pool import OTHER, TASK, Hand, Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    with fakeredis.FakeRedis() as connection:
        yield Pool.over(connection)


def test_a_request_runs_to_its_end(pool: Pool, hand: Hand):
    """enqueue, claim, chunk, progress, renew, heartbeat, beat and finish."""
    pool.submit("a")
    assert not pool.store.beat(hand.incarnation)
    assert hand.beat(["model-1"]) == "ok"
    pool.sweep()
    assert pool.store.beat(hand.incarnation)
    claim = hand.take("a")
    state = pack_state(b"s" * 2_500_000, limit=10**7)
    assert (hand.write(claim, state), hand.commit(claim, state, ["x"])) == (["ok"] * 3, "ok")
    assert pool.store.state("a") == (b"s" * 2_500_000, True)
    assert hand.renew(claim) == "ok"
    assert hand.finish(claim, {"n": 1}, offset=1, outputs=["y"]) == "ok"
    assert pool.status("a") is State.FINISHED
    assert pool.store.result("a") == {"n": 1}
    assert pool.store.all_outputs("a") == ["x", "y"]


def test_a_request_is_retried_released_and_fails(pool: Pool, hand: Hand):
    """fail, promote and release."""
    pool.submit("a", retries=1)
    assert hand.fail(hand.take("a")) == "scheduled"
    pool.make_due("a")
    assert pool.store.promote(["gpu"]) == 1
    assert hand.release(hand.take("a")) == ["queued"]
    assert hand.fail(hand.take("a")) == "failed"
    assert pool.events("a") == ["retry", "released", "failed"]
    assert "it broke" in pool.store.traceback("a")


def test_a_lost_worker_is_reaped_and_another_goes_on(pool: Pool, hand: Hand):
    """reap, by evidence and by a sweep."""
    pool.submit("a")
    hand.step(hand.take("a"), ["x"])
    assert [item.outcome for item in pool.reap(hand.incarnation)] == ["queued", "gone"]
    other = Hand(pool, "w2")
    claim = other.take("a")
    assert claim.offset == 1
    pool.stop_heart(other.incarnation)
    assert [item.outcome for item in pool.sweep().reaped] == ["scheduled", "gone"]


def test_options_of_a_submit():
    """Delay, deadline, idempotency and the bound of a queue, in enqueue, promote, claim and progress."""
    with fakeredis.FakeRedis() as connection:
        pool = Pool.over(connection, queue_limit=3)
        hand = Hand(pool)
        once = replace(pool.new("once"), digest="d", deadline=60, queue_timeout=60)
        late, missed = replace(pool.new("late"), delay=60), replace(pool.new("missed"), deadline_at=1)
        assert pool.store.enqueue([once, late, missed, pool.new("more")]) == ["accepted"] * 3 + ["full"]
        assert pool.store.enqueue([replace(once, nonce="other"), replace(once, nonce="x", digest="e")]) == [
            "same",
            "conflict",
        ]
        assert pool.store.promote(["gpu"]) == 0
        assert (pool.status("missed"), pool.status("late")) == (State.FAILED, State.SCHEDULED)
        claim = hand.take("once")
        connection.hset(key("job", "once"), "deadline", 1)
        assert hand.step(claim, ["x"]) == "deadline"
        assert pool.field("once", "error_kind") == "DEADLINE"


def test_a_degraded_pool_refuses_low_priority(pool: Pool, hand: Hand):
    """Weigh and declare, and what enqueue makes of it."""
    hand.beat()
    Hand(pool, "spare").beat(ready=False)
    pool.set_pulse()
    count = pool.store.weigh()
    assert (count.judged, count.live) == (True, 1)
    tally = replace(count.tally, degraded=True, live=1, expected=4, until=count.now + 60_000, dwell=7_000)
    assert [pool.store.declare(count, tally), pool.store.declare(count, tally)] == [True, False]
    assert pool.store.weigh().tally == tally
    assert pool.store.mode().degraded
    requests = [pool.new("a"), pool.new("b", queue="gpu-low")]
    assert pool.store.enqueue(requests) == ["accepted", "degraded 7000 1 4"]


def test_a_checkpoint_expires_and_a_request_is_canceled(pool: Pool, hand: Hand):
    """Expire, cancel and stop."""
    pool.submit("a", "b")
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    pool.age_checkpoint("a", 4000)
    assert pool.store.expire(["gpu"]) == 1
    claim = hand.take("a")
    assert claim.epoch == 1
    assert [pool.cancel("a"), pool.cancel("b")] == ["requested", "canceled"]
    assert pool.store.stop(hand.incarnation, [(claim.id, claim.execution)]) == ["cancel"]
    assert hand.confirm_cancel(claim) == "canceled"


def test_a_plain_job_is_settled(pool: Pool, hand: Hand):
    """Settle, in the transaction in which RQ ends the job."""
    job = Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2, job_id="a")
    claim = hand.take(job.id)
    with pool.connection.pipeline() as pipeline:
        hand.settle(claim, pipeline)
        pipeline.execute()
    assert pool.connection.zcard(key("leases", "gpu")) == 0
    assert pool.field("a", "execution") == ""


def test_a_plain_job_becomes_a_request(pool: Pool, hand: Hand):
    """Adopt: claimed again, it is a request; sent again, nothing changes."""
    Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2, job_id="a")
    claim = hand.take("a")
    adopt = partial(pool.store.adopt, hand.incarnation, hand.name, "a", claim.execution, task=TASK, payload=b"\xc0")
    assert [adopt(), adopt()] == ["ok", "lost"]
    hand.held.clear()
    again = hand.take("a")
    assert (again.plain, again.task, again.payload) == (False, TASK, b"\xc0")


def test_what_a_worker_measures_is_added_once(pool: Pool, hand: Hand):
    """Measure, sent twice."""
    pool.submit("a")
    answers = [pool.store.measure(hand.incarnation, 1, {"outputs:gpu": 3}) for _ in range(2)]
    assert answers == ["ok", "already"]
    assert pool.connection.hget(key("counters"), "outputs:gpu") == b"3"


def test_a_request_is_taken_from_a_stock_worker(pool: Pool, hand: Hand):
    """Readmit: popped by a worker of RQ's own and lost with it, a request waits again, once."""
    pool.submit("a")
    pool.connection.lpop(key("queue", "gpu"))
    pool.connection.hset(key("job", "a"), "status", "started")
    assert pool.store.readmit([("a", "")], reason="lost") == ["queued"]
    assert pool.store.readmit([("a", "")], reason="lost") == ["already"]
    assert pool.events("a") == ["readmitted"]
    assert hand.take("a").id == "a"
    assert pool.store.readmit([("a", ""), ("b", "")], reason="lost") == ["held", "gone"]


def test_what_nobody_can_load_is_given_up(pool: Pool, hand: Hand):
    """give_up, and what a heartbeat says of it; not while another worker may be able to."""
    pool.submit("a", "b", task=OTHER)
    lack = {"task": OTHER, "kind": "missing", "reason": "no module", "age": 100.0}

    def beat(who: Hand, *lacks: dict[str, object]) -> None:
        pool.store.heartbeat(
            incarnation=who.incarnation, worker=who.name, queues=["gpu"], pid=1, host="here", unable=lacks
        )

    def give_up(*who: Hand) -> int:
        names = [item.incarnation for item in who]
        return pool.store.give_up("gpu", OTHER, kind="INVALID_REQUEST", reason="no module", workers=names)

    other = Hand(pool, "w2")
    beat(hand, lack)
    beat(other)
    assert give_up(hand) == give_up(hand, other) == -1
    beat(other, lack)
    assert give_up(hand, other) == 2
    assert {pool.status(name) for name in ("a", "b")} == {State.FAILED}
    assert give_up(hand, other) == 0


def test_every_script_was_run_above(pool: Pool, hand: Hand, monkeypatch: pytest.MonkeyPatch):
    """A new script needs a plain path here too."""
    ran: set[str] = set()
    call = scripts.Script.__call__

    def note(self, *arguments):
        ran.add(self.name)
        return call(self, *arguments)

    monkeypatch.setattr(scripts.Script, "__call__", note)
    for test in (
        test_what_nobody_can_load_is_given_up,
        test_a_request_runs_to_its_end,
        test_a_request_is_retried_released_and_fails,
        test_a_lost_worker_is_reaped_and_another_goes_on,
        test_a_degraded_pool_refuses_low_priority,
        test_a_checkpoint_expires_and_a_request_is_canceled,
        test_a_plain_job_is_settled,
        test_a_plain_job_becomes_a_request,
        test_what_a_worker_measures_is_added_once,
        test_a_request_is_taken_from_a_stock_worker,
    ):
        pool.connection.flushall()
        hand.held.clear()
        hand.incarnation = f"{test.__name__}"
        test(pool, hand)
    assert ran == set(scripts.names())
    assert pool.connection.exists(key("job", "a"))
