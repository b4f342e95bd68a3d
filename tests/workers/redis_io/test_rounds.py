"""The courier and the claimer round by round, over a real server but without threads and processes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis

from perdure.protocol.keys import SCHEMA, key
from perdure.protocol.reading.output_log import LogPage, LogPlace
from perdure.protocol.settings import LEASE, Settings
from perdure.protocol.states import State
from perdure.protocol.store import Store
from perdure.protocol.transitions.calls import Progress
from perdure.workers.guardian.companion import Guarded
from perdure.workers.guardian.process import Guardian
from perdure.workers.leases.holdings import MAX_BUFFER
from perdure.workers.leases.mailbox import Drop
from perdure.workers.redis_io import courier as courier_module
from perdure.workers.redis_io import line as line_module
from perdure.workers.redis_io.claimer import Limits
from perdure.workers.redis_io.pace import CALLS
from perdure.workers.tasks.base import Step
from tests.kit.protocol.pool import TASK, Hand, Pool
from tests.kit.workers.bench import Bench


@pytest.fixture
def bench(connection: redis.Redis) -> Bench:
    return Bench(connection)


def calls(connection: redis.Redis, command: str) -> int:
    stats: dict[str, Any] = connection.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


# --- claims ------------------------------------------------------------------------------------------


def test_what_leads_nowhere_is_skipped_without_waiting(bench: Bench) -> None:
    """Hundreds of canceled entries in front of a live one: as long as more is there, no bell is waited for."""
    connection = bench.pool.connection
    canceled = [f"canceled-{number}" for number in range(300)]
    for start in range(0, 300, 100):
        part = canceled[start : start + 100]
        bench.pool.submit(*part)
        bench.pool.store.cancel([(name, "") for name in part], reason="asked")
    bench.pool.submit("live")
    before = calls(connection, "blpop")
    bench.holdings.wanting = False
    bench.claim()  # the only one that looks at the bells
    assert bench.holdings.wanting
    for _ in range(2):
        bench.claim()
    assert list(bench.holdings.held) == ["live"]
    assert calls(connection, "blpop") == before + 1


def test_long_logs_are_read_while_all_else_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request's checkpoint and its end are stored between two pages, and what has less to be
    read comes first.
    """
    bench.pool.submit("a")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    other = Hand(bench.pool, "w2")
    bench.pool.submit("long", "short", "fresh")
    long, short = other.claim(2).claims
    for number in range(40):
        other.step(long, [f"{number}{'x' * 30_000}"], offset=number, seq=number + 1)
    other.step(short, ["s"])
    for claim in (short, long):
        other.release(claim)
    bench.letters()
    store, seen = bench.pool.store, []
    read = store.output_page

    def page(identifier: str, place: LogPlace, *, check: bool = False) -> LogPage:
        if identifier == "long":
            record = store.fetch("a")
            assert record is not None
            seen.append((record.status, len(store.all_outputs("a"))))
            if len(seen) == 1:
                bench.offer("a", Step(1, 1))
            elif len(seen) == 2:
                bench.offer("a", Step(result="there"))
        return read(identifier, place, check=check)

    monkeypatch.setattr(store, "output_page", page)
    bench.claim()
    assert len(seen) >= 4
    assert seen[:3] == [(State.STARTED, 0), (State.STARTED, 1), (State.FINISHED, 1)]
    assert [letter.request.id for letter in bench.letters()] == ["fresh", "short", "long"]
    assert list(bench.holdings.held) == ["long", "short", "fresh"]


def test_a_loop_that_stands_still_gets_nothing_more(bench: Bench) -> None:
    """No sign of life for half a step timeout: the free slots stay free until it moves, or while a model loads."""
    bench.pool.submit("a")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    bench.pool.submit("b")
    bench.holdings.moved -= bench.settings.step_timeout
    bench.claim()
    assert list(bench.holdings.held) == ["a"]
    bench.holdings.loading_until = time.monotonic() + 600
    bench.claim()
    assert list(bench.holdings.held) == ["a", "b"]
    bench.holdings.loading_until = 0.0
    bench.pool.submit("c")
    bench.claim()
    assert list(bench.holdings.held) == ["a", "b"]
    bench.offer("a", Step(output=1))
    bench.claim()
    assert list(bench.holdings.held) == ["a", "b", "c"]


def test_a_still_loop_gets_nothing_after_its_leases_went(bench: Bench) -> None:
    """What it held was given to others; its step goes on, and would keep whatever it claimed now waiting."""
    bench.pool.submit("a")
    bench.holdings.stepping = True
    bench.holdings.moved -= bench.settings.step_timeout
    bench.claim()
    assert list(bench.holdings.held) == []
    bench.holdings.stepping = False
    bench.claim()
    assert list(bench.holdings.held) == ["a"]


def test_idle_time_counts_from_the_end_of_the_last_request(connection: redis.Redis) -> None:
    """--max-idle-time: a worker that was busy for longer than that has not been idle."""
    bench = Bench(connection, Limits(max_idle_time=10))
    bench.pool.submit("a")
    bench.claim()
    bench.claimer._idle_since -= 1000  # so long it has run now
    bench.claim()  # its slot is full; the round passes all the same
    bench.offer("a", Step(result=1))
    bench.round()
    assert bench.pool.status("a") is State.FINISHED
    for _ in range(2):
        bench.holdings.wanting = True
        bench.claim()
        assert not bench.holdings.stopping
    bench.claimer._idle_since -= 1000
    bench.holdings.wanting = True
    bench.claim()
    assert bench.holdings.stopping


def test_others_are_released_while_a_long_log_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel that was heard, a stop command and a handback do not wait for the last page."""
    bench.pool.submit("a", "b", "c")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    bench.claim()
    assert list(bench.holdings.held) == ["a", "b", "c"]
    other = Hand(bench.pool, "w2")
    bench.pool.submit("long")
    (long,) = other.claim(1).claims
    for number in range(40):
        other.step(long, [f"{number}{'x' * 30_000}"], offset=number, seq=number + 1)
    other.release(long)
    claims = {name: item.claim for name, item in bench.holdings.held.items()}
    read, seen = Store.output_page, []

    def page(self: Store, identifier: str, place: LogPlace, *, check: bool = False) -> LogPage:
        if identifier == "long":
            seen.append([bench.pool.status(name) for name in "abc"])
            if len(seen) == 1:
                bench.pool.cancel("a")
                bench.courier.renewals.hasten()
                assert bench.holdings.stop_request("b")
                bench.holdings.hand_back(claims["c"], reason="elsewhere", delay=100.0)
        return read(self, identifier, place, check=check)

    monkeypatch.setattr(Store, "output_page", page)
    bench.claim()
    assert seen[0] == [State.STARTED] * 3
    assert seen[2] == [State.CANCELED, State.STOPPED, State.SCHEDULED]
    assert list(bench.holdings.held) == ["long"]
    assert bench.holdings.handbacks == []


# --- when Redis is slow --------------------------------------------------------------------------------


def slow_calls(bench: Bench, seconds: float) -> None:
    for _ in range(CALLS):
        bench.courier.line.pace.took(seconds)


def test_checkpoints_come_further_apart_while_calls_take_long(connection: redis.Redis) -> None:
    """They take at most half of the time, and so leave room; never so far apart that a lease runs out."""
    bench = Bench(connection)
    checkpoints, holdings = bench.courier.checkpoints, bench.holdings
    for seconds, interval in ((0.0004, 0.1), (0.04, 0.1), (0.3, 0.6), (60.0, LEASE * 20 / 4)):
        holdings.settings = Settings()
        slow_calls(bench, seconds)
        checkpoints._last = time.monotonic()
        with holdings.lock:
            assert checkpoints.due_in() == pytest.approx(interval, abs=0.05)
    slow_calls(bench, 0.0004)
    for _ in range(CALLS // 2):
        bench.courier.line.pace.took(3.0)  # a pause of the process, or of the server
    with holdings.lock:
        assert checkpoints.due_in() <= 0.1


def test_a_worker_shows_how_often_it_checkpoints(connection: redis.Redis) -> None:
    """In its record, once a heartbeat, also when it has nothing else to tell: when it stretches, and comes back."""
    bench = Bench(connection)
    bench.holdings.settings = Settings()
    bench.pool.store.heartbeat(incarnation=bench.courier.incarnation, worker="w1", queues=["gpu"], pid=1, host="h")
    for seconds, shown in ((0.001, 0.1), (0.3, 0.6), (0.001, 0.1)):
        slow_calls(bench, seconds)
        bench.courier.line.ledger._sent = 0.0
        bench.courier._show()
        (worker,) = bench.pool.store.workers()
        assert (worker["interval"], worker["usual"]) == (shown, 0.1)


def test_renewals_and_ends_wait_for_no_stretched_checkpoint(bench: Bench) -> None:
    """With calls of 2 s the next checkpoint is due in 4 s: rounds go on, and what is due in them is done."""
    bench.pool.submit("a", "b")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    bench.claim()
    bench.offer("a", Step(0, 0))
    bench.round()
    slow_calls(bench, 2.0)
    bench.offer("a", Step(1, 1))
    bench.courier.renewals.hasten()
    before = bench.pool.connection.zscore(key("leases", "gpu"), "b")
    bench.courier._round()
    after = bench.pool.connection.zscore(key("leases", "gpu"), "b")
    assert before is not None
    assert after is not None
    assert after > before
    assert bench.pool.store.all_outputs("a") == [0]
    slow_calls(bench, 2.0)
    bench.offer("a", Step(result="there"))
    bench.courier._round()
    assert bench.pool.status("a") is State.FINISHED
    assert bench.pool.store.all_outputs("a") == [0, 1]


def test_the_first_claim_after_a_false_death_waits(connection: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that was declared dead because all calls were slow does not claim in one moment; it does claim soon."""
    bench = Bench(connection)
    waits: list[float] = []

    def uniform(low: float, high: float) -> float:
        waits.append(high)
        return high

    monkeypatch.setattr(random, "uniform", uniform)
    bench.pool.submit("a")
    bench.claim()
    bench.pool.reap(bench.courier.incarnation)
    slow_calls(bench, 0.1)
    bench.courier.tended = lambda: Guarded.REAPED
    bench.round()
    bench.courier.tended = lambda: Guarded.WELL
    assert len(bench.rejoined) == 1
    for _ in range(3):
        bench.round()
        assert not bench.holdings.held
    assert waits == [2.0]
    bench.courier._claims_from -= 2.0
    bench.round()
    assert list(bench.holdings.held) == ["a"]
    slow_calls(bench, 9.0)
    bench.courier._rejoin()
    slow_calls(bench, 0.001)
    bench.courier._rejoin()
    assert waits[1:] == [bench.settings.heartbeat_timeout, 0.0]


# --- when the loop may step --------------------------------------------------------------------------


@pytest.fixture
def without_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may_step waits for does not come in these tests."""

    def wait_for(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        return predicate()

    monkeypatch.setattr(bench.holdings.lock, "wait_for", wait_for)


@pytest.mark.usefixtures("without_waiting")
def test_no_step_while_the_leases_must_be_over(bench: Bench) -> None:
    """Out of contact for a lease: no step, however often it is asked, until Redis has answered. Idle, it may."""
    bench.holdings.contact -= 1000
    assert bench.holdings.may_step()
    bench.pool.submit("a")
    bench.claim()
    assert [bench.holdings.may_step() for _ in range(3)] == [False] * 3
    bench.round()
    assert bench.holdings.may_step()


@pytest.mark.usefixtures("without_waiting")
def test_a_lease_is_as_long_as_the_task_that_is_held_asks(bench: Bench) -> None:
    """Out of contact for less than the lease of a task with long steps is no reason to stop it."""
    bench.pool.submit("a")
    bench.claim()
    bench.holdings.contact -= 1.6 * bench.settings.step_timeout
    assert not bench.holdings.may_step()
    bench.holdings.capacity.loaded(TASK, 1, 2 * bench.settings.step_timeout)
    assert bench.holdings.may_step()


@pytest.mark.usefixtures("without_waiting")
def test_no_step_while_the_buffer_is_full(bench: Bench) -> None:
    """What Redis has not taken is bounded: the loop pauses, and goes on once it is stored."""
    bench.pool.submit("a")
    bench.claim()
    bench.offer("a", Step(output=1))
    bench.holdings.held["a"].size = MAX_BUFFER + 1
    assert [bench.holdings.may_step() for _ in range(3)] == [False] * 3
    bench.round()
    assert bench.holdings.may_step()


# --- cancels -----------------------------------------------------------------------------------------


def test_a_cancel_that_a_checkpoint_hears_ends_the_request(bench: Bench) -> None:
    """What it had put out is dropped with it: no gap is seen in it, and nothing is handed back."""
    bench.pool.submit("a")
    bench.claim()
    bench.offer("a", Step(output=0, state=1))
    bench.round()
    assert bench.pool.cancel("a") == "requested"
    bench.offer("a", Step(output=1, state=2))
    bench.round()
    bench.round()
    assert bench.pool.status("a") is State.CANCELED
    assert (bench.pool.events("a"), bench.pool.waiting(), bench.holdings.handbacks) == (["cancel", "canceled"], [], [])
    assert any(isinstance(letter, Drop) for letter in bench.letters())
    assert "a" not in bench.holdings.held


def test_an_end_during_a_cancel_leaves_no_gap(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint on its way was refused as canceled, and its request's result came just then: it is canceled."""
    bench.pool.submit("a")
    bench.claim()
    bench.offer("a", Step(output=0, state=1))
    assert bench.pool.cancel("a") == "requested"
    progress = bench.pool.store.progress

    def meanwhile(incarnation: str, rows: Sequence[Progress]) -> list[str]:
        answers = progress(incarnation, rows)
        bench.offer("a", Step(output=1), Step(result="late"))
        return answers

    monkeypatch.setattr(bench.pool.store, "progress", meanwhile)
    bench.round()
    bench.round()
    assert bench.pool.status("a") is State.CANCELED
    assert (bench.pool.events("a"), bench.pool.waiting()) == (["cancel", "canceled"], [])


def test_an_end_that_is_ready_wins_over_a_cancel(bench: Bench) -> None:
    """The answer is there, and the renewal of the same round hears of the cancel: the request is finished."""
    bench.pool.submit("a")
    bench.claim()
    bench.offer("a", Step(output=0), Step(result="there"))
    assert bench.pool.cancel("a") == "requested"
    bench.courier.renewals.hasten()
    bench.round()
    assert bench.pool.status("a") is State.FINISHED
    assert (bench.pool.store.result("a"), bench.pool.store.all_outputs("a")) == ("there", [0])


# --- what Redis does not take --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("error", [redis.ConnectionError("reset"), redis.ResponseError("ERR Protocol error")])
@pytest.mark.parametrize("script", ["progress", "finish"])
def test_a_call_that_is_never_taken_ends_its_request_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: redis.RedisError, script: str
) -> None:
    """Whether it is refused or cut off: its batch-mates go on, and the reason has the numbers."""
    monkeypatch.setattr(line_module, "REFUSAL_PAUSE", 0.0)
    real = getattr(bench.pool.store, script)

    def taken(incarnation: str, *rest: Any) -> list[str]:
        if any(b"BAD" in row.blob for row in rest[-1]):
            raise error
        return real(incarnation, *rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(bench.pool.store, script, taken)
    bench.pool.submit("a", "bad", "c")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    bench.claim()
    end = [Step(result="done")] if script == "finish" else []
    bench.offer("bad", Step("BAD"), *end)
    for number in range(12):
        for name in ("a", "c"):
            if name in bench.holdings.held:
                bench.offer(name, Step(number, number), *([Step(result="well")] if number == 9 else []))
        bench.round()
    record = bench.pool.store.fetch("bad")
    assert record is not None
    assert (record.status, record.error_kind) == ("failed", "INVALID_REQUEST")
    assert "5 calls of" in record.error_reason
    for name in ("a", "c"):
        assert bench.pool.store.all_outputs(name) == list(range(10))
        assert bench.pool.status(name) is State.FINISHED
    assert not bench.holdings.held


@pytest.mark.slow
def test_a_server_that_cannot_take_anything_now_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of itself (a script runs, no replicas) is held against no request, and neither is an outage."""
    bench.pool.submit("a")
    bench.claim()
    bench.offer("a", Step("x"))
    store, connection = bench.pool.store, bench.pool.connection
    real, ping = store.progress, connection.ping
    for text in ("BUSY Redis is busy", "NOREPLICAS Not enough good replicas", "MISCONF Redis is configured to save"):
        monkeypatch.setattr(store, "progress", raising(redis.ResponseError(text)))
        for _ in range(7):
            bench.round()
    monkeypatch.setattr(store, "progress", raising(redis.ConnectionError("gone")))
    monkeypatch.setattr(connection, "ping", raising(redis.ConnectionError("gone")))
    for _ in range(7):
        bench.round()
    monkeypatch.setattr(connection, "ping", ping)
    monkeypatch.setattr(store, "progress", real)
    bench.round()
    assert bench.pool.store.all_outputs("a") == ["x"]
    assert bench.pool.status("a") is State.STARTED


def test_a_call_that_is_nobodys_and_never_taken_ends_the_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot ask for work is replaced; it does not stand still without a word."""
    monkeypatch.setattr(courier_module, "REFUSALS", 4)
    monkeypatch.setattr(bench.pool.store, "claim", raising(redis.ResponseError("WRONGTYPE Operation against a key")))
    for _ in range(3):
        bench.round()
    with pytest.raises(RuntimeError, match="4 calls in a row"):
        bench.round()


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


# --- the guardian's verdict --------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Guarded.REAPED, Guarded.OUTDATED])
def test_a_guardian_leaves_with_its_verdict(connection: redis.Redis, verdict: Guarded) -> None:
    """Its exit status says whether the worker must rejoin or stop; nothing is reaped by it."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    hand.beat()
    if verdict is Guarded.REAPED:
        pool.reap(hand.incarnation)
    else:
        connection.set(key("schema"), SCHEMA + 1)
    near, far = os.pipe()
    try:
        guardian = Guardian(
            store=pool.store,
            settings=pool.store.settings,
            incarnation=hand.incarnation,
            worker="w1",
            queues=["gpu"],
            pid=os.getpid(),
            host="here",
            device="",
            fingerprints=[],
            ready=True,
            pipe=near,
        )
        assert guardian.run() == verdict.value
    finally:
        os.close(near)
        os.close(far)


def test_a_full_worker_rejoins_after_its_death(connection: redis.Redis) -> None:
    """It asks for no work, so no claim tells it: the guardian's verdict does."""
    bench = Bench(connection)
    bench.pool.submit("a")
    bench.claim()
    incarnation = bench.courier.incarnation
    bench.pool.reap(incarnation)
    bench.courier.tended = lambda: Guarded.REAPED
    bench.round()
    assert bench.rejoined == [bench.courier.incarnation] != [incarnation]
    assert bench.letters()[-2:-1] == [Drop("a")], "the old execution leaves the engine before it comes again"
    assert bench.holdings.held["a"].claim.execution != ""


def test_a_worker_that_is_too_old_stops(bench: Bench) -> None:
    """Said by its guardian's verdict: no more claims, and the message says what to do."""
    bench.courier.tended = lambda: Guarded.OUTDATED
    bench.round()
    assert bench.holdings.stopping
