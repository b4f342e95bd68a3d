"""Generators that run side by side in threads, without a worker: what one of them does is its own affair."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from perdure.workers import Request, Step
from perdure.workers.tasks.base import Task
from perdure.workers.tasks.threads import ThreadBatch

LONG = 30.0


class Gated:
    """A task whose every step waits for a word of the test; what it did is noted."""

    def __init__(self) -> None:
        self.words: dict[str, queue.SimpleQueue[Any]] = {}
        self.closed: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.began: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.news = threading.Semaphore(0)
        self.batch = ThreadBatch(Task(self.run, slots=2), self.news.release)

    def run(self, request: Request) -> Generator[Step, None, Any]:
        self.began.put(request.payload)
        try:
            while True:
                word = self.words[request.payload].get(timeout=LONG)
                if isinstance(word, BaseException):
                    raise word
                yield word if word == "no step" else Step(output=(word, threading.get_ident()))
        except GeneratorExit:
            if request.payload != "stubborn":
                raise
            yield Step(output="late")
        finally:
            self.closed.put(request.payload)

    def admit(self, identifier: str, name: str = "") -> None:
        self.words[name or identifier] = queue.SimpleQueue()
        self.batch.admit(Request(id=identifier, payload=name or identifier))

    def say(self, name: str, word: Any) -> None:
        self.words[name].put(word)

    def next(self) -> list[Step]:
        """Wait for a step of anybody, and what has come."""
        assert self.news.acquire(timeout=LONG)
        return self.batch.collect()


@pytest.fixture
def gated() -> Iterator[Gated]:
    gated = Gated()
    yield gated
    for name in list(gated.batch._members):
        gated.batch.drop(name)
    for words in gated.words.values():
        words.put(None)
    gated.batch.close()
    assert gated.batch.join(LONG)


def test_each_moves_by_itself_and_in_its_own_thread(gated: Gated) -> None:
    """One waits in its first step while the other makes three; all steps of one are in one thread, of two in two."""
    gated.admit("slow")
    gated.admit("quick")
    threads = set()
    for number in range(3):
        gated.batch.resume()
        gated.say("quick", number)
        (step,) = gated.next()
        assert (step.request_id, step.output[0]) == ("quick", number)
        threads.add(step.output[1])
        assert gated.batch.computing == {"slow"}
    assert len(threads) == 1
    gated.say("slow", "at last")
    (step,) = gated.next()
    assert step.output[1] not in threads
    assert threading.get_ident() not in {step.output[1], *threads}


def test_nobody_goes_on_unasked(gated: Gated) -> None:
    """A step is computed only after resume(), and not for those that are withheld."""
    gated.admit("a")
    assert gated.batch.computing == frozenset()
    gated.batch.resume()
    gated.say("a", 1)
    assert [step.output[0] for step in gated.next()] == [1]
    gated.batch.withhold(["a"])
    gated.batch.resume()
    assert gated.batch.computing == frozenset()
    gated.batch.release(["a"])
    gated.batch.resume()
    assert gated.batch.computing == {"a"}
    gated.say("a", 2)


def test_what_was_dropped_in_a_step_is_ignored_when_it_comes(gated: Gated) -> None:
    """The same id may be admitted meanwhile; the slot is taken until the old step has ended and was closed."""
    gated.admit("a", "old")
    gated.batch.resume()
    assert gated.began.get(timeout=LONG) == "old"
    gated.batch.drop("a")
    assert gated.batch.free_slots == 1
    gated.admit("a", "new")
    gated.batch.resume()
    gated.say("old", "too late")
    assert gated.closed.get(timeout=LONG) == "old"
    assert gated.batch.join(LONG)
    assert gated.batch.free_slots == 2
    gated.say("new", "in time")
    steps = [step for _ in range(2) for step in gated.next()]
    assert [step.output[0] for step in steps] == ["in time"]


def test_a_member_waits_for_a_thread(gated: Gated) -> None:
    """No more than ``slots`` run at once, also while dropped ones still do; who waited may be dropped again."""
    for name in ("a", "b"):
        gated.admit(name)
    gated.batch.resume()
    for _ in range(2):
        gated.began.get(timeout=LONG)
    for name in ("a", "b"):
        gated.batch.drop(name)
    assert gated.batch.free_slots == 0
    for name in ("c", "d"):
        gated.admit(name)
    gated.batch.resume()
    gated.batch.drop("d")
    assert gated.batch.free_slots == 0
    gated.say("c", "here")
    gated.say("a", "gone")
    steps: list[Step] = []
    while not steps:
        steps = gated.next()
    assert [step.request_id for step in steps] == ["c"]


@pytest.mark.parametrize(
    "error", [KeyError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(7)], ids=repr
)
def test_whatever_one_raises_is_its_own_failure(gated: Gated, error: BaseException) -> None:
    """Also what would end a thread or a process; its thread serves the next request."""
    for number in range(3):
        gated.admit(f"bad-{number}")
        gated.batch.resume()
        gated.say(f"bad-{number}", error)
        (step,) = gated.next()
        assert step.ends
        expected = RuntimeError if isinstance(error, StopIteration) else type(error)
        assert isinstance(step.error, expected)


def test_a_generator_that_yields_when_it_is_closed_is_left(gated: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """Its last word is not heard, and its slot is free."""
    gated.admit("stubborn")
    gated.batch.resume()
    gated.say("stubborn", 1)
    gated.next()
    gated.batch.drop("stubborn")
    assert gated.batch.join(LONG)
    assert gated.batch.free_slots == 2
    assert "stubborn raised while it was closed" in caplog.text
    assert gated.batch.collect() == []


def test_something_else_than_a_step_is_refused(gated: Gated) -> None:
    """And its generator is closed."""
    gated.admit("a")
    gated.batch.resume()
    gated.say("a", "no step")
    (step,) = gated.next()
    assert isinstance(step.error, TypeError)
    assert gated.closed.get(timeout=LONG) == "a"


def test_a_function_that_is_no_generator_fails_its_request() -> None:
    """One that was annotated as such. With what to do; it was not run in the engine's thread."""

    def wrong(request: Request) -> Iterator[Step]:
        return 1  # type: ignore[return-value]

    batch = ThreadBatch(Task(wrong, slots=2))
    batch.admit(Request(id="a", payload=1))
    (step,) = batch.step()
    assert isinstance(step.error, TypeError)
    batch.close()
