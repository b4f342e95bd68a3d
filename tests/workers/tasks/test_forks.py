"""Children that a task forks: they end where they would come back, and touch nothing of their parent's."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rq import Queue
from rq.job import Job

from tests.kit.lab import Lab, eventually

STATUS = {"exit": 3, "raise": 1, "return": 0, "yield": 0}


@pytest.mark.slow
@pytest.mark.parametrize("how", STATUS)
@pytest.mark.parametrize("task", ["generator", "threads", "loop", "admit", "step"])
def test_a_child_ends_where_it_comes_back(lab: Lab, task: str, how: str) -> None:
    """By sys.exit, an exception, a return or a yield: with the status that it would have elsewhere. The
    parent goes on.
    """
    worker = lab.worker()
    path, payload = ("Batch", {"where": task}) if task in ("admit", "step") else (task, {})
    one = lab.submit(f"fork_tasks.{path}", payload | {"how": how})
    record = lab.ended(one)
    assert (record.status, record.executions, lab.outputs(one)) == ("finished", 1, [STATUS[how]])
    assert worker.running
    assert ("ValueError: in the child" in worker.log) is (how == "raise")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "raise", "return"])
def test_a_plain_job_s_child_ends_too(lab: Lab, how: str) -> None:
    """RQ would write the child's end as the job's."""
    worker = lab.worker()
    job = Queue("gpu", connection=lab.connection).enqueue("fork_tasks.plain", how)
    found = eventually(lambda: Job.fetch(job.id, connection=lab.connection).latest_result())
    assert found is not None
    assert found.type == found.Type.SUCCESSFUL
    assert found.return_value == STATUS[how]
    assert Job.fetch(job.id, connection=lab.connection).get_status() == "finished"
    assert worker.running


COUNTERS = """
import os
from perdure.workers.guardian.companion import Companion
from perdure.workers.guardian.watchdog import Page

page = Page.create()
page.loop.tick(1.0)
pid = os.fork()
if pid == 0:
    for _ in range(5):
        page.loop.tick(1.0)
        page.courier.tick(1.0)
    os._exit(0)
os.waitpid(pid, 0)
print(page.loop.read().ticks, page.courier.read().ticks)
read, write = os.pipe()
companion = Companion(None, None, "w", [], page=page)
os.dup2(write, companion.crash_file)
pid = os.fork()
if pid == 0:
    os.close(write)
    os.write(companion.crash_file, b"the child's")
    os._exit(0)
os.waitpid(pid, 0)
os.close(write)
os.close(companion.crash_file)
print(os.read(read, 100))
"""


def test_a_child_shares_neither_the_counters_nor_the_pipe() -> None:
    """What it ticks would hide that its parent hangs; what it keeps open or writes would be taken for its parent's."""
    done = subprocess.run([sys.executable, "-c", COUNTERS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["1 0", "b''"], done.stderr
