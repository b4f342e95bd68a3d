"""The demonstration passes when all is well, fails when resuming is off, and its verdict finds what is planted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perdure.protocol.records import Event
from perdure.protocol.settings import Settings
from perdure.scripts.demonstration.run import Answer, DemoKill, Record, most_within
from perdure.scripts.demonstration.verdict import judge

pytest.importorskip("torch")


def demo(folder: Path, **environment: str) -> tuple[int, str, dict[str, Any]]:
    """Run ``perdure demo --model tiny``; its status, what it printed, its figures."""
    figures = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "perdure.scripts.main", "demo", "--model", "tiny", "--json", str(figures)],
        cwd=folder, env={**os.environ, "TMPDIR": str(folder), **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=110, check=False,
    )  # fmt: skip
    text = done.stdout.decode(errors="replace")
    assert figures.exists(), text
    return done.returncode, text, json.loads(figures.read_text())


@pytest.mark.slow
def test_the_demonstration_shows_what_is_promised(tmp_path: Path) -> None:
    """Two kills, each interrupting two generations or more: nothing lost, doubled or different; plain lines."""
    status, text, figures = demo(tmp_path)
    assert status == 0, text
    assert (figures["requests"], figures["kills"]) == (12, 2)
    assert (figures["lost"], figures["duplicated"], figures["different"]) == (0, 0, 0)
    assert [kill["kind"] for kill in figures["kill_details"]] == ["worker", "tree"]
    assert all(kill["interrupted"] >= 2 for kill in figures["kill_details"])
    assert set(figures["recovery_ms"]) == {"worker", "tree"}
    assert all(delay > 0 for delay in figures["recovery_ms"].values())
    assert "Every answer is byte for byte the one that no crash has touched." in text
    assert "\x1b" not in text, "without a terminal there is nothing to steer"
    assert list(tmp_path.glob("perdure-demo-*")) == [], "the logs of a good run are removed"


@pytest.mark.slow
def test_the_demonstration_fails_without_resuming(tmp_path: Path) -> None:
    """Beginning again from zero gives the same bytes; the engine's own count of forward passes gives it away."""
    status, text, figures = demo(tmp_path, PERDURE_RESUME="0")
    assert status == 1, text
    assert (figures["lost"], figures["duplicated"], figures["different"]) == (0, 0, 0), figures["problems"]
    assert any("tokens again; a checkpoint interval allows" in problem for problem in figures["problems"])
    assert "FAILED: request" in text
    assert len(list(tmp_path.glob("perdure-demo-*/pool.log"))) == 1, "the logs of a bad run are kept"


# --- the verdict -----------------------------------------------------------------------------------------


def output(index: int) -> dict[str, Any]:
    return {"token": 100 + index, "text": chr(97 + index)}


def result(number: int) -> dict[str, Any]:
    return {
        "text": "".join(output(index)["text"] for index in range(number)),
        "token_ids": [100 + i for i in range(number)],
    }


def event(worker: str, offset: int) -> Event:
    return Event(
        at=0.0, event="redelivered", worker=worker, execution="e", offset=offset, kind="WORKER_LOST", reason="is gone"
    )


NUMBER = 20
"""Outputs of each of the requests."""


@pytest.fixture
def record() -> Record:
    """Three requests that two kills interrupt as promised: on workers 1 → 2 → 3, at 6 and at 12 stored outputs."""
    good = Record(Settings(), workers={1: "A", 2: "B", 3: "C"})
    good.kills = [
        DemoKill(kind="worker", worker="one", pid=1, at=1.0, held=["r0", "r1", "r2"]),
        DemoKill(kind="tree", worker="two", pid=2, at=2.0, held=["r0", "r1", "r2"]),
    ]
    at = 0
    for number in range(3):
        name = f"r{number}"
        handle: Any = SimpleNamespace(id=name)
        outputs = [output(index) for index in range(NUMBER)]
        times = [0.5] * 6 + [1.5] * 6 + [2.5] * (NUMBER - 12)
        good.answers.append(Answer({}, handle, outputs, times, result(NUMBER), "", True))
        good.histories[name] = [event("one", 6), event("two", 12)]
        good.logs[name] = list(outputs)
        good.entries[name] = 1
        good.golden.append({"result": result(NUMBER), "outputs": list(outputs)})
        # Each process samples one more than is stored in the end, and that one is sampled again elsewhere.
        for pid, indices in ((1, range(7)), (2, range(6, 13)), (3, range(12, NUMBER))):
            for index in indices:
                at += 50_000_000
                good.trace.append({"at": at, "pid": pid, "rows": [[name, "e", index, "decode"]]})
    return good


def test_a_good_record_has_no_problem(record: Record) -> None:
    """What is as promised is found so, with every figure."""
    verdict = judge(record)
    assert verdict.problems == []
    figures = verdict.as_dict()
    assert (figures["requests"], figures["kills"], figures["interrupted"], figures["tokens"]) == (3, 2, 3, 3 * NUMBER)
    assert (figures["recomputed"], figures["lost"], figures["duplicated"], figures["different"]) == (6, 0, 0, 0)
    assert figures["recovery_ms"] == {"worker": 500.0, "tree": 500.0}
    assert figures["request_details"][0]["workers"] == ["A", "B", "C"]
    # Two kills, each with at most three samples in 100 ms and two of slack.
    assert figures["request_details"][0]["allowed"] == 10
    json.dumps(figures)


def lose(record: Record) -> None:
    record.answers[1].result, record.answers[1].error = None, "TimeoutError: gone"


def repeat_in_stream(record: Record) -> None:
    record.answers[1].outputs.insert(5, output(5))


def repeat_in_log(record: Record) -> None:
    record.logs["r1"].insert(5, output(5))


def end_twice(record: Record) -> None:
    record.entries["r1"] = 2


def change_text(record: Record) -> None:
    record.answers[1].result = result(NUMBER) | {"text": "something else"}


def change_output(record: Record) -> None:
    record.answers[1].outputs[4] = output(4) | {"text": "?"}


def change_golden(record: Record) -> None:
    record.golden[1] = {"result": result(NUMBER - 1), "outputs": record.golden[1]["outputs"][:-1]}


def lack_golden(record: Record) -> None:
    record.golden.pop()


def skip_output(record: Record) -> None:
    del record.answers[1].outputs[4]


def begin_again(record: Record) -> None:
    """The last worker samples everything from the first token."""
    record.trace += [{"at": 10**12 + index, "pid": 3, "rows": [["r1", "e", index, "decode"]]} for index in range(12)]


def one_kill(record: Record) -> None:
    record.kills.pop()


def other_kill(record: Record) -> None:
    record.kills[1].kind = "worker"


def interrupt_one(record: Record) -> None:
    for name in ("r1", "r2"):
        record.histories[name].pop()


def interrupt_before_output(record: Record) -> None:
    for name in ("r1", "r2"):
        record.histories[name][1] = event("two", 0)


def never_go_on(record: Record) -> None:
    for answer in record.answers:
        answer.times = answer.times[:12]


@pytest.mark.parametrize(
    ("plant", "count", "words"),
    [
        (lose, "lost", "was lost"),
        (repeat_in_stream, "duplicated", "too many"),
        (repeat_in_log, "duplicated", "too many"),
        (end_twice, "duplicated", "too many"),
        (change_text, "different", "another answer"),
        (change_output, "different", "another answer"),
        (change_golden, "different", "another answer"),
        (lack_golden, "different", "another answer"),
        (skip_output, "different", "another answer"),
        (begin_again, "", "tokens again"),
        (one_kill, "", "the kills were"),
        (other_kill, "", "the kills were"),
        (interrupt_one, "", "interrupted 1 requests"),
        (interrupt_before_output, "", "interrupted 1 requests"),
        (never_go_on, "", "no interrupted request went on"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_found(record: Record, plant: Any, count: str, words: str) -> None:
    """Each single fault is named, counted where there is a count, and makes the run fail."""
    harmed = copy.deepcopy(record)
    plant(harmed)
    verdict = judge(harmed)
    assert any(words in problem for problem in verdict.problems), verdict.problems
    assert verdict.as_dict()["passed"] is False
    if count:
        assert verdict.as_dict()[count] >= 1


def test_the_allowance_counts_one_process_only() -> None:
    """Outputs of one request, sampled by one process, within the interval; prefill and replay do not count."""
    rows = [
        (0, 1, "decode"),
        (50, 1, "decode"),
        (100, 1, "decode"),
        (151, 1, "decode"),
        (60, 2, "decode"),
        (70, 1, "replay"),
    ]
    trace = [{"at": at * 10**6, "pid": pid, "rows": [["r", "e", 0, kind]]} for at, pid, kind in rows]
    assert most_within(trace, "r", 1, 0.1) == 3
    assert most_within(trace, "r", 2, 0.1) == 1
    assert most_within(trace, "other", 1, 0.1) == 0
