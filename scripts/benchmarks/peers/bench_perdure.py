"""Perdure: the no-op as a generator task, and as a batch task; both as users write them."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from typing import Any

import kit
import notes

from perdure.producer import Client
from perdure.workers import BatchTask, Request, Step, task


@task(slots=64)
def noop(request: Request) -> Generator[Step, None, None]:
    """One step, which is the result."""
    yield Step(result=request.payload["n"])


@task
def walk(request: Request) -> Generator[Step, None, Any]:
    """Steps that are put out and stored, as any task of this kind does."""
    for step in notes.steps(request.payload, request.state or 0):
        yield Step(output=step, state=step + 1)
    return request.payload["steps"]


class Noop(BatchTask):
    """The same for many at once, as models run them."""

    slots = 64

    def __init__(self) -> None:
        self.admitted: dict[str, Any] = {}

    def admit(self, request: Request) -> None:
        self.admitted[request.id] = request.payload["n"]

    def step(self) -> Iterable[Step]:
        steps = [Step(request_id=name, result=number) for name, number in self.admitted.items()]
        self.admitted.clear()
        return steps

    def drop(self, request_id: str) -> None:
        self.admitted.pop(request_id, None)


class Perdure(kit.Producer):
    """Submits by dotted path; ``name`` is the task's."""

    bulk = True

    def __init__(self, name: str) -> None:
        self.task = f"bench_perdure.{name}"
        self.client: Client | None = None

    def open(self, url: str) -> None:
        if self.client is not None:
            self.client.close()
        self.client = Client(url)

    def submit(self, payload: dict[str, Any]) -> Any:
        assert self.client is not None
        return self.client.submit(self.task, payload, queue=kit.QUEUE)

    def submit_many(self, payloads: list[dict[str, Any]]) -> Any:
        assert self.client is not None
        return self.client.submit_many([(self.task, payload) for payload in payloads], queue=kit.QUEUE)

    def walk(self, payload: dict[str, Any]) -> Any:
        assert self.client is not None
        return self.client.submit("bench_perdure.walk", payload, queue=kit.QUEUE)

    def result(self, handle: Any) -> Any:
        return handle.result(kit.WAIT)


if __name__ == "__main__":
    kit.serve(Perdure(sys.argv[1]))
