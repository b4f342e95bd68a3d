"""Logs: one JSON object a line, from every process of a pool, that says what it is about."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.protocol.telemetry import logs
from tests.kit.lab import Lab, eventually

BASE = {"at", "level", "logger", "message", "pid"}


def written(text: str) -> list[dict[str, Any]]:
    """Each line is one object."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def heard() -> Any:
    """A logger of its own with our formatter, and what it has written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter(worker="w1", device="cuda:0", nothing=""))
    logger = logging.getLogger("app.tasks")
    logger.propagate = False
    logger.handlers[:] = [handler]
    return logger, lambda: written(stream.getvalue())


def test_a_line_says_when_who_and_what(heard: Any):
    logger, lines = heard
    logger.warning("%d of %s", 2, "three", extra=logs.about("r1", "e1"))
    (line,) = lines()
    assert set(line) == BASE | {"worker", "device", "request", "execution"}
    assert (line["level"], line["logger"], line["message"]) == ("warning", "app.tasks", "2 of three")
    assert (line["worker"], line["device"], line["request"], line["execution"]) == ("w1", "cuda:0", "r1", "e1")
    assert line["at"].endswith("+00:00")


def test_what_runs_is_what_its_lines_are_about(heard: Any):
    """The call's own word comes first."""
    logger, lines = heard
    with logs.running("r1", "e1"):
        logger.error("within")
        logger.error("of another", extra=logs.about("r2"))
    logger.error("after")
    assert [(line.get("request"), line.get("execution")) for line in lines()] == [
        ("r1", "e1"),
        ("r2", "e1"),
        (None, None),
    ]


def test_every_record_is_one_line(heard: Any):
    """Newlines, colours, errors, arguments that do not fit, and fields of somebody else's."""
    logger, lines = heard
    logger.error("two\nlines \x1b[32min green\x1b[39;49;00m")
    # Not through the logger: pytest's own handler would take offence.
    logger.handlers[0].handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    logger.error("strange", extra={"request": object(), "device": "other"})
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it failed")
    first, second, third, fourth = lines()
    assert first["message"] == "two\nlines in green"
    assert second["message"] == "%d (TypeError in its arguments)"
    assert ("request" in third, third["device"]) == (False, "other")
    assert fourth["error"].startswith("Traceback")
    assert fourth["error"].endswith("ValueError: broken")


def test_a_word_that_is_no_format_is_refused():
    with pytest.raises(SettingsError, match="PERDURE_LOG_FORMAT must be text, json or auto, not 'xml'"):
        Settings(log_format="xml")


@pytest.mark.parametrize(("chosen", "json_expected"), [("text", False), ("json", True), ("auto", True)])
def test_a_process_writes_what_was_chosen(chosen: str, json_expected: bool):
    """Auto, where nobody reads on a terminal, is JSON."""
    code = (
        "import logging; from perdure.protocol.telemetry import logs; "
        f"logs.configure({chosen!r}, worker='w1'); logging.getLogger('perdure.x').info('hello'); "
        "logging.getLogger('perdure.x').debug('unheard')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    if json_expected:
        (line,) = written(done.stderr)
        assert (line["message"], line["worker"]) == ("hello", "w1")
    else:
        assert done.stderr.endswith(" perdure.x hello\n")


@pytest.mark.slow
def test_all_processes_of_a_pool_write_json(lab: Lab, tmp_path: Path):
    """Reaper, worker, its guardian, RQ's own lines and a task's: each line is an object, and the loss
    can be followed.
    """
    lab.settings |= {"log_format": "json"}
    reaper = lab.reaper()
    first = lab.worker()
    request = lab.submit("gate", {"folder": str(lab.folder)})
    lab.moved(request, 3)
    execution = lab.record(request).execution
    first.kill()
    second = lab.worker()
    (lab.folder / "open").touch()
    lab.check(request, 6)
    talking = lab.submit("talks", {})
    lab.check(talking, 1)
    eventually(lambda: "OK" in second.log)
    second.send(15)
    assert second.end() == 0
    said = {name: written(process.log) for name, process in (("reaper", reaper), ("first", first), ("second", second))}
    assert all(set(line) >= BASE for lines in said.values() for line in lines)
    (ok,) = [line for line in said["second"] if line.get("request") == request and "OK" in line["message"]]
    assert ok["worker"] == second.name
    assert ok["execution"] not in ("", execution)
    # RQ's own, and the guardian's after the kill.
    assert any(line["logger"] == "rq.worker" and "started" in line["message"] for line in said["first"])
    eventually(lambda: any(line["logger"] == "perdure.guardian" for line in written(first.log)))
    assert {line["worker"] for line in written(first.log)} == {first.name}
    # A task's, without a word of its author's about requests.
    (mine,) = [line for line in said["second"] if line["logger"] == "app"]
    assert (mine["request"], mine["message"]) == (talking, "from within")
    assert any("sweeping" in line["message"] for line in said["reaper"])
