"""Tasks and a plain job that fork; the child leaves in the way that the payload names."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any

from perdure.workers import BatchTask, Request, Step, task

STATUS: dict[str, int] = {}
"""What became of the child that the load has forked."""


def fork(how: str) -> bool | int:
    """True in the child, if it is to return; in the parent, the child's exit status, -1 if it has not ended in time."""
    pid = os.fork()
    if pid == 0:
        if how == "exit":
            sys.exit(3)
        if how == "raise":
            raise ValueError("in the child")
        return True
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    return -1


@task
def generator(request: Request) -> Generator[Step, None, Any]:
    found = fork(request.payload["how"])
    if found is True and request.payload["how"] == "yield":
        yield Step(output="the child's")
    if found is True:
        return "the child's"
    yield Step(output=found)
    return found


@task(slots=2)
def threads(request: Request) -> Generator[Step, None, Any]:
    found = fork(request.payload["how"])
    if found is True and request.payload["how"] == "yield":
        yield Step(output="the child's")
    if found is True:
        return "the child's"
    yield Step(output=found)
    return found


@task(slots=2)
async def loop(request: Request) -> AsyncGenerator[Step, None]:
    found = fork(request.payload["how"])
    if found is True:
        if request.payload["how"] == "yield":
            yield Step(output="the child's")
        return
    yield Step(output=found)
    yield Step(result=found)


class Batch(BatchTask):
    """``where``: the method that forks."""

    slots = 2

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}

    def admit(self, request: Request) -> None:
        found: Any = None
        if request.payload["where"] == "admit":
            found = fork(request.payload["how"])
            if found is True:
                return
        self.running[request.id] = (request.payload, found)

    def step(self) -> Iterable[Step]:
        for identifier, (payload, found) in list(self.running.items()):
            if payload["where"] == "step":
                found = fork(payload["how"])
                if found is True:
                    return [Step(request_id=identifier, result="the child's")]
            del self.running[identifier]
            return [Step(request_id=identifier, output=found), Step(request_id=identifier, result=found)]
        return []

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


def plain(how: str) -> Any:
    """An ordinary RQ job."""
    return fork(how)
