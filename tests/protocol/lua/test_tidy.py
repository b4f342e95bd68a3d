"""What is left of requests: nothing without a TTL after a delete, and nothing lost to a TTL that is not its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.registry import CanceledJobRegistry

from perdure.protocol.keys import key
from perdure.protocol.queries.inspection import queue_facts
from perdure.protocol.records import FailureKind
from perdure.protocol.states import State
from tests.kit.protocol.clock import CLOCK, Clock, pretended_clock
from tests.kit.protocol.pool import Hand, Pool, dump


@pytest.fixture
def pool(connection: redis.Redis) -> Iterator[Pool]:
    with pretended_clock():
        yield Pool.over(connection)


@pytest.fixture
def clock(connection: redis.Redis, pool: Pool) -> Clock:
    return Clock(connection)


@pytest.fixture
def hand(pool: Pool, clock: Clock) -> Hand:
    return Hand(pool)


def sweeps(pool: Pool, clock: Clock, number: int = 12) -> None:
    """So many rounds of a reaper, ten seconds apart, with all that it does."""
    for _ in range(number):
        queues, aside = pool.store.queues(), pool.store.aside()
        pool.store.reap(aside, kind="WORKER_LOST", reason="no heartbeat")
        pool.store.promote(queues, rounds=16)
        pool.store.expire(queues)
        clock.advance(10)


def fill(pool: Pool, hand: Hand) -> None:
    """A request of each kind: waits, is delayed, waits for a retry, has a deadline, is a suspect, runs, runs again."""
    pool.submit("crashes")
    crashed = Hand(pool, "crashed")
    crashed.take("crashes")
    pool.reap(crashed.incarnation, FailureKind.CRASH)
    pool.submit("fails")
    failing = Hand(pool, "failing")
    pool.connection.zrem(key("suspects", "gpu"), "crashes")
    failing.fail(failing.take("fails"), FailureKind.NETWORK)
    pool.submit("runs")
    hand.take("runs")
    pool.connection.zadd(key("suspects", "gpu"), {"crashes": clock_of(pool)})
    for name in ("again", "anew"):
        pool.submit(name)
        begun = hand.take(name)
        hand.step(begun, ["x"])
        hand.finish(begun, "done", offset=1)
        Queue("gpu", connection=pool.connection).enqueue_job(Job.fetch(name, connection=pool.connection))
        if name == "again":
            hand.take(name)
    pool.store.promote(["gpu"])
    pool.store.enqueue([replace(pool.new("delayed"), delay=10**6), replace(pool.new("dated"), deadline=10**6)])
    pool.submit("waits")


def clock_of(pool: Pool) -> int:
    return int(pool.connection.get(CLOCK) or 0)


def left_over(pool: Pool) -> dict[str, Any]:
    """Keys of ours about requests and queues that never expire."""
    about = ("leases", "retries", "ended", "deadlines", "suspects", "checkpoints", "aside", "bounced", "output",
             "history",
             "checkpoint", "held", "spent")  # fmt: skip
    stems = tuple(key(name) for name in about)
    found = dump(pool.connection)
    return {name: value for name, value in found.items() if name.startswith(stems) and pool.connection.ttl(name) < 0}


@pytest.mark.parametrize(
    "how", ["delete each job", "empty the queue", "delete the queue", "delete the queue, not its jobs"]
)
def test_after_a_delete_nothing_of_ours_stays(pool: Pool, clock: Clock, hand: Hand, how: str) -> None:
    """RQ's tools know nothing of our sets. A queue that RQ has deleted is swept until nothing stands in it."""
    fill(pool, hand)
    queue = Queue("gpu", connection=pool.connection)
    if how == "empty the queue":
        queue.empty()
    elif how.startswith("delete the queue"):
        queue.delete(delete_jobs=how == "delete the queue")
    for name in ("again", "anew", "crashes", "fails", "runs", "delayed", "dated", "waits"):
        if pool.connection.exists(key("job", name)):
            Job.fetch(name, connection=pool.connection).delete()
    if how != "delete each job":
        pool.connection.srem(key("queues"), key("queue", "gpu"))
    sweeps(pool, clock)
    assert left_over(pool) == {}
    assert pool.store.queues() == (["gpu"] if how == "delete each job" else [])


def test_a_deleted_queue_is_swept_while_its_requests_run(pool: Pool, clock: Clock, hand: Hand) -> None:
    """Its lease ends, and its deadline: RQ's set of queues has forgotten the name."""
    pool.submit("a")
    hand.beat()
    hand.take("a")
    Queue("gpu", connection=pool.connection).delete(delete_jobs=False)
    assert pool.store.queues() == ["gpu"]
    sweeps(pool, clock, 4)
    assert [event.kind for event in pool.store.history("a")] == ["WORKER_LOST"]


def test_rqs_canceled_registry_is_trimmed(pool: Pool, clock: Clock, hand: Hand) -> None:
    """RQ itself never does. What is still kept stays, however much of it stands before."""
    kept, short = 100, 100
    pool.submit(*(f"kept-{number}" for number in range(kept)))
    for number in range(short):
        pool.store.enqueue([replace(pool.new(f"short-{number}"), failure_ttl=60)])
    for name in [*(f"kept-{number}" for number in range(kept)), *(f"short-{number}" for number in range(short))]:
        assert pool.cancel(name) == "canceled"
    sweeps(pool, clock, 20)
    found: Any = pool.connection.zrange(key("canceled", "gpu"), 0, -1)
    assert sorted(name.decode() for name in found) == sorted(f"kept-{number}" for number in range(kept))
    assert len(CanceledJobRegistry("gpu", connection=pool.connection)) == kept


def test_what_rq_cancels_while_it_waits_ends_as_ours_does(pool: Pool, clock: Clock, hand: Hand) -> None:
    """RQ's Job.cancel takes it out of its list, where no claim meets it: it is told of once, and kept for its TTL."""
    pool.submit("waits", "runs")
    hand.beat()
    pool.store.enqueue([replace(pool.new("delayed"), delay=50)])
    Job.fetch("waits", connection=pool.connection).cancel()
    Job.fetch("delayed", connection=pool.connection).cancel()
    claim = hand.take("runs")
    Job.fetch("runs", connection=pool.connection).cancel()
    pool.store.expire(["gpu"])
    assert pool.events("runs") == []
    assert pool.connection.ttl(key("job", "runs")) == -1
    hand.finish(claim)
    sweeps(pool, clock)
    for name in ("waits", "delayed"):
        assert pool.status(name) is State.CANCELED
        assert pool.events(name) == ["canceled"]
        assert 0 < pool.connection.ttl(key("job", name)) <= 2000
    assert pool.status("runs") is State.FINISHED


@pytest.mark.parametrize("tool", ["requeue", "enqueue_job", "at the front"])
def test_what_is_requeued_outlives_the_ttl_of_its_end(pool: Pool, clock: Clock, hand: Hand, tool: str) -> None:
    """RQ's tools leave the hash's TTL as it is, and it may wait for longer than that."""
    pool.submit("a")
    hand.fail(hand.take("a"), FailureKind.INVALID_REQUEST)
    queue = Queue("gpu", connection=pool.connection)
    if tool == "requeue":
        queue.failed_job_registry.requeue("a")
    else:
        queue.enqueue_job(Job.fetch("a", connection=pool.connection), at_front=tool == "at the front")
    assert pool.connection.ttl(key("job", "a")) > 0
    sweeps(pool, clock, 250)
    assert pool.connection.ttl(key("job", "a")) == -1
    later = Hand(pool, "later")
    later.finish(later.take("a"), 1)
    assert 0 < pool.connection.ttl(key("job", "a")) <= 1000


@pytest.mark.parametrize("place", ["in the middle", "in front", "enqueued while it ran"])
def test_a_requeue_is_found_wherever_it_stands(pool: Pool, clock: Clock, hand: Hand, place: str) -> None:
    """Among hundreds that wait, within its TTL."""
    queue = Queue("gpu", connection=pool.connection)
    pool.submit("a")
    claim = hand.take("a")
    if place == "enqueued while it ran":
        queue.enqueue_job(Job.fetch("a", connection=pool.connection))
    pool.submit(*(f"b{number}" for number in range(100)))
    hand.finish(claim, 1)
    if place != "enqueued while it ran":
        queue.enqueue_job(Job.fetch("a", connection=pool.connection), at_front=place == "in front")
        pool.submit(*(f"c{number}" for number in range(100)))
    assert pool.connection.ttl(key("job", "a")) > 0
    sweeps(pool, clock, 1 if place == "in front" else 5)
    assert pool.connection.ttl(key("job", "a")) == -1


def test_what_has_ended_in_a_list_keeps_its_ttl(pool: Pool, clock: Clock, hand: Hand) -> None:
    """A canceled request's entry, and a stale writer's, are no requeue."""
    pool.submit("canceled", "pushed")
    pool.cancel("canceled")
    hand.finish(hand.take("pushed"), 1)
    pool.connection.rpush(key("queue", "gpu"), "pushed")
    sweeps(pool, clock, 1)
    assert 0 < pool.connection.ttl(key("job", "canceled")) <= 2000
    assert 0 < pool.connection.ttl(key("job", "pushed")) <= 1000


@pytest.mark.parametrize("ttl", [0, 1, 30])
def test_a_resend_after_a_short_ttl_is_not_accepted_twice(pool: Pool, clock: Clock, hand: Hand, ttl: int) -> None:
    """The answer was lost, the request ran and is gone: its producer, who sends it again, hears that it was in."""
    request = replace(pool.new("a"), result_ttl=ttl)
    assert pool.store.enqueue([request]) == ["accepted"]
    hand.finish(hand.take("a"), 1)
    clock.advance(ttl + 1)
    assert not pool.connection.exists(key("job", "a"))
    assert pool.store.enqueue([request]) == ["already"]
    assert pool.waiting() == []
    other = replace(request, nonce="another")
    assert pool.store.enqueue([other]) == ["accepted"], "another submit of the same name is another request"
    clock.advance(700)
    assert pool.connection.exists(key("spent", "a")) == 0


@pytest.mark.parametrize("end", ["cancel", "deadline", "queue_timeout"])
def test_what_ended_while_it_waited_counts_no_more(pool: Pool, clock: Clock, hand: Hand, end: str) -> None:
    """In a queue that nobody serves: our counts, and the bound of the queue, leave it out; the next claim drops it."""
    pool.submit("stays")
    limits = {"deadline": (10.0, 0.0), "queue_timeout": (0.0, 10.0)}.get(end, (0.0, 0.0))
    pool.store.enqueue([replace(pool.new("ends"), deadline=limits[0], queue_timeout=limits[1])])
    if end == "cancel":
        pool.cancel("ends")
    else:
        clock.advance(20)
        pool.store.promote(["gpu"])
    assert pool.status("ends") is (State.CANCELED if end == "cancel" else State.FAILED)
    assert pool.waiting() == ["stays", "ends"]
    (facts,) = queue_facts(pool.store, ["gpu"])
    assert facts.waiting == 1
    bounded = Pool.over(pool.connection, queue_limit=2)
    assert bounded.store.enqueue([bounded.new("next"), bounded.new("full")]) == ["accepted", "full"]
    assert [claim.id for claim in hand.claim(4).claims] == ["stays", "next"]
    assert pool.waiting() == []
    hand.claim(1)
    assert not pool.connection.exists(key("ended", "gpu"))
    assert "dropped" not in pool.events("ends"), "its end stands there already"
