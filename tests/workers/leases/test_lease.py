"""Leases: who does not move is judged; who says that a step or a load takes long is not."""

from __future__ import annotations

import signal

import pytest

from perdure.protocol.keys import key
from tests.kit.lab import Lab, eventually


def test_a_hanging_step_is_found(lab: Lab) -> None:
    """No progress for a lease, or a step timeout: HANG, a crash is counted once, the worker is ended,
    another goes on.
    """
    lab.reaper()
    stuck = lab.worker()
    one = lab.submit("hang", {"folder": str(lab.folder), "seconds": 600})
    eventually((lab.folder / "hung").exists)
    lab.worker(wait=False)
    record = lab.check(one, 6)
    assert lab.events(one) == [("suspected", "HANG"), ("retry", "HANG")]
    assert (record.attempt, record.executions) == (0, 2)
    assert lab.connection.hget(key("job", one), "crashes_total") == b"1"
    assert stuck.end() in (-signal.SIGABRT, -signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_gets_back_what_hung_in_it(lab: Lab) -> None:
    """The only worker claims the request again while its old step still hangs: outputs stay gapless and single."""
    lab.reaper()
    lab.worker()
    one = lab.submit("hang_among_others", {"folder": str(lab.folder), "n": 20, "seconds": 2.0})
    record = lab.check(one, 20)
    assert record.attempt == 0
    assert ("retry", "HANG") in lab.events(one)
    assert lab.nothing_held()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a batch", "every thread"])
def test_a_worker_that_hangs_claims_nothing_more(lab: Lab, kind: str) -> None:
    """Its slots are free until it is ended, but whatever it took would wait: all of it is another worker's."""
    lab.reaper()
    stuck = lab.worker()
    task = "HangingBatch" if kind == "a batch" else "hang_among_others"
    folders = [lab.folder / name for name in ("one", "two")[: 1 if kind == "a batch" else 2]]
    for folder in folders:
        folder.mkdir()
    poison = [lab.submit(task, {"folder": str(folder), "seconds": 600}) for folder in folders]
    # By the lease or by its guardian, whoever is first: each is judged once.
    eventually(lambda: all(lab.events(name).count(("suspected", "HANG")) == 1 for name in poison))
    innocents = [lab.submit(task, {"folder": str(folders[0])}) for _ in range(3)]
    assert stuck.end() in (-signal.SIGABRT, -signal.SIGKILL)
    other = lab.worker(wait=False)
    for name in (*innocents, *poison):
        record = lab.check(name, 20)
        assert (record.worker, record.attempt) == (other.name, 0)
    assert [lab.events(name) for name in innocents] == [[], [], []]
    for name in poison:
        assert [event for event, _ in lab.events(name)] in (["suspected", "retry"], ["suspected", "redelivered"])


@pytest.mark.slow
def test_a_long_load_is_not_judged(lab: Lab) -> None:
    """Loading for several leases, but less than the load timeout, is progress."""
    lab.reaper()
    lab.worker(step_timeout=0.3, environment={"LAB_LOAD": "2"})
    one = lab.submit("model", {"n": 3})
    record = lab.check(one, 3)
    assert (record.executions, lab.events(one)) == (1, [])


@pytest.mark.slow
def test_a_tasks_own_step_timeout_holds_from_its_first_step(lab: Lab) -> None:
    """A task that asks for longer steps than the pool allows gets them: at once, and after other tasks ran."""
    lab.reaper()
    lab.worker(step_timeout=0.3)
    names = {
        lab.submit(task, {"n": 3, "seconds": 1.2}): 3 if task == "count" else 2
        for task in ("patient", "count", "patient")
    }
    for name, number in names.items():
        record = lab.check(name, number)
        assert (record.executions, lab.events(name)) == (1, [])


@pytest.mark.slow
def test_a_tasks_own_step_timeout_ends_with_it(lab: Lab) -> None:
    """After a task with long steps, one with short ones is judged by its own again."""
    lab.reaper()
    lab.worker()
    lab.check(lab.submit("patient", {"seconds": 0}), 2)
    one = lab.submit("hang", {"folder": str(lab.folder), "seconds": 600})
    eventually(lambda: lab.events(one) == [("suspected", "HANG"), ("retry", "HANG")])


@pytest.mark.slow
def test_a_requests_own_step_timeout_is_its_own(lab: Lab) -> None:
    """A short one is judged by it at once, its neighbour in the same worker by the pool's long one; both go on."""
    lab.reaper()
    stuck = lab.worker()
    beside = lab.folder / "neighbour"
    beside.mkdir()
    # It stands still as well, so that it cannot end before the other is judged, however slow the machine is.
    neighbour = lab.submit("stall_among_others", {"n": 100, "at": 50, "folder": str(beside)})
    lab.moved(neighbour)
    short = lab.submit("stall_among_others", {"n": 6, "at": 3, "folder": str(lab.folder)}, step_timeout=0.3)
    eventually(lambda: ("suspected", "HANG") in lab.events(short))
    assert (lab.events(neighbour), lab.record(neighbour).worker) == ([], stuck.name)
    stuck.kill()
    lab.worker(wait=False)
    lab.check(short, 6)
    lab.check(neighbour, 100)
    assert lab.events(neighbour) == [("redelivered", "WORKER_LOST")]


@pytest.mark.slow
def test_a_requests_step_timeout_comes_first(lab: Lab) -> None:
    """Longer than the worker's setting, it survives; shorter than the task's, it is judged."""
    lab.reaper()
    lab.worker(step_timeout=0.3)
    long = lab.submit("count", {"n": 1, "sleep": 1.2}, step_timeout=30)
    assert (lab.check(long, 1).executions, lab.events(long)) == (1, [])
    short = lab.submit("patient", {"seconds": 600}, step_timeout=0.3)
    eventually(lambda: ("retry", "HANG") in lab.events(short))
    assert lab.outputs(short) == [0]


@pytest.mark.slow
def test_a_load_is_no_hang_of_a_request_with_short_steps(lab: Lab) -> None:
    """While its task loads, its lease is renewed as often as that needs."""
    lab.reaper()
    lab.worker(environment={"LAB_LOAD": "1.5"})
    one = lab.submit("model", {"n": 3}, step_timeout=0.3)
    assert (lab.check(one, 3).executions, lab.events(one)) == (1, [])
