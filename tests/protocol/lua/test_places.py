"""A request remembers where it failed, and prefers other workers; but it never waits for one that does not come."""

from __future__ import annotations

import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool, plain


def live(
    pool: Pool, name: str, *, device: str = "", host: str = "here", ready: bool = True, queue: str = "gpu"
) -> Hand:
    """A worker whose heart beats."""
    hand = Hand(pool, name)
    pool.store.heartbeat(
        incarnation=hand.incarnation, worker=name, queues=[queue], pid=1, host=host, device=device, ready=ready
    )
    return hand


def fail(pool: Pool, hand: Hand, kind: FailureKind = FailureKind.WORKER_LOST) -> None:
    pool.reap(hand.incarnation, kind)


def ids(hand: Hand, free: int | None = None) -> list[str]:
    return [claim.id for claim in hand.claim(free).claims]


def failed_on(pool: Pool, name: str = "a") -> list[str]:
    return [line.partition("\t")[0] for line in pool.field(name, "failed_on").splitlines()]


def test_a_request_is_left_to_another_worker(pool: Pool) -> None:
    """The one of the same name passes it over, keeps its place in the queue for it, and takes what comes after it."""
    pool.submit("a", "b", "c")
    first = live(pool, "w1")
    first.take("a")
    fail(pool, first)
    other, again = live(pool, "w2"), live(pool, "w1")
    assert ids(again, 1) == ["b"]
    assert pool.waiting() == ["a", "c"]
    claims = live(pool, "w1").claim(4)
    assert [claim.id for claim in claims.claims] == ["c"]
    assert ids(live(pool, "w1")) == []
    assert ids(other) == ["a"]
    assert (failed_on(pool), pool.field("a", "attempt"), pool.field("a", "passed_at")) == (["w1"], "", "")
    assert pool.events("a") == ["redelivered"]


def test_alone_it_is_taken_at_once(pool: Pool) -> None:
    """Nobody else, or nobody who could: dead, still loading, on another queue, or one where it failed as well."""
    pool.submit("a")
    for name in ("w1", "w2"):
        hand = live(pool, name)
        hand.take("a")
        fail(pool, hand)
        pool.make_due("a")
        if name == "w1":
            live(pool, "w3", ready=False)
            live(pool, "w4", queue="other")
            pool.stop_heart(live(pool, "w5").incarnation)
            again = live(pool, "w1")
            assert ids(again) == ["a"]
            again.release(again.held["a"])
            pool.reap(again.incarnation)
    live(pool, "w1")
    assert ids(live(pool, "w2")) == ["a"]


def test_it_waits_for_two_seconds_at_most(pool: Pool) -> None:
    """Then whoever asks gets it; neither a clock that was set back nor what is no time makes it longer."""
    now = round(pool.now() * 1000)
    for since in (now - 2000, now + 1_000_000, "soon"):
        name = f"r{str(since)[-4:]}"
        pool.submit(name)
        hand = live(pool, "w1")
        hand.take(name)
        fail(pool, hand)
        live(pool, "w2")
        again = live(pool, "w1")
        claims = again.claim()
        assert (claims.status, claims.claims) == ("blocked", [])
        pool.connection.hset(key("job", name), "passed_at", since)
        assert ids(again) == [name]
        assert pool.field(name, "passed_at") == ""
        again.finish(again.held[name])


def test_the_other_is_woken_once(pool: Pool) -> None:
    """A bell at each of its own claims would wake the one that passes it over again and again."""
    pool.submit("a")
    hand = live(pool, "w1")
    hand.take("a")
    fail(pool, hand)
    live(pool, "w2")
    again = live(pool, "w1")
    pool.connection.delete(key("bell", "gpu"))
    for _ in range(3):
        assert ids(again) == []
        assert pool.connection.llen(key("bell", "gpu")) == 1


@pytest.mark.parametrize(
    ("host", "device", "taken"),
    [("here", "auto [3]", False), ("here", "auto [2]", True), ("there", "auto [3]", True), ("here", "cpu", True)],
)
def test_a_device_is_known_again_whatever_its_worker_is_called(pool: Pool, host: str, device: str, taken: bool) -> None:
    """By its host and number: RQ's own names of workers are random."""
    pool.submit("a")
    hand = live(pool, "random1", device="auto [3]")
    hand.take("a")
    fail(pool, hand, FailureKind.WORKER_LOST)
    live(pool, "random2", device="auto [1]")
    assert ids(live(pool, "random3", device=device, host=host)) == (["a"] if taken else [])


def test_workers_of_one_host_without_devices_are_not_one_place(pool: Pool) -> None:
    """That they all compute on ``auto`` says nothing."""
    pool.submit("a")
    hand = live(pool, "w1", device="auto")
    hand.take("a")
    fail(pool, hand)
    live(pool, "w2", device="auto")
    assert ids(live(pool, "w3", device="auto")) == ["a"]


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind is not FailureKind.DEADLINE])
def test_what_is_the_place_s_fault_is_remembered(pool: Pool, kind: FailureKind) -> None:
    """The end of its worker, a hang, the device, the memory; not what the request itself, or a network, did."""
    pool.submit("a")
    hand = live(pool, "w1")
    hand.fail(hand.take("a"), kind)
    blamed = ("CRASH", "HANG", "GPU_ERROR", "GPU_OOM", "HOST_OOM", "WORKER_LOST")
    retried = pool.field("a", "status") != "failed"
    assert failed_on(pool) == (["w1"] if kind in blamed and retried else [])


def test_the_last_four_places_are_remembered_until_requeue(connection: redis.Redis) -> None:
    """Each once, the newest first."""
    pool = Pool.over(connection, max_crashes_total=6)
    pool.submit("a")
    for name in ("w1", "w2", "w3", "w4", "w2", "w5"):
        hand = live(pool, name)
        hand.take("a")
        fail(pool, hand)
        pool.make_due("a")
    assert failed_on(pool) == ["w5", "w2", "w4", "w3"]
    hand = live(pool, "w6")
    hand.fail(hand.take("a"), FailureKind.INVALID_REQUEST)
    connection.zrem(key("failed", "gpu"), "a")
    connection.rpush(key("queue", "gpu"), "a")
    live(pool, "w7")
    assert ids(live(pool, "w5")) == ["a"]
    assert failed_on(pool) == []


def test_a_suspect_is_left_to_another_that_holds_nothing(pool: Pool) -> None:
    """One that is busy cannot take it at once; for that one it does not wait."""
    pool.submit("a", "b")
    hand, other = live(pool, "w1"), live(pool, "w2")
    hand.take("a")
    other.take("b")
    fail(pool, hand, FailureKind.CRASH)
    pool.make_due("a")
    pool.store.promote(["gpu"])
    assert pool.suspects() == ["a"]
    idle = live(pool, "w3")
    again = live(pool, "w1")
    claims = again.claim()
    assert (claims.status, claims.claims, pool.suspects()) == ("blocked", [], ["a"])
    pool.stop_heart(idle.incarnation)
    assert ids(again) == ["a"]


def test_queues_of_other_priorities_count(pool: Pool) -> None:
    """A heartbeat names the queue that the worker was started with."""
    pool.submit("a", queue="gpu-high")
    hand = Hand(pool, "w1", queues=["gpu-high", "gpu"])
    hand.beat()
    hand.take("a")
    fail(pool, hand)
    live(pool, "w2")
    again = Hand(pool, "w1", queues=["gpu-high", "gpu"])
    again.beat()
    assert ids(again) == []
    assert plain(pool.connection.lrange(key("queue", "gpu-high"), 0, -1)) == ["a"]


@pytest.mark.slow
def test_a_worker_that_was_started_again_leaves_it_to_the_other(lab: Lab) -> None:
    """Real processes: the one takes what comes after it, the other takes it when it is done."""
    first, other = lab.worker(), lab.worker()
    held = lab.submit("gate", {"folder": str(lab.folder)})
    eventually((lab.folder / "gate").exists)
    if lab.record(held).worker == first.name:
        first, other = other, first
    one = lab.submit("count", {"n": 100_000, "sleep": 0.02})
    lab.moved(one, 3)
    assert lab.record(one).worker == first.name
    first.kill()
    eventually(lambda: lab.events(one) == [("redelivered", "WORKER_LOST")])
    after = lab.submit("count", {"n": 100_000, "sleep": 0.02})
    lab.worker("--name", first.name, wait=False)
    eventually(lambda: lab.record(after).worker == first.name)
    assert lab.record(one).status == "queued"
    (lab.folder / "open").touch()
    eventually(lambda: lab.record(one).worker == other.name and lab.record(one).status == "started")
    lab.check(held, 6)
