"""Generator tasks, seen as a batch: each admitted request is one generator, each step advances all."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable
from typing import Any, cast

from .tasks import RAISED, AnyTask, BatchTask, Request, Step, Task


class GeneratorBatch(BatchTask):
    """Runs the requests of one :class:`Task`; what one of them raises is that one's alone."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.slots = task.slots
        self.step_timeout = task.step_timeout
        self.reproducible = task.reproducible
        self._running: dict[str, Generator[Step, None, Any]] = {}

    def admit(self, request: Request) -> None:
        generator: object = self.task(request)  # annotated, but nobody has checked the user's promise
        if not inspect.isgenerator(generator):
            raise TypeError(
                f"{self.task!r} returned a {type(generator).__name__}, not a generator: a task yields at least one Step"
            )
        self._running[request.id] = cast("Generator[Step, None, Any]", generator)

    def step(self) -> Iterable[Step]:
        steps = []
        for identifier, generator in list(self._running.items()):
            step = _advance(identifier, generator)
            if step.ends:
                del self._running[identifier]
            steps.append(step)
        return steps

    def drop(self, request_id: str) -> None:
        generator = self._running.pop(request_id, None)
        if generator is not None:
            generator.close()


def _advance(identifier: str, generator: Generator[Step, None, Any]) -> Step:
    try:
        step: Any = next(generator)
    except StopIteration as stop:
        return Step(request_id=identifier, result=stop.value)
    except RAISED as error:
        return Step(request_id=identifier, error=error)
    if not isinstance(step, Step):
        generator.close()
        return Step(
            request_id=identifier,
            error=TypeError(f"a task yields Step(…), but this one yielded a {type(step).__name__}"),
        )
    return Step(output=step.output, state=step.state, request_id=identifier, durable=step.durable)


def as_batch(task: AnyTask) -> BatchTask:
    """What the engine loop runs for a task: an instance of a batch task, or one made of generators."""
    if isinstance(task, Task):
        return GeneratorBatch(task)
    return task() if isinstance(task, type) else task
