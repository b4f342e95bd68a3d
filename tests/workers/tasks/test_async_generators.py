"""Async generator tasks: side by side on one event loop, in unit and in real workers."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.workers import Request, Step, task
from perdure.workers.engine.engines import as_batch
from perdure.workers.tasks.async_generators import AsyncBatch
from perdure.workers.tasks.base import Task
from perdure.workers.tasks.members import Members
from perdure.workers.testing import resume_at_every_step
from tests.kit.lab import Lab, eventually

LONG = 30.0
Steps = AsyncGenerator[Step, None]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody")


@task(slots=3)
async def right(request: Request) -> Steps:
    """Sums; each step awaits."""
    index, total = request.state or (0, 0)
    while index < request.payload:
        await asyncio.sleep(0)
        total += index
        index += 1
        yield Step(output=total, state=[index, total], durable=index % 2 == 0)
    yield Step(result={"total": total})


@task
async def forgetful(request: Request) -> Steps:
    for index in range(4):
        yield Step(output=index, state=index + 1)


class Gated:
    """An async task whose every step waits for a word of the test."""

    def __init__(self, slots: int = 3) -> None:
        self.closed: list[str] = []
        self.began = threading.Semaphore(0)
        self.queues: dict[str, asyncio.Queue[Any]] = {}
        self.news = threading.Semaphore(0)

        async def run(request: Request) -> Steps:
            name = request.payload
            variable.set(name)
            words = self.queues[name]
            self.began.release()
            try:
                while True:
                    word = await words.get()
                    if isinstance(word, BaseException):
                        raise word
                    yield Step(output=(variable.get(), threading.get_ident())) if word == "go" else word
            finally:
                self.closed.append(name)

        self.batch = AsyncBatch(Task(run, slots=slots), self.news.release)

    def admit(self, identifier: str, name: str = "") -> None:
        self.queues[name or identifier] = asyncio.Queue()
        self.batch.admit(Request(id=identifier, payload=name or identifier))

    def begin(self, *names: str) -> None:
        for name in names:
            self.admit(name)
        self.batch.resume()
        for _ in names:
            assert self.began.acquire(timeout=LONG)

    def say(self, name: str, word: Any) -> None:
        loop = self.batch._loop
        assert loop is not None
        loop.call_soon_threadsafe(self.queues[name].put_nowait, word)

    def next(self) -> list[Step]:
        while True:
            assert self.news.acquire(timeout=LONG)
            if steps := self.batch.collect():
                return steps


@pytest.fixture
def gated() -> Iterator[Gated]:
    gated = Gated()
    yield gated
    for name in list(gated.batch._members):
        gated.batch.drop(name)
    assert gated.batch.join(LONG)
    gated.batch.close()


def test_each_moves_by_itself_on_one_loop(gated: Gated) -> None:
    """One that awaits holds no other up; all share a thread that is not the caller's; context variables
    are one's own.
    """
    gated.begin("slow", "quick")
    for _ in range(3):
        gated.say("quick", "go")
        (step,) = gated.next()
        assert (step.request_id, step.output[0]) == ("quick", "quick")
        assert gated.batch.computing == {"slow"}
        gated.batch.resume()
    gated.say("slow", "go")
    (last,) = gated.next()
    assert last.output == ("slow", step.output[1])
    assert last.output[1] != threading.get_ident()


def test_a_dropped_one_is_canceled_where_it_awaits(gated: Gated) -> None:
    """It is closed at once, also in the middle of a step; the same id may come again."""
    gated.admit("a", "old")
    gated.batch.resume()
    assert gated.began.acquire(timeout=LONG)
    gated.batch.drop("a")
    gated.admit("a", "new")
    assert gated.batch.join(LONG)
    assert gated.closed == ["old"]
    assert gated.batch.free_slots == 3
    gated.batch.resume()
    gated.say("new", Step(result=7))
    assert [(step.request_id, step.result) for step in gated.next()] == [("a", 7)]
    assert gated.closed == ["old", "new"]


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration(7), 17],
    ids=repr,
)
def test_whatever_one_raises_is_its_own_failure(gated: Gated, error: Any) -> None:
    """Also what would end an event loop, and what is no step; the loop serves its mates on."""
    gated.begin("bad", "good")
    gated.say("bad", error)
    (step,) = gated.next()
    assert step.request_id == "bad"
    replaced: dict[type, type[BaseException]] = {int: TypeError, StopIteration: RuntimeError}
    kind: type = type(error)
    expected: type[BaseException] = replaced.get(kind, kind)
    assert isinstance(step.error, expected)
    gated.say("good", Step(output=1, result=2))
    assert [(step.output, step.result, step.error) for step in gated.next()] == [(1, 2, None)]


@task
def plain(request: Request) -> Generator[Step, None, Any]:
    yield Step(result="early")
    raise AssertionError("not reached")


@task
async def without(request: Request) -> Steps:
    yield Step(output=1)


def test_a_result_is_a_last_step() -> None:
    """Async generators and plain ones may both end by Step(result=...); what stands behind it is not run."""
    (step,) = _only(plain)
    assert (step.result, step.error) == ("early", None)
    assert [item.result for item in _only(without) if item.ends] == [None]


def _only(candidate: Task) -> list[Step]:
    batch = as_batch(candidate)
    batch.admit(Request(id="a", payload=None))
    steps = list(batch.step())
    while not steps[-1].ends:
        steps += batch.step()
    if isinstance(batch, Members):
        batch.close()
    return steps


def test_an_async_function_that_yields_nothing_is_refused() -> None:
    """Where it is written, saying what to do."""

    async def nothing(request: Request) -> None: ...

    function: Any = nothing
    with pytest.raises(TypeError, match=r"nothing is an async function without a yield.*yield Step"):
        task(function)


def test_it_can_be_resumed_at_every_step() -> None:
    """The check for users' own tests runs async tasks too, and finds their mistakes."""
    report = resume_at_every_step(right, 5)
    assert (report.outputs, report.result, report.runs) == ([0, 1, 3, 6, 10], {"total": 10}, 11)
    with pytest.raises(AssertionError, match="cut after step 1 of 4"):
        resume_at_every_step(forgetful)


def gate(lab: Lab, name: str, **payload: object) -> str:
    return lab.submit("async_gates", {"folder": str(lab.folder), "name": name, "n": 6, **payload})


def exists(folder: Path, *names: str) -> None:
    eventually(lambda: all((folder / name).exists() for name in names))


@pytest.mark.slow
def test_async_requests_of_a_killed_worker_go_on(lab: Lab) -> None:
    """Three await in one worker, a fourth ends; kill -9; each goes on at its own checkpoint. A cancel closes one."""
    first = lab.worker()
    names = ["a", "b", "c"]
    requests = [gate(lab, name, at=number + 1) for number, name in enumerate(names)]
    exists(lab.folder, *(f"{name}-waits" for name in names))
    lab.check(gate(lab, "quick"), 6)
    canceled = gate(lab, "canceled", at=0)
    exists(lab.folder, "canceled-waits")
    assert lab.store.cancel([(canceled, "")], reason="enough") == ["requested"]
    exists(lab.folder, "canceled-closed")
    assert lab.ended(canceled).status == "canceled"
    for number, request in enumerate(requests):
        lab.moved(request, number + 1)
    first.kill()
    for name in names:
        (lab.folder / f"{name}-open").touch()
    lab.worker(wait=False)
    for number, request in enumerate(requests):
        assert (lab.check(request, 6).attempt, lab.store.history(request)[0].offset) == (0, number + 1)
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_coroutine_that_hangs_is_found(lab: Lab) -> None:
    """It awaits for ever: HANG; it is canceled, started again, and its mates have not noticed."""
    lab.reaper()
    lab.worker()
    poison = gate(lab, "poison", hang=2)
    exists(lab.folder, "poison-hung")
    mates = [gate(lab, f"mate-{number}", n=40) for number in range(4)]
    for name in mates:
        lab.check(name, 40)
    assert lab.check(poison, 6).attempt == 0
    assert lab.events(poison)[0] == ("suspected", "HANG")
    assert [lab.events(name) for name in mates] == [[]] * 4
