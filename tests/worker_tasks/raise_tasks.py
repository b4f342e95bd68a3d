"""Tasks that raise what is no Exception, each in another place."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Generator, Iterable
from pathlib import Path
from typing import Any

from perdure.workers import BatchTask, InvalidRequest, Request, Step, Unfit, task


class Panic(BaseException):
    """As pyo3's PanicException: derived from BaseException, so that nobody catches it by mistake."""


RAISES: dict[str, type[BaseException]] = {
    "panic": Panic,
    "interrupt": KeyboardInterrupt,
    "cancel": asyncio.CancelledError,
    "exit": SystemExit,
    "generator exit": GeneratorExit,
    "unfit": Unfit,
    "value": ValueError,
    "invalid": InvalidRequest,
}


def fail(payload: dict[str, Any], where: str) -> None:
    """Raise what the payload names, if it is meant for this place."""
    if payload.get("where") == where:
        raise RAISES[payload["what"]]("of the task's own" + (" \x1b[31m" if payload["what"] == "value" else ""))


@task
def alone(request: Request) -> Generator[Step, None, str]:
    yield Step(output=os.getpid())
    fail(request.payload, "step")
    return "well"


@task(slots=2)
def threads(request: Request) -> Generator[Step, None, str]:
    yield Step(output=os.getpid())
    fail(request.payload, "step")
    return "well"


@task(slots=2)
async def loop(request: Request) -> AsyncGenerator[Step, None]:
    yield Step(output=os.getpid())
    fail(request.payload, "step")
    yield Step(result="well")


class Many(BatchTask):
    """Each puts out one number and ends; ``where`` says which method raises for it."""

    slots = 4

    def __init__(self) -> None:
        self.running: dict[str, dict[str, Any]] = {}

    def memory_needed(self, payload: Any) -> int | None:
        fail(payload, "memory_needed")
        return None

    def admit(self, request: Request) -> None:
        fail(request.payload, "admit")
        self.running[request.id] = request.payload

    def step(self) -> Iterable[Step]:
        time.sleep(0.01)
        for identifier, payload in list(self.running.items()):
            if payload.get("where") == "error":
                del self.running[identifier]
                yield Step(request_id=identifier, error=RAISES[payload["what"]]("of the task's own"))
            elif payload.get("where") == "drop":
                yield Step(request_id=identifier, output=1)
            else:
                del self.running[identifier]
                yield Step(request_id=identifier, result="well")

    def drop(self, request_id: str) -> None:
        fail(self.running.pop(request_id, {}), "drop")


class Loads(BatchTask):
    """Its first load raises what the file ``first`` names."""

    slots = 2

    def load(self) -> None:
        first = Path("first")
        if first.exists():
            what = first.read_text()
            first.unlink()
            raise RAISES[what]("of the task's own")

    def admit(self, request: Request) -> None:
        self.admitted = request.id

    def step(self) -> Iterable[Step]:
        yield Step(request_id=self.admitted, result="well")

    def drop(self, request_id: str) -> None:
        pass
