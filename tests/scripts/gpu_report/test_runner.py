"""The steps of a report: one that raises, hangs or cannot begin stops no other, and leaves no process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from perdure.scripts.gpu_report.page import page
from perdure.scripts.gpu_report.plan import STEPS, TOTAL, ReportStep, bound
from perdure.scripts.gpu_report.runner import FINDING, NOT_RUN, OK, SKIPPED, Runner, StepOutcome
from tests.kit.lab import eventually, gone

PLANTED = '''
"""Steps that go well, and steps that do not."""

import subprocess, sys, time
from pathlib import Path


def well(stage):
    stage.note(answer=42)
    stage.row("four at once", {"tokens_per_s": 12.5})


def fail(stage):
    stage.note(before=1)
    raise ArithmeticError("planted\\nand more")


def broken(stage):
    stage.expect("nothing is lost", kept=False)
    stage.expect("nothing is doubled", kept=True)


def bare(stage):
    if not stage.needs_cuda("all of it"):
        raise AssertionError


def hang(stage):
    stage.note(reached=True)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    Path(sys.argv[-1], "child").write_text(str(child.pid))
    time.sleep(600)


def die(stage):
    import os
    os.kill(os.getpid(), 9)
'''


def step(name: str, seconds: float = 60.0) -> ReportStep:
    return ReportStep(name, f"Planted: {name}", seconds, f"planted_steps:{name}")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted_steps.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Runner(tmp_path / "out", tmp_path / "work", "cpu", time.monotonic() + 600, print)


def child_of(runner: Runner) -> int:
    """The process that the step ``hang`` has started."""
    note = runner.work / "shared" / "child"
    return int(eventually(lambda: note.exists() and note.read_text()))


def test_the_plan_fits_into_eight_minutes() -> None:
    assert bound() <= TOTAL == 480
    assert len({step.name for step in STEPS}) == len(STEPS)


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_stops_no_other(runner: Runner) -> None:
    """Each has a line, what was noted before its end is in it, and its log is kept."""
    runner.run([step("fail"), step("hang", 6.0), step("die"), step("broken"), step("bare"), step("well")])
    fail, hang, die, broken, bare, well = runner.outcomes
    assert (fail.state, fail.reason, fail.figures) == (FINDING, "ArithmeticError: planted", {"before": 1})
    assert (hang.state, hang.reason, hang.figures) == (FINDING, "took more than 6 s, and was ended", {"reached": True})
    assert (die.state, die.reason) == (FINDING, "it ended with status -9")
    assert (broken.state, broken.reason, broken.problems) == (FINDING, "nothing is lost", ["nothing is lost"])
    assert (bare.state, bare.reason, bare.missing) == (SKIPPED, "needs CUDA: all of it", ["needs CUDA: all of it"])
    assert (well.state, well.reason) == (OK, "")
    assert well.figures == {"answer": 42, "four at once": {"tokens_per_s": 12.5}}
    assert gone(child_of(runner))
    lines = (runner.out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(outcome) for outcome in runner.outcomes]
    with tarfile.open(runner.out / "logs.tar") as logs:
        assert logs.getnames() == [f"{item.step}.log" for item in runner.outcomes]
        text = logs.extractfile("fail.log")
        assert text is not None
        assert b"Traceback" in text.read()


def test_no_step_begins_when_time_is_over(runner: Runner) -> None:
    runner.deadline = time.monotonic() + 1
    runner.run([step("well")])
    assert [(item.state, item.reason) for item in runner.outcomes] == [(NOT_RUN, "no time was left")]


def test_an_interrupt_leaves_the_lines_and_no_process(runner: Runner) -> None:
    """Ctrl-C in the middle of a step: what came before is written, the page too, and the folder of the work is gone."""
    program = f"""
import sys, time
from perdure.scripts.gpu_report import __main__ as report
from perdure.scripts.gpu_report.plan import ReportStep
report.STEPS = tuple(ReportStep(name, name, 60, "planted_steps:" + name) for name in ("well", "hang", "fail"))
began = f"--began={{time.monotonic()}}"
sys.exit(report.main([{str(runner.out)!r}, "--rehearse", "--work", {str(runner.work)!r}, began]))
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        child = child_of(runner)
        os.kill(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "1 of 3 steps, 0 findings" in text
    (line,) = (runner.out / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == "well"
    assert "| well | ok |" in (runner.out / "gpu.md").read_text()
    assert gone(child)
    assert not runner.work.exists()
    with contextlib.suppress(psutil.NoSuchProcess):
        assert not psutil.Process(process.pid).children()


def test_a_page_says_what_is_known() -> None:
    """The machine first, every step in a row, what could not be had, and each step's figures as tables."""
    outcomes = [
        StepOutcome(
            step="machine",
            title="The machine",
            state=OK,
            figures={"device": "H200", "driver": "580", "torch_s": 3.14159},
        ),
        StepOutcome(
            step="speed",
            title="Speed",
            state=FINDING,
            reason="a | b\nc",
            seconds=12.0,
            figures={"8 at once": {"tokens_per_s": 1234.5}, "64 at once": {"load_s": 2.0}},
        ),
        StepOutcome(
            step="fault", title="Fault", state=SKIPPED, reason="needs CUDA: a fault", missing=["needs CUDA: a fault"]
        ),
    ]
    text = page(outcomes, "cuda", 99.6)
    assert "device H200, driver 580," in text
    assert "it took 100 s." in text
    assert "rehearsal" not in text
    assert "| Speed | finding | 12 | a / b c |" in text
    assert "- Fault: needs CUDA: a fault" in text
    assert "| torch s | 3.14 |" in text
    assert "|  | tokens per s | load s |" in text
    assert "| 8 at once | 1,234 | – |" in text
    assert "A rehearsal on the CPU" in page(outcomes, "cpu", 1.0)
