"""A thousand queue names: what a claim and a sweep cost goes by what the queues hold, not by how many there are."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from rq import Queue

from perdure.protocol.keys import key
from perdure.protocol.reading.occupied import BLOCK, FEW
from perdure.recovery.reaper import TURN, Reaper
from tests.kit.protocol.pool import TASK, Hand, Pool

NAMES = tuple(f"names-{number:04d}" for number in range(1000))


def keys_read(connection: redis.Redis) -> int:
    """Commands so far, those of scripts too."""
    stats: dict[str, Any] = connection.info("commandstats")
    return sum(row["calls"] for name, row in stats.items() if name not in ("cmdstat_info", "cmdstat_config|resetstat"))


def spent(connection: redis.Redis, what: Any) -> int:
    what()  # loads its script
    before = keys_read(connection)
    what()
    return keys_read(connection) - before


def test_an_idle_claim_costs_as_little_with_a_thousand_names(pool: Pool) -> None:
    one = Hand(pool, "one", queues=NAMES[:1])
    all_of_them = Hand(pool, "all", queues=NAMES)
    assert spent(pool.connection, all_of_them.claim) <= spent(pool.connection, one.claim) + 3


def test_a_sweep_looks_at_few_of_a_thousand_idle_queues(pool: Pool) -> None:
    pool.connection.sadd(key("queues"), *(key("queue", name) for name in NAMES))
    reaper = Reaper(pool.store, pool.store.settings)
    many = spent(pool.connection, lambda: reaper.sweep(expire=False))
    pool.connection.srem(key("queues"), *(key("queue", name) for name in NAMES[TURN:]))
    assert many <= spent(pool.connection, lambda: reaper.sweep(expire=False))


@pytest.mark.parametrize("place", [0, 499, 999])
@pytest.mark.parametrize("names", [NAMES[: FEW + 1], NAMES])
def test_whatever_waits_in_one_of_many_queues_is_found(pool: Pool, names: tuple[str, ...], place: int) -> None:
    """A request, what was taken from a dead worker, a plain job."""
    queue = names[min(place, len(names) - 1)]
    hand = Hand(pool, queues=names)
    hand.beat()

    def taken() -> list[str]:
        found = [claim.id for claim in hand.claim().claims]
        hand.held.clear()
        pool.reap(hand.incarnation)
        hand.incarnation += "+"
        return found

    pool.submit("request", queue=queue)
    assert taken() == ["request"]  # and lost: by itself, as the first suspect of its kind
    assert taken() == ["request"]
    Queue(queue, connection=pool.connection).enqueue(len, [], job_id="plain")
    assert "plain" in taken() + taken()


def test_a_retry_is_due_in_one_of_many_queues(pool: Pool) -> None:
    hand = Hand(pool, queues=NAMES)
    pool.submit("a", queue=NAMES[700])
    assert hand.fail(hand.claim().claims[0]) == "scheduled"
    assert hand.claim().claims == []
    pool.make_due("a", NAMES[700])
    assert [claim.id for claim in hand.claim().claims] == ["a"]


def test_the_first_queue_named_is_the_first_served(pool: Pool) -> None:
    hand = Hand(pool, queues=NAMES)
    for place in (999, 5, BLOCK + 1, 4):
        pool.submit(f"r{place}", queue=NAMES[place])
    order = []
    for _ in range(4):
        claim = hand.claim(1).claims[0]
        order.append(claim.id)
        hand.finish(claim, "done")
    assert order == ["r4", "r5", f"r{BLOCK + 1}", "r999"]


def test_due_queues_of_other_workers_hide_none_of_ones_own(pool: Pool) -> None:
    """A page of the index is full of queues that this worker does not serve."""
    hand = Hand(pool, "mine", queues=("zz",))
    pool.submit("a", queue="zz")
    hand.fail(hand.claim().claims[0])
    pool.connection.zadd(key("aside"), dict.fromkeys(NAMES[:200], 1))
    pool.make_due("a", "zz")
    assert [claim.id for claim in hand.claim().claims] == ["a"]


@pytest.mark.parametrize("set_of", ["retries", "suspects", "bounced", "leases", "deadlines"])
def test_a_sweep_finds_what_the_index_does_not_name(pool: Pool, set_of: str) -> None:
    """Workers of an older release write into the sets alone: within a turn of the queues a sweep puts that right."""
    number = 3 * TURN
    pool.connection.sadd(key("queues"), *(key("queue", name) for name in NAMES[:number]))
    queue = NAMES[number - 1]
    if set_of == "bounced":
        pool.connection.sadd(key("bounced", queue), "a")
    else:
        pool.connection.zadd(key(set_of, queue), {"a": 2e15})
    pool.connection.hset(
        key("job", "a"), mapping={"created_at": "x", "status": "started", "task": TASK, "origin": queue}
    )
    reaper = Reaper(pool.store, pool.store.settings)
    for _ in range(3):
        reaper.sweep(expire=False)
    found: Any = pool.connection.zscore(key("aside"), queue)
    assert found == {"bounced": 0, "retries": 2e15, "suspects": 2e15}.get(set_of, float("inf"))


def test_the_index_forgets_a_queue_that_holds_nothing(pool: Pool, hand: Hand) -> None:
    pool.submit("a")
    hand.beat()
    hand.finish(hand.take("a"), "done")
    assert pool.connection.zscore(key("aside"), "gpu") is not None
    Reaper(pool.store, pool.store.settings).sweep(expire=False)
    assert not pool.connection.exists(key("aside"))


def test_a_queue_of_an_older_release_is_swept(pool: Pool, hand: Hand) -> None:
    """It had its name in `rq:perdure:queues`; RQ's own set has forgotten it."""
    pool.submit("a")
    hand.beat()
    hand.take("a")
    pool.connection.delete(key("queues"), key("aside"))
    pool.connection.sadd(key("swept"), "gpu")
    Reaper(pool.store, pool.store.settings).sweep(expire=True)
    assert pool.store.queues() == ["gpu"]
    assert not pool.connection.exists(key("swept"))
