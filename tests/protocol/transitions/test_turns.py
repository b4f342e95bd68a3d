"""Of the idle workers that serve the same queues, one asks each second: a stock producer rings no bell."""

from __future__ import annotations

import pytest

from perdure.protocol.keys import crowd, key
from perdure.recovery.reaper import Reaper
from tests.kit.protocol.pool import TASK, Hand, Pool

CROWD = crowd(("gpu",))


def turns(pool: Pool) -> int:
    return int(pool.connection.llen(key("turn", CROWD)))


@pytest.fixture
def three(pool: Pool) -> list[Hand]:
    hands = [Hand(pool, f"w{number}") for number in range(3)]
    for hand in hands:
        hand.beat()
    return hands


def test_one_of_three_looks(three: list[Hand]) -> None:
    assert [hand.claim().looks for hand in three] == [True, False, False]
    assert [hand.claim().looks for hand in reversed(three)] == [False, False, True]


def test_workers_of_other_queues_have_one_of_their_own(pool: Pool, three: list[Hand]) -> None:
    """By their names, not by the order in which they serve them."""
    assert three[0].claim().looks
    one, other = Hand(pool, "a", queues=("gpu", "cpu")), Hand(pool, "b", queues=("cpu", "gpu"))
    assert [one.claim().looks, other.claim().looks] == [True, False]


def test_who_takes_work_passes_the_turn_on(pool: Pool, three: list[Hand]) -> None:
    assert three[0].claim().looks
    pool.submit("a")
    three[0].take("a")
    assert turns(pool) == 1
    assert three[1].claim().looks
    assert not three[2].claim().looks


def test_another_one_that_takes_work_passes_nothing_on(pool: Pool, three: list[Hand]) -> None:
    assert three[0].claim().looks
    pool.submit("a")
    three[1].take("a")
    assert turns(pool) == 0
    assert not three[2].claim().looks


@pytest.mark.parametrize("how", ["evidence", "silence"])
def test_the_turn_of_the_dead_goes_on(pool: Pool, three: list[Hand], how: str) -> None:
    assert three[0].claim().looks
    if how == "evidence":
        pool.reap(three[0].incarnation)
    else:
        pool.stop_heart(three[0].incarnation)
        pool.set_pulse()
        Reaper(pool.store, pool.store.settings).sweep(expire=False)
    assert turns(pool) == 1
    assert three[1].claim().looks


def test_a_turn_whose_worker_says_nothing_more_runs_out(pool: Pool, three: list[Hand]) -> None:
    assert three[0].claim().looks
    assert 0 < pool.connection.pttl(key("looker", CROWD)) <= 3000
    pool.connection.delete(key("looker", CROWD))
    assert three[1].claim().looks


def test_what_the_one_cannot_take_wakes_others(pool: Pool, three: list[Hand]) -> None:
    """It could not load the task; who sleeps may have."""
    assert [hand.claim().looks for hand in three] == [True, False, False]
    pool.submit("a")
    answer = pool.store.claim(
        incarnation=three[0].incarnation, worker="w0", queues=["gpu"], task="", free=1, slots={TASK: 1}, known=[],
        unable=[TASK],
    )  # fmt: skip
    assert (answer.status, answer.looks) == ("blocked", True)
    assert 1 <= turns(pool) <= 8
    three[1].take("a")


def test_a_busy_worker_has_no_turn(pool: Pool, three: list[Hand]) -> None:
    pool.submit("a")
    three[0].take("a")
    assert not three[0].claim().looks
    assert three[1].claim().looks
