"""The pool on one machine: children that die are replaced, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from perdure.protocol.connection import connect
from perdure.protocol.settings import Settings
from perdure.scripts.pool.pool import Pool
from perdure.workers.pool.places import describe
from tests.kit.lab import QUICK, Lab, eventually, gone, laboratory
from tests.kit.places import TASKS


def ready(lab: Lab) -> list[int]:
    """Process ids of the workers that claim."""
    return [item["pid"] for item in lab.store.workers() if item["ready"] and item["dead_in"] > 0]


@pytest.mark.slow
def test_the_dead_are_replaced_and_all_leave_together(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed worker or reaper is started again; stop() drains all and leaves no process, guardians included."""
    monkeypatch.setenv("PYTHONPATH", str(TASKS))
    pool = Pool(redis_url, ["gpu"], 1, Settings().replace(**QUICK), output=tmp_path / "pool.log")
    with laboratory(redis_url, tmp_path) as lab:
        pool.start()
        try:
            (worker,) = eventually(lambda: ready(lab))
            one = lab.submit("count", {"n": 100, "sleep": 0.02})
            lab.moved(one, 3)
            reaper = pool.children[0].process
            assert reaper is not None
            reaper.kill()
            os.kill(worker, signal.SIGKILL)
            (other,) = eventually(lambda: [pid for pid in ready(lab) if pid != worker])
            eventually(lambda: pool.children[0].process not in (None, reaper))
            stored = lab.moved(one, 10)
            below = [child.pid for child in psutil.Process(other).children(recursive=True)]
            pids = [child.process.pid for child in pool.children if child.process is not None]
        finally:
            clean = pool.stop()
        assert clean
        eventually(lambda: all(gone(pid) for pid in [*pids, *below]))
        assert (lab.waiting(), lab.record(one).attempt) == ([one], 0)
        assert len(lab.outputs(one)) >= stored
        assert lab.nothing_held()


@pytest.mark.slow
def test_a_child_that_dies_at_once_is_started_ever_later(
    redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that cannot start does not use up the machine: the pauses between its starts grow."""
    settings = Settings().replace(tasks=("no_such_module.task",), **QUICK)
    pool = Pool(redis_url, ["gpu"], 1, settings, output=tmp_path / "pool.log")
    pool.start()
    try:
        eventually(lambda: "again in 1 s" in caplog.text)
    finally:
        pool.stop()
    assert "cannot load a task of PERDURE_TASKS" in (tmp_path / "pool.log").read_text()


def test_children_die_with_their_pool(redis_url: str, tmp_path: Path) -> None:
    """Kill -9 of the pool's process: its children get SIGTERM from the kernel, hand back and leave."""
    if sys.platform != "linux":
        pytest.skip("the kernel tells children of their parent's death on Linux only")
    environment = {**os.environ, **Settings().replace(**QUICK).environment(), "PERDURE_REDIS_URL": redis_url}
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-P", "-m", "perdure.scripts.main", "up", "gpu"], stdout=log, stderr=log,
            start_new_session=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
    try:
        with laboratory(redis_url, tmp_path) as lab:
            eventually(lambda: ready(lab) or up.poll() is not None)
            assert up.poll() is None, (tmp_path / "up.log").read_text()
            below = [child.pid for child in psutil.Process(up.pid).children(recursive=True)]
            assert len(below) == 5, "reaper, worker, guardian, undertaker, relay of their lines"
            up.kill()
            eventually(lambda: all(gone(pid) for pid in below))
            eventually(lambda: lab.store.workers() == [])
    finally:
        up.kill()
        up.wait()


@pytest.mark.slow
def test_up_starts_a_server_of_its_own_and_ends_cleanly(tmp_path: Path) -> None:
    """``perdure up`` without a Redis: it starts one, serves, and on SIGTERM everything ends with status 0."""
    environment = {
        **os.environ, **Settings().replace(**QUICK).environment(), "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONPATH": str(TASKS),
    }  # fmt: skip
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-P", "-m", "perdure.scripts.main", "up", "gpu"], stdout=log, stderr=log,
            start_new_session=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
    try:
        record = tmp_path / "state" / "perdure" / "server.json"
        eventually(lambda: record.exists() or up.poll() is not None)
        assert up.poll() is None, (tmp_path / "up.log").read_text()
        import json

        url = eventually(lambda: record.read_text()) and json.loads(record.read_text())["url"]
        with connect(url) as connection:
            lab = Lab(url, tmp_path, connection)
            one = lab.submit("count", {"n": 3})
            lab.check(one, 3)
        below = [child.pid for child in psutil.Process(up.pid).children(recursive=True)]
        up.send_signal(signal.SIGTERM)
        assert up.wait(20) == 0
        eventually(lambda: all(gone(pid) for pid in below))
        assert not record.exists()
    finally:
        if up.poll() is None:
            up.kill()
            up.wait()


def test_an_ending_is_told_in_words() -> None:
    """Exit statuses and signals are named; a signal without a name keeps its number."""
    assert describe(0) == "exit status 0"
    assert describe(3) == "exit status 3"
    assert describe(-9) == "signal SIGKILL"
    assert describe(-200) == "signal 200"
