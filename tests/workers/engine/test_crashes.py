"""Requests that end their worker's process: told apart from the innocent, and ended."""

from __future__ import annotations

import signal
from functools import partial

import pytest

from perdure.protocol.keys import key
from tests.kit.lab import Lab, Process, eventually, send

CROWD = "crash_tasks.crowd"


def replaced(lab: Lab, workers: list[Process]) -> int:
    """What a supervisor does: a new worker for each that has ended. Returns how many were replaced."""
    ended = [index for index, worker in enumerate(workers) if not worker.running]
    for index in ended:
        workers[index] = lab.worker(wait=False, retry_base=0.05)
    return len(ended)


def handed_on(lab: Lab, name: str, times: int) -> bool:
    """Whether a request has been taken from a worker so many times."""
    record = lab.record(name)
    return record.executions == times and record.status != "started"


@pytest.mark.slow
def test_a_poison_among_31_innocents(lab: Lab):
    """A native crash in a batch of 32, 3 workers: few workers die, the poison is a dead letter, everybody else is
    right.
    """
    workers = [lab.worker(retry_base=0.05)]
    names = [lab.submit(CROWD, {"n": 10}) for _ in range(14)]
    bad = lab.submit(CROWD, {"n": 10, "how": "segfault"})
    names += [lab.submit(CROWD, {"n": 10}) for _ in range(17)]
    workers += [lab.worker(wait=False, retry_base=0.05) for _ in range(2)]
    deaths = 0

    def over() -> bool:
        nonlocal deaths
        deaths += replaced(lab, workers)
        return all(lab.record(name).status in ("finished", "failed") for name in [*names, bad])

    eventually(over, timeout=90)
    record = lab.record(bad)
    assert (record.status, record.error_kind) == ("failed", "CRASH")
    assert "Segmentation fault" in record.error_reason
    assert lab.events(bad)[-1] == ("failed", "CRASH")
    assert ("suspected", "CRASH") in lab.events(bad)
    for name in names:
        assert lab.check(name, 10).attempt == 0
    assert deaths <= 5 + 4
    assert lab.nothing_held()
    assert not lab.connection.exists(key("suspects", "gpu"))


@pytest.mark.slow
def test_a_native_crash_leaves_its_stacks(lab: Lab):
    """The signal's name is the reason, and the dead letter shows where every thread stood."""
    bad = lab.submit("crash_tasks.poison", {"how": "abort"})
    workers = [lab.worker(wait=False, retry_base=0.05)]
    eventually(lambda: replaced(lab, workers) < 0 or lab.record(bad).status == "failed", timeout=60)
    record = lab.record(bad)
    assert (record.error_kind, record.attempt, record.executions) == ("CRASH", 0, 3)
    assert "crashed: Aborted" in record.error_reason
    text = lab.store.traceback(bad)
    assert "in end" in text
    assert "crash_tasks.py" in text
    assert "courier" in text, "the stack of each thread"
    assert any("Aborted" in worker.log for worker in lab.processes)
    assert lab.outputs(bad) == [0, 1, 2], "one output each time did not keep it alive"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "reason"), [("kill", "was ended by SIGKILL"), ("exit", "exited with status 3")])
def test_a_poison_without_evidence_ends_too(lab: Lab, how: str, reason: str):
    """Nothing is left to be read but that it was alone, and with what the process ended: the third time is the last."""
    bad = lab.submit("crash_tasks.poison", {"how": how})
    lab.settings |= {"retry_base": 0.02}
    for number in range(3):
        worker = lab.worker(wait=False)
        # Nobody asks for the status of the process before its guardian has: a supervisor is not as quick either.
        eventually(partial(handed_on, lab, bad, number + 1))
        worker.end()
    record = lab.record(bad)
    assert (record.status, record.error_kind, record.executions, record.attempt) == ("failed", "WORKER_LOST", 3, 0)
    assert reason in record.error_reason
    assert "this request was alone with each of 3 workers that ended so, without progress" in record.error_reason
    assert lab.events(bad)[0] == ("redelivered", "WORKER_LOST"), "the first time, at once"


def test_kill_9_accuses_nobody(lab: Lab):
    """Requests that were on a worker which somebody killed go on in ordinary company."""
    first = lab.worker()
    names = [lab.submit(CROWD, {"n": 40}) for _ in range(4)]
    for name in names:
        lab.moved(name, 3)
    first.kill()
    lab.worker(wait=False)
    for name in names:
        lab.check(name, 40)
        assert lab.events(name) == [("redelivered", "WORKER_LOST")]


@pytest.mark.slow
def test_a_crashed_child_of_a_task_is_not_the_worker_s_crash(lab: Lab):
    """A task forks, the child ends by SIGSEGV, and later somebody kills the worker: that accuses nobody."""
    worker = lab.worker()
    one = lab.submit("crash_tasks.fork")
    lab.moved(one, 10)
    send(worker.pid, signal.SIGKILL)
    lab.worker(wait=False)
    lab.check(one, 60)
    assert lab.events(one) == [("redelivered", "WORKER_LOST")]
