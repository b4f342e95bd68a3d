"""A process is killed between any two things that it does to the world; what comes of it is right all the same.

The external effects of worker, guardian, reaper and producer stand in :data:`GAPS` and its like, in the order in which
they happen; each test kills a real process with SIGKILL in one of the gaps between them (``crash_hooks/``), lets others
take over, and looks at what is left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.command import send_stop_job_command

from perdure.producer import Client
from perdure.protocol.keys import PREFIX, key
from perdure.protocol.settings import Settings
from perdure.recovery.reaper import Reaper
from tests.kit.lab import Lab, Process, eventually, gone, send
from tests.kit.places import TASKS, TESTS
from tests.kit.protocol.pool import TASK, Hand, Pool

pytestmark = pytest.mark.slow

HOOKS = TESTS / "crash_hooks"
STEPS = "point_tasks.steps"

Action = Callable[[Lab, Process, str], object]


def crash_at(point: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(HOOKS), str(TASKS)]), "CRASH_POINT": point}


def within(lab: Lab, payload: dict[str, Any]) -> dict[str, Any]:
    """The payload with its files in the folder of this test."""
    return payload | {name: str(lab.folder / payload[name]) for name in ("until", "reached") if name in payload}


def wait_inside(lab: Lab) -> None:
    """The long step has begun."""
    eventually((lab.folder / "reached").exists)


def drain(lab: Lab, victim: Process, name: str) -> None:
    wait_inside(lab)
    victim.send(signal.SIGTERM)
    (lab.folder / "open").touch()


def cancel(lab: Lab, victim: Process, name: str) -> None:
    wait_inside(lab)
    assert lab.store.cancel([(name, "")], reason="asked") == ["requested"]
    (lab.folder / "open").touch()


def stop(lab: Lab, victim: Process, name: str) -> None:
    wait_inside(lab)
    send_stop_job_command(lab.connection, name)
    (lab.folder / "open").touch()


def nothing(lab: Lab, victim: Process, name: str) -> None:
    pass


def leave(lab: Lab, victim: Process, name: str) -> None:
    """The worker stops when its request has ended."""
    lab.ended(name)
    victim.send(signal.SIGTERM)


SHORT: dict[str, Any] = {"heartbeat_timeout": 0.8, "reap_interval": 0.1}
"""Settings of workers whose guardians find a lost host soon."""

LARGE = {"bytes": 1_200_000}
FAILS = {"fails": 1}
LONG: dict[str, Any] = {"until": "open", "reached": "reached"}

GAPS: dict[str, tuple[str, dict[str, Any], Action, str]] = {
    # The start of a worker.
    "registered, not yet listening to commands": ("birth 1 after", {}, nothing, "finished"),
    "listening to commands, no guardian yet": ("commands 1 after", {}, nothing, "finished"),
    "guarded, not yet known as ready": ("guardian 1 after", {}, nothing, "finished"),
    "ready, not yet waiting at the bell": ("ready 1 after", {}, nothing, "finished"),
    # A request's way through it.
    "woken by the bell, nothing claimed": ("bell 1 before", {}, nothing, "finished"),
    "claimed, nothing stored": ("claim 1 after", {}, nothing, "finished"),
    "one checkpoint stored": ("progress 1 after", {}, nothing, "finished"),
    "several checkpoints stored": ("progress 3 after", {}, nothing, "finished"),
    "one chunk of a state written, one to come": ("chunk 1 after", LARGE, nothing, "finished"),
    "all chunks written, not committed": ("chunk 2 after", LARGE, nothing, "finished"),
    "all chunks committed": ("progress 1 after", LARGE, nothing, "finished"),
    "result computed, not stored": ("finish 1 before", {}, nothing, "finished"),
    "result stored, worker not told": ("finish 1 after", {}, nothing, "finished"),
    "failed, nobody told": ("fail 1 before", FAILS, nothing, "finished"),
    "failed and put aside for its retry": ("fail 1 after", FAILS, nothing, "finished"),
    "resumed, nothing stored since": ("claim 2 after", FAILS, nothing, "finished"),
    # Its other ends.
    "told of a cancel, not confirmed": ("cancel 1 before", LONG, cancel, "canceled"),
    "cancel confirmed": ("cancel 1 after", LONG, cancel, "canceled"),
    # RQ's command was in the memory of the lost worker alone, as RQ has it.
    "told to stop, not written": ("stop 1 before", LONG, stop, "finished"),
    "stop written, not confirmed": ("stop 1 after", LONG, stop, "stopped"),
    "drained, nothing handed back": ("release 1 before", LONG, drain, "finished"),
    "handed back, still registered": ("release 1 after", LONG, drain, "finished"),
    # The end of a worker.
    "idle and told to leave": ("reap 1 before", {}, leave, "finished"),
    "its own tombstone set, still registered": ("reap 1 after", {}, leave, "finished"),
    "unregistered, guardian not dismissed": ("death 1 after", {}, leave, "finished"),
    # (The first good-bye was that of `watch`, to no guardian at all.)
    "guardian dismissed, not yet gone": ("goodbye 2 after", {}, leave, "finished"),
}
"""Between two effects of a worker -> where the process is killed, what its request does, what the test does
meanwhile, and how the request ends."""


def leaks(connection: redis.Redis) -> list[str]:
    """Keys without an expiry that belong to a request, a worker or an execution."""
    stems = ("job", "execution", "executions", "worker", "results", "incarnation", "held", "output", "checkpoint",
     "chunk", "history",
             "leases", "retries", "suspects", "deadlines", "bell", "wip")  # fmt: skip
    prefixes = tuple(key(stem) for stem in stems)
    found: Any = connection.scan_iter(match=f"{PREFIX}:*", count=1000)
    names = [name.decode() for name in found]
    return sorted(name for name in names if name.startswith(prefixes) and connection.ttl(name) == -1)


def check_end(lab: Lab, name: str, status: str) -> None:
    """It ended once and as it should; nothing is held, and nothing stays for ever."""
    if status == "finished":
        lab.check(name, 6)
    else:
        assert lab.ended(name).status == status, lab.events(name)
        outputs = lab.outputs(name)
        assert outputs == list(range(len(outputs)))
    eventually(lab.nothing_held)
    assert not lab.waiting()
    assert not lab.connection.exists(key("checkpoints"), key("suspects", "gpu"), key("retries", "gpu"))
    assert eventually(lambda: not leaks(lab.connection)), leaks(lab.connection)


@pytest.mark.parametrize("gap", GAPS)
def test_a_worker_that_is_killed(lab: Lab, gap: str):
    """Another worker takes over."""
    point, payload, action, status = GAPS[gap]
    name = lab.submit(STEPS, within(lab, payload))
    victim = lab.worker(wait=False, environment=crash_at(f"worker {point}"), retry_base=0.05)
    action(lab, victim, name)
    assert victim.end() == -signal.SIGKILL, victim.log
    (lab.folder / "open").touch()
    lab.worker(wait=False, retry_base=0.05)
    check_end(lab, name, status)


@pytest.mark.parametrize("gap", ["one checkpoint stored", "several checkpoints stored", "result computed, not stored"])
def test_a_worker_that_is_killed_with_its_guardian(lab: Lab, gap: str):
    """A whole host is lost: the guardian of another worker finds it by its silence."""
    victim = lab.worker(environment=crash_at(f"worker {GAPS[gap][0]}"), **SHORT)
    guardians = victim.children()
    assert guardians
    for pid in guardians:
        send(pid, signal.SIGSTOP)  # it sees nothing
    name = lab.submit(STEPS)
    assert victim.end() == -signal.SIGKILL, victim.log
    for pid in guardians:
        send(pid, signal.SIGKILL)
    lab.worker(wait=False, **SHORT)
    check_end(lab, name, "finished")


HEARTBEATS = {
    "started, no heartbeat sent": "heartbeat 1 before",
    "one heartbeat sent": "heartbeat 1 after",
    "several heartbeats sent": "heartbeat 3 after",
}


@pytest.mark.parametrize("gap", HEARTBEATS)
def test_a_guardian_that_is_killed(lab: Lab, gap: str):
    """Its worker starts another and goes on; the request does not notice."""
    name = lab.submit(STEPS)
    worker = lab.worker(wait=False, environment=crash_at(f"guardian {HEARTBEATS[gap]}"))
    assert lab.ended(name).executions == 1
    assert worker.running
    check_end(lab, name, "finished")


@pytest.mark.parametrize("when", ["before", "after"], ids=["its worker gone, nothing reaped", "its worker reaped"])
def test_a_guardian_that_is_killed_when_its_worker_is_gone(lab: Lab, when: str):
    """Another worker's guardian finds what both left."""
    name = lab.submit(STEPS, within(lab, LONG))
    # A sweep is a call of the same script: none is due for so long.
    Pool.over(lab.connection).set_pulse()
    victim = lab.worker(wait=False, environment=crash_at(f"guardian reap 1 {when}"), reap_interval=100)
    wait_inside(lab)
    guardians = victim.children()
    victim.kill()
    eventually(lambda: all(gone(pid) for pid in guardians))
    assert lab.nothing_held() == (when == "after")
    (lab.folder / "open").touch()
    lab.worker(wait=False, **SHORT)
    check_end(lab, name, "finished")


SWEEPS = {
    "nothing swept": "reap 1 before",
    "the dead reaped, nothing promoted": "reap 1 after",
    "retries promoted, checkpoints not looked at": "promote 1 after",
    "stale checkpoints dropped": "expire 1 after",
}


@pytest.mark.parametrize("gap", SWEEPS)
def test_a_reaper_that_is_killed(lab: Lab, gap: str):
    """One request of a dead worker, one due retry, one stale checkpoint: the next sweep does what is left, once."""
    pool = Pool.over(lab.connection)
    pool.submit("held", "failed", "stale")
    hand, other = Hand(pool, slots=3), Hand(pool, "w2")
    hand.beat()
    claims = {claim.id: claim for claim in hand.claim().claims}
    for claim in claims.values():
        hand.step(claim, [0, 1])
    hand.release(claims["stale"], delay=3600)
    hand.fail(claims["failed"])
    pool.make_due("failed")
    pool.age_checkpoint("stale", 4000)
    pool.stop_heart(hand.incarnation)
    pool.set_pulse()
    # With so long an interval the pulse is good for as long as a start may take.
    command = [sys.executable, "-m", "perdure.recovery", "--redis-url", lab.url]
    victim = lab._start("reaper", command, {"reap_interval": 100}, crash_at(f"reaper {SWEEPS[gap]}"))
    assert victim.end() == -signal.SIGKILL, victim.log
    pool.set_pulse()
    Reaper(pool.store, Settings()).sweep(expire=True)
    assert pool.events("held").count("redelivered") == 1
    assert sorted(pool.waiting()) == ["failed", "held"]
    assert pool.events("stale") == ["released", "restart"]
    pool.make_due("stale")
    got = {claim.id: claim for claim in other.claim().claims}
    assert {name: claim.offset for name, claim in got.items()} == {"held": 2, "failed": 2, "stale": 0}
    for claim in got.values():
        assert other.finish(claim, offset=claim.offset) == "ok"
    assert lab.nothing_held()
    assert not leaks(lab.connection)


PRODUCER = """
import os
from perdure.producer import Client
with Client(os.environ["RQ_REDIS_URL"]) as client:
    handle = client.submit("app.tasks.count", {"n": 1}, queue="gpu", idempotency_key="once")
    print(list(handle.stream(timeout=30)), handle.result(timeout=30))
"""

SUBMITS = {
    "nothing sent": "enqueue 1 before",
    "stored, not told": "enqueue 1 after",
    "waiting for outputs": "listen 1 after",
    "asked once for the end": "poll 1 after",
}


@pytest.mark.parametrize("gap", SUBMITS)
def test_a_producer_that_is_killed(redis_url: str, connection: redis.Redis, tmp_path: Path, gap: str):
    """Started again it sends the same submit: one request in all, and its answer is read from the start."""
    environment = {**os.environ, "RQ_REDIS_URL": redis_url, **crash_at(f"producer {SUBMITS[gap]}")}
    command = [sys.executable, "-c", PRODUCER]
    victim = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    hand = Hand(Pool.over(connection))
    with Client(redis_url) as client:
        handle = client.submit(TASK, {"n": 1}, queue="gpu", idempotency_key="once")
        (claim,) = hand.claim().claims
        assert claim.id == handle.id
        hand.step(claim, [0, 1])
        hand.finish(claim, "done", offset=2, outputs=[2])
        assert list(handle.stream(timeout=30)) == [0, 1, 2]
        assert handle.result(timeout=30) == "done"
        assert client.submit(TASK, {"n": 1}, queue="gpu", idempotency_key="once").result(timeout=30) == "done"
    assert not hand.claim().claims
    assert not leaks(connection)
