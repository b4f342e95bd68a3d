"""What somebody listens to is stored after each step; who listens is known from Redis' own subscriptions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis

from perdure.producer import Client
from perdure.protocol.connection import connect
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.workers.leases.hearing import MOST_EARLY, Hearing
from perdure.workers.tasks.base import Step
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import TASK, Hand, Pool
from tests.kit.workers.bench import Bench

NEVER = 3600.0
"""Seconds between two checkpoints, so that only what is heard is stored."""


def channel(name: str) -> str:
    return key("replies", f"{name}:outputs")


@contextmanager
def listening(connection: redis.Redis, *names: str) -> Iterator[Any]:
    """Somebody listens to these channels."""
    pubsub = connection.pubsub()  # type: ignore[no-untyped-call]
    pubsub.subscribe(*names)
    for _ in names:
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
    try:
        yield pubsub
    finally:
        pubsub.close()


def progress(hand: Hand, claim: Any, outputs: list[Any], seq: int, *, tell: bool = True, brief: bool = False) -> str:
    row = replace(hand.progress(claim, outputs, seq - 1, seq), tell=tell, brief=brief)
    return hand.store.progress(hand.incarnation, [row])[0]


# --- processes -----------------------------------------------------------------------------------


def test_what_is_heard_is_stored_after_each_step(lab: Lab) -> None:
    """Once the task waits in a step, what came before is stored, although no checkpoint is due."""
    name = lab.submit("gate", {"folder": str(lab.folder)})
    with listening(lab.connection, channel(name)), Client(lab.url) as client:
        lab.worker(checkpoint_interval=NEVER)
        eventually(lambda: client.get(name).offset() == 3)
        (lab.folder / "open").touch()
        assert client.get(name).wait(timeout=30)


def test_who_begins_to_listen_later_is_heard_at_once(lab: Lab) -> None:
    """The worker is told by whoever listens: no checkpoint comes that could say so."""
    lab.worker(checkpoint_interval=NEVER)
    with Client(lab.url) as client:
        handle = client.get(lab.submit("gates", {"folder": str(lab.folder), "n": 10**6, "sleep": 0.01}))
        eventually(lambda: handle.status() == "started")
        outputs = handle.stream(timeout=30)
        assert [next(outputs) for _ in range(50)] == list(range(50))
        handle.cancel()


# --- scripts -------------------------------------------------------------------------------------


def test_a_claim_says_who_is_heard(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    pool.submit("a", "b", "c")
    with listening(connection, channel("b")):
        assert [claim.heard for claim in hand.claim(2).claims] == [False, True]
        again = hand.claim(2, forget=True).claims
        assert [(claim.id, claim.heard) for claim in again] == [("a", False), ("b", True)]
    assert [claim.heard for claim in hand.claim(1).claims] == [False]


def test_a_checkpoint_says_whether_it_was_heard(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    """On the request's own channel, and on that of a producer of an earlier release, which has one for all."""
    pool.submit("a", "b")
    a, b = hand.claim(2).claims
    with listening(connection, channel("a")) as pubsub:
        assert progress(hand, a, ["x"], 1) == "heard"
        assert pubsub.get_message(timeout=5)["data"] == b"a 1"
        assert progress(hand, a, ["y"], 2, tell=False) == "ok"
        assert progress(hand, a, [], 3) == "ok"
        assert progress(hand, b, ["x"], 1) == "ok"
        assert pubsub.get_message() is None
    with listening(connection, channel("me")) as pubsub:
        assert progress(hand, b, ["y"], 2) == "heard"
        assert progress(hand, b, ["z"], 3, brief=True) == "heard"
        assert [pubsub.get_message(timeout=5)["data"] for _ in range(2)] == [b"b 2", b"b 3"]
    assert progress(hand, a, ["z"], 3) == "ok"


def test_a_user_who_may_not_ask_claims_all_the_same(pool: Pool, connection: redis.Redis) -> None:
    """The rules for a worker of the release before have no PUBSUB: it hears so from its first checkpoint."""
    pool.submit("a")
    connection.acl_setuser(
        "worker", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-pubsub"]
    )
    try:
        options = connection.get_connection_kwargs()
        with (
            connect(f"redis://worker:x@{options['host']}:{options['port']}") as limited,
            listening(connection, channel("a")),
        ):
            hand = Hand(Pool(Store(limited, Settings())))
            (claim,) = hand.claim(1).claims
            assert not claim.heard
            assert progress(hand, claim, ["x"], 1) == "heard"
    finally:
        connection.acl_deluser("worker")


def test_a_worker_is_told_by_a_channel_of_producers(pool: Pool, hand: Hand, connection: redis.Redis) -> None:
    """Once for each stream, and only of what runs: a claim sees the others."""
    pool.submit("a", "b")
    hand.take("a")
    with listening(connection, key("replies", hand.name)) as pubsub, Client(connection=connection) as client:
        outputs = client.get("b").stream(timeout=0.2)
        with pytest.raises(TimeoutError):
            next(outputs)
        outputs = client.get("a").stream(timeout=3)  # looks at the request more than once
        with pytest.raises(TimeoutError):
            next(outputs)
        assert pubsub.get_message(timeout=5)["data"] == b"a"
        assert pubsub.get_message() is None


# --- rounds --------------------------------------------------------------------------------------


@pytest.fixture
def bench(connection: redis.Redis) -> Bench:
    """Holds a, b and c, of which a and b are heard; no checkpoint is due."""
    bench = Bench(connection)
    bench.pool.submit("a", "b", "c")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 8, None)
    bench.claim()
    bench.letters()
    bench.holdings.settings = replace(bench.holdings.settings, checkpoint_interval=NEVER)
    bench.courier.checkpoints._last = time.monotonic()
    bench.holdings.urgent = bench.holdings.wanting = False
    bench.courier.line.ledger.interval = NEVER
    for name in ("a", "b"):
        bench.holdings.listen(name)
    return bench


def turn(bench: Bench, number: int) -> None:
    """One step of all three."""
    keys = {name: item.claim.execution for name, item in bench.holdings.held.items()}
    assert bench.holdings.offer([Step(number, number, name) for name in "abc"], keys) == []


def stored(bench: Bench) -> list[int]:
    return [len(bench.pool.store.all_outputs(name)) for name in "abc"]


def scripts(connection: redis.Redis) -> int:
    stats: Any = connection.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


def test_one_call_stores_what_is_heard_of_a_step(bench: Bench) -> None:
    """With its states, so that whoever goes on has them; slots are free, and nothing is claimed meanwhile."""
    calls = []
    for number in range(3):
        turn(bench, number)
        bench.courier._round()
        calls.append(scripts(bench.pool.connection))
    assert calls[2] - calls[0] == 2  # the first call finds that the server does not have the script yet
    assert stored(bench) == [3, 3, 0]
    assert [bench.pool.store.state(name)[0] for name in "abc"] == [2, 2, None]


def test_what_is_heard_rests_as_long_as_a_call_takes(bench: Bench) -> None:
    """So that half of Redis' time is left for others, and several steps go in one call when it is slow."""
    turn(bench, 0)
    bench.courier._round()
    for _ in range(5):
        bench.courier.line.pace.took(NEVER)
    assert bench.courier.checkpoints.prompt_in() > 0.9 * NEVER
    turn(bench, 1)
    bench.courier.checkpoints.store()
    assert stored(bench) == [1, 1, 0]
    for _ in range(5):
        bench.courier.line.pace.took(1e-6)
    bench.courier._round()
    assert stored(bench) == [2, 2, 0]


def test_long_steps_that_are_heard_hold_nothing_else_up(bench: Bench) -> None:
    """A step takes longer than an interval: the courier waits for it with nothing to store, and claims too."""
    holdings = bench.holdings
    holdings.settings = replace(holdings.settings, checkpoint_interval=0.001)
    bench.courier.checkpoints._last = 1.0
    bench.pool.submit("d")

    def step() -> None:
        eventually(lambda: holdings.hungry)
        turn(bench, 0)

    with ThreadPoolExecutor(1) as other:
        stepping = other.submit(step)
        bench.courier._round()
        stepping.result()
    assert stored(bench) == [1, 1, 1]
    assert "d" in holdings.held


def test_what_nobody_listens_to_any_more_waits(bench: Bench) -> None:
    """It is forgotten after a silence; until then each call asks who listens."""
    turn(bench, 0)
    bench.courier._round()
    a, b = (bench.holdings.held[name] for name in "ab")
    assert a.hearing.heard
    with listening(bench.pool.connection, channel("b")):
        for item in (a, b):
            item.hearing._heard_at = time.monotonic() - 60  # between two outputs there may be any time
        turn(bench, 1)
        assert bench.holdings.prompt
        bench.courier._round()
        assert [a.hearing.heard, b.hearing.heard] == [False, True]
    turn(bench, 2)
    bench.courier._round()
    assert stored(bench) == [2, 3, 0]


def test_who_is_heard_of_before_the_claim_s_answer_counts(connection: redis.Redis) -> None:
    """A claim is on its way back, its client sees that the request runs, and says that he listens."""
    bench = Bench(connection)
    bench.pool.submit("a", "b")
    for number in range(2000):
        bench.holdings.listen(f"another-{number}")
    assert len(bench.holdings.early._at) == MOST_EARLY
    bench.holdings.early._at.clear()
    bench.holdings.listen("a")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    bench.claim()
    assert [bench.holdings.held[name].hearing.heard for name in "ab"] == [True, False]
    assert bench.holdings.early._at == {}


def test_what_was_cut_off_is_sent_again_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not only at the next checkpoint."""
    store, send = bench.pool.store, bench.pool.store.progress

    def cut(incarnation: str, requests: Any) -> list[str]:
        monkeypatch.setattr(store, "progress", send)
        raise redis.ConnectionError("cut off")

    monkeypatch.setattr(store, "progress", cut)
    turn(bench, 0)
    bench.courier._round()
    assert stored(bench) == [0, 0, 0]
    assert bench.holdings.prompt

    def again() -> bool:
        bench.courier._round()
        return stored(bench) == [1, 1, 0]

    eventually(again)


def test_what_is_not_heard_asks_once_a_second() -> None:
    hearing = Hearing()
    assert [hearing.tell(), hearing.tell()] == [True, False]
    eventually(hearing.tell)
    hearing.listen()
    assert [hearing.tell(), hearing.tell()] == [True, True]
