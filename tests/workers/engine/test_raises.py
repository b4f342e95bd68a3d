"""Whatever a task raises is its request's failure, with its traceback; the worker and the others go on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from perdure.workers import Unfit
from perdure.workers.pool.statuses import UNFIT
from tests.kit.lab import Lab, Process, eventually

NAMES = {
    "panic": "Panic",
    "interrupt": "KeyboardInterrupt",
    "cancel": "CancelledError",
    "exit": "SystemExit",
    "generator exit": "GeneratorExit",
}
PLACES = [
    *[(task, "step") for task in ("alone", "threads", "loop")],
    *[("Many", place) for place in ("memory_needed", "admit", "error")],
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "where"), PLACES)
def test_what_is_no_exception_ends_one_request(lab: Lab, task: str, where: str) -> None:
    """CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit, a panic: failed by itself, in a
    worker that lives.
    """
    worker = lab.worker()
    bad = {what: lab.submit(f"raise_tasks.{task}", {"where": where, "what": what}, max_retries=0) for what in NAMES}
    well = lab.submit(f"raise_tasks.{task}", {})
    for what, name in bad.items():
        record = lab.ended(name)
        assert (record.status, record.error_kind, record.executions) == ("failed", "ERROR", 1), (what, record)
        text = lab.store.traceback(name)
        assert NAMES[what] in text
        assert "of the task's own" in text
        assert "Traceback" in text or where == "error"
    assert lab.ended(well).status == "finished"
    assert worker.running


@pytest.mark.slow
def test_text_that_raises_needs_no_healthy_neighbour(lab: Lab) -> None:
    """Five raise in each pass. The engine's probe says that it computes: each is charged, and the worker stays."""
    worker = lab.worker(model="tiny", slots=8, retry_base=0.05)
    bad = [
        lab.submit("fragile_text.Fragile", {"prompt": f"poison {number}", "max_tokens": 4}, max_retries=1)
        for number in range(5)
    ]
    for name in bad:
        record = lab.ended(name)
        assert (record.status, record.error_kind) == ("failed", "ERROR"), record
        assert record.executions < 12, "each in halves, and alone"
    well = lab.submit("fragile_text.Fragile", {"prompt": "well", "max_tokens": 4})
    assert lab.ended(well).status == "finished"
    assert worker.running


def logged(worker: Process, text: str, times: int) -> bool:
    return worker.log.count(text) == times


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_worker_s_log_shows_where_a_task_raised(lab: Lab, form: str) -> None:
    """Whichever way it runs: file, line and function of the task's code, at every attempt. Not for a wrong request."""
    worker = lab.worker(log_format=form)
    for task in ("alone", "threads", "loop"):
        name = lab.submit(f"raise_tasks.{task}", {"where": "step", "what": "value"}, max_retries=1)
        assert lab.ended(name).error_kind == "ERROR"
        eventually(partial(logged, worker, f"({name}): ValueError", 2))
    wrong = lab.submit("raise_tasks.alone", {"where": "step", "what": "invalid"})
    assert lab.ended(wrong).error_kind == "INVALID_REQUEST"
    eventually(lambda: f"({wrong}): of the task's own" in worker.log)
    assert worker.log.count("Traceback (most recent call last)") == 6
    for line in ('raise_tasks.py", line', "in alone", "in threads", "in loop", "fail(request.payload"):
        assert line in worker.log.replace('\\"', '"')
    assert "\x1b[31m" not in worker.log, "a message steers no terminal"
    if form == "json":
        rows = [json.loads(row) for row in worker.log.splitlines() if row.startswith("{")]
        traces = [row["error"] for row in rows if row.get("request") and "error" in row]
        assert len(traces) == 6
        assert all("\n" in trace and "Traceback" not in row["message"] for trace in traces for row in rows)


def test_a_drop_that_panics_leaves_the_worker_as_it_was(lab: Lab) -> None:
    """The canceled request is canceled, and the next one runs in the same process."""
    worker = lab.worker()
    bad = lab.submit("raise_tasks.Many", {"where": "drop", "what": "panic"})
    lab.moved(bad)
    lab.store.cancel([(bad, "")], reason="asked")
    assert lab.ended(bad).status == "canceled"
    assert lab.ended(lab.submit("raise_tasks.Many", {})).status == "finished"
    assert worker.running
    assert "raised while it dropped" in worker.log


@pytest.mark.slow
def test_a_load_that_panics_is_tried_again(lab: Lab) -> None:
    """Its request goes back uncharged; the worker lives."""
    Path(lab.folder, "first").write_text("panic")
    worker = lab.worker()
    one = lab.submit("raise_tasks.Loads")
    record = lab.ended(one)
    assert (record.status, record.attempt) == ("finished", 0)
    assert lab.events(one)[0] == ("released", "")
    assert worker.running


# --- Unfit -------------------------------------------------------------------------------------------


def left(lab: Lab, worker: Process, name: str) -> None:
    """The worker leaves as unfit, and its request finishes elsewhere, uncharged."""
    assert worker.end() == UNFIT
    assert "this worker is unfit, and hands back what it holds: of the task's own" in worker.log
    assert lab.record(name).attempt == 0
    assert {event for event, _ in lab.events(name)} == {"released"}


@pytest.mark.slow
def test_unfit_from_load_is_honoured(lab: Lab) -> None:
    """At once: no waiting for a second try in a process that has just said that it cannot."""
    Path(lab.folder, "first").write_text("unfit")
    worker = lab.worker()
    one = lab.submit("raise_tasks.Loads")
    left(lab, worker, one)
    lab.worker()
    assert lab.ended(one).status == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("task", "where"), PLACES)
def test_unfit_from_anywhere_is_honoured(lab: Lab, task: str, where: str) -> None:
    """No request is to blame: nothing is charged, the process exits with 72."""
    worker = lab.worker()
    one = lab.submit(f"raise_tasks.{task}", {"where": where, "what": "unfit"}, max_retries=0)
    left(lab, worker, one)


def test_unfit_at_the_start_gives_its_status(lab: Lab) -> None:
    """From a task of PERDURE_TASKS, before anything was claimed."""
    Path(lab.folder, "first").write_text("unfit")
    worker = lab.worker(wait=False, tasks=("raise_tasks.Loads",))
    assert worker.end() == UNFIT


@pytest.mark.parametrize(("given", "status"), [(72, 72), (75, 75), (0, 72), (256, 72), (-1, 72)])
def test_unfit_never_looks_like_an_end_that_was_asked_for(given: int, status: int) -> None:
    assert Unfit("broken", given).status == status
