"""Measures: what workers time and count reaches the counters once, and says what happened."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind, Interruption
from perdure.protocol.telemetry.measures import MEASURES, Meter
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool, plain


def counters(connection: redis.Redis) -> dict[str, int]:
    found: Any = connection.hgetall(key("counters"))
    return {name: int(value) for name, value in plain(found).items()}


def hits(found: dict[str, int], measure: str, labels: str) -> int:
    """How many values of a histogram there are."""
    start = f"bucket:{measure}:"
    return sum(value for name, value in found.items() if name.startswith(start) and name.endswith(labels))


def test_a_value_on_a_bound_belongs_to_its_bucket():
    """Prometheus' ``le``: less than or equal."""
    meter, sent = Meter(), {}
    for value in (0.3, 0.300001, 1e9):
        meter.observe("queue_time", value, "gpu")
    meter.flush("i", lambda _incarnation, _number, counts, *_: sent.update(counts), 0.1, 0.1)
    assert sent == {
        "bucket:queue_time:0.3:gpu": 1,
        "bucket:queue_time:0.5:gpu": 1,
        "bucket:queue_time:inf:gpu": 1,
        "sum:queue_time:gpu": 1_000_000_000_600_001,
    }


def test_what_was_not_answered_is_sent_again_as_it_was():
    """Also for the incarnation that it was first sent for; what has come since waits."""
    meter, sent = Meter(), []

    def send(incarnation: str, number: int, counts: dict[str, int], *intervals: float) -> None:
        sent.append((incarnation, number, counts, intervals))
        if len(sent) == 1:
            raise redis.ConnectionError

    meter.count("checkpoints", 2, "gpu")
    with pytest.raises(redis.ConnectionError):
        meter.flush("first", send, 0.1, 0.1)
    meter.count("checkpoints", 5, "gpu")
    for _ in range(3):
        meter.flush("second", send, 0.1, 0.1)
    meter.flush("second", send, 0.4, 0.1)  # nothing but that
    assert sent == [
        ("first", 1, {"checkpoints:gpu": 2}, (0.1, 0.1)),
        ("first", 1, {"checkpoints:gpu": 2}, (0.1, 0.1)),
        ("second", 2, {"checkpoints:gpu": 5}, (0.1, 0.1)),
        ("second", 3, {}, (0.4, 0.1)),
    ]


def test_the_bounds_grow_and_read_as_numbers():
    for measure in MEASURES.values():
        numbers = [float(text) for text in measure.texts]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == len(measure.bounds) + 1


def test_a_call_that_is_sent_twice_counts_once(pool: Pool):
    """A reply was lost; later calls, and those of another incarnation, count."""
    measure = pool.store.measure
    answers = [
        measure("a", 1, {"x": 2}),
        measure("a", 1, {"x": 2}),
        measure("a", 2, {"x": 3}),
        measure("b", 1, {"x": 5}),
    ]
    assert answers == ["ok", "already", "ok", "ok"]
    assert counters(pool.connection) == {"x": 10}
    assert pool.connection.ttl(key("incarnation", "a")) > 0


def test_whoever_goes_on_is_told_of_the_execution_before(pool: Pool):
    """And counted as a resume, by why it was one; only once."""
    first, second = Hand(pool), Hand(pool, "w 2")
    pool.submit("a")
    claim = first.take("a")
    assert (claim.interruption, claim.paused, claim.waited) == (None, 0.0, claim.age)
    first.step(claim, ["x", "y"])
    pool.let_pass(7)
    pool.reap(first.incarnation)
    again = second.take("a")
    assert again.interruption is not None
    assert (again.interruption.kind, again.interruption.execution) == ("WORKER_LOST", claim.execution)
    assert 7 <= again.paused < 60
    assert again.interruption.began <= again.interruption.moved <= again.interruption.ended - 7
    assert second.release(again) == ["queued"]
    last = first.take("a") if first.beat() == "ok" else Hand(pool).take("a")
    assert last.interruption is not None
    assert (last.interruption.kind, last.interruption.worker) == ("RELEASED", "w 2")
    assert (again.interruption.taken, last.interruption.taken) == (True, False)
    found = counters(pool.connection)
    expected = {"resumed:gpu:WORKER_LOST": 1, "resumed:gpu:RELEASED": 1, "kept:gpu": 4, "again:gpu:WORKER_LOST": 1,
                "lost:gpu:WORKER_LOST": 1, "left:WORKER_LOST": 1}  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected


def test_a_start_from_zero_is_no_resume(pool: Pool):
    """It was lost before its first checkpoint."""
    hand = Hand(pool)
    pool.submit("a")
    hand.take("a")
    pool.reap(hand.incarnation)
    assert Hand(pool).take("a").interruption is not None
    assert not [name for name in counters(pool.connection) if name.startswith(("resumed", "kept"))]


def test_a_dead_letter_is_counted_by_its_kind(pool: Pool):
    """Requeued days later, it does not count as recovered from its last failure."""
    hand = Hand(pool)
    pool.submit("a", retries=1)
    hand.fail(hand.take("a"))
    pool.make_due("a")
    pool.store.promote(["gpu"])
    assert hand.fail(hand.take("a"), FailureKind.INVALID_REQUEST) == "failed"
    found = counters(pool.connection)
    assert (found["again:gpu:UNKNOWN"], found["dead:gpu:INVALID_REQUEST"]) == (1, 1)
    assert pool.field("a", "interrupted") == ""


def test_a_field_that_nobody_of_ours_has_written_is_none():
    assert Interruption.parse("anything") is None
    assert Interruption.parse("HANG 2000 3000 1000 1 e a worker's name") == Interruption(
        kind="HANG", moved=2.0, ended=3.0, began=1.0, taken=True, execution="e", worker="a worker's name"
    )


@pytest.mark.slow
def test_a_pool_s_figures_say_what_happened(lab: Lab):
    """A request is interrupted by kill -9 and goes on elsewhere: what the counters say of it is what was done."""
    first = lab.worker()
    request = lab.submit("gate", {"folder": str(lab.folder)})
    lab.moved(request, 3)
    second = lab.worker()
    first.kill()
    eventually(lambda: lab.record(request).worker == second.name)
    (lab.folder / "open").touch()
    lab.check(request, 6)
    eventually(lambda: hits(counters(lab.connection), "e2e_request_latency", ":gpu"))
    found = counters(lab.connection)
    assert hits(found, "e2e_request_latency", ":gpu") == found["finished:gpu"] == 1
    assert hits(found, "recovery", ":gpu:WORKER_LOST") == found["resumed:gpu:WORKER_LOST"] == 1
    assert found["kept:gpu"] >= 3
    # What the first worker had not sent yet was lost with it.
    assert 1 <= hits(found, "queue_time", ":gpu") <= 2
    assert 6 - found["kept:gpu"] <= found["outputs:gpu"] <= 6
    assert 0 < found["sum:recovery:gpu:WORKER_LOST"] < 60_000_000
