"""Checkpoints after the first of an execution are brief: they read and write only what may have changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.transitions.calls import Claim, Progress
from perdure.workers.redis_io.checkpoints import Checkpoints
from perdure.workers.tasks.base import Step
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.workers.bench import Bench


def progress(hand: Hand, claim: Claim, seq: int, *, brief: bool) -> str:
    row = replace(hand.progress(claim, [f"out {seq}"], seq - 1, seq), brief=brief)
    return hand.store.progress(hand.incarnation, [row])[0]


def commands(connection: redis.Redis) -> dict[str, int]:
    stats: dict[str, Any] = connection.info("commandstats")
    return {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}


def test_a_brief_checkpoint_leaves_what_a_full_one_leaves(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    pool.submit("brief", "full")
    claims = {claim.id: claim for claim in hand.claim(2).claims}
    for seq in range(1, 6):
        for name, claim in claims.items():
            assert progress(hand, claim, seq, brief=name == "brief" and seq > 1) == "ok"

    def left(name: str) -> list[Any]:
        job, point = (connection.hgetall(key(kind, name)) for kind in ("job", "checkpoint"))
        for fields, own in (
            (job, (b"nonce", b"payload", b"description", b"execution", b"claimed", b"last_heartbeat")),
            (point, (b"at",)),
        ):
            for field in own:
                assert field in fields
                del fields[field]
        return [job, point, pool.store.all_outputs(name), connection.ttl(key("checkpoint", name)) > 86000]

    brief, full = left("brief"), left("full")
    for one, other in zip(brief, full, strict=True):
        assert one == other
    assert [connection.zscore(key("leases", "gpu"), name) is not None for name in claims] == [True, True]


def test_a_brief_checkpoint_takes_four_commands(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    """And two for all of a call: leases and nothing else are renewed together."""
    names = [f"r{number}" for number in range(20)]
    pool.submit(*names)
    claims = hand.claim(20).claims
    rows = [hand.progress(claim, ["a"], 0, 1) for claim in claims]
    hand.store.progress(hand.incarnation, rows)
    before = commands(connection)
    rows = [replace(hand.progress(claim, ["b"], 1, 2), brief=True) for claim in claims]
    assert set(hand.store.progress(hand.incarnation, rows)) == {"ok"}
    made = {name: number - before.get(name, 0) for name, number in commands(connection).items()}
    spent = {name: number for name, number in made.items() if number and name not in ("info", "evalsha", "time")}
    assert spent.pop("zadd") <= 2  # the index of their ages, once in ten seconds
    assert spent == {"hmget": 40, "rpush": 20, "hset": 20}


def test_a_brief_checkpoint_is_fenced_and_canceled_as_any(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    pool.submit("a", "b", "c")
    a, b, c = hand.claim(3).claims
    for claim in (a, b, c):
        assert progress(hand, claim, 1, brief=False) == "ok"
    pool.cancel("a")
    assert progress(hand, a, 2, brief=True) == "cancel"
    assert progress(hand, replace(b, execution="another"), 2, brief=True) == "lost"
    connection.delete(key("checkpoint", "c"))
    assert progress(hand, c, 2, brief=True) == "gap 0"  # nobody would know whose state this is
    assert connection.exists(key("checkpoint", "c")) == 0


@pytest.mark.parametrize("watched", [{"deadline": 60.0}, {"deadline_at": 4e9}, {"step_timeout": 5.0}, {}])
def test_a_claim_says_what_is_to_be_watched(pool: Pool, hand: Hand, watched: dict[str, Any]) -> None:
    pool.store.enqueue([replace(pool.new("a"), **watched)])
    (claim,) = hand.claim(1).claims
    assert claim.watched is bool(watched)


def test_a_suspect_is_watched(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    pool.submit("a")
    connection.hset(key("job", "a"), "company", "1")
    hand.claim(1)
    (claim,) = hand.claim(1).claims or hand.held.values()
    assert claim.watched


def test_only_the_first_of_an_execution_is_full(connection: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of what has a deadline."""
    bench = Bench(connection)
    sent: list[Progress] = []
    call = Checkpoints._call

    def calling(self: Checkpoints, rows: Sequence[Progress]) -> list[str]:
        sent.extend(rows)
        return call(self, rows)

    monkeypatch.setattr(Checkpoints, "_call", calling)
    bench.pool.store.enqueue([bench.pool.new("a"), replace(bench.pool.new("b"), deadline=600.0)])
    for name in ("a", "b"):
        bench.claim()
        for number in range(3):
            bench.offer(name, Step(number, number))
            bench.round()
        bench.offer(name, Step(result=1))
        bench.round()
    assert [(row.id, row.brief) for row in sent] == [
        ("a", False), ("a", True), ("a", True), ("b", False), ("b", False), ("b", False),
    ]  # fmt: skip


def test_a_checkpoint_is_as_old_as_it_says_itself(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    """The index is exact to ten seconds; what it holds for too old is looked at."""
    pool.submit("a", "b")
    a, b = hand.claim(2).claims
    for claim in (a, b):
        assert progress(hand, claim, 1, brief=False) == "ok"
    hand.release(a)
    hand.release(b)
    long_ago = int(pool.now() * 1000) - 7_200_000
    connection.zadd(key("checkpoints"), {"a": long_ago, "b": long_ago})
    connection.hset(key("checkpoint", "b"), "at", long_ago)
    pool.store.expire(["gpu"])
    assert [connection.exists(key("checkpoint", name)) for name in "ab"] == [1, 0]
    assert connection.zscore(key("checkpoints"), "a") == float(connection.hget(key("checkpoint", "a"), "at") or 0)
