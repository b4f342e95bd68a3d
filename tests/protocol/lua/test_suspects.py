"""Suspects: who becomes one, in which company one runs, and how it is cleared."""

from __future__ import annotations

import math

import pytest
import redis
from rq.job import Job
from rq.registry import FailedJobRegistry

from perdure.producer import Client
from perdure.protocol.errors import QueueFull
from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.protocol.states import State
from perdure.protocol.transitions.calls import Failure
from tests.kit.protocol.pool import TASK, Hand, Pool


def crash(pool: Pool, *names: str, worker: str = "w0", kind: FailureKind = FailureKind.CRASH) -> None:
    """A worker takes these and ends by a native signal."""
    hand = Hand(pool, worker, slots=32)
    assert sorted(claim.id for claim in hand.claim(len(names)).claims) == sorted(names)
    pool.reap(hand.incarnation, kind)


def ids(hand: Hand, free: int | None = None) -> list[str]:
    return [claim.id for claim in hand.claim(free).claims]


# --- accusation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FailureKind.CRASH, FailureKind.HOST_OOM, FailureKind.GPU_ERROR])
@pytest.mark.parametrize(("number", "company"), [(1, "1"), (2, "1"), (5, "2"), (8, "4")])
def test_a_crash_accuses_all_that_were_in_flight(pool: Pool, kind: FailureKind, number: int, company: str):
    """Each may share a worker with half as many; they wait apart from the queue."""
    names = [f"r{index}" for index in range(number)]
    pool.submit(*names, "later")
    crash(pool, *names, kind=kind)
    assert {pool.field(name, "company") for name in names} == {company}
    assert pool.waiting() == ["later"]
    if number > 1:
        assert sorted(pool.suspects()) == names
        assert pool.events("r0") == ["suspected", "redelivered"]
        assert f"one of {number} in flight" in pool.store.history("r0")[0].reason


def test_one_loss_accuses_nobody_and_a_second_one_does(pool: Pool):
    """kill -9 says nothing of the requests; twice at the same place says a little."""
    pool.submit("a", "b")
    crash(pool, "a", "b", kind=FailureKind.WORKER_LOST)
    assert pool.suspects() == []
    assert sorted(pool.waiting()) == ["a", "b"]
    crash(pool, "a", "b", kind=FailureKind.WORKER_LOST)
    assert sorted(pool.suspects()) == ["a", "b"]
    assert pool.field("a", "crashes") == ""


def test_losses_with_progress_between_accuse_nobody(pool: Pool):
    """However often: a request that moves is no poison."""
    pool.submit("a")
    for number in range(5):
        hand = Hand(pool)
        hand.step(hand.take("a"), [number], stepped=1.5)
        pool.reap(hand.incarnation)
        assert pool.waiting() == ["a"]
        assert pool.suspects() == []


def test_steps_of_an_earlier_checkpoint_do_not_count(pool: Pool):
    """A worker of the release before stores checkpoints beside an old number; its time since the claim counts."""
    pool.submit("a")
    hand = Hand(pool)
    hand.step(hand.take("a"), [0], stepped=0.1)
    pool.reap(hand.incarnation)
    hand = Hand(pool, "old")
    claim = hand.take("a")
    hand.step(claim, [1], stepped=0.1)
    pool.connection.hset(key("checkpoint", "a"), "stepped", "1:100")
    pool.connection.hincrby(key("job", "a"), "claimed", -5000)
    pool.reap(hand.incarnation)
    assert (pool.waiting(), pool.suspects()) == (["a"], [])


def test_losses_alone_end_at_the_total(connection: redis.Redis):
    """What kills without leaving evidence is not cleared by that: it ends as well, only later."""
    pool = Pool.over(connection, max_crashes_total=4)
    pool.submit("a")
    losses = 0
    while pool.status("a") is not State.FAILED:
        hand = Hand(pool)
        hand.take("a")
        pool.reap(hand.incarnation)
        pool.make_due("a")
        losses += 1
    assert losses == 5, "the first loss accuses nobody"


def test_the_third_loss_alone_is_a_dead_letter(pool: Pool):
    """The first one still goes on at once; the dead letter says that it was alone, and how often."""
    pool.submit("a")
    outcomes = []
    for _ in range(3):
        hand = Hand(pool)
        hand.take("a")
        outcomes.append(next(row.outcome for row in pool.reap(hand.incarnation, seen=True) if row.id))
        pool.make_due("a")
    assert outcomes == ["queued", "scheduled", "failed"]
    record = pool.store.fetch("a")
    assert record is not None
    assert record.error_kind == "WORKER_LOST"
    assert record.error_reason == "seen; this request was alone with each of 3 workers that ended so, without progress"
    assert record.attempt == 0


def test_losses_that_a_guardian_saw_count_alone_only(pool: Pool):
    """Two innocents that are killed together three times are suspects, and no dead letters."""
    pool.submit("a", "b")
    for _ in range(3):
        hand = Hand(pool, slots=2)
        pool.make_due("a")
        pool.make_due("b")
        pool.store.promote(["gpu"])
        while hand.claim(2).claims:
            pass
        pool.reap(hand.incarnation, seen=len(hand.held) > 1)
    assert {pool.field(name, "crashes") for name in ("a", "b")} <= {"", "0"}
    assert {pool.status(name) for name in ("a", "b")} <= {State.QUEUED, State.SCHEDULED}


def test_a_host_that_vanished_never_counts(pool: Pool):
    """Nobody saw the end: a power cut is no request's fault, however often."""
    pool.submit("a")
    for _ in range(5):
        hand = Hand(pool)
        hand.take("a")
        hand.beat()
        pool.stop_heart(hand.incarnation)
        pool.sweep()
        pool.make_due("a")
    assert pool.field("a", "crashes") == ""
    assert pool.status("a") is not State.FAILED


def test_progress_gives_back_what_the_guardian_counted(pool: Pool):
    pool.submit("a")
    for number in range(5):
        hand = Hand(pool)
        hand.step(hand.take("a"), [number], offset=number, seq=number + 1, stepped=1.5)
        pool.reap(hand.incarnation, seen=True)
        pool.make_due("a")
    assert pool.status("a") is not State.FAILED


def test_one_that_moved_each_time_is_no_poison(pool: Pool):
    """Workers are killed one after another within a second: without evidence, a request that moved is their victim.

    One checkpoint more each time is not enough: so would a poison that puts something out before it ends its worker.
    """
    pool.submit("a", "poison")
    for number in range(8):
        hand = Hand(pool)
        claim = hand.take("a")
        for part in (2 * number, 2 * number + 1):
            hand.step(claim, [part], offset=part, seq=part + 1, stepped=0.1)
        pool.connection.lrem(key("queue", "gpu"), 0, "poison")
        pool.reap(hand.incarnation, seen=True)
        pool.make_due("a")
    assert pool.field("a", "crashes") == ""
    assert pool.status("a") is not State.FAILED
    pool.cancel("a")
    pool.connection.rpush(key("queue", "gpu"), "poison")
    for number in range(3):
        hand = Hand(pool)
        pool.make_due("poison")
        pool.store.promote(["gpu"])
        claims = [claim for _ in range(3) for claim in hand.claim(1).claims]
        hand.step(claims[0], [number], offset=number, seq=number + 1, stepped=0.1)
        pool.reap(hand.incarnation, seen=True)
    assert pool.status("poison") is State.FAILED


def raised(pool: Pool, hand: Hand) -> list[str]:
    """A step of all that this worker holds raises."""
    failures = [
        Failure(
            id=claim.id,
            execution=claim.execution,
            kind=FailureKind.UNKNOWN,
            reason="TypeError",
            traceback="TypeError",
            charge=False,
            crash=False,
            loss=False,
            retry=True,
            batch=True,
        )
        for claim in hand.held.values()
    ]
    hand.held.clear()
    return pool.store.fail(hand.incarnation, hand.name, failures)


def test_a_raise_halves_the_company_and_charges_nothing(pool: Pool):
    """However often: no attempt, no crash, no execution, no delay."""
    names = [f"r{index}" for index in range(8)]
    pool.submit(*names, retries=0)
    hand = Hand(pool, slots=8)
    for company in ("4", "2", "1"):
        while hand.claim().claims:
            pass
        first = list(hand.held)
        assert set(raised(pool, hand)) == {"queued"}
        assert {pool.field(name, "company") for name in first} == {company}
        rest = [name for name in names if name not in first and pool.status(name) is State.QUEUED]
        for name in rest:
            pool.connection.zadd(key("suspects", "gpu"), {name: pool.now() * 1000 + 10_000})
    assert pool.field(first[0], "raised") == "3"
    for name in names:
        fields = [pool.field(name, field) for field in ("attempt", "crashes", "crashes_total", "losses")]
        assert set(fields) <= {"", "0"}
        assert pool.field(name, "executions") == "0"


def test_one_that_raises_late_is_charged_in_the_end(connection: redis.Redis):
    """It is cleared each time before it raises, and so is never alone; others that moved are not charged with it."""
    pool = Pool.over(connection, max_crashes_total=4)
    pool.submit("late", retries=0)
    for number in range(5):
        assert pool.status("late") is State.QUEUED
        pool.submit(f"good{number}", retries=0)
        hand = Hand(pool, slots=2)
        while len(hand.held) < 2:
            assert hand.claim().claims
        raised(pool, hand)
        assert pool.status(f"good{number}") is State.QUEUED
        pool.cancel(f"good{number}")
        # What the clearing does, after a second of steps.
        pool.connection.hdel(key("job", "late"), "company")
        if pool.connection.zrem(key("suspects", "gpu"), "late"):
            pool.connection.lpush(key("queue", "gpu"), "late")
    assert pool.status("late") is State.FAILED


def test_a_task_s_own_error_accuses_nobody(pool: Pool):
    """It is charged to the request; the worker lives."""
    pool.submit("a", "b")
    hand = Hand(pool)
    first, _ = hand.claim(2).claims
    hand.fail(first)
    pool.make_due("a")
    assert ids(hand, 1) == ["a"]
    assert pool.field("a", "company") == ""


def test_a_reported_device_error_accuses_its_batch(pool: Pool):
    """Each of the batch is failed by its own row; all were in flight together, the last one too."""
    pool.submit("a", "b", "c", "d")
    hand = Hand(pool)
    for claim in hand.claim(4).claims:
        hand.held[claim.id] = claim
    for claim in list(hand.held.values())[:1]:
        hand.fail(claim, FailureKind.GPU_ERROR)
    assert pool.field("a", "company") == "2"


def test_a_hang_accuses_the_batch_also_over_several_sweeps(pool: Pool):
    """The leases of one hang do not all end in the same sweep."""
    pool.submit("a", "b", "c", "d")
    hand = Hand(pool)
    hand.claim(4)
    hand.beat()
    for name in ("a", "b", "c", "d"):
        pool.expire_lease(name)
        pool.sweep()
    assert {pool.field(name, "company") for name in ("a", "b", "c", "d")} == {"2"}


# --- limited company ---------------------------------------------------------------------------------


def test_an_empty_worker_takes_suspects_first_and_nothing_else(pool: Pool):
    """As many as each allows, until it is empty."""
    names = [f"r{index}" for index in range(6)]
    pool.submit(*names, "x", "y")
    crash(pool, *names)
    hand = Hand(pool, "w1", slots=8)
    assert len(ids(hand)) == 3
    blocked = hand.claim()
    assert (blocked.status, blocked.claims) == ("blocked", [])
    for claim in list(hand.held.values()):
        hand.finish(claim)
    assert len(ids(hand)) == 3
    for claim in list(hand.held.values()):
        hand.finish(claim)
    assert ids(hand) == ["x", "y"]
    assert not pool.connection.exists(key("isolating"))


def test_the_smallest_company_rules(pool: Pool):
    """One that may be with nobody is with nobody."""
    pool.submit("a", "b", "c", "d", "e", "f")
    crash(pool, "a", "b", "c", "d", "e", "f")
    for name, company in (("a", 4), ("b", 4), ("c", 2), ("d", 4)):
        pool.connection.hset(key("job", name), "company", company)
    pool.connection.zadd(key("suspects", "gpu"), {name: index + 1 for index, name in enumerate("abcdef")})
    first = Hand(pool, "w1", slots=8)
    assert ids(first) == ["a", "b"], "with c there would be three"


def test_slots_bound_the_company_too(pool: Pool):
    pool.submit("a", "b", "c", "d", "e", "f")
    crash(pool, "a", "b", "c", "d", "e", "f")
    assert len(ids(Hand(pool, "w1", slots=2))) == 2


@pytest.mark.parametrize(("workers", "isolating"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_at_most_half_of_the_workers_isolate(pool: Pool, workers: int, isolating: int):
    """The others serve the ordinary queue."""
    names = [f"r{index}" for index in range(16)]
    pool.submit(*names)
    crash(pool, *names)
    for name in names:
        pool.connection.hset(key("job", name), "company", 1)
    pool.submit(*[f"x{index}" for index in range(workers)])
    hands = [Hand(pool, f"w{index}", slots=1) for index in range(workers)]
    for hand in hands:
        hand.beat()
    taken = [ids(hand)[0] for hand in hands]
    assert sum(name.startswith("r") for name in taken) == isolating


def test_an_isolating_worker_that_dies_makes_room(pool: Pool):
    """Also before anybody has noticed more than that it holds nothing."""
    pool.submit("a", "b")
    crash(pool, "a", "b")
    first, second = Hand(pool, "w1"), Hand(pool, "w2")
    first.beat(), second.beat()
    assert len(ids(first)) == 1
    assert second.claim().status == "blocked", "one of two isolates; the rest is left to it"
    pool.reap(first.incarnation)
    assert len(ids(second)) == 1


def test_a_busy_worker_is_reserved_after_a_while(pool: Pool):
    """A worker that is never empty would never take one: it stops to claim, drains, and then takes it."""
    pool.submit("s")
    crash(pool, "s")
    pool.make_due("s")
    pool.submit("x", "y", "z")
    hand = Hand(pool, "w1", slots=2)
    pool.connection.zrem(key("retries", "gpu"), "s")
    assert ids(hand, 1) == ["x"]
    pool.connection.zadd(key("suspects", "gpu"), {"s": round(pool.now() * 1000) - 4000})
    assert ids(hand) == ["y"], "not yet"
    hand.finish(hand.held["x"])
    pool.connection.zadd(key("suspects", "gpu"), {"s": round(pool.now() * 1000) - 6000})
    assert hand.claim().status == "blocked"
    hand.finish(hand.held["y"])
    assert ids(hand) == ["s"]
    hand.finish(hand.held["s"])
    assert ids(hand) == ["z"]


def test_a_suspect_that_steps_is_cleared(pool: Pool):
    """A second, and ten checkpoints: what it did then it did not do now."""
    pool.submit("a", "b", "x")
    crash(pool, "a", "b")
    hand = Hand(pool, "w1")
    (claim,) = hand.claim().claims
    hand.step(claim, [0], stepped=0.9)
    assert pool.field(claim.id, "company") == "1"
    assert hand.claim().status == "blocked"
    hand.step(claim, [1], offset=1, seq=2, stepped=1.1)
    assert pool.field(claim.id, "company") == ""
    assert pool.events(claim.id)[-1] == "cleared"
    assert ids(hand) == ["x"], "the other suspect waits for an empty worker"
    assert hand.step(claim, [1], offset=1, seq=2, stepped=1.1) == "ok"
    assert pool.events(claim.id).count("cleared") == 1


def test_clearing_one_of_two_keeps_the_worker_apart(pool: Pool):
    names = ["a", "b", "c", "d"]
    pool.submit(*names, "x")
    crash(pool, *names)
    hand = Hand(pool, "w1")
    first, second = hand.claim().claims
    hand.step(first, [0], stepped=2)
    assert hand.claim().status == "blocked"
    hand.step(second, [0], stepped=2)
    assert ids(hand) == ["x"]


def test_a_long_checkpoint_interval_asks_for_more(connection: redis.Redis):
    pool = Pool.over(connection, checkpoint_interval=1)
    pool.submit("a", "b")
    crash(pool, "a", "b")
    hand = Hand(pool, "w1")
    (claim,) = hand.claim().claims
    hand.step(claim, [0], stepped=9)
    assert pool.field(claim.id, "company") == "1"


# --- every other way of a suspect --------------------------------------------------------------------


def test_a_lost_reply_gives_the_same_suspects_again(pool: Pool):
    pool.submit("a", "b", "c", "d")
    crash(pool, "a", "b", "c", "d")
    hand = Hand(pool, "w1")
    first = hand.claim().claims
    again = hand.claim(forget=True).claims
    assert sorted((claim.id, claim.execution) for claim in again) == sorted((item.id, item.execution) for item in first)


def test_a_released_suspect_stays_one(pool: Pool):
    """A drain proves nothing."""
    pool.submit("a", "b")
    crash(pool, "a", "b")
    hand = Hand(pool, "w1")
    (claim,) = hand.claim().claims
    assert hand.release(claim) == ["queued"]
    assert sorted(pool.suspects()) == ["a", "b"]
    assert pool.waiting() == []


def test_a_suspect_s_retry_leads_back_to_the_suspects(pool: Pool):
    pool.submit("a")
    crash(pool, "a")
    assert pool.status("a") is State.SCHEDULED
    pool.make_due("a")
    pool.store.promote(["gpu"])
    assert (pool.suspects(), pool.waiting()) == (["a"], [])


def test_an_entry_of_a_suspect_in_the_queue_leads_nowhere(pool: Pool):
    """Whoever pushed it: the hash is the truth."""
    pool.submit("a", "b", "x")
    crash(pool, "a", "b")
    pool.connection.lpush(key("queue", "gpu"), "a")
    pool.connection.zrem(key("suspects", "gpu"), "a")
    busy = Hand(pool, "busy", slots=2)
    pool.connection.zadd(key("isolating"), {"other": 1})
    pool.connection.hset(key("held", "other"), "?", "?")
    assert ids(busy) == ["x"]
    assert sorted(pool.suspects()) == ["a", "b"]


def test_requeue_takes_the_suspicion_back(pool: Pool):
    """A person has looked at it."""
    pool.submit("a")
    for _ in range(3):
        crash(pool, "a")
        pool.make_due("a")
    assert pool.status("a") is State.FAILED
    FailedJobRegistry("gpu", connection=pool.connection).requeue("a")
    hand = Hand(pool, "w1")
    assert ids(hand) == ["a"]
    assert (pool.field("a", "company"), pool.field("a", "crashes")) == ("", "")
    pool.submit("x")
    assert ids(hand) == ["x"], "it is with others again"


def test_a_waiting_suspect_can_be_canceled_deleted_and_late(pool: Pool):
    names = ["canceled", "stopped", "deleted", "late"]
    pool.submit(*names)
    crash(pool, *names)
    assert pool.cancel("canceled") == "canceled"
    assert "canceled" not in pool.suspects()
    Job.fetch("stopped", connection=pool.connection).cancel()
    Job.fetch("deleted", connection=pool.connection).delete()
    pool.connection.hset(key("job", "late"), "deadline", 1)
    pool.connection.zadd(key("deadlines", "gpu"), {"late": 1})
    pool.store.promote(["gpu"])
    assert pool.status("late") is State.FAILED
    hand = Hand(pool, "w1")
    assert ids(hand) == []
    assert pool.suspects() == []
    assert pool.status("stopped") is State.CANCELED
    assert not pool.connection.exists(key("history", "deleted"))


def test_suspects_count_in_the_queue_s_limit_and_are_listed(pool: Pool, redis_url: str):
    pool.submit("a", "b")
    crash(pool, "a", "b")
    with Client(redis_url, settings=Settings(queue_limit=2)) as client:
        with pytest.raises(QueueFull):
            client.submit(TASK, {}, queue="gpu")
        assert sorted(item.id for item in client.list(status="queued", queue="gpu").items) == ["a", "b"]


def test_a_burst_worker_does_not_leave_suspects_behind(pool: Pool):
    """While another isolates, there is still work: 'blocked', not 'ok'."""
    pool.submit("a", "b")
    crash(pool, "a", "b")
    Hand(pool, "w1").claim()
    assert Hand(pool, "w2").claim().status == "blocked"


# --- the whole: one poison among many ----------------------------------------------------------------


@pytest.mark.parametrize("poison", [0, 13, 31])
def test_one_poison_of_32_costs_few_workers_and_no_innocent(pool: Pool, poison: int):
    """Three workers: at most log2(32) + 4 deaths, the poison is a dead letter, everybody else finishes."""
    names = [f"r{index:02}" for index in range(32)]
    pool.submit(*names)
    deaths, runs, hands = 0, 0, [Hand(pool, f"w{index}", slots=32) for index in range(3)]
    while any(pool.status(name) not in (State.FINISHED, State.FAILED) for name in names):
        runs += 1
        assert runs < 200
        for index, hand in enumerate(hands):
            hand.beat()
            pool.make_due(names[poison])
            held = hand.claim().claims
            if any(claim.id == names[poison] for claim in held):
                pool.reap(hand.incarnation, FailureKind.CRASH)
                hands[index] = Hand(pool, f"w{index}-{runs}", slots=32)
                deaths += 1
                continue
            for claim in held:
                hand.finish(claim)
    assert pool.status(names[poison]) is State.FAILED
    assert deaths <= math.log2(32) + 4
    assert [name for name in names if pool.status(name) is State.FINISHED] == [n for n in names if n != names[poison]]
    record = pool.store.fetch(names[poison])
    assert record is not None
    assert record.error_kind == "CRASH"
