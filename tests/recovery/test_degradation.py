"""When a pool is degraded: the decision by histories, the declarations by the scripts, both under a
clock of the test.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from perdure.protocol.keys import key
from perdure.protocol.reading.mode import Count, Mode, ModeTally
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.recovery.degradation import ENTER, HOLD, LEAVE, SPAN, SPANS, Degradation, judge
from perdure.recovery.reaper import Reaper
from tests.kit.protocol.clock import Clock, pretended_clock
from tests.kit.protocol.pool import Hand, Pool, plain

TIMEOUT = 5_000
START = 1_800_000_000_000
HOUR = SPAN * SPANS


def told(history: list[tuple[float, int]], capacity: int = 0, tally: ModeTally | None = None) -> list[ModeTally]:
    """What is decided, one after the other, when so many workers are counted at these seconds."""
    decided = [tally or ModeTally()]
    for second, live in history:
        count = Count(START + round(second * 1000), True, live, 0, decided[-1])
        decided.append(judge(count, capacity=capacity, timeout=TIMEOUT))
    return decided[1:]


def during(start: float, end: float, live: int, every: float = 0.5) -> list[tuple[float, int]]:
    """Counts from ``start`` until before ``end``, in seconds."""
    return [(start + every * n, live) for n in range(round((end - start) / every))]


SETTLED = told(during(-20, 0, 4))[-1]
"""Four workers that have been there for a while."""


def test_a_pool_that_never_had_a_worker_is_normal() -> None:
    """Nothing is missing where nothing was: not even when a capacity is configured."""
    assert SETTLED.expected == 4
    for capacity in (0, 4):
        assert not any(tally.degraded for tally in told(during(0, 30, 0), capacity))


@pytest.mark.parametrize(
    ("live", "expected", "degraded"),
    [(2, 4, False), (1, 4, True), (0, 1, True), (1, 2, False), (3, 7, True), (1, 3, True)],
)
def test_below_half_a_pool_is_degraded(live: int, expected: int, degraded: bool) -> None:
    """Half is enough; and the last of one worker is all of them."""
    settled = told(during(-20, 0, expected))[-1]
    (tally,) = told([(0, live)], tally=settled)
    assert (tally.degraded, tally.live, tally.expected) == (degraded, live, expected)
    assert tally.since == (START if degraded else 0)


@pytest.mark.parametrize(("live", "leaves"), [(2, False), (3, True), (4, True)])
def test_above_seventy_percent_for_the_dwell_it_is_normal_again(live: int, leaves: bool) -> None:
    tallies = told([(0, 1), *during(1, 8, live)], tally=SETTLED)
    normal_at = [1 + 0.5 * n for n, tally in enumerate(tallies[1:]) if not tally.degraded]
    assert normal_at == ([6.0, 6.5, 7.0, 7.5] if leaves else [])


def test_the_dwell_begins_anew_when_a_worker_is_lost_again() -> None:
    """Four seconds, a loss, and again: the whole dwell is waited for."""
    tallies = told([(0, 1), *during(1, 5, 4), (5, 2), *during(5.5, 11, 4)], tally=SETTLED)
    assert [tally.degraded for tally in tallies].count(False) == 1
    assert not tallies[-1].degraded


def test_seventy_percent_is_not_above_seventy_percent() -> None:
    settled = told(during(-20, 0, 10))[-1]
    assert told([(0, 4), *during(1, 60, 7)], tally=settled)[-1].degraded


@given(st.lists(st.tuples(st.floats(0.1, 900), st.integers(0, 12)), max_size=60), st.integers(0, 8))
def test_whatever_is_counted_the_rules_hold(steps: list[tuple[float, int]], capacity: int) -> None:
    """Any history: it enters only below half, leaves only after a dwell or by itself, expects no more
    than was there.
    """
    at, history = 0.0, []
    for seconds, live in steps:
        at += seconds
        history.append((at, live))
    tallies = told(history, capacity)
    for (second, live), before, after in zip(history, [ModeTally(), *tallies], tallies, strict=False):
        now = START + round(second * 1000)
        if after.degraded and not (before.degraded and before.since == after.since):
            assert live < ENTER * after.expected
            assert after.since == now
        if before.degraded and not after.degraded and now < before.until:
            assert now - before.recovering >= TIMEOUT
            assert live > LEAVE * after.expected or not after.expected
        if after.degraded:
            assert now < after.until <= now + HOLD + 2 * TIMEOUT
        assert after.expected == capacity or after.expected <= max((live for _, live in history), default=0)
        assert len(after.peaks) <= SPANS + 1


def test_what_is_counted_twice_for_a_moment_is_not_expected() -> None:
    """A killed worker's last beat counts until it is too old, beside its successor's: that is no peak."""
    alone = told(during(-20, 0, 1))[-1]
    tallies = told([*during(0, 4.9, 2), *during(5, 60, 1)], tally=alone)
    assert {tally.expected for tally in tallies} == {1}


def test_a_dead_worker_is_expected_for_an_hour() -> None:
    """What nobody replaces becomes normal in the end."""
    tallies = told(during(0, 2 * HOUR / 1000, 1, every=5), tally=SETTLED)
    ended = next(5 * n for n, tally in enumerate(tallies) if not tally.degraded)
    assert HOUR / 1000 <= ended <= (HOUR + SPAN) / 1000 + 20
    assert not any(tally.degraded for tally in tallies[ended // 5 :])
    assert tallies[-1].expected == 1


def test_a_configured_capacity_rules() -> None:
    """More than there ever were, or fewer; reapers that were told none, or less, take it from the one that was."""
    (tally,) = told([(0, 4)], capacity=10, tally=SETTLED)
    assert (tally.degraded, tally.expected) == (True, 10)
    (tally,) = told([(0, 1)], capacity=2, tally=SETTLED)
    assert (tally.degraded, tally.expected) == (False, 2)
    tally = SETTLED
    for second in range(20):
        tally = told([(second, 4)], capacity=(10, 0, 3)[second % 3], tally=tally)[-1]
        assert (tally.degraded, tally.expected, tally.since) == (True, 10, START)
    # Its reaper has gone, and the others' word holds.
    assert told(during(20, 60, 4), tally=tally)[-1].expected == 4


def test_while_nobody_may_be_judged_the_mode_stays() -> None:
    """After an outage all heartbeats are old: that says nothing, either way."""
    count = Count(START, False, 0, 0, SETTLED)
    assert judge(count, capacity=0, timeout=TIMEOUT) == SETTLED
    degraded = told([(0, 1)], tally=SETTLED)[-1]
    later = judge(Count(START + 15_000, False, 4, 0, degraded), capacity=0, timeout=TIMEOUT)
    assert (later.degraded, later.since, later.until) == (True, START, START + 15_000 + HOLD + 2 * TIMEOUT)


def test_what_nobody_repeats_ends_by_itself() -> None:
    degraded = told([(0, 1)], tally=SETTLED)[-1]
    assert degraded.until == START + HOLD + 2 * TIMEOUT
    late = judge(Count(degraded.until, False, 0, 0, degraded), capacity=0, timeout=TIMEOUT)
    assert (late.degraded, late.until) == (False, 0)


def test_a_clock_that_was_set_back_stops_nothing() -> None:
    """What stands in the future is forgotten: a failover to a server whose clock is an hour behind."""
    ahead = told([(3600, 1), (3601, 4)], tally=replace(SETTLED, peaks=((START // SPAN + 6, 4),)))[-1]
    assert ahead.degraded
    assert not told(during(0, 60, 4), tally=ahead)[-1].degraded


def test_a_stored_state_comes_back_and_damage_is_nothing() -> None:
    tally = told([(0, 1)], capacity=9, tally=SETTLED)[-1]
    raw = {name: str(value) for name, value in tally.to_redis().items()}
    raw["until"] = raw.pop("until_ms")
    assert ModeTally.from_redis(raw) == tally
    assert (
        ModeTally.from_redis(dict.fromkeys(raw, "1e999\x00") | {"peaks": "a:b 12345678901234567890:1 ١:٢"})
        == ModeTally()
    )
    assert ModeTally.from_redis({}) == ModeTally()


# --- by the scripts ------------------------------------------------------------------------------


@pytest.fixture
def clock(connection: redis.Redis) -> Iterator[Clock]:
    with pretended_clock():
        yield Clock(connection)


@pytest.fixture
def pool(connection: redis.Redis, clock: Clock) -> Pool:
    return Pool.over(connection)


class Crowd:
    """Pretended workers that beat, and reapers that sweep, as the test's clock goes."""

    def __init__(self, pool: Pool, clock: Clock, reapers: int = 1, **settings: Any) -> None:
        self.pool, self.clock = pool, clock
        store = Store(pool.connection, Settings(**settings))
        self.reapers = [Reaper(store, store.settings, name=f"r{n}") for n in range(reapers)]
        self.hands: list[Hand] = []
        self.modes: list[Mode] = []

    def join(self, number: int) -> None:
        self.hands += [Hand(self.pool, f"w{len(self.hands) + n}") for n in range(number)]

    def leave(self) -> None:
        """One leaves in order, as a worker does at its end."""
        hand = self.hands.pop()
        self.pool.store.reap(
            incarnation=hand.incarnation, kind="WORKER_LOST", reason="its worker has exited", clean=True
        )

    def pass_(self, seconds: float) -> None:
        """A sweep each half second, a beat each second."""
        for turn in range(round(seconds * 2)):
            for hand in self.hands if turn % 2 == 0 else ():
                assert hand.beat() == "ok"
            for reaper in self.reapers:
                reaper.sweep()
                self.modes.append(self.mode)
            self.clock.advance(0.5)

    @property
    def mode(self) -> Mode:
        """As the scripts see it: a reader asks the server's own clock."""
        fields: Any = plain(self.pool.connection.hgetall(key("mode")))
        degraded = fields.get("mode") == "degraded" and self.clock.now < int(fields["until"])
        since = int(fields["since"]) / 1000 if degraded else None
        return Mode(
            degraded=degraded,
            live=int(fields.get("live", 0)),
            expected=int(fields.get("expected", 0)),
            since=since,
            recovering=degraded and int(fields["recovering"]) > 0,
        )

    def counted(self, event: str) -> int:
        number: Any = self.pool.connection.hget(key("counters"), event)
        return int(number or 0)


@pytest.mark.parametrize("reapers", [1, 2])
def test_a_pool_without_three_of_four_is_degraded(pool: Pool, clock: Clock, reapers: int) -> None:
    """Once in, once out, whoever sweeps how often: nothing goes to and fro."""
    crowd = Crowd(pool, clock, reapers)
    crowd.join(4)
    crowd.pass_(12)
    assert (crowd.mode.degraded, crowd.mode.live, crowd.mode.expected) == (False, 4, 4)
    del crowd.hands[1:]  # killed, with their guardians
    lost_at = clock.now
    crowd.pass_(12)
    assert (crowd.mode.degraded, crowd.mode.live, crowd.mode.expected) == (True, 1, 4)
    assert crowd.mode.since is not None
    assert 4 <= crowd.mode.since - lost_at / 1000 <= 6
    assert str(crowd.mode).startswith("the pool is degraded: 1 of 4 workers since 2027-01-15 ")
    crowd.join(3)
    crowd.pass_(2)
    assert str(crowd.mode).startswith("the pool is recovering: 4 of 4 workers are ready; degraded since 2027-01-15 ")
    crowd.pass_(6)
    assert (crowd.mode.degraded, crowd.mode.live, crowd.mode.expected) == (False, 4, 4)
    assert (crowd.counted("degraded"), crowd.counted("recovered")) == (1, 1)
    assert sum(one.degraded != other.degraded for one, other in pairwise(crowd.modes)) == 2


def test_a_pool_that_shrinks_in_order_is_not_degraded(pool: Pool, clock: Clock) -> None:
    """Four, three, two, one, none: whoever leaves of its own accord is expected no longer."""
    crowd = Crowd(pool, clock)
    crowd.join(4)
    crowd.pass_(12)
    for expected in (3, 2, 1, 0):
        crowd.leave()
        crowd.pass_(1)
        assert (crowd.mode.degraded, crowd.mode.live, crowd.mode.expected) == (False, expected, expected)
    crowd.join(2)
    crowd.pass_(12)
    assert (crowd.mode.degraded, crowd.mode.expected) == (False, 2)


def test_a_pool_that_drains_is_not_degraded(pool: Pool, clock: Clock) -> None:
    """Ctrl-C: all are told at once, and what they hold may take a while. One that dies meanwhile was on its way out."""
    crowd = Crowd(pool, clock)
    crowd.join(3)
    crowd.pass_(12)
    leaving, dying, staying = crowd.hands
    crowd.hands = [staying]
    for hand in (leaving, dying, leaving):
        hand.beat(ready="leaving")
    assert [item["leaving"] for item in pool.store.workers()].count(True) == 2
    for _ in range(4):
        leaving.beat(ready="leaving")
        crowd.pass_(2)
    pool.store.reap(incarnation=leaving.incarnation, kind="WORKER_LOST", reason="", clean=True)
    pool.reap(dying.incarnation)
    crowd.pass_(8)
    assert not any(mode.degraded for mode in crowd.modes)
    assert (crowd.mode.live, crowd.mode.expected) == (1, 1)


def test_leaving_twice_or_before_it_was_counted_is_leaving_once(pool: Pool, clock: Clock) -> None:
    """A resent call lowers nothing again; nor does a burst that was there for a moment, or what was never ready."""
    crowd = Crowd(pool, clock)
    crowd.join(4)
    crowd.pass_(12)
    hand = crowd.hands[-1]
    crowd.leave()
    crowd.hands.append(hand)
    crowd.leave()
    crowd.pass_(1)
    assert crowd.mode.expected == 3
    crowd.join(1)
    crowd.pass_(1)
    crowd.leave()
    spare = Hand(pool, "spare")
    for _ in range(3):
        spare.beat(ready=False)
        crowd.pass_(2)
    pool.store.reap(incarnation=spare.incarnation, kind="WORKER_LOST", reason="", clean=True)
    crowd.pass_(1)
    assert (crowd.mode.live, crowd.mode.expected) == (3, 3)


def test_the_last_worker_of_one_is_missed(pool: Pool, clock: Clock) -> None:
    """One killed and none left: 0 of 1. When the others then leave in order, it is still the one that is missed."""
    crowd = Crowd(pool, clock)
    crowd.join(1)
    crowd.pass_(12)
    crowd.hands.clear()
    crowd.pass_(10)
    assert (crowd.mode.degraded, crowd.mode.live, crowd.mode.expected) == (True, 0, 1)


def test_spares_and_what_still_loads_are_no_capacity(pool: Pool, clock: Clock) -> None:
    """Their hearts beat, but they claim nothing. One that becomes ready counts, one that is so no longer does not."""
    crowd = Crowd(pool, clock)
    crowd.join(1)
    spares = [Hand(pool, f"spare{n}") for n in range(3)]
    for _ in range(20):
        for spare in spares:
            spare.beat(ready=False)
        crowd.pass_(1)
    assert (crowd.mode.live, crowd.mode.expected) == (1, 1)
    spares[0].beat()
    crowd.pass_(1)
    assert crowd.mode.live == 2
    spares[0].beat(ready=False)
    crowd.pass_(1)
    assert crowd.mode.live == 1
    pool.reap(spares[0].incarnation)
    crowd.pass_(6)
    assert crowd.mode.live == 1
    assert not pool.connection.zcard(key("unready"))


def test_an_outage_is_no_loss(pool: Pool, clock: Clock) -> None:
    """Nothing beats and nothing sweeps for an hour; afterwards all are there, and it was never degraded."""
    crowd = Crowd(pool, clock)
    crowd.join(4)
    crowd.pass_(12)
    clock.advance(600)
    for reaper in crowd.reapers:
        reaper.sweep()
    crowd.pass_(12)
    assert not any(mode.degraded for mode in crowd.modes)
    assert crowd.counted("degraded") == 0


def test_a_declaration_is_heard_once(pool: Pool, clock: Clock) -> None:
    """Sent again, or decided by what has changed since, or by what was counted long ago: nothing is written."""
    crowd = Crowd(pool, clock)
    crowd.join(1)
    crowd.pass_(12)
    count = pool.store.weigh()
    tally = replace(count.tally, degraded=True, since=clock.now, until=clock.now + 60_000)
    assert pool.store.declare(count, tally)
    assert not pool.store.declare(count, tally)
    assert crowd.counted("degraded") == 1
    count = pool.store.weigh()
    assert count.tally == tally
    crowd.leave()
    assert not pool.store.declare(count, ModeTally()), "it has not seen that one worker is expected no longer"
    count = pool.store.weigh()
    clock.advance(6)
    assert not pool.store.declare(count, ModeTally())
    clock.advance(-12)
    assert not pool.store.declare(count, ModeTally())
    assert crowd.mode.degraded


def test_a_reaper_says_when_the_mode_changes(pool: Pool, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """One line in, one line out."""
    crowd = Crowd(pool, clock)
    crowd.join(4)
    with caplog.at_level(logging.WARNING, "perdure.reaper"):
        crowd.pass_(12)
        del crowd.hands[1:]
        crowd.pass_(10)
        crowd.join(3)
        crowd.pass_(10)
    lines = [record.getMessage() for record in caplog.records if "pool" in record.getMessage()]
    assert len(lines) == 2
    assert lines[0].startswith("r0: the pool is degraded: 1 of 4 workers since 2027-")
    assert lines[0].endswith("; low priority is refused")
    assert lines[1] == "r0: the pool is normal: 4 of 4 workers again"


def test_the_mode_does_not_outlive_the_pool(pool: Pool, clock: Clock) -> None:
    crowd = Crowd(pool, clock)
    crowd.join(1)
    crowd.pass_(12)
    assert 0 < int(pool.connection.ttl(key("mode"))) <= 86400
    assert isinstance(crowd.reapers[0]._degradation, Degradation)
