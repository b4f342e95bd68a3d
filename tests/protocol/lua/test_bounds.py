"""One call is bounded in its work, over however many queues it is asked to look."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.reading.histories import PAGE
from tests.kit.protocol.pool import Hand, Pool

QUEUES = [f"q{number}" for number in range(40)]


def calls(connection: redis.Redis) -> int:
    """Commands that the server has run, those within scripts too."""
    stats = connection.info("commandstats")
    return sum(row["calls"] for name, row in stats.items() if not name.startswith(("cmdstat_info", "cmdstat_config")))


def late_in(pool: Pool, name: str, score: int = 1) -> None:
    """In each queue 100 requests that are due in a set."""
    with pool.connection.pipeline(transaction=False) as pipe:
        for queue in QUEUES:
            for number in range(100):
                identifier = f"{queue}-{number}"
                pipe.hset(
                    key("job", identifier),
                    mapping={
                        "created_at": "x",
                        "status": "scheduled",
                        "task": "app.t",
                        "origin": queue,
                        "deadline": 1,
                    },
                )
                pipe.zadd(key(name, queue), {identifier: score})
            pipe.sadd(key("queues"), key("queue", queue))
            pipe.zadd(key("aside"), {queue: score})
        pipe.execute()


@pytest.mark.parametrize("name", ["retries", "deadlines", "leases"])
def test_a_sweep_does_no_more_in_many_queues_than_in_one(pool: Pool, name: str) -> None:
    """What is left is told, and done by the next call."""
    late_in(pool, name)
    pool.set_pulse()
    before = calls(pool.connection)
    if name == "leases":
        assert pool.sweep(*QUEUES).left
    else:
        pool.store.promote(QUEUES)
    assert calls(pool.connection) - before < 128 * 60
    left = sum(pool.connection.zcard(key(name, queue)) for queue in QUEUES)
    assert left == 100 * len(QUEUES) - 128
    if name == "leases":
        for _ in range(40):
            pool.sweep(*QUEUES)
    else:
        pool.store.promote(QUEUES, rounds=40)
    assert not pool.connection.exists(*(key(name, queue) for queue in QUEUES))


def test_a_claim_moves_no_more_in_many_queues_than_in_one(pool: Pool) -> None:
    late_in(pool, "retries")
    before = calls(pool.connection)
    hand = Hand(pool, queues=QUEUES)
    hand.claim(1)
    assert calls(pool.connection) - before < 128 * 60
    assert sum(pool.connection.zcard(key("retries", queue)) for queue in QUEUES) == 100 * len(QUEUES) - 128


def test_a_claim_reads_each_living_worker_once(pool: Pool) -> None:
    """Requests that failed here look for another worker that could take them: 128 of them among 100 workers."""
    others = [Hand(pool, f"other-{number}", queues=("elsewhere",)) for number in range(100)]
    for other in others:
        other.beat()
    pool.submit(*(f"r{number}" for number in range(100)))
    hand = Hand(pool, "here", slots=100)
    hand.beat()
    with pool.connection.pipeline(transaction=False) as pipe:
        for number in range(100):
            pipe.hset(key("job", f"r{number}"), "failed_on", "here\t")
        pipe.execute()
    before = calls(pool.connection)
    assert len(hand.claim(100).claims) == 100
    assert calls(pool.connection) - before < 100 * 12 + 100 * 6


def test_a_history_is_read_in_calls_of_few_bytes(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines with the stacks of crashes among short ones: all are there, in order, and no answer has more than it
    should.
    """
    sizes = [10] * 80 + [9_000] * 40 + [10] * 80
    with pool.connection.pipeline(transaction=False) as pipe:
        for number, size in enumerate(sizes):
            pipe.rpush(key("history", "a"), f"{number}\tretry\tw1\te\t0\tUNKNOWN\tr\t\t{'x' * size}")
        pipe.execute()
    pages: list[int] = []
    read = redis.Redis.lrange

    def lrange(*where: Any) -> Any:
        lines: Any = read(*where)
        pages.append(sum(map(len, lines)))
        return lines

    monkeypatch.setattr(redis.Redis, "lrange", lrange)
    events = pool.store.history("a")
    assert [len(event.evidence) for event in events] == sizes
    # The first page with long lines cannot know of them.
    assert sorted(pages)[-2] <= 2 * PAGE
    assert len(pages) < 40
