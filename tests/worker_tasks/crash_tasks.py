"""Tasks that end their worker's process."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Generator, Iterable
from typing import Any

from perdure.workers import BatchTask, Request, Step, task


def end(how: str) -> None:
    """End this process as a fault in native code would, or as the kernel does."""
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    elif how == "exit":
        os._exit(3)


class Crowd(BatchTask):
    """Each counts to ``n``; one with ``how`` ends the process once it has put out ``after`` more."""

    slots = 32

    def __init__(self) -> None:
        self.running: dict[str, list[Any]] = {}

    def admit(self, request: Request) -> None:
        index = len(request.outputs)
        self.running[request.id] = [index, index + request.payload.get("after", 0), request.payload]

    def step(self) -> Iterable[Step]:
        time.sleep(0.02)
        steps = []
        for identifier, entry in list(self.running.items()):
            index, last, payload = entry
            if index >= last and payload.get("how"):
                end(payload["how"])
            if index == payload["n"]:
                del self.running[identifier]
                steps.append(Step(request_id=identifier, result=index))
            else:
                entry[0] += 1
                steps.append(Step(request_id=identifier, output=index))
        return steps

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


crowd = Crowd()


@task
def poison(request: Request) -> Generator[Step, None, None]:
    """One durable output, then the end of the process: in every execution one more."""
    yield Step(output=len(request.outputs), durable=True)
    end(request.payload["how"])


@task
def fork(request: Request) -> Generator[Step, None, Any]:
    """A child of the worker crashes; the worker is as well as before."""
    for index in range(len(request.outputs), 60):
        if index == 3:
            child = os.fork()
            if child == 0:
                end("segfault")
            os.waitpid(child, 0)
        time.sleep(0.02)
        yield Step(output=index)
