"""What ``perdure up`` prints: each line of a child with the name of its place in front."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perdure.protocol.settings import Settings
from tests.kit.lab import LONG, QUICK, Lab, Process, eventually, gone
from tests.kit.places import TASKS

COMMAND = [sys.executable, "-P", "-m", "perdure.scripts.main", "up", "gpu"]


def up(lab: Lab, *arguments: str, path: str = str(TASKS), **settings: Any) -> Process:
    """The command, once its workers are ready; both of its streams go to one file."""
    output = lab.folder / "up.log"
    environment = {**os.environ, **Settings().replace(**(QUICK | settings)).environment(), "PYTHONPATH": path}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, "--url", lab.url, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=environment,
            start_new_session=True,
        )  # fmt: skip
    started = Process(process, output, "up")
    lab.processes.append(started)
    eventually(lambda: "workers ready" in started.log or not started.running)
    return started


@pytest.mark.slow
def test_each_line_has_the_name_of_who_printed_it(lab: Lab) -> None:
    """Logs, what a task prints, tracebacks and last words, to their ends; what the pool itself says has none."""
    pool = up(lab, "--workers", "2")
    bad = lab.submit("printing_tasks.loud", {}, max_retries=0)
    assert lab.ended(bad).status == "failed"
    pool.send(signal.SIGTERM)
    assert pool.end() == 0
    names = ("reaper | ", "worker-1 | ", "worker-2 | ")
    lines = pool.log.splitlines()
    own = [line for line in lines if not line.startswith(names)]
    assert own
    assert all("perdure.pool" in line for line in own), own
    (holder,) = {line.partition(" | ")[0] for line in lines if "printed by a task" in line}
    told = [line.removeprefix(f"{holder} | ") for line in lines if line.startswith(f"{holder} | ")]
    assert "printed by a task" in told
    assert "Traceback (most recent call last):" in told
    assert "ValueError: of the task's own" in told
    assert "".join(line for line in told if set(line) == {"x"}) == "x" * 200_000, "a long line comes in parts"
    assert "no end of line" in told
    assert sum(line.startswith(name) for line in lines for name in names[1:]) > 4


@pytest.mark.slow
def test_as_json_lines_stay_as_they_are(lab: Lab) -> None:
    """They name the worker in a field."""
    pool = up(lab, log_format="json")
    pool.send(signal.SIGTERM)
    assert pool.end() == 0
    rows = [json.loads(line) for line in pool.log.splitlines() if line.startswith("{")]
    assert any(row.get("worker", "").startswith("worker-1-") for row in rows)
    assert not any(line.startswith("worker-1 | ") for line in pool.log.splitlines())


@pytest.mark.slow
def test_a_pool_that_is_killed_breaks_nothing_under_what_drains(lab: Lab) -> None:
    """A task that prints while its worker drains fails nobody; the end of the last process is the end of the relay."""
    pool = up(lab)
    below = pool.children()
    one = lab.submit("printing_tasks.slowly", {"n": 2000})
    lab.moved(one)
    pool.send(signal.SIGKILL)
    eventually(lambda: all(gone(pid) for pid in below), 2 * LONG)
    record = lab.record(one)
    assert (record.status, record.attempt) == ("queued", 0), lab.events(one)
    assert "BrokenPipe" not in pool.log


@pytest.mark.slow
def test_reload_restarts_the_worker_and_its_requests_go_on(lab: Lab, tmp_path: Path) -> None:
    """Edited code runs from the next step on."""
    folder = tmp_path / "code"
    folder.mkdir()
    source = folder / "fresh_tasks.py"
    text = (TASKS / "printing_tasks.py").read_text()
    source.write_text(text)
    up(lab, "--reload", path=str(folder))
    one = lab.submit("fresh_tasks.slowly", {"n": 300})
    lab.moved(one)
    source.write_text(text.replace("output=index", "output=-index"))
    record = lab.ended(one, 2 * LONG)
    assert (record.status, record.attempt) == ("finished", 0)
    outputs = lab.outputs(one)
    cut = next(place for place, value in enumerate(outputs) if value < 0)
    assert outputs == [*range(cut), *(-index for index in range(cut, 300))]
