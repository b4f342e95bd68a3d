"""The end of a worker's process, whatever its tasks have left behind: bounded, with its own status, and
with its kin.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.lab import Lab, eventually, gone, send
from tests.kit.places import TASKS

KIN = ("multiprocessing", "spawn", "subprocess", "session", "grandchild", "fork")


@pytest.fixture
def left(lab: Lab) -> Iterator[list[int]]:
    """Process ids of what a task has left; none outlives the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if not gone(pid):
            send(pid, signal.SIGKILL)


def started(lab: Lab, left: list[int], *what: str) -> None:
    """Wait until a task has started these."""
    for name in what:
        file = Path(lab.folder, f"{name}.pid")
        eventually(file.exists)
        left.append(int(file.read_text()))
        assert not gone(left[-1]), name


@pytest.mark.slow
@pytest.mark.parametrize("what", ["thread", "hook", "multiprocessing", "subprocess", "fork"])
def test_what_a_task_leaves_behind_does_not_keep_the_process(lab: Lab, left: list[int], what: str) -> None:
    """SIGTERM: it ends with status 0 within a few seconds, and what it has started ends with it."""
    worker = lab.worker()
    lab.ended(lab.submit("leave_tasks.leaves", {"what": [what]}))
    if what in KIN:
        started(lab, left, what)
    worker.send(signal.SIGTERM)
    assert worker.end(20) == 0
    assert "Traceback" not in worker.log
    eventually(lambda: all(gone(pid) for pid in left))


def test_kill_9_ends_what_the_tasks_have_started(lab: Lab, left: list[int]) -> None:
    """Children, their children, those in sessions of their own; and nobody who only has the same name."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        worker = lab.worker()
        one = lab.submit("leave_tasks.leaves", {"what": KIN, "n": 10_000})
        lab.moved(one)
        started(lab, left, *KIN)
        worker.kill()
        eventually(lambda: all(gone(pid) for pid in left))
        assert stranger.poll() is None
        assert lab.events(one) == [("redelivered", "WORKER_LOST")]
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
def test_a_child_with_its_own_environment_is_known(lab: Lab, left: list[int]) -> None:
    worker = lab.worker()
    one = lab.submit("leave_tasks.leaves", {"what": ["bare"], "n": 10_000})
    lab.moved(one, 40)  # two seconds: the guardian looks once in each
    started(lab, left, "bare")
    worker.kill()
    eventually(lambda: all(gone(pid) for pid in left))


IN_PROCESS = """
import atexit, sys, threading, time
from redis import Redis
from rq import Queue
from perdure.workers import Worker

connection = Redis.from_url(sys.argv[1])
mine = threading.Thread(target=time.sleep, args=(7.0,))
mine.start()
atexit.register(print, "to its end")
Worker([Queue("gpu", connection=connection)], connection=connection).work(burst=True)
sys.exit(5)
"""


@pytest.mark.slow
def test_a_program_that_calls_work_keeps_what_is_its_own(lab: Lab) -> None:
    """Its threads are waited for, for longer than a worker's would be, and its status is its own."""
    environment = os.environ | {"PYTHONPATH": str(TASKS)}
    command = [sys.executable, "-c", IN_PROCESS, lab.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 5, done.stderr
    assert "to its end" in done.stdout


def blocked(lab: Lab, name: str) -> subprocess.Popen[bytes]:
    """A worker whose output nobody reads."""
    rq = str(Path(sys.executable).with_name("rq"))
    command = [rq, "worker", "-w", "perdure.workers.Worker", "--url", lab.url, "--name", name, "gpu"]
    environment = os.environ | {"PYTHONPATH": str(TASKS)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=lab.folder)


@pytest.mark.slow
def test_unread_output_stops_neither_work_nor_stop(lab: Lab) -> None:
    """Requests are stored, SIGTERM hands back and ends the process, with a pipe that has been full for long."""
    worker = blocked(lab, "mute")
    try:
        one = lab.submit("leave_tasks.talks", {"n": 30})
        assert lab.ended(one).status == "finished"
        two = lab.submit("leave_tasks.talks", {"n": 100_000})
        lab.moved(two, 3)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert {event for event, _ in lab.events(two)} == {"released"}
        assert lab.nothing_held()
    finally:
        worker.kill()
        worker.communicate()


def test_a_guardian_whose_output_nobody_reads_hands_on(lab: Lab) -> None:
    """It writes to the same pipe, and says what it does before it does it."""
    worker = blocked(lab, "mute")
    try:
        one = lab.submit("leave_tasks.talks", {"n": 100_000})
        lab.moved(one, 20)
        worker.kill()
        worker.wait()
        eventually(lambda: lab.events(one) == [("redelivered", "WORKER_LOST")], 10)
    finally:
        worker.kill()
        worker.communicate()
