"""One pool with every setting at its default, and all that may befall it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import redis

from perdure.protocol.connection import connect
from perdure.protocol.settings import Settings
from perdure.scripts.pool.pool import Child, Pool
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, eventually, gone, later
from tests.kit.places import TASKS

OUTAGE = 12.0
"""Seconds: longer than a heartbeat may be late and than any call waits, shorter than a lease."""


def answers(connection: redis.Redis) -> bool:
    try:
        return bool(connection.ping())
    except redis.TimeoutError:
        return False


def child_of(pool: Pool, worker: str, lab: Lab) -> Child:
    """The child of the pool that a request's worker is."""
    pid = next(item["pid"] for item in lab.store.workers() if item["worker"] == worker)
    return next(child for child in pool.children if child.process is not None and child.process.pid == pid)


@pytest.mark.slow
def test_with_every_setting_at_its_default(
    server_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree kill, a hang and an outage of 12 s: every request ends right, none is lost, charged or doubled."""
    monkeypatch.setenv("PYTHONPATH", str(TASKS))
    monkeypatch.delenv("PERDURE_MODEL_PATH", raising=False)  # scripts/test says where the tests find their weights
    assert Settings.from_environment() == Settings(), "something in the environment changes a default"
    with Server(tmp_path / "redis", binary=server_binary, die_with_parent=True) as server:
        pool = Pool(server.url, ["gpu"], 2, Settings(), output=tmp_path / "pool.log")
        with connect(server.url) as connection:
            lab = Lab(server.url, tmp_path, connection)
            pool.start()
            try:
                eventually(lambda: len([item for item in lab.store.workers() if item["ready"]]) == 2)
                # The hang first: a default lease lasts 30 s, and the rest happens meanwhile, on the other worker.
                hung = lab.submit("stall", {"folder": str(tmp_path), "seconds": 600})
                eventually((tmp_path / "hung").exists)
                stuck = child_of(pool, lab.record(hung).worker, lab)
                names = [lab.submit("many", {"n": 100, "sleep": 0.01}) for _ in range(8)]

                lab.moved(names[0], 10)
                killed = child_of(pool, lab.record(names[0]).worker, lab)
                assert killed is not stuck
                assert killed.process is not None
                tree = psutil.Process(killed.process.pid)
                for process in [*tree.children(recursive=True), tree]:
                    process.kill()
                eventually(lambda: lab.record(names[0]).executions == 2)

                lab.moved(names[0], 40)
                os.kill(server.pid, signal.SIGSTOP)
                with later(OUTAGE, lambda: os.kill(server.pid, signal.SIGCONT)):
                    eventually(lambda: answers(connection))

                for name in names:
                    record = lab.check(name, 100)
                    assert record.attempt == 0
                    assert {kind for _, kind in lab.events(name)} <= {"WORKER_LOST"}
                assert ("redelivered", "WORKER_LOST") in lab.events(names[0])

                eventually(lambda: ("suspected", "HANG") in lab.events(hung), 60)
                assert lab.check(hung, 6).attempt == 0
                # It would sleep on for minutes, and the pool would wait for its drain timeout.
                assert stuck.process is not None
                first = stuck.process
                first.kill()
                eventually(lambda: stuck.process is not None and stuck.process is not first)
                eventually(lambda: len([item for item in lab.store.workers() if item["ready"]]) == 2)
                assert lab.nothing_held()
                below = [child for item in pool.children for child in _below(item)]
            finally:
                clean = pool.stop()
            assert clean
            eventually(lambda: all(gone(pid) for pid in below))
            assert lab.store.workers() == []


def _below(child: Child) -> list[int]:
    assert child.process is not None
    return [process.pid for process in psutil.Process(child.process.pid).children(recursive=True)]
