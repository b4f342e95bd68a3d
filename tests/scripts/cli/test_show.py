"""One request in time: ``perdure show`` as text, JSON and picture, after real kills; and its pure parts
by histories.
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from perdure.protocol.records import Event, RequestRecord
from perdure.protocol.states import State
from perdure.scripts.present.drawing import TICKS_MOST, Bar, Chart, Cross, Link, draw, step_of
from perdure.scripts.present.timeline import chart_of, executions_of
from tests.kit.lab import Lab
from tests.kit.places import ROOT
from tests.kit.scripts.commands import call

SVG = "{http://www.w3.org/2000/svg}"


def parts(document: str, tag: str, name: str) -> list[ElementTree.Element]:
    """The elements of an SVG whose classes include ``name``."""
    root = ElementTree.fromstring(document)
    return [item for item in root.iter(SVG + tag) if name in item.get("class", "").split()]


@pytest.mark.slow
def test_a_killed_request_shows_who_had_it_when(lab: Lab, tmp_path: Path) -> None:
    """A kill -9 with checkpoints, then the end elsewhere: two executions, the first lost, with what it left."""
    one = lab.submit("count", {"n": 100, "sleep": 0.02})
    first = lab.worker()
    lab.moved(one, 5)
    first.kill()
    lab.worker()
    lab.ended(one)
    url = {"PERDURE_REDIS_URL": lab.url}
    told: dict[str, Any] = json.loads(call("show", one, "--json", **url).stdout)
    lost, done = told["timeline"]
    assert (lost["worker"], lost["outcome"], lost["kind"], lost["lost"]) == (
        "worker-0",
        "redelivered",
        "WORKER_LOST",
        True,
    )
    assert lost["began"] < lost["stored"] <= lost["ended"] <= done["began"] + 0.001
    assert lost["seq"] >= 1
    assert lost["offset"] >= 5
    assert (done["worker"], done["outcome"], done["lost"], done["offset"]) == ("worker-1", "finished", False, 100)
    shown = call("show", one, **url).stdout
    assert "worker-0, WORKER_LOST after " in shown
    assert "worker-1, finished after " in shown
    file = tmp_path / "one.svg"
    assert call("show", one, "--svg", str(file), **url).stdout == ""
    picture = file.read_text(encoding="utf-8")
    assert call("show", one, "--svg", "-", **url).stdout == picture
    lanes = [item.text for item in parts(picture, "text", "text")]
    assert lanes[1:] == ["waiting", "worker-0", "worker-1"]
    assert len(parts(picture, "rect", "lost")) == 1
    assert len(parts(picture, "rect", "finished")) == 1
    assert [item.text for item in parts(picture, "text", "red")] == ["WORKER_LOST"]
    by_file = subprocess.run(
        [sys.executable, "scripts/inspect_request.py", "--url", lab.url, one, "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(by_file.stdout)["timeline"] == told["timeline"]


@pytest.mark.slow
def test_a_dead_letter_shows_its_traceback(lab: Lab) -> None:
    """The text has what a person needs; a reason that would steer the terminal does not."""
    one = lab.submit("boom", {}, max_retries=0)
    lab.worker()
    assert lab.ended(one).status is State.FAILED
    told = json.loads(call("show", one, "--json", PERDURE_REDIS_URL=lab.url).stdout)
    assert told["traceback"].startswith("Traceback")
    (turn,) = told["timeline"]
    assert (turn["outcome"], turn["kind"], turn["lost"]) == ("failed", told["error"]["kind"], False)
    assert "\ntraceback     Traceback" in call("show", one, PERDURE_REDIS_URL=lab.url).stdout


# --- executions from histories -----------------------------------------------------------------------------


def record(**changes: Any) -> RequestRecord:
    given: dict[str, Any] = {
        "id": "a", "status": State.STARTED, "queue": "gpu", "task": "app.tasks.count", "attempt": 0, "executions": 1,
        "execution": "e2", "worker": "w2", "epoch": 0, "client": "", "created_at": "1970-01-01T00:00:01.000000Z",
        "started_at": "1970-01-01T00:00:10.000000Z", "ended_at": "", "canceling": False, "error_kind": "",
        "error_reason": "",
    }  # fmt: skip
    return RequestRecord(**given | changes)


def event(at: float, what: str, execution: str = "e1", kind: str = "", **more: Any) -> Event:
    return Event(at=at, event=what, worker="w1", execution=execution, offset=3, kind=kind, reason="", **more)


@pytest.mark.parametrize(
    ("given", "history", "expected"),
    [
        ({"execution": "", "started_at": "", "status": State.QUEUED}, [], []),
        ({}, [], [("running", 10.0, None)]),
        ({}, [event(1, "submitted", ""), event(5, "redelivered", began=2.0)],
         [("redelivered", 2.0, 5), ("running", 10.0, None)]),
        ({}, [event(4, "suspected"), event(5, "retry", began=2.0)], [("retry", 2.0, 5), ("running", 10.0, None)]),
        ({}, [event(5, "released")], [("released", None, 5), ("running", 10.0, None)]),
        ({}, [event(12, "retry", execution="e2", began=10.0)], [("retry", 10.0, 12)]),
        (
            {"execution": "", "status": State.FINISHED, "ended_at": "1970-01-01T00:00:20.000000Z"},
            [event(5, "retry", began=2.0)],
            [("retry", 2.0, 5), ("finished", 10.0, 20.0)],
        ),
        ({"execution": "", "status": State.FAILED}, [event(12, "failed", began=10.0)], [("failed", 10.0, 12)]),
        ({"execution": "", "status": State.FAILED}, [event(12, "failed", execution="")], []),
    ],
)  # fmt: skip
def test_executions_follow_from_the_history_and_the_hash(
    given: dict[str, Any], history: list[Event], expected: list[Any]
) -> None:
    """Each end of an execution is one; what runs or finished stands in the hash. Nothing twice when reads were torn."""
    found = executions_of(record(**given), history, offset=7, point=None, now=30.0)
    assert [(item.outcome, item.began, item.ended) for item in found] == expected


def test_a_request_that_waits_is_drawn_as_waiting() -> None:
    """From its submit until now, and between two executions."""
    waits = record(execution="", started_at="", status=State.QUEUED)
    chart = chart_of(waits, [], now=9.0)
    assert [(bar.lane, bar.begin, bar.end) for bar in chart.bars] == [("waiting", 1.0, 9.0)]
    runs = record()
    turns = executions_of(runs, [event(5, "redelivered", kind="HANG", began=2.0)], offset=0, point=None, now=30.0)
    chart = chart_of(runs, turns, now=30.0)
    assert [(bar.lane, bar.begin, bar.end) for bar in chart.bars] == [
        ("waiting", 1.0, 2.0),
        ("w1", 2.0, 5),
        ("waiting", 5, 10.0),
        ("w2", 10.0, 30.0),
    ]
    assert [(cross.at, cross.lane, cross.text) for cross in chart.crosses] == [(5, "w1", "HANG")]
    assert len(chart.links) == 1


# --- the drawing -------------------------------------------------------------------------------------------


def test_bars_of_one_lane_do_not_cover_each_other() -> None:
    """Each has its row while it lasts; rows are used again."""
    chart = Chart(title="t", subtitle="", origin=0.0, end=9.0)
    chart.bars = [Bar(lane="a", begin=at, end=at + 2.0, shape="finished") for at in (0.0, 1.0, 2.0, 3.0)]
    heights = [float(item.get("y", "")) for item in parts(draw(chart), "rect", "bar")]
    assert heights[0] == heights[2] < heights[1] == heights[3]


def test_what_stands_in_redis_cannot_break_the_document() -> None:
    """Names and reasons come from outside."""
    chart = Chart(title="<script>&\x1b[2J", subtitle='"', origin=0.0, end=1.0)
    bars = [Bar(lane="]]>\ud800", begin=0.0, end=1.0, shape="lost", title="<b>", label="&", ticks=(0.5,))]
    chart.bars, chart.links = bars, [Link(bars[0], bars[0])]
    chart.crosses = [Cross(at=1.0, lane="nowhere", text="<", title=">", line=True)]
    root = ElementTree.fromstring(draw(chart))
    assert root.findtext(SVG + "title") == "<script>&▯[2J"
    assert not list(root.iter(SVG + "script"))


def test_a_drawing_is_bounded_and_its_grid_fits() -> None:
    """A request of a week is no larger a file than one of a second."""
    for span in (0.004, 1.0, 59.0, 604800.0):
        assert 4 <= span / step_of(span) <= 12.0001
    chart = Chart(title="t", subtitle="", origin=0.0, end=1e6)
    chart.bars = [Bar(lane="a", begin=0.0, end=1e6, shape="running", ticks=tuple(float(at) for at in range(10**5)))]
    (ticks,) = [item.get("d", "") for item in parts(draw(chart), "path", "tick") if len(item.get("d", "")) > 100]
    assert ticks.count("M") <= TICKS_MOST
    empty = Chart(title="t", subtitle="", origin=5.0, end=5.0)
    ElementTree.fromstring(draw(empty))
