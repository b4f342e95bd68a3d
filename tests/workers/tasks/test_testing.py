"""resume_at_every_step: right tasks pass, and each common mistake is found and named. No server, no process."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from perdure.workers import BatchTask, InvalidRequest, Request, Step, task
from perdure.workers.testing import resume_at_every_step

Steps = Generator[Step, None, Any]


@task
def right(request: Request) -> Steps:
    """Sums, with all that it needs in its state."""
    index, total = request.state or (0, 0)
    while index < request.payload:
        total += index
        index += 1
        yield Step(output=total, state=[index, total])
    return {"total": total}


@task(slots=3)
def right_in_threads(request: Request) -> Steps:
    """The same, with durable steps."""
    index, total = request.state or (0, 0)
    while index < request.payload:
        total += index
        index += 1
        yield Step(output=total, state=[index, total], durable=index % 2 == 0)
    return {"total": total}


class Right(BatchTask):
    """The same again, from its outputs."""

    def __init__(self) -> None:
        self.running: dict[str, list[int]] = {}

    def prepare(self, payload: Any) -> Any:
        if payload < 0:
            raise InvalidRequest("must not be negative", "n")
        return payload

    def admit(self, request: Request) -> None:
        total = request.outputs[-1] if request.outputs else 0
        self.running[request.id] = [len(request.outputs), total, request.payload]

    def step(self) -> Iterable[Step]:
        for identifier, entry in list(self.running.items()):
            index, total, number = entry
            if index == number:
                del self.running[identifier]
                yield Step(request_id=identifier, result={"total": total})
            else:
                entry[:2] = index + 1, total + index
                yield Step(request_id=identifier, output=total + index)

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "candidate", [right, right_in_threads, Right, Right()], ids=["plain", "threads", "class", "it"]
)
def test_a_right_task_passes(candidate: Any) -> None:
    """Cut after each of its steps, with the checkpoint there and one step behind: two runs for each cut."""
    report = resume_at_every_step(candidate, 5)
    assert (report.steps, report.cuts, report.runs) == (5, [1, 2, 3, 4, 5], 11)
    assert (report.outputs, report.result) == ([0, 1, 3, 6, 10], {"total": 10})


def test_a_task_without_steps_passes() -> None:
    """There is nowhere to cut."""
    assert resume_at_every_step(right, 0).cuts == []


counter = itertools.count()


@task
def global_counter(request: Request) -> Steps:
    for index in range(request.state or 0, 4):
        yield Step(output=next(counter), state=index + 1)


@task
def unseeded(request: Request) -> Steps:
    for index in range(request.state or 0, 4):
        yield Step(output=random.random(), state=index + 1)


@task
def state_first(request: Request) -> Steps:
    for index in range(request.state or 0, 4):
        yield Step(state=index + 1)
        yield Step(output=index)


@task
def ignores_state(request: Request) -> Steps:
    for index in range(4):
        yield Step(output=index, state=index + 1)


@task
def local_total(request: Request) -> Steps:
    total = 0
    for index in range(request.state or 0, 4):
        total += index
        yield Step(output=total, state=index + 1)


@task
def local_result(request: Request) -> Steps:
    seen = []
    for index in range(request.state or 0, 4):
        seen.append(index)
        yield Step(output=index, state=index + 1)
    return seen


@task
def fails_resumed(request: Request) -> Steps:
    for index in range(request.state["n"] if request.state else 0, 4):
        yield Step(output=index, state=index + 1)


@task
def clock(request: Request) -> Steps:
    for index in range(request.state or 0, 3):
        yield Step(output=time.monotonic_ns(), state=index + 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (global_counter, r"cut after step 1 of 4, resumed from the checkpoint of step 1[\s\S]*output 0 differs"
         r"\s+expected 0\s+got      4[\s\S]*before the cut[\s\S]*module-level"),
        (unseeded, r"output 0 differs[\s\S]*without a seed"),
        (state_first, r"cut after step 1 of 8[\s\S]*output 0 differs\s+expected 0\s+got      1"
         r"[\s\S]*another Step than the"),
        (ignores_state, r"cut after step 1 of 4[\s\S]*output 1 differs\s+expected 1\s+got      0[\s\S]*request.state"),
        (local_total, r"cut after step 2 of 4[\s\S]*output 2 differs\s+expected 3\s+got      2[\s\S]*not in the state"),
        (local_result, r"all 4 outputs are equal, but the result differs\s+expected \[0, 1, 2, 3\]"
         r"\s+got      \[1, 2, 3\]"),
        (fails_resumed, r"cut after step 1 of 4[\s\S]*the task fails[\s\S]*TypeError"),
        (clock, r"output 0 differs[\s\S]*the time of day"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_mistake_is_found_and_named(wrong: Any, message: str) -> None:
    """Which cut, which output, what was expected and what came, and where to look."""
    with pytest.raises(AssertionError, match=message):
        resume_at_every_step(wrong)


def test_what_only_a_late_checkpoint_shows() -> None:
    """A side effect of a step that runs twice: right from the checkpoint of the cut, wrong from the one before."""
    done: list[str] = []

    @task
    def appends(request: Request) -> Steps:
        for index in range(request.state or 0, 3):
            done.append(f"{request.id} {index}")
            yield Step(output=sum(line.startswith(request.id) for line in done), state=index + 1)

    resume_at_every_step(appends, behind=[0])
    with pytest.raises(AssertionError, match=r"cut after step 1 of 3, resumed from the start: output 0 differs"):
        resume_at_every_step(appends)


class Changing(Right):
    """Another fingerprint for each instance."""

    def fingerprint(self) -> str:
        return str(id(self))


def test_a_fingerprint_that_changes_is_found() -> None:
    """Nobody could ever continue such a request."""
    with pytest.raises(
        AssertionError, match=r"cannot go on: another model began it[\s\S]*fingerprint\(\) must be the same"
    ):
        resume_at_every_step(Changing, 3)


def test_equal_decides() -> None:
    """What need not be equal byte by byte is compared as the caller says."""
    assert resume_at_every_step(unseeded, equal=lambda one, other: type(one) is type(other)).runs == 9


@pytest.mark.slow
def test_long_tasks_are_sampled() -> None:
    """First and last always, the rest spread; or the very cuts that are asked for."""
    report = resume_at_every_step(right, 30, cuts=3, behind=[0])
    assert (report.cuts, report.runs) == ([1, 15, 30], 4)
    assert resume_at_every_step(right, 30, cuts=[7], behind=[7]).runs == 2
    with pytest.raises(ValueError, match="between 1 and 30"):
        resume_at_every_step(right, 30, cuts=[31])


@task
def endless(request: Request) -> Steps:
    while True:
        yield Step()


class Idle(Right):
    """Never says anything."""

    def step(self) -> Iterable[Step]:
        return []


def test_what_does_not_end_is_told() -> None:
    """With steps or without."""
    for candidate in (endless, Idle):
        with pytest.raises(AssertionError, match="did not end within 50 steps"):
            resume_at_every_step(candidate, 1, max_steps=50)


@task
def fails(request: Request) -> Steps:
    yield Step(output=1)
    raise RuntimeError("always")


def test_a_task_that_fails_without_a_cut_is_told() -> None:
    """With its own error."""
    with pytest.raises(AssertionError, match=r"without any cut:\s+ERROR: RuntimeError: always"):
        resume_at_every_step(fails)


def test_prepare_is_asked_as_at_submit() -> None:
    """A payload that would be refused at submit is refused here."""
    with pytest.raises(InvalidRequest, match="negative"):
        resume_at_every_step(Right, -1)


WITHOUT = """
import sys
sys.modules["lupa"] = None
from perdure.workers import Step, task
from perdure.workers.testing import resume_at_every_step

@task
def one(request):
    yield Step(output=1)

try:
    resume_at_every_step(one)
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_fakeredis_it_says_what_to_install() -> None:
    """In a process of its own: fakeredis that was imported without lupa knows no scripts until its process ends."""
    said = subprocess.check_output([sys.executable, "-c", WITHOUT], text=True, timeout=60)
    assert 'pip install "perdure[testing]"' in said
