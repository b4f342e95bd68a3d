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

from .test_protocol_kit import Hand, Pool, dump, packed

FULL, SMALL = {"n": 100}, {"n": 5}


@pytest.fixture(params=["server", "fakeredis"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    if request.param == "server":
        yield Pool.over(request.getfixturevalue("connection"))
    else:
        with fakeredis.FakeRedis() as connection:
            yield Pool.over(connection)


@pytest.fixture
def hand(pool: Pool) -> Hand:
    return Hand(pool)


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
    plain, small = hand.claim(2).claims
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
