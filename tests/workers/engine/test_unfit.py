"""Worker processes that become unfit: nothing is lost, and the exit status says why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from perdure.workers.pool import statuses
from tests.kit.lab import Lab, Process


def batch(lab: Lab, task: str, n: int) -> tuple[Process, list[str]]:
    """A worker on which the second of three requests fails in its fourth step, when all have put out three."""
    payload: dict[str, Any] = {"n": n, "folder": str(lab.folder)}
    names = [lab.submit(f"memory_tasks.{task}", payload | {"fails": number == 1}) for number in range(3)]
    worker = lab.worker(wait=False)
    for name in names:
        lab.moved(name, 3)
    Path(lab.folder, "go").touch()
    return worker, names


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_a_host_without_memory_costs_no_request(lab: Lab) -> None:
    """A real allocation fails. The process is left with what it has, reports and leaves; all go on elsewhere."""
    worker, names = batch(lab, "Cramped", n=20)
    assert worker.end() == statuses.UNFIT == 72
    assert "unfit after MemoryError" in worker.log
    lab.worker(wait=False)
    for name in names:
        record = lab.check(name, 20)
        assert record.attempt == 0
        assert lab.events(name)[0] == ("suspected", "HOST_OOM")
    assert lab.nothing_held()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["Sticky", "sticky"])
def test_a_lost_device_is_not_called_again(lab: Lab, task: str) -> None:
    """The process stores what it has, leaves at once with a status of its own, and runs no more of the task's code."""
    pytest.importorskip("torch")
    worker, names = batch(lab, task, n=40)
    assert worker.end() == statuses.UNFIT_DEVICE == 70
    assert "unfit after AcceleratorError" in worker.log
    traces = {path.name for path in lab.folder.iterdir() if path.suffix != ".log"}
    assert traces == {"go", "lost"}
    for name in names:
        assert lab.outputs(name) == list(range(len(lab.outputs(name))))
        assert ("suspected", "GPU_ERROR") in lab.events(name)
    assert lab.nothing_held()
    lab.worker(wait=False)
    for name in names:
        assert lab.check(name, 40).attempt == 0


@pytest.mark.slow
def test_a_device_that_stays_full_gets_a_fresh_process(lab: Lab) -> None:
    """The third time that one request alone finds no memory, the process leaves; in the next one it fits."""
    pytest.importorskip("torch")
    Path(lab.folder, "go").touch()
    one = lab.submit("memory_tasks.Full", {"n": 5, "folder": str(lab.folder), "fails": True})
    worker = lab.worker(wait=False)
    assert worker.end() == statuses.OUT_OF_MEMORY == 71
    assert "leaving, to be replaced" in worker.log
    lab.worker(wait=False)
    record = lab.check(one, 5)
    assert (record.attempt, lab.events(one)) == (3, [("retry", "GPU_OOM")] * 3)
