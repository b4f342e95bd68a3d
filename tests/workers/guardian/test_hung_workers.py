"""A worker that stands still is ended, with the stacks of its threads; one that waits, loads or was frozen is not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import redis
from rq import Queue
from rq.suspension import resume, suspend

from perdure.protocol.keys import key
from perdure.scripts.pool.server import Server
from perdure.workers import Request, Step, task
from perdure.workers.engine.engines import as_batch
from perdure.workers.tasks.members import Members
from tests.kit.lab import Lab, Process, eventually, laboratory, later, send
from tests.kit.places import TASKS

N = 6


def poison(lab: Lab, how: str, task: str = "alone") -> str:
    return lab.submit(f"hang_tasks.{task}", {"folder": str(lab.folder), "how": how})


def hung(process: Process) -> str:
    """What its guardian says of a worker that it has ended."""
    assert process.end() in (-signal.SIGABRT, -signal.SIGKILL)
    return eventually(lambda: next((line for line in process.log.splitlines() if " hangs: " in line), ""))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["native", "elsewhere"])
def test_who_keeps_the_interpreters_lock_ends_its_worker(lab: Lab, how: str) -> None:
    """A step in native code, or any other thread: HANG, another worker goes on, `perdure show` prints the stacks."""
    worker = lab.worker(step_timeout=1.5)
    one = poison(lab, how)
    assert "its engine loop has not moved" in hung(worker)
    lab.worker(wait=False)
    record = lab.check(one, N)
    assert lab.events(one) == [("suspected", "HANG"), ("retry", "HANG")]
    assert (record.attempt, lab.connection.hget(key("job", one), "crashes_total")) == (0, b"1")
    shown = subprocess.run(
        [Path(sys.executable).with_name("perdure"), "show", one, "--url", lab.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert f"stacks of {worker.name} at its end:" in shown
    assert "in hold_the_interpreter" in shown
    assert how == "native" or "in hold_it_elsewhere" in shown
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_courier_that_hangs_ends_its_worker(lab: Lab) -> None:
    """It waits for a lock that a step never gives back, while the loop steps on: all that is held is handed on."""
    worker = lab.worker(step_timeout=0.5)
    one = lab.submit("hang_tasks.beside", {"folder": str(lab.folder), "how": "log", "sleep": 1.5}, step_timeout=3)
    eventually((lab.folder / f"hung-{one}").exists)
    two = lab.submit("hang_tasks.beside", {})  # the courier writes into the log that it comes
    assert "its courier has not moved" in hung(worker)
    eventually(lambda: all(("suspected", "HANG") in lab.events(name) for name in (one, two)))
    eventually(lambda: "in _admission" in worker.log)


@pytest.mark.slow
def test_a_courier_that_fails_ends_its_worker(lab: Lab) -> None:
    """With its error in the log and status 1; what was held is accused of nothing and goes on elsewhere."""
    worker = lab.worker()
    one = poison(lab, "fail")
    assert worker.end() == 1
    assert "the courier stopped" in worker.log
    assert "ArithmeticError" in worker.log
    lab.worker(wait=False)
    assert lab.check(one, N).attempt == 0
    assert lab.events(one) == [("redelivered", "WORKER_LOST")]


@pytest.mark.slow
def test_a_worker_that_was_stopped_alone_is_ended(lab: Lab) -> None:
    """SIGSTOP to the worker and not to its guardian: it cannot write its stacks, and is replaced all the same."""
    worker = lab.worker(step_timeout=1)
    one = lab.submit("count", {"n": 100, "sleep": 0.02})
    lab.moved(one, 5)
    worker.send(signal.SIGSTOP)
    assert "its engine loop has not moved" in hung(worker)
    assert worker.process.returncode == -signal.SIGKILL
    lab.worker(wait=False)
    lab.check(one, 100)
    assert ("retry", "HANG") in lab.events(one)


@pytest.mark.slow
def test_a_worker_stopped_with_its_guardian_is_not_judged(lab: Lab) -> None:
    """As when a container or a machine is paused: for longer than a step may take, in the middle of one."""
    worker = lab.worker(step_timeout=1)
    one = lab.submit("count", {"n": 40, "sleep": 0.1})
    lab.moved(one, 5)
    pids = [worker.pid, *worker.children()]
    for pid in pids:
        send(pid, signal.SIGSTOP)
    rest(3)
    for pid in pids:
        send(pid, signal.SIGCONT)
    lab.check(one, 40)
    assert worker.running
    assert " hangs: " not in worker.log


@pytest.mark.slow
def test_who_waits_is_not_judged(lab: Lab) -> None:
    """Idle, suspended, in a plain job, loading with the interpreter's lock held: each for many step timeouts."""
    worker = lab.worker(step_timeout=0.2, environment={"LAB_LOAD": "2"})
    rest(2)
    suspend(lab.connection)
    one = lab.submit("count", {"n": 3})
    rest(2)
    assert lab.record(one).status == "queued"
    resume(lab.connection)
    lab.check(one, 3)
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.nap", 2, job_timeout=-1)
    eventually(lambda: job.get_status(refresh=True) == "finished")
    assert lab.check(lab.submit("hang_tasks.Greedy", {}), N).worker == worker.name
    assert worker.running
    assert " hangs: " not in worker.log


@pytest.mark.slow
def test_who_waits_for_redis_is_not_judged(server_binary: Path, tmp_path: Path) -> None:
    """Its server is frozen for many step timeouts, and a durable step waits for it as well: it goes on by itself."""
    with Server(tmp_path / "redis", binary=server_binary) as server, laboratory(server.url, tmp_path) as lab:
        worker = lab.worker(step_timeout=0.5)
        one = lab.submit("gates", {"folder": str(tmp_path), "n": 30, "sleep": 0.02, "durable": True})
        lab.moved(one, 5)
        os.kill(server.pid, signal.SIGSTOP)
        with later(4, lambda: os.kill(server.pid, signal.SIGCONT)):
            eventually(lambda: _answers(lab.connection))
        assert lab.check(one, 30).worker == worker.name
        assert worker.running
        assert " hangs: " not in worker.log


@pytest.mark.slow
def test_a_load_that_does_not_end_is_judged(lab: Lab) -> None:
    """By the load timeout."""
    worker = lab.worker(step_timeout=0.3, load_timeout=1, environment={"LAB_LOAD": "600"})
    one = lab.submit("hang_tasks.Greedy", {})
    assert "(1 s are allowed)" in hung(worker)
    eventually(lambda: ("retry", "HANG") in lab.events(one))


@pytest.mark.slow
def test_a_worker_with_no_slot_left_is_replaced(lab: Lab) -> None:
    """Every thread of a task hangs: nothing can run there any more."""
    worker = lab.worker(step_timeout=1)
    names = [poison(lab, "sleep", "beside") for _ in range(2)]
    assert "each of its 2 slots" in hung(worker)
    lab.worker(wait=False)
    for name in names:
        lab.check(name, N)


def test_an_event_loop_that_is_blocked_is_noticed() -> None:
    """By what waits to be run on it, after a step timeout in which it has run nothing; while it runs,
    nothing is said.
    """

    @task(slots=8)
    async def blocks(request: Request) -> AsyncGenerator[Step, None]:
        await asyncio.sleep(0.5)
        yield Step()
        time.sleep(1)  # noqa: ASYNC251  # that is what is tested
        yield Step()

    batch = as_batch(blocks)
    assert isinstance(batch, Members)
    batch.admit(Request(id="a", payload={}, attempt=1, execution="e"))
    batch.resume()
    while not batch.collect():
        assert not batch.stuck(0.3), "it awaits for longer, which is a hang of this request alone"
    batch.resume()
    assert "blocked" in eventually(lambda: batch.stuck(0.1))
    eventually(batch.collect)
    batch.drop("a")
    assert batch.join(30)
    batch.close()


def test_the_backstop_ends_a_process_whose_guardian_is_gone(tmp_path: Path) -> None:
    """Without anybody beside it: it writes the stacks and exits, although no thread of it gets the
    interpreter's lock.
    """
    code = """
import os, sys
from perdure.workers.guardian import watchdog
sys.path.append(sys.argv[1])
from hang_tasks import hold_the_interpreter
watchdog.SPARE = 0.3
dog = watchdog.Watchdog(file=os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT))
for _ in range(3):
    dog.tick(0.2)
hold_the_interpreter()
"""
    tasks = str(TASKS)
    ended = subprocess.run([sys.executable, "-c", code, tasks, str(tmp_path / "stacks")], check=False, timeout=60)
    assert ended.returncode == 1
    assert "Timeout (" in (tmp_path / "stacks").read_text()
    assert "in hold_the_interpreter" in (tmp_path / "stacks").read_text()


def rest(seconds: float) -> None:
    """Let so much time pass: nothing is to happen in it."""
    end = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > end)


def _answers(connection: redis.Redis) -> bool:
    try:
        return bool(connection.ping())
    except redis.RedisError:
        return False
