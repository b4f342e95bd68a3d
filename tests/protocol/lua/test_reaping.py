"""Who is judged dead, when, and what becomes of what they held."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from rq import Queue, Retry
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.worker import Worker

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.states import State
from perdure.protocol.transitions.calls import Claim, Sweep
from tests.kit.protocol.backoff import backoff, schedule
from tests.kit.protocol.pool import HOUR_MS, Hand, Pool, dump


def beats(pool: Pool) -> set[str]:
    found: Any = pool.connection.zrange(key("beats"), 0, -1)
    return {member.decode() for member in found}


# --- who is dead -------------------------------------------------------------------------------------


def test_evidence_reaps_at_once(pool: Pool, hand: Hand):
    """A guardian saw the end: neither pulse nor heartbeat nor lease has to agree."""
    pool.submit("a", "b")
    hand.beat()
    hand.claim(2)
    reaped = pool.reap(hand.incarnation)
    assert [(item.outcome, item.kind) for item in reaped] == [
        ("queued", "WORKER_LOST"),
        ("queued", "WORKER_LOST"),
        ("gone", "WORKER_LOST"),
    ]
    assert {item.worker for item in reaped} == {"w1"}
    assert sorted(pool.waiting()) == ["a", "b"]
    assert beats(pool) == set()


def test_a_silent_heart_is_reaped_by_the_sweep(pool: Pool, hand: Hand):
    """A host that died tells nobody; the others are left alone."""
    pool.submit("a", "b")
    hand.take("a")
    other = Hand(pool, "w2")
    other.take("b")
    pool.stop_heart(hand.incarnation)
    assert {(item.id, item.incarnation, item.outcome) for item in pool.sweep().reaped} == {
        ("a", hand.incarnation, "queued"),
        ("", hand.incarnation, "gone"),
    }
    assert beats(pool) == {other.incarnation}


def test_a_dead_worker_that_held_nothing_is_cleared_away(pool: Pool, hand: Hand):
    """Its heartbeat and its registration go."""
    hand.beat()
    pool.stop_heart(hand.incarnation)
    assert [(item.id, item.outcome) for item in pool.sweep().reaped] == [("", "gone")]
    assert beats(pool) == set()


def test_the_first_heartbeat_may_come_later(pool: Pool, hand: Hand):
    """A worker that claims before its guardian has started is not declared dead after a short heartbeat timeout."""
    pool.submit("a")
    allowed = 1000 * pool.store.settings.heartbeat_timeout + 60_000
    hand.store.claim(
        incarnation=hand.incarnation,
        worker="w1",
        queues=["gpu"],
        task="",
        free=1,
        slots={},
        known=[],
        first_beat=allowed / 1000,
    )
    now: Any = pool.connection.time()
    first: Any = pool.connection.zscore(key("beats"), hand.incarnation)
    assert 0 <= now[0] * 1000 + now[1] / 1000 + allowed - first < 50_000
    assert not pool.sweep().reaped
    hand.beat()
    second: Any = pool.connection.zscore(key("beats"), hand.incarnation)
    assert second < first


def test_an_expired_lease_is_a_hang(pool: Pool, hand: Hand):
    """No progress while the heart beats: this request is taken, its neighbours stay, the worker lives."""
    pool.submit("hangs", "moves")
    first, second = hand.claim(2).claims
    hand.beat()
    pool.expire_lease("hangs")
    assert [(item.id, item.kind, item.outcome) for item in pool.sweep().reaped] == [("hangs", "HANG", "queued")]
    assert hand.beat() == "ok"
    assert hand.step(first, ["x"]) == "lost"
    assert hand.step(second, ["x"]) == "ok"


def test_a_heartbeat_that_arrives_in_time_saves_its_worker(pool: Pool, hand: Hand):
    """Who is dead is decided by the sweep at its own moment, not before."""
    pool.submit("a")
    claim = hand.take("a")
    pool.stop_heart(hand.incarnation)
    hand.beat()
    assert pool.sweep().reaped == []
    assert hand.step(claim, ["x"]) == "ok"


def test_progress_that_arrives_in_time_saves_its_lease(pool: Pool, hand: Hand):
    """A late step is no hang once it is there."""
    pool.submit("a")
    claim = hand.take("a")
    pool.expire_lease("a")
    hand.step(claim, ["x"])
    assert pool.sweep().reaped == []


def test_a_worker_that_died_before_its_first_heartbeat_is_found(pool: Pool, hand: Hand):
    """The claim itself counts as a heartbeat: nothing is held by somebody of whom nobody ever hears."""
    pool.submit("a")
    hand.take("a")
    assert beats(pool) == {hand.incarnation}


# --- when nobody is judged ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pulse",
    [
        None,  # first start, or Redis lost its data
        (-HOUR_MS, -2 * HOUR_MS),  # an outage, a stall
        (HOUR_MS, -HOUR_MS),  # the server's clock was set back
        (-1000, -1000),  # sweeps have only just begun again
    ],
)
def test_nobody_is_judged_by_clocks_that_say_nothing(pool: Pool, hand: Hand, pulse):
    """Pulse missing, old, from the future, or too young: beats and leases judge nobody for a heartbeat timeout."""
    pool.submit("a")
    claim = hand.take("a")
    pool.stop_heart(hand.incarnation)
    pool.expire_lease("a")
    pool.connection.delete(key("pulse"))
    if pulse:
        pool.set_pulse(at_shift=pulse[0], since_shift=pulse[1])
    sweep = pool.sweep(settled=False)
    assert (sweep.judged, sweep.reaped) == (False, [])
    assert hand.step(claim, ["x"]) == "ok"


def test_evidence_is_good_even_when_clocks_say_nothing(pool: Pool, hand: Hand):
    """A guardian's evidence needs no clock."""
    pool.submit("a")
    hand.take("a")
    pool.connection.delete(key("pulse"))
    assert [item.outcome for item in pool.reap(hand.incarnation)] == ["queued", "gone"]


def test_judging_begins_one_heartbeat_timeout_after_a_gap(pool: Pool, hand: Hand):
    """The grace after an outage is one heartbeat timeout of sweeps that went on as they should."""
    pool.submit("a")
    hand.take("a")
    pool.stop_heart(hand.incarnation)
    assert not pool.sweep(settled=False).judged
    timeout = round(pool.store.settings.heartbeat_timeout * 1000)
    pool.set_pulse(at_shift=-500, since_shift=-timeout + 2000)
    assert not pool.sweep(settled=False).judged
    pool.set_pulse(at_shift=-500, since_shift=-timeout - 1)
    assert pool.sweep(settled=False).judged


def test_a_heartbeat_says_when_a_sweep_is_due(pool: Pool, hand: Hand):
    """Without any reaper the guardians sweep; while one sweeps, they need not."""

    def due() -> bool:
        return pool.store.heartbeat(
            incarnation=hand.incarnation, worker="w1", queues=["gpu"], pid=1, host="here"
        ).sweep_due

    assert due()
    pool.sweep(settled=False)
    assert not due()
    for shift in (-HOUR_MS, HOUR_MS):
        pool.connection.delete(key("pulse"))
        pool.set_pulse(at_shift=shift)
        assert due()


def test_one_guardian_at_a_time_is_asked_to_sweep(pool: Pool):
    """Another one only when the first has not come to the end of its sweep in time, or has and it is time again."""

    def asked(name: str) -> bool:
        return pool.store.heartbeat(incarnation=name, worker=name, queues=["gpu"], pid=1, host=name).sweep_due

    def by_whom() -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = pool.connection.hgetall(key("pulse"))  # type: ignore[assignment]
        return found

    pool.set_pulse(at_shift=-HOUR_MS)
    assert [asked(name) for name in "abc"] == [True, False, False]
    assert by_whom()[b"asked"] == b"a"
    pool.store.weigh()  # it has swept; an hour later it is time again
    pool.set_pulse(at_shift=-HOUR_MS)
    assert [asked(name) for name in "bca"] == [True, False, False]
    # It was asked, and has vanished.
    pool.connection.hset(key("pulse"), "asked_until", round(pool.now() * 1000) - 1)
    assert [asked(name) for name in "cab"] == [True, False, False]
    # The server's clock was set back: nobody is kept from sweeping by a date an hour ahead.
    pool.connection.hset(key("pulse"), "asked_until", round(pool.now() * 1000) + HOUR_MS)
    assert asked("a")


def test_where_sweeps_take_long_they_judge_all_the_same(pool: Pool, hand: Hand):
    """The limit of the pulse follows the gaps that there are, and as much longer a heartbeat may be late then."""
    pool.submit("a")
    hand.take("a")
    timeout, limit = 5000, 3000
    now = round(pool.now() * 1000)
    pool.connection.hset(key("pulse"), mapping={"at": now - 4500, "since": now - HOUR_MS, "gap": 0})
    assert not pool.sweep(settled=False).judged, "a gap that was never seen before is an outage"
    pool.connection.hset(key("pulse"), mapping={"at": now - 4500, "since": now - timeout - 1})
    pool.connection.zadd(key("beats"), {hand.incarnation: now - 4500})
    assert pool.sweep(settled=False) == Sweep(True, False, []), "a beat may be late by as much as the pulse"
    pool.connection.zadd(key("beats"), {hand.incarnation: now - 3 * 4500 + limit - 1000})
    assert [item.id for item in pool.sweep(settled=False).reaped] == ["a", ""]
    for _ in range(60):
        pool.sweep(settled=False)
    assert int(pool.connection.hget(key("pulse"), "gap") or -1) < 500, "what is over is forgotten"


# --- the dead who come back --------------------------------------------------------------------------


def test_a_zombie_is_told_that_it_was_reaped(pool: Pool, hand: Hand):
    """A process that was stopped and wakes up may neither claim nor beat nor write under its old incarnation."""
    pool.submit("a", "b")
    claim = hand.take("a")
    pool.reap(hand.incarnation)
    before = dump(pool.connection)
    assert hand.beat() == "reaped"
    assert hand.claim().status == "reaped"
    assert hand.step(claim, ["x"]) == "lost"
    assert dump(pool.connection) == before
    assert 3500 < pool.connection.ttl(key("incarnation", hand.incarnation)) <= 3600
    successor = Hand(pool)
    assert successor.beat() == "ok"
    assert len(successor.claim(2).claims) == 2


def test_the_registration_of_a_dead_worker_is_deleted(pool: Pool, hand: Hand):
    """RQ's tools show no worker that is gone, and its name is free at once."""
    worker = Worker(["gpu"], connection=pool.connection, name="w1")
    worker.register_birth()
    pool.connection.hset(key("worker", "w1"), "pid", 4711)
    hand.beat()
    pool.submit("a")
    hand.take("a")
    assert [item.name for item in Worker.all(connection=pool.connection)] == ["w1"]
    pool.reap(hand.incarnation)
    assert Worker.all(connection=pool.connection) == []
    assert not [name for name in dump(pool.connection) if name.startswith(key("worker", "w1"))]


def test_a_successors_registration_of_the_same_name_stays(pool: Pool, hand: Hand):
    """Names are for people, fences are for incarnations."""
    hand.beat()
    worker = Worker(["gpu"], connection=pool.connection, name="w1")
    worker.register_birth()
    pool.connection.hset(key("worker", "w1"), "pid", 9999)
    pool.reap(hand.incarnation)
    assert [item.name for item in Worker.all(connection=pool.connection)] == ["w1"]


# --- what becomes of the requests --------------------------------------------------------------------


def lose(pool: Pool, hand: Hand, identifier: str, *, kind: FailureKind = FailureKind.WORKER_LOST) -> Claim:
    """A fresh worker claims the request and is lost; what it held."""
    pool.make_due(identifier)
    worker = Hand(pool, f"lost-{hand.incarnation}")
    claim = worker.take(identifier)
    pool.reap(worker.incarnation, kind)
    return claim


def test_the_first_loss_is_redelivered_at_once(pool: Pool, hand: Hand):
    """Being on a worker that was lost is not the request's fault."""
    pool.submit("a", "waiting")
    assert lose(pool, hand, "a").attempt == 1
    assert pool.waiting() == ["a", "waiting"]
    assert pool.events("a") == ["redelivered"]
    assert hand.take("a").attempt == 1


def test_a_lost_batch_comes_back_in_its_order(pool: Pool, hand: Hand):
    """In front of those who came later, first served first, as after a release."""
    pool.submit("a", "b", "c", "waiting")
    hand.claim(3)
    pool.reap(hand.incarnation)
    assert pool.waiting() == ["a", "b", "c", "waiting"]


def test_the_second_loss_without_progress_waits(pool: Pool, hand: Hand):
    """Perhaps it is the request after all: still uncharged, but no longer at once."""
    pool.submit("a")
    lose(pool, hand, "a")
    lose(pool, hand, "a")
    assert pool.status("a") is State.SCHEDULED
    assert pool.events("a") == ["redelivered", "suspected", "retry"]
    assert pool.due_in("a") == pytest.approx(backoff("a", 1, 1, 30), abs=0.9)
    pool.make_due("a")
    assert hand.take("a").attempt == 1


def test_progress_gives_the_budget_back(pool: Pool, hand: Hand):
    """A second of stepping, and further than ever before: attempts, losses and crashes start anew."""
    pool.submit("a")
    claim = hand.take("a")
    hand.fail(claim)
    pool.make_due("a")
    lose(pool, hand, "a")
    claim = hand.take("a")
    assert claim.attempt == 2
    assert pool.field("a", "retries_left") == "2"
    hand.step(claim, ["x"], stepped=1.5)
    pool.reap(hand.incarnation)
    assert pool.field("a", "retries_left") == "3"
    assert pool.status("a") is State.QUEUED, "a loss after progress is a first loss again"
    assert pool.field("a", "executions") == "0"


@pytest.mark.parametrize(("stepped", "outputs"), [(0.5, ["x"]), (5.0, [])])
def test_progress_needs_both_a_step_and_time(pool: Pool, hand: Hand, stepped, outputs):
    """A poison that puts out one output an attempt, or only lives long, does not live for ever."""
    pool.submit("a")
    lose(pool, hand, "a")
    claim = hand.take("a")
    pool.connection.hincrby(key("job", "a"), "claimed", -8000)  # it also loaded a model, which is no step
    if outputs:
        hand.step(claim, outputs, stepped=stepped)
    pool.reap(hand.incarnation)
    assert pool.status("a") is State.SCHEDULED


def test_progress_must_pass_the_best_earlier_execution(pool: Pool, hand: Hand):
    """To come as far as before is no progress."""
    pool.submit("a")
    claim = hand.take("a")
    pool.connection.hincrby(key("job", "a"), "claimed", -5000)
    hand.step(claim, ["x"])
    pool.reap(hand.incarnation)
    assert pool.field("a", "losses") == "1"
    again = Hand(pool, "w2")
    claim = again.take("a")
    pool.connection.hincrby(key("job", "a"), "claimed", -5000)
    again.step(claim, [], seq=2)
    pool.reap(again.incarnation)
    assert pool.field("a", "losses") == "2"


def test_executions_without_progress_are_capped(connection: redis.Redis):
    """Losses are nobody's fault, but not without end."""
    pool = Pool.over(connection, max_executions=3)
    hand = Hand(pool)
    pool.submit("a")
    for _ in range(3):
        assert pool.status("a") is not State.FAILED
        lose(pool, hand, "a")
    assert pool.status("a") is State.FAILED
    assert pool.field("a", "error_kind") == "WORKER_LOST"


def test_the_third_crash_alone_is_a_dead_letter(pool: Pool, hand: Hand):
    """A request that kills a worker whenever it is alone there is a poison."""
    pool.submit("a")
    for number in range(1, 4):
        assert pool.status("a") is not State.FAILED
        lose(pool, hand, "a", kind=FailureKind.CRASH)
        assert pool.field("a", "crashes") == str(number)
    job = Job.fetch("a", connection=pool.connection)
    assert job.is_failed
    result = job.latest_result()
    assert result is not None
    assert result.exc_string == "CRASH: seen"
    assert pool.events("a") == ["suspected", "retry", "suspected", "retry", "failed"]


def test_a_crash_in_company_counts_only_in_all(connection: redis.Redis):
    """Who of the batch it was is not known; after max_crashes_total it does not matter any more."""
    pool = Pool.over(connection, max_crashes_total=4)
    pool.submit("a", "b")
    for number in range(1, 5):
        worker = Hand(pool)
        assert len(worker.claim(2).claims) == 2
        pool.reap(worker.incarnation, FailureKind.CRASH)
        pool.connection.hset(key("job", "a"), "company", 2)
        pool.connection.hset(key("job", "b"), "company", 2)
        assert pool.field("a", "crashes_total") == str(number)
        assert pool.field("a", "crashes") == ""
    assert {pool.status("a"), pool.status("b")} == {State.FAILED}


@pytest.mark.parametrize("sweeps", [[4], [3, 1], [1, 3], [1, 1, 1, 1]])
def test_a_batch_that_hangs_has_nobody_alone(pool: Pool, sweeps: list[int]):
    """In one sweep or over several: whose fault it was is not known, and three such hangs are no dead letter."""
    names = ["a", "b", "c", "d"]
    pool.submit(*names)
    for number in range(1, 4):
        for name in names if number > 1 else ():
            assert pool.field(name, "company") == "2"
            pool.connection.hset(key("job", name), "company", 4)
        hand = Hand(pool, f"w{number}")
        assert len(hand.claim(4).claims) == 4
        hand.beat()
        rest = list(names)
        for share in sweeps:
            for name in rest[:share]:
                pool.expire_lease(name)
            assert [item.kind for item in pool.sweep().reaped] == ["HANG"] * share
            rest = rest[share:]
        for name in names:
            assert (pool.field(name, "crashes"), pool.field(name, "crashes_total")) == ("", str(number))
            assert pool.status(name) is State.QUEUED
        assert sorted(pool.suspects()) == names


def test_a_hung_batch_has_nobody_alone_in_bounded_sweeps(pool: Pool):
    """What one call leaves to the next was not alone."""
    pool.submit("a", "b", "c")
    hand = Hand(pool)
    hand.claim(3)
    hand.beat()
    for name in ("a", "b", "c"):
        pool.expire_lease(name)
    for _ in range(3):
        pool.set_pulse()
        sweep = pool.store.reap(["gpu"], kind="WORKER_LOST", reason="no heartbeat", limit=1)
        assert [item.kind for item in sweep.reaped] == ["HANG"]
    assert [pool.field(name, "crashes") for name in ("a", "b", "c")] == ["", "", ""]


def test_the_third_hang_alone_is_a_dead_letter(pool: Pool):
    """A request that hangs a worker of its own each time is a poison."""
    pool.submit("a")
    for number in range(1, 4):
        assert pool.status("a") is not State.FAILED
        pool.make_due("a")
        hand = Hand(pool, f"w{number}")
        hand.take("a")
        hand.beat()
        pool.expire_lease("a")
        assert [item.kind for item in pool.sweep().reaped] == ["HANG"]
        assert pool.field("a", "crashes") == str(number)
    assert pool.status("a") is State.FAILED
    assert pool.field("a", "error_kind") == "HANG"


def test_a_worker_that_hangs_again_is_judged_anew(pool: Pool, hand: Hand):
    """Its step ended after all, and it claimed again, alone: earlier hangs on it say nothing about company."""
    pool.submit("a")
    for number in range(1, 4):
        pool.make_due("a")
        hand.held.clear()  # it was told that its request is lost
        hand.take("a")
        hand.beat()
        pool.expire_lease("a")
        pool.sweep()
        assert pool.field("a", "crashes") == str(number)
    assert pool.status("a") is State.FAILED


def test_a_batch_reaped_in_bounded_calls_has_nobody_alone(pool: Pool, hand: Hand):
    """The last one of a batch was not alone only because its mates were taken by earlier calls."""
    pool.submit("a", "b", "c")
    hand.claim(3)
    left = True
    while left:
        left = pool.store.reap(incarnation=hand.incarnation, kind="CRASH", reason="seen", crash=True, limit=1).left
    for name in ("a", "b", "c"):
        assert (pool.field(name, "crashes"), pool.field(name, "crashes_total")) == ("", "1")


def test_an_expired_lease_with_a_late_heartbeat_is_no_hang(pool: Pool, hand: Hand):
    """With a short lease a lost host shows there first: nobody saw it beat without moving."""
    pool.submit("a")
    hand.take("a")
    hand.beat()
    timeout = pool.store.settings.heartbeat_timeout
    pool.connection.zadd(key("beats"), {hand.incarnation: round((pool.now() + 0.3 * timeout) * 1000)})
    pool.expire_lease("a")
    assert [(item.id, item.kind, item.outcome) for item in pool.sweep().reaped] == [("a", "WORKER_LOST", "queued")]
    assert (pool.field("a", "crashes_total"), pool.field("a", "losses")) == ("", "1")
    assert beats(pool) == {hand.incarnation}, "its heart may only have been late"


def test_a_crash_always_waits_before_the_next_try(pool: Pool, hand: Hand):
    """A poison must not take the pool down at the speed of its workers' starts."""
    pool.submit("a")
    for number in (1, 2):
        lose(pool, hand, "a", kind=FailureKind.CRASH)
        assert pool.due_in("a") == pytest.approx(backoff("a", number, 1, 30), abs=0.7)


def test_retries_come_as_the_formula_says(connection: redis.Redis):
    """The delays between a request's failures are those of the first, second, third … retry."""
    pool = Pool.over(connection, retry_base=100.0, retry_cap=1000.0)
    hand = Hand(pool)
    for identifier in ("a", "another-id", "Z_9"):
        pool.submit(identifier, retries=6)
        expected = schedule(identifier, 6, 100.0, 1000.0)
        for delay in expected:
            pool.make_due(identifier)
            claim = hand.take(identifier)
            before = pool.now()
            assert hand.fail(claim) == "scheduled"
            after = pool.now()
            due: Any = connection.zscore(key("retries", "gpu"), identifier)
            # The script's own moment lies between; a delay is rounded to a millisecond.
            assert before + delay - 0.002 <= due / 1000 <= after + delay + 0.002
        connection.delete(key("retries", "gpu"))


def test_a_sweep_is_bounded_and_says_what_is_left(pool: Pool):
    """One call takes at most its limit; the next ones take the rest, and nothing is taken twice."""
    hand = Hand(pool, slots=10)
    pool.submit(*[f"r{number}" for number in range(10)])
    assert len(hand.claim(10).claims) == 10
    pool.stop_heart(hand.incarnation)
    taken: list[str] = []
    left = True
    while left:
        pool.set_pulse()
        sweep = pool.store.reap(["gpu"], kind="WORKER_LOST", reason="no heartbeat", limit=4)
        ids = [item.id for item in sweep.reaped if item.id]
        assert len(ids) <= 4
        taken += ids
        left = sweep.left
    assert sorted(taken) == sorted(f"r{number}" for number in range(10))
    assert len(pool.waiting()) == 10


def test_a_full_sweep_says_that_there_may_be_more(pool: Pool):
    """They come as one page of expired leases: what is beyond it was not seen."""
    hand = Hand(pool, slots=10)
    names = [f"r{number}" for number in range(10)]
    pool.submit(*names)
    assert len(hand.claim(10).claims) == 10
    hand.beat()
    for name in names:
        pool.expire_lease(name)
    taken: list[str] = []
    left = True
    while left:
        pool.set_pulse()
        sweep = pool.store.reap(["gpu"], kind="WORKER_LOST", reason="no heartbeat", limit=4)
        taken += [item.id for item in sweep.reaped if item.id]
        left = sweep.left
    assert sorted(taken) == sorted(names)


def test_more_dead_workers_than_one_call_sees_are_reaped(pool: Pool):
    """A host of many workers is lost at once: a call that has not seen them all says so."""
    hands = [Hand(pool, f"w{number}") for number in range(20)]
    for hand in hands:
        hand.beat()
        pool.stop_heart(hand.incarnation)
    first = pool.sweep()
    assert first.left
    second = pool.sweep()
    assert not second.left
    assert {item.incarnation for item in first.reaped + second.reaped} == {hand.incarnation for hand in hands}


# --- plain jobs --------------------------------------------------------------------------------------


def test_a_plain_job_of_a_lost_worker_fails_as_with_rq(pool: Pool, hand: Hand):
    """Without RQ's Retry it is RQ's failure, only sooner."""
    job = Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2)
    hand.take(job.id)
    assert [item.outcome for item in pool.reap(hand.incarnation)] == ["failed", "gone"]
    job.refresh()
    assert job.is_failed
    assert job.id in job.failed_job_registry.get_job_ids()


def test_a_failed_plain_job_may_be_kept_for_ever(pool: Pool, hand: Hand):
    """RQ's failure_ttl=-1: the job stays, in the registry with the score that RQ gives it, and no clean-up takes it."""
    job = Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2, failure_ttl=-1)
    hand.take(job.id)
    assert [item.outcome for item in pool.reap(hand.incarnation)] == ["failed", "gone"]
    registry = FailedJobRegistry("gpu", connection=pool.connection)
    assert pool.connection.zscore(registry.key, job.id) == -1
    pool.store.expire(["gpu"])
    assert registry.get_job_ids(cleanup=True) == [job.id]
    for name in ("job", "results"):
        assert pool.connection.ttl(key(name, job.id)) == -1
    job.refresh()
    assert job.is_failed


def test_a_dead_plain_job_may_be_enqueued_again(pool: Pool, hand: Hand):
    """Under the same id: RQ allows it, and RQ's status is the truth of its jobs."""
    queue = Queue("gpu", connection=pool.connection)
    queue.enqueue("operator.add", 1, 2, job_id="same")
    hand.take("same")
    pool.reap(hand.incarnation)
    assert queue.failed_job_registry.get_job_ids() == ["same"]
    queue.enqueue("operator.add", 3, 4, job_id="same")
    again = Hand(pool, "w2")
    again.take("same")
    assert pool.field("same", "status") == "started"
    assert queue.failed_job_registry.get_job_ids() == []


def test_a_plain_job_with_rqs_retry_runs_again(pool: Pool, hand: Hand):
    """RQ's Retry holds: at once without interval, later with one."""
    queue = Queue("gpu", connection=pool.connection)
    job = queue.enqueue("operator.add", 1, 2, retry=Retry(max=1))
    hand.take(job.id)
    assert [item.outcome for item in pool.reap(hand.incarnation)] == ["queued", "gone"]
    again = Hand(pool, "w2")
    again.take(job.id)
    assert [item.outcome for item in pool.reap(again.incarnation)] == ["failed", "gone"]
    late = queue.enqueue("operator.add", 1, 2, retry=Retry(max=2, interval=[5, 9]))
    third = Hand(pool, "w3")
    third.take(late.id)
    assert [item.outcome for item in pool.reap(third.incarnation)] == ["scheduled", "gone"]
    assert pool.due_in(late.id) == pytest.approx(5, abs=2)


def test_reaping_an_ended_plain_job_only_ends_the_lease(pool: Pool, hand: Hand):
    """Its worker died between RQ's end and the lease's."""
    job = Queue("gpu", connection=pool.connection).enqueue("operator.add", 1, 2)
    hand.take(job.id)
    pool.connection.hset(key("job", job.id), "status", "finished")
    assert [item.outcome for item in pool.reap(hand.incarnation)] == ["ended", "gone"]
    assert pool.field(job.id, "status") == "finished"
    assert pool.connection.zcard(key("leases", "gpu")) == 0


def test_the_lease_of_a_plain_job_lasts_as_long_as_its_timeout(pool: Pool, hand: Hand):
    """Its one step may take all of RQ's timeout; with -1 only the heartbeat watches it."""
    queue = Queue("gpu", connection=pool.connection)
    for timeout, least in ((600, 629), (-1, 86_400)):
        job = queue.enqueue("operator.add", 1, 2, job_timeout=timeout)
        Hand(pool).take(job.id)
        deadline: Any = pool.connection.zscore(key("leases", "gpu"), job.id)
        assert deadline / 1000 - pool.now() > least
