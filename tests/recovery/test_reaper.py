"""The reaper: its sweep, its loop, and the process."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from perdure.protocol.connection import connect
from perdure.protocol.errors import ProtocolMismatch
from perdure.protocol.keys import SCHEMA, key
from perdure.protocol.settings import Settings
from perdure.protocol.states import State
from perdure.protocol.store import Store
from perdure.protocol.transitions.calls import Sweep
from perdure.recovery import reaper as module
from perdure.recovery.reaper import MAX_ROUNDS, Reaper
from perdure.scripts.pool.server import Server
from tests.kit.protocol.pool import Hand, Pool


@pytest.fixture
def reaper(pool: Pool) -> Reaper:
    return Reaper(pool.store, pool.store.settings, name="r1")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here waits for the cap of an outage."""
    monkeypatch.setattr(module, "OUTAGE_BASE", 0.001)
    monkeypatch.setattr(module, "OUTAGE_CAP", 0.02)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def count(calls: list[int]) -> int:
    calls.append(1)
    return 0


# --- the sweep ---------------------------------------------------------------------------------------


def test_a_sweep_reaps_promotes_and_expires(pool: Pool, hand: Hand, reaper: Reaper):
    """All that time alone brings about, over all queues."""
    pool.submit("lost", "retried", "stale")
    pool.submit("elsewhere", queue="other")
    lost, retried, stale = hand.claim(3).claims
    other = Hand(pool, "w2", queues=["other"])
    other.claim(1)
    survivor = Hand(pool, "w3")
    hand.fail(retried)
    pool.make_due("retried")
    hand.step(stale, ["x"])
    hand.release(stale)
    pool.age_checkpoint("stale", 4000)
    pool.stop_heart(hand.incarnation)
    pool.expire_lease("elsewhere", queue="other")
    pool.set_pulse()
    reaped = reaper.sweep()
    assert {(item.id, item.kind, item.outcome) for item in reaped} == {
        ("lost", "WORKER_LOST", "queued"),
        ("", "WORKER_LOST", "gone"),
        ("elsewhere", "HANG", "scheduled"),
    }
    assert lost.id == "lost"
    assert pool.status("retried") is State.QUEUED
    assert pool.events("stale") == ["released", "restart"]
    assert survivor.claim(4).claims


def test_nothing_to_do_is_nothing_done(reaper: Reaper):
    """A sweep of an empty server."""
    assert reaper.sweep() == []


def test_checkpoints_are_looked_at_now_and_then_or_when_asked(
    pool: Pool, reaper: Reaper, monkeypatch: pytest.MonkeyPatch
):
    """They are an hour old: not at every sweep."""
    calls: list[int] = []
    monkeypatch.setattr(pool.store, "expire", lambda queues: count(calls))
    reaper.sweep(expire=False)
    assert calls == []
    reaper.sweep()
    assert calls == [1]
    reaper.sweep()
    assert calls == [1]
    reaper.sweep(expire=True)
    assert calls == [1, 1]
    monkeypatch.setattr(module, "EXPIRE_INTERVAL", 0.0)
    reaper.sweep()
    assert calls == [1, 1, 1]


def test_a_sweep_goes_on_while_something_is_left(pool: Pool, reaper: Reaper):
    """More than one call takes, in one sweep."""
    hands = [Hand(pool, f"w{number}") for number in range(40)]
    for hand in hands:
        hand.beat()
        pool.stop_heart(hand.incarnation)
    pool.set_pulse()
    assert {item.incarnation for item in reaper.sweep()} == {hand.incarnation for hand in hands}


def test_a_sweep_ends_even_if_there_is_always_something_left(
    pool: Pool, reaper: Reaper, monkeypatch: pytest.MonkeyPatch
):
    """A flood must not keep retries from being promoted."""
    calls: list[int] = []

    def reap(*_: object, **__: object) -> Sweep:
        calls.append(1)
        return Sweep(True, True, [])

    promoted: list[int] = []
    monkeypatch.setattr(pool.store, "reap", reap)
    monkeypatch.setattr(pool.store, "promote", lambda queues, rounds: count(promoted))
    reaper.sweep()
    assert (len(calls), promoted) == (MAX_ROUNDS, [1])


def test_one_line_is_logged_for_each_thing_reaped(
    pool: Pool, hand: Hand, reaper: Reaper, caplog: pytest.LogCaptureFixture
):
    """What, whose, why and what became of it."""
    pool.submit("a")
    claim = hand.take("a")
    pool.stop_heart(hand.incarnation)
    pool.set_pulse()
    with caplog.at_level(logging.INFO, "perdure.reaper"):
        reaper.sweep(expire=False)
        reaper.sweep(expire=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"r1: WORKER_LOST a is now queued (execution {claim.execution} of worker w1)",
        f"r1: WORKER_LOST worker w1 is gone ({hand.incarnation})",
    ]


def test_a_sweep_stops_before_it_touches_a_newer_protocol(pool: Pool, hand: Hand, reaper: Reaper):
    """An old reaper must not act upon what it may misread."""
    pool.submit("a")
    hand.take("a")
    pool.stop_heart(hand.incarnation)
    pool.set_pulse()
    pool.connection.set(key("schema"), SCHEMA + 1)
    with pytest.raises(ProtocolMismatch, match="upgrade"):
        reaper.sweep()
    assert pool.status("a") is State.STARTED


# --- the loop ----------------------------------------------------------------------------------------


def test_the_loop_rides_out_errors_of_redis(
    reaper: Reaper, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """One line when it goes away, one when it is back, however often it was tried."""
    stop = threading.Event()
    answers: Iterator[BaseException | None] = iter(
        [redis.ConnectionError("gone"), redis.TimeoutError("late"), redis.ResponseError("OOM"), OSError("odd"), None,
         redis.ReadOnlyError("replica"), None]
    )  # fmt: skip

    served: list[int] = []

    def counted() -> list[object]:
        served.append(1)
        if len(served) == 7:
            stop.set()
        answer = next(answers, None)
        if answer:
            raise answer
        return []

    monkeypatch.setattr(reaper, "sweep", counted)
    reaper.settings = reaper.settings.replace(reap_interval=0.001)
    with caplog.at_level(logging.INFO, "perdure.reaper"):
        reaper.run(stop)
    assert len(served) == 7
    assert [record.getMessage() for record in caplog.records] == [
        "r1: no sweep, trying again until it works: redis.exceptions.ConnectionError: gone",
        "r1: Redis answers again",
        "r1: no sweep, trying again until it works: redis.exceptions.ReadOnlyError: replica",
        "r1: Redis answers again",
    ]


def test_the_wait_of_an_outage_grows_to_its_cap(reaper: Reaper, monkeypatch: pytest.MonkeyPatch):
    """Doubling, capped, and spread over its upper half."""
    monkeypatch.setattr(module, "OUTAGE_BASE", 0.1)
    monkeypatch.setattr(module, "OUTAGE_CAP", 2.0)
    for failures, longest in ((1, 0.1), (2, 0.2), (5, 1.6), (6, 2.0), (10_000, 2.0)):
        reaper._outages = failures
        delays = [reaper._outage_delay() for _ in range(50)]
        assert all(longest / 2 <= delay <= longest for delay in delays)
        assert len(set(delays)) > 1


def test_the_loop_ends_with_a_newer_protocol(pool: Pool, reaper: Reaper):
    """It cannot get better by trying again."""
    pool.connection.set(key("schema"), SCHEMA + 1)
    with pytest.raises(ProtocolMismatch):
        reaper.run(threading.Event())


def test_a_loop_that_is_stopped_already_does_nothing(reaper: Reaper, pool: Pool):
    """Stopped before it began."""
    stop = threading.Event()
    stop.set()
    reaper.run(stop)
    assert not pool.connection.exists(key("pulse"))


def test_the_loop_survives_a_restart_of_the_real_server(server_binary: Path, caplog: pytest.LogCaptureFixture):
    """Killed and started again: the same loop goes on sweeping."""
    caplog.set_level(logging.INFO, "perdure.reaper")
    settings = Settings(reap_interval=0.02)

    def said(text: str) -> Callable[[], bool]:
        return lambda: any(text in record.getMessage() for record in caplog.records)

    with Server(binary=server_binary, die_with_parent=True) as own, connect(own.url) as connection:
        stop = threading.Event()
        loop = threading.Thread(target=Reaper(Store(connection, settings), settings, "r1").run, args=(stop,))
        loop.start()
        try:
            own.kill()
            wait_until(said("no sweep"))
            own.restart()
            wait_until(said("answers again"))
            with connect(own.url) as second:
                second.delete(key("pulse"))
                wait_until(lambda: bool(second.exists(key("pulse"))))
        finally:
            stop.set()
            loop.join(30)
        assert not loop.is_alive()


# --- the process -------------------------------------------------------------------------------------


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "perdure.recovery", *arguments], env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_sweeps_until_a_signal_and_ends_with_0(connection: redis.Redis, redis_url: str, number):
    """`python -m perdure.recovery --url …`; no traceback at its end."""
    process = start("--url", redis_url, "--reap-interval", "0.02", "--name", "r1")
    try:
        wait_until(lambda: bool(connection.exists(key("pulse"))))
        process.send_signal(number)
        code, errors = ended(process)
    finally:
        process.kill()
    assert (code, "Traceback" in errors) == (0, False)
    assert f"r1: sweeping {redis_url} every 0.02 s" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "environment", "code", "text"),
    [
        (["--url", "redis://127.0.0.1:1/0"], {}, 3, "Cannot reach Redis at redis://127.0.0.1:1/0"),
        ([], {}, 3, "No Redis is configured"),
        (["--url", "http://example"], {}, 2, "must begin with redis://"),
        (["--reap-interval", "soon"], {}, 2, "invalid float value"),
        (["--reap-interval", "0"], {}, 2, "PERDURE_REAP_INTERVAL must be more than 0"),
        (["--unknown"], {}, 2, "unrecognized arguments"),
        ([], {"PERDURE_REAP_INTERVALL": "1"}, 2, "did you mean PERDURE_REAP_INTERVAL?"),
    ],
)
def test_a_process_that_cannot_start_says_why(arguments, environment, code, text):
    """2 for usage, 3 for Redis; one line, no traceback."""
    ended_with, errors = ended(start(*arguments, **environment))
    assert (ended_with, text in errors, "Traceback" in errors) == (code, True, False), errors


def test_a_process_that_is_too_old_ends_with_4(connection: redis.Redis, redis_url: str):
    """Unhealthy, and says what to do."""
    connection.set(key("schema"), SCHEMA + 1)
    code, errors = ended(start("--url", redis_url))
    assert code == 4
    assert "upgrade this process" in errors
    assert "Traceback" not in errors
