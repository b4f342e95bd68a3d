"""Tasks that bring a worker process to a standstill, once; nothing here knows the tests."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from perdure.workers import BatchTask, Request, Step, task

N = 6
"""Outputs of each request here."""


def hold_the_interpreter(seconds: float = 600) -> None:
    """Sleep in native code without giving the interpreter's lock away."""
    libc = ctypes.PyDLL(None)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        libc.usleep(ctypes.c_uint(900_000))


def hold_it_elsewhere() -> None:
    thread = threading.Thread(target=hold_the_interpreter, name="greedy", daemon=True)
    thread.start()
    thread.join()


def lock_the_log() -> None:
    """Whoever writes to the log from now on waits for ever: in this process, that is the courier."""
    logging.getLogger("rq.worker").handlers[0].acquire()


def fail_the_courier() -> None:
    """Something goes wrong in the courier's thread that nobody has foreseen."""
    (thread,) = [item for item in threading.enumerate() if item.name == "courier"]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(ArithmeticError))


HOW = {
    "sleep": lambda: time.sleep(600),
    "native": hold_the_interpreter,
    "elsewhere": hold_it_elsewhere,
    "log": lock_the_log,
    "fail": fail_the_courier,
}


def _once(request: Request) -> bool:
    mark = Path(request.payload["folder"], f"hung-{request.id}")
    seen = mark.exists()
    mark.touch()
    return not seen


def _steps(request: Request) -> Generator[Step, None, None]:
    for index in range(request.state or 0, N):
        if index == 3 and "how" in request.payload and _once(request):
            HOW[request.payload["how"]]()
        time.sleep(request.payload.get("sleep", 0))
        yield Step(output=index, state=index + 1)


@task
def alone(request: Request) -> Generator[Step, None, None]:
    """Comes to a standstill at its fourth output, as the payload says."""
    yield from _steps(request)


@task(slots=2)
def beside(request: Request) -> Generator[Step, None, None]:
    """The same, two at once, each in a thread."""
    yield from _steps(request)


class Greedy(BatchTask):
    """Holds the interpreter's lock for as long as it loads."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}

    def load(self) -> None:
        hold_the_interpreter(float(os.environ["LAB_LOAD"]))

    def admit(self, request: Request) -> None:
        self.running[request.id] = len(request.outputs)

    def step(self) -> Iterable[Step]:
        for name, index in list(self.running.items()):
            self.running[name] += 1
            yield Step(request_id=name, output=index) if index < N else Step(request_id=name, result=self._end(name))

    def _end(self, name: str) -> Any:
        return self.running.pop(name)

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)
