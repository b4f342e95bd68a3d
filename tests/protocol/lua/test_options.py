"""Options that a request carries into its executions: its own step timeout, and the payload of a degraded pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import fakeredis
import pytest
import redis

from perdure.protocol.codec import unpack
from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from tests.kit.protocol.pool import TASK, Hand, Pool, dump, packed

FULL, SMALL = {"n": 100}, {"n": 5}


@pytest.fixture(params=["server", "fakeredis"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    if request.param == "server":
        yield Pool.over(request.getfixturevalue("connection"))
    else:
        with fakeredis.FakeRedis() as connection:
            yield Pool.over(connection)


def left(pool: Pool, identifier: str) -> float:
    """Seconds until the lease ends."""
    score: Any = pool.connection.zscore(key("leases", "gpu"), identifier)
    return float(score) / 1000 - pool.now()


def test_a_requests_own_step_timeout_rules_its_lease(pool: Pool, hand: Hand) -> None:
    """One and a half times as long, at claim, claim given again, progress, cancel and renewal; others keep theirs."""
    assert pool.store.enqueue([replace(pool.new("own"), step_timeout=200), pool.new("other")]) == ["accepted"] * 2
    own, other = hand.claim(2).claims
    assert (own.step_timeout, other.step_timeout) == (200, None)

    def again() -> None:
        assert len(hand.claim(1, forget=True).claims) == 2

    moves: dict[str, Callable[[], object]] = {
        "claim": lambda: None,
        "again": again,
        "progress": lambda: hand.step(own, ["x"]) + hand.step(other, ["x"]),
        "renew": lambda: hand.renew(own) + hand.renew(other),
        "cancel": lambda: [pool.cancel("own"), pool.cancel("other"), hand.step(own, []), hand.step(other, [])],
    }
    for name, move in moves.items():
        if name != "claim":
            pool.expire_lease("own")
            pool.expire_lease("other")
        move()
        assert 290 < left(pool, "own") <= 300, name
        assert 20 < left(pool, "other") <= 30, name


# --- a degraded pool -----------------------------------------------------------------------------


def degrade(pool: Pool, seconds: float = 60) -> None:
    """What the reaper writes, by hand."""
    until = int((pool.now() + seconds) * 1000)
    pool.connection.hset(key("mode"), mapping={"mode": "degraded", "until": until})


def recover(pool: Pool) -> None:
    pool.connection.delete(key("mode"))


def submit(pool: Pool, identifier: str = "a") -> None:
    request = replace(pool.new(identifier), payload=packed(FULL), degraded_payload=packed(SMALL))
    assert pool.store.enqueue([request]) == ["accepted"]


def degraded(pool: Pool) -> bool:
    record = pool.store.fetch("a")
    assert record is not None
    return record.degraded


def test_a_healthy_pool_runs_the_whole_payload(pool: Pool, hand: Hand) -> None:
    submit(pool)
    assert unpack(hand.take("a").payload) == FULL
    assert (degraded(pool), pool.events("a")) == (False, [])


def test_a_mode_that_has_run_out_is_none(pool: Pool, hand: Hand) -> None:
    """The reaper that wrote it may be gone: nothing stays degraded because nobody takes it back."""
    submit(pool)
    degrade(pool, -1)
    assert unpack(hand.take("a").payload) == FULL


def test_a_degraded_pool_changes_only_what_has_overrides(pool: Pool, hand: Hand) -> None:
    pool.submit("plain")
    submit(pool)
    degrade(pool)
    plain, small = hand.claim(4).claims
    assert (unpack(plain.payload), unpack(small.payload)) == ({"n": "plain"}, SMALL)
    assert (degraded(pool), pool.events("a"), pool.events("plain")) == (True, ["degraded"], [])


def test_what_began_degraded_resumes_degraded(pool: Pool, hand: Hand) -> None:
    """Also when the pool has recovered, after a loss and after a release."""
    submit(pool)
    degrade(pool)
    assert hand.step(hand.take("a"), ["x"]) == "ok"
    recover(pool)
    pool.reap(hand.incarnation)
    other = Hand(pool, "w2")
    claim = other.take("a")
    assert (unpack(claim.payload), claim.offset) == (SMALL, 1)
    assert other.release(claim) == ["queued"]
    assert unpack(other.take("a").payload) == SMALL
    assert degraded(pool)


def test_what_began_whole_resumes_whole(pool: Pool, hand: Hand) -> None:
    submit(pool)
    hand.step(hand.take("a"), ["x"])
    degrade(pool)
    pool.reap(hand.incarnation)
    assert unpack(Hand(pool, "w2").take("a").payload) == FULL
    assert not degraded(pool)


def test_a_start_from_zero_decides_anew(pool: Pool, hand: Hand) -> None:
    """A stale checkpoint: the next epoch is of one piece again. So is a start that had put nothing out."""
    submit(pool)
    degrade(pool)
    claim = hand.take("a")
    hand.step(claim, ["x"])
    hand.release(claim)
    recover(pool)
    pool.age_checkpoint("a", 4000)
    claim = hand.take("a")
    assert (unpack(claim.payload), claim.epoch, degraded(pool)) == (FULL, 1, False)
    hand.release(claim)
    degrade(pool)
    claim = hand.take("a")
    assert (unpack(claim.payload), claim.epoch, degraded(pool)) == (SMALL, 1, True)
    assert [event for event in pool.events("a") if event != "released"] == [
        *("degraded", "restart", "restored", "degraded"),
    ]


def test_a_lost_reply_is_given_again_as_it_was(pool: Pool, hand: Hand) -> None:
    submit(pool)
    degrade(pool)
    hand.take("a")
    recover(pool)
    before = dump(pool.connection, without=("counters", "leases"))
    (again,) = hand.claim(1, forget=True).claims
    assert unpack(again.payload) == SMALL
    assert dump(pool.connection, without=("counters", "leases")) == before


def test_a_requeued_dead_letter_goes_on_as_it_began(connection: redis.Redis) -> None:
    """From its checkpoint the same; without one, as the pool is now."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    submit(pool)
    degrade(pool)
    claim = hand.take("a")
    hand.step(claim, ["x"])
    pool.connection.hset(key("job", "a"), "retries_left", 0)
    assert hand.fail(claim) == "failed"
    recover(pool)
    for expected in (SMALL, FULL):
        pool.connection.zrem(key("failed", "gpu"), "a")
        pool.connection.rpush(key("queue", "gpu"), "a")
        claim = hand.take("a")
        assert unpack(claim.payload) == expected
        pool.connection.hset(key("job", "a"), "retries_left", 0)
        assert hand.fail(claim) == "failed"
        pool.connection.delete(key("checkpoint", "a"))


def test_a_degraded_pool_takes_no_low_priority(pool: Pool) -> None:
    """But all that it knows already, and everything else. What it refuses leaves nothing behind and is counted."""
    low = [pool.new(name, queue="gpu-low") for name in ("known", "new")]
    assert pool.store.enqueue(low[:1]) == ["accepted"]
    degrade(pool)
    pool.connection.hset(key("mode"), mapping={"live": 1, "expected": 4, "dwell": 7000})
    others = [pool.new("a"), pool.new("b", queue="gpu-high"), pool.new("c", queue="lower")]
    before = set(dump(pool.connection))
    answers = pool.store.enqueue([*low, *others])
    assert answers == ["already", "degraded 7000 1 4", "accepted", "accepted", "accepted"]
    assert pool.store.fetch("new") is None
    assert not {name for name in set(dump(pool.connection)) - before if name.endswith("new")}
    assert pool.connection.hget(key("counters"), "refused:gpu-low") == b"1"
    recover(pool)
    assert pool.store.enqueue(low) == ["already", "accepted"]


def test_what_is_refused_may_come_back_when_the_dwell_ends(pool: Pool) -> None:
    """Ms until it can be over at the earliest, at least a second."""
    low = pool.new("a", queue="gpu-low")
    for begun, expected in ((0, 7000), (5, 2000), (60, 1000), (-60, 7000)):
        degrade(pool)
        recovering = round((pool.now() - begun) * 1000) if begun else 0
        pool.connection.hset(key("mode"), mapping={"dwell": 7000, "recovering": recovering})
        (answer,) = pool.store.enqueue([low])
        assert expected - 1000 <= int(answer.split()[1]) <= expected + 1, begun  # its own clock is rounded to the ms
        assert int(answer.split()[1]) >= 1000


def test_time_that_counts_from_the_submit_is_doubled(pool: Pool) -> None:
    """Deadlines and queue timeouts in seconds; a date stays, and so does the delay."""
    degrade(pool)
    before = pool.now() * 1000
    limited = replace(pool.new("limited"), deadline=100, queue_timeout=10, delay=50)
    dated = replace(pool.new("dated"), deadline_at=(before + 100_000) / 1000)
    assert pool.store.enqueue([limited, dated, pool.new("plain")]) == ["accepted"] * 3
    took = pool.now() * 1000 - before
    assert 200_000 - 1 <= int(pool.field("limited", "deadline")) - before <= 200_000 + took + 1
    assert 70_000 - 1 <= int(pool.field("limited", "queue_deadline")) - before <= 70_000 + took + 1
    assert abs(int(pool.field("dated", "deadline")) - before - 100_000) <= 1
    assert 49 < pool.due_in("limited") <= 50
    assert (pool.events("limited"), pool.events("dated"), pool.events("plain")) == (["stretched"], [], [])
    recover(pool)
    assert pool.store.enqueue([pool.new("later")]) == ["accepted"]
    records = [pool.store.fetch(name) for name in ("limited", "dated", "plain", "later")]
    assert [record and record.stretched for record in records] == [True, True, True, False]


@pytest.mark.parametrize(("slots", "half"), [(8, 4), (3, 1), (2, 1), (1, 1)])
def test_a_degraded_worker_fills_half_of_its_slots(pool: Pool, hand: Hand, slots: int, half: int) -> None:
    """Never less than one. What it holds beyond that runs on, and when the pool recovers it takes the rest."""

    def claim() -> int:
        claims = hand.store.claim(
            incarnation=hand.incarnation,
            worker="w1",
            queues=["gpu"],
            task=TASK if hand.held else "",
            free=slots - len(hand.held) if hand.held else 1,
            slots={TASK: slots},
            known=list(hand.held),
        )
        hand.held |= {item.id: item for item in claims.claims}
        assert claims.degraded is (pool.connection.exists(key("mode")) == 1)
        return len(hand.held)

    pool.submit(*(f"r{number}" for number in range(20)))
    degrade(pool)
    assert [claim(), claim()] == [half, half]
    recover(pool)
    assert claim() == slots
    degrade(pool)
    while len(hand.held) > half:
        assert claim() == len(hand.held)
        hand.finish(next(iter(hand.held.values())))
    hand.finish(next(iter(hand.held.values())))
    assert claim() == half


def test_a_degraded_worker_takes_half_of_the_suspects(pool: Pool, hand: Hand) -> None:
    """They are a batch as any other."""
    pool.submit(*(f"r{number}" for number in range(8)))
    other = Hand(pool, "w2", slots=8)
    assert len(other.claim(8).claims) == 8
    pool.reap(other.incarnation, FailureKind.CRASH)
    assert len(pool.suspects()) == 8
    degrade(pool)
    assert len(hand.claim(4).claims) == 2
