"""The server's clock is set an hour back or ahead: nothing is late by more than the timeouts, and nobody is accused.

The scripts run under a clock that the test moves; the sweeps go on as a reaper's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis
from rq import Queue

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.states import State
from tests.kit.protocol.clock import Clock, pretended_clock
from tests.kit.protocol.pool import Hand, Pool

HOUR = 3600.0
STEPS = pytest.mark.parametrize("step", [-HOUR, HOUR, -90 * HOUR], ids=["back", "ahead", "days back"])


@pytest.fixture
def pool(connection: redis.Redis) -> Iterator[Pool]:
    with pretended_clock():
        yield Pool.over(connection)


@pytest.fixture
def clock(connection: redis.Redis, pool: Pool) -> Clock:
    return Clock(connection)


def sweep(pool: Pool) -> None:
    """What a reaper does in one round."""
    aside = pool.store.aside()
    pool.store.reap(aside, kind="WORKER_LOST", reason="no heartbeat")
    pool.store.promote(aside, rounds=16)


def go_on(pool: Pool, clock: Clock, seconds: float, *living: Hand) -> None:
    """So much time passes under sweeps and the heartbeats of those that live."""
    for _ in range(round(2 * seconds)):
        for hand in living:
            hand.beat()
        sweep(pool)
        clock.advance(0.5)


@STEPS
def test_a_lost_host_is_found_within_its_timeouts(pool: Pool, clock: Clock, hand: Hand, step: float) -> None:
    """Its heartbeat and its leases lie an hour ahead, or all look long over."""
    pool.submit("a")
    hand.beat()
    hand.take("a")
    go_on(pool, clock, 10, hand)
    clock.step(step)
    go_on(pool, clock, 12)
    assert pool.waiting() == ["a"]
    assert [event.kind for event in pool.store.history("a")] == ["WORKER_LOST"]


@STEPS
def test_a_hung_step_is_found_and_a_long_one_is_not_accused(pool: Pool, clock: Clock, hand: Hand, step: float) -> None:
    """Ahead, the leases of both are over at once: each step has its whole time from then on."""
    pool.submit("hangs", "long")
    other = Hand(pool, "w2")
    hung, slow = hand.take("hangs"), other.take("long")
    hand.renew(hung)
    go_on(pool, clock, 10, hand, other)
    other.renew(slow)
    clock.step(step)
    go_on(pool, clock, 19, hand, other)
    assert pool.status("long") is pool.status("hangs") is State.STARTED
    assert other.step(slow, ["x"]) == "ok"
    go_on(pool, clock, 15, hand, other)
    assert pool.status("long") is State.STARTED
    assert [event.kind for event in pool.store.history("hangs") if event.event != "suspected"] == ["HANG"]
    assert pool.events("long") == []


@STEPS
def test_retries_and_delays_wait_no_longer_than_they_were_to(pool: Pool, clock: Clock, hand: Hand, step: float) -> None:
    """Among hundreds that are to wait for days, which go on doing so."""
    far = [replace(pool.new(f"far-{number}"), delay=30 * 86400) for number in range(300)]
    for begin in range(0, 300, 100):
        pool.store.enqueue(far[begin : begin + 100])
    pool.store.enqueue([replace(pool.new("soon"), delay=20)])
    pool.submit("fails")
    go_on(pool, clock, 3, hand)
    assert hand.fail(hand.take("fails"), FailureKind.NETWORK) == "scheduled"
    clock.step(step)
    go_on(pool, clock, 25, hand)
    assert set(pool.waiting()) == {"fails", "soon"}
    assert pool.connection.zcard(key("retries", "gpu")) == 300


@pytest.mark.parametrize("kind", ["deadline", "queue_timeout"])
def test_a_deadline_in_seconds_is_met_and_one_of_a_date_stays(pool: Pool, clock: Clock, hand: Hand, kind: str) -> None:
    """The stated rule: seconds count again from the step back; a date is a date of the server's clock."""
    date = clock.now / 1000 + 30
    soon = replace(
        pool.new("soon"),
        deadline=30.0 if kind == "deadline" else 0.0,
        queue_timeout=30.0 if kind != "deadline" else 0.0,
    )
    pool.store.enqueue([soon, replace(pool.new("dated"), deadline_at=date)])
    go_on(pool, clock, 5, hand)
    clock.step(-HOUR)
    go_on(pool, clock, 33, hand)
    assert (pool.status("soon"), pool.status("dated")) == (State.FAILED, State.QUEUED)
    go_on(pool, clock, HOUR / 100, hand)
    assert pool.status("dated") is State.QUEUED


@pytest.mark.parametrize("write", ["progress", "renew"])
def test_a_running_request_meets_its_deadline_in_seconds(pool: Pool, clock: Clock, hand: Hand, write: str) -> None:
    pool.store.enqueue([replace(pool.new("a"), deadline=30.0)])
    claim = hand.take("a")
    go_on(pool, clock, 5, hand)
    clock.step(-HOUR)
    answers = []
    for number in range(1, 40):
        go_on(pool, clock, 1, hand)
        answer = hand.renew(claim) if write == "renew" else hand.step(claim, [], seq=number)
        answers.append(answer)
        if answer == "deadline":
            break
    assert 25 <= len(answers) <= 31, answers


def test_a_step_ahead_costs_no_checkpoint(pool: Pool, clock: Clock, hand: Hand) -> None:
    """An hour in which no time passed makes none stale, neither at a claim nor in a sweep; an hour that passed does."""
    pool.submit("a", "b")
    claims = hand.claim(2).claims
    for claim in claims:
        hand.step(claim, ["x"])
    hand.release(*claims)
    go_on(pool, clock, 3, hand)
    clock.step(HOUR + 10)
    sweep(pool)
    assert pool.store.expire(["gpu"]) == 0
    assert sorted((claim.id, claim.offset) for claim in hand.claim(2).claims) == [("a", 1), ("b", 1)]
    hand.release(*hand.held.values())
    for _ in range(370):
        clock.advance(10)
        pool.store.reap(["gpu"], kind="WORKER_LOST", reason="no heartbeat")
        pool.store.connection.hset(key("pulse"), "away_from", 0)
    assert pool.store.expire(["gpu"]) == 2


def test_a_claim_before_the_first_sweep_goes_on_too(pool: Pool, clock: Clock, hand: Hand) -> None:
    """Its guardian reaps a worker right after the step: no sweep has seen the gap yet."""
    pool.submit("a")
    hand.step(hand.take("a"), ["x"])
    go_on(pool, clock, 3, hand)
    clock.step(HOUR + 10)
    pool.reap(hand.incarnation)
    claim = Hand(pool, "w2").take("a")
    assert (claim.offset, claim.epoch) == (1, 0)


def test_a_gone_model_is_not_waited_for_because_of_a_step_back(pool: Pool, clock: Clock, hand: Hand) -> None:
    """It was shown an hour ahead of now."""
    pool.submit("a")
    hand.beat(["model-1"])
    hand.step(hand.take("a"), ["x"])
    pool.reap(hand.incarnation)
    clock.step(-HOUR)
    other = Hand(pool, "w2")
    assert other.release(other.take("a"), delay=1.0, fingerprints=["model-1"]) == ["scheduled"]
    go_on(pool, clock, 17, other)
    assert other.release(other.take("a"), delay=1.0, fingerprints=["model-1"]) == ["queued"]
    assert other.take("a").epoch == 1


def test_a_suspect_is_reserved_for_in_time(pool: Pool, clock: Clock, hand: Hand) -> None:
    """A worker that is never empty gets one after 5 s, whatever the clock did meanwhile."""
    pool.submit("s")
    lost = Hand(pool, "lost")
    lost.take("s")
    pool.reap(lost.incarnation, FailureKind.CRASH)
    pool.submit("busy", "next")
    pool.connection.zrem(key("suspects", "gpu"), "s")
    busy = hand.take("busy")
    pool.connection.zadd(key("suspects", "gpu"), {"s": clock.now})
    sweep(pool)
    clock.step(-HOUR)
    go_on(pool, clock, 8, hand)
    assert hand.claim(1).status == "blocked"
    hand.finish(busy)
    assert [claim.id for claim in hand.claim().claims] == ["s"]


def test_a_plain_jobs_lease_is_its_timeout_from_a_step_back_on(pool: Pool, clock: Clock, hand: Hand) -> None:
    Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2, job_id="p", job_timeout=20)
    hand.take("p")
    go_on(pool, clock, 3, hand)
    clock.step(-HOUR)
    go_on(pool, clock, 60, hand)
    assert pool.connection.hget(key("job", "p"), "status") == b"failed"
