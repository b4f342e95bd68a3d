"""Generator tasks, seen as a batch: each admitted request is one generator."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Generator, Iterable
from typing import Any, cast

from ...protocol.telemetry import logs
from .base import RAISED, BatchTask, Request, Step, Task
from .forks import foreign

log = logging.getLogger("rq.worker")

Running = Generator[Step, None, Any]


class GeneratorBatch(BatchTask):
    """Runs the requests of one :class:`Task` in the engine's thread; each step advances all, one after another."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.slots = task.slots
        self.step_timeout = task.step_timeout
        self.reproducible = task.reproducible
        self._running: dict[str, Running] = {}
        self._executions: dict[str, str] = {}

    def admit(self, request: Request) -> None:
        self._running[request.id] = _generator(self.task, request)
        self._executions[request.id] = request.execution

    def step(self) -> Iterable[Step]:
        steps = []
        for identifier, generator in list(self._running.items()):
            with logs.running(identifier, self._executions[identifier]):
                step = advance(generator)
            if step.ends:
                del self._running[identifier], self._executions[identifier]
            steps.append(Step(step.output, step.state, identifier, step.result, step.error, step.durable))
        return steps

    def drop(self, request_id: str) -> None:
        generator = self._running.pop(request_id, None)
        if generator is not None:
            with logs.running(request_id, self._executions.pop(request_id)), foreign:
                generator.close()


def begin(task: Task, request: Request) -> Running | Step:
    """The generator of a request, or the step that says why there is none."""
    try:
        return _generator(task, request)
    except RAISED as error:
        return Step(error=error)


def advance(generator: Running) -> Step:
    """The next step of a generator; its end and what it raises are steps too."""
    try:
        with foreign:
            step: Any = next(generator)
    except StopIteration as stop:
        return Step(result=stop.value)
    except RAISED as error:
        return Step(error=error)
    if isinstance(step, Step) and not step.ends:
        return step
    # It is over, by what it has yielded. What its finally blocks raise counts, as after a return.
    try:
        with foreign:
            generator.close()
    except RAISED as error:
        return Step(error=error)
    return step if isinstance(step, Step) else Step(error=no_step(step))


def no_step(value: object) -> TypeError:
    """The error of a task that yields something else than a step."""
    return TypeError(f"a task yields Step(…), but this one yielded a {type(value).__name__}")


def close(generator: Running, identifier: str) -> None:
    """Close the generator of a request that nobody wants any more."""
    try:
        with foreign:
            generator.close()
    except BaseException:
        log.exception("the generator of %s raised while it was closed", identifier)


def _generator(task: Task, request: Request) -> Running:
    with foreign:
        generator: object = task(request)  # annotated, but nobody has checked the user's promise
    if not inspect.isgenerator(generator):
        raise TypeError(
            f"{task!r} returned a {type(generator).__name__}, not a generator: a task yields at least one Step"
        )
    return cast("Running", generator)
