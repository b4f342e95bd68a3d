"""Tasks and plain jobs that worker processes of the tests run. Nothing here knows the tests."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterable
from pathlib import Path
from typing import Any

from perdure.workers import BatchTask, InvalidRequest, Request, Step, task


def _mark(folder: str, name: str) -> None:
    """Leave a trace that a test can wait for."""
    Path(folder, name).touch()


def _count(request: Request) -> Generator[Step, None, Any]:
    for index in range(request.state or 0, request.payload["n"]):
        time.sleep(request.payload.get("sleep", 0))
        yield Step(output=index, state=index + 1)
    return {"counted": request.payload["n"]}


@task
def count(request: Request) -> Generator[Step, None, Any]:
    """Count to ``n``, ``sleep`` seconds each."""
    return (yield from _count(request))


@task(slots=4)
def many(request: Request) -> Generator[Step, None, Any]:
    """The same, four at once."""
    return (yield from _count(request))


@task(step_timeout=0.4)
def hang(request: Request) -> Generator[Step, None, Any]:
    """Put out three, hang once (the GIL is free) for as long as ``seconds`` says, go on when started again."""
    for index in range(request.state or 0, 6):
        if index == 3 and not Path(request.payload["folder"], "hung").exists():
            _mark(request.payload["folder"], "hung")
            time.sleep(request.payload["seconds"])
        yield Step(output=index, state=index + 1)


@task(slots=2, step_timeout=0.4)
def hang_among_others(request: Request) -> Generator[Step, None, Any]:
    """Hangs once as ``hang`` does, and takes every further run slowly."""
    for index in range(request.state or 0, 20):
        if index == 3 and not Path(request.payload["folder"], "hung").exists():
            _mark(request.payload["folder"], "hung")
            time.sleep(request.payload["seconds"])
        time.sleep(0.02)
        yield Step(output=index, state=index + 1)


@task(slots=2)
def stall_among_others(request: Request) -> Generator[Step, None, Any]:
    """Hangs once where the payload says ``at``, with the pool's own step timeout."""
    for index in range(request.state or 0, request.payload["n"]):
        if index == request.payload.get("at") and _once(request.payload["folder"], "hung"):
            time.sleep(600)
        time.sleep(0.01)
        yield Step(output=index, state=index + 1)


@task(slots=4)
def laden(request: Request) -> Generator[Step, None, Any]:
    """Count to ``n`` with a state of ``bytes``, and say which installation ended it; once ``goes`` is there, if it is
    named.
    """
    from perdure.workers import __file__ as place

    state = request.state or {"next": 0}
    for index in range(state["next"], request.payload["n"]):
        time.sleep(request.payload.get("sleep", 0))
        yield Step(
            output=index, state={"next": index + 1, "load": bytes([index % 256]) * request.payload.get("bytes", 0)}
        )
    while not Path(request.payload.get("goes", "/")).exists():
        time.sleep(0.01)
    return place


@task
def native(request: Request) -> Generator[Step, None, Any]:
    """Three outputs, then a step in native code that no Python handler interrupts; the GIL is free."""
    for index in range(request.state or 0, 6):
        if index == 3 and not Path(request.payload["folder"], "native").exists():
            _mark(request.payload["folder"], "native")
            # usleep returns early at a signal; what is left is slept again, as a kernel would run on.
            end = time.monotonic() + 600
            libc = ctypes.CDLL(None)
            while time.monotonic() < end:
                libc.usleep(ctypes.c_uint(900_000))
        yield Step(output=index, state=index + 1)


@task
def stall(request: Request) -> Generator[Step, None, Any]:
    """``hang`` with the pool's own step timeout."""
    yield from hang(request)


@task
def gate(request: Request) -> Generator[Step, None, Any]:
    """Put out three, then wait within one step until somebody opens."""
    for index in range(request.state or 0, 6):
        if index == 3:
            _mark(request.payload["folder"], "gate")
            while not Path(request.payload["folder"], "open").exists():
                time.sleep(0.01)
        yield Step(output=index, state=index + 1)


@task
def talks(request: Request) -> Generator[Step, None, Any]:
    """Log a line, as any code does."""
    logging.getLogger("app").warning("from within")
    yield Step(output=0, state=1)


def _once(folder: str, name: str) -> bool:
    """True the first time that anybody asks."""
    seen = Path(folder, name).exists()
    _mark(folder, name)
    return not seen


@task
def starve(request: Request) -> Generator[Step, None, Any]:
    """Raises once, in its generator, what the payload names."""
    yield from ()
    if _once(request.payload["folder"], "raised"):
        raise {"memory": MemoryError, "ordinary": ArithmeticError}[request.payload["error"]]("once")
    yield Step(output=0)


@task(step_timeout=60)
def patient(request: Request) -> Generator[Step, None, Any]:
    """A step that takes longer than the pool's default allows, for a task that says so."""
    yield Step(output=0)
    time.sleep(request.payload["seconds"])
    yield Step(output=1)


@task
def boom(request: Request) -> Generator[Step, None, Any]:
    """Fails after one output."""
    yield Step(output="before")
    raise RuntimeError("boom")


@task
def leave(request: Request) -> Generator[Step, None, Any]:
    """Calls sys.exit, as a library that was written as a program does."""
    yield Step(output="before")
    sys.exit(3)


@task
def refuse(request: Request) -> Generator[Step, None, Any]:
    """Says that the request is wrong."""
    if request.payload.get("n", 0) < 1:
        raise InvalidRequest("n must be at least 1", "n")
    yield Step()


@task
def durable(request: Request) -> Generator[Step, None, Any]:
    """What stands in Redis right after a durable step."""
    import redis

    connection = redis.Redis.from_url(request.payload["url"])
    seen = []
    for index in range(3):
        yield Step(output=index, durable=True)
        seen.append(int(connection.hget(f"rq:perdure:checkpoint:{request.id}", "offset") or 0))
    connection.close()
    return seen


class Batch(BatchTask):
    """Counts for each admitted request; what goes wrong is written in the payload."""

    slots = 3

    def __init__(self) -> None:
        self.running: dict[str, list[Any]] = {}

    def admit(self, request: Request) -> None:
        if request.payload.get("admit"):
            raise RuntimeError("not this one")
        self.running[request.id] = [len(request.outputs), request.payload]

    def step(self) -> Iterable[Step]:
        time.sleep(0.01)
        for identifier, entry in list(self.running.items()):
            index, payload = entry
            entry[0] += 1
            kind = payload.get("kind") if index == payload.get("at", 3) else None
            if index == payload["n"]:
                del self.running[identifier]
                yield Step(request_id=identifier, result={"mates": payload.get("mates")})
            elif kind == "error":
                del self.running[identifier]
                yield Step(request_id=identifier, error=ValueError("its own fault"))
            elif kind == "unpackable":
                yield Step(request_id=identifier, output=object())
            elif kind == "oversize":
                yield Step(request_id=identifier, output=b"x" * 5000)
            elif kind == "raise":
                raise RuntimeError("the whole step")
            elif kind == "no step":
                yield "no step"  # type: ignore[misc]
            else:
                # Which others ran in this very step.
                yield Step(request_id=identifier, output=[index, len(self.running)])

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


class Untimely(BatchTask):
    """Has no answer to how long a step may take: an error in the worker's own code, where it catches none."""

    slots = 2
    admitted = False

    def load(self) -> None:
        atexit.register(time.sleep, 1.0)  # the end of a process with a device takes longer

    @property
    def step_timeout(self) -> float | None:  # type: ignore[override]
        if self.admitted:
            raise ArithmeticError("not a task's method")
        return None

    def admit(self, request: Request) -> None:
        self.admitted = True

    def step(self) -> Iterable[Step]:
        return []

    def drop(self, request_id: str) -> None:
        pass


class Broken(BatchTask):
    """Each step raises while there is a file ``broken``, whoever is in it."""

    slots = 2

    def __init__(self) -> None:
        self.running: dict[str, dict[str, Any]] = {}
        self.says: bool | None = None

    def admit(self, request: Request) -> None:
        self.running[request.id] = request.payload
        self.says = request.payload.get("probe")

    def probe(self) -> bool | None:
        return self.says

    def step(self) -> Iterable[Step]:
        for identifier, payload in list(self.running.items()):
            if Path(payload["folder"], "broken").exists():
                raise RuntimeError("the engine's own fault")
            del self.running[identifier]
            yield Step(request_id=identifier, result="well")

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


class HangingBatch(BatchTask):
    """Counts to 20 for each; the step in which a request's third output is due hangs once."""

    slots = 2
    step_timeout = 0.4

    def __init__(self) -> None:
        self.running: dict[str, list[Any]] = {}

    def admit(self, request: Request) -> None:
        self.running[request.id] = [len(request.outputs), request.payload]

    def step(self) -> Iterable[Step]:
        for identifier, entry in list(self.running.items()):
            index, payload = entry
            if index == 3 and _once(payload["folder"], "hung"):
                time.sleep(payload["seconds"])
            if index == 20:
                del self.running[identifier]
                yield Step(request_id=identifier, result=20)
            else:
                entry[0] += 1
                yield Step(request_id=identifier, output=index)

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


@task(slots=4)
def gates(request: Request) -> Generator[Step, None, Any]:
    """Count to ``n``; where the payload says ``at``, wait within the step until somebody opens.

    Notes in its folder when it waits and when it is closed. ``durable`` makes every step so.
    """
    folder, name = request.payload["folder"], request.payload.get("name", "gate")
    try:
        for index in range(request.state or 0, request.payload["n"]):
            if index == request.payload.get("at"):
                _mark(folder, f"{name}-waits")
                while not Path(folder, f"{name}-open").exists():
                    time.sleep(0.01)
            time.sleep(request.payload.get("sleep", 0))
            yield Step(output=index, state=index + 1, durable=request.payload.get("durable", False))
        return threading.current_thread().name
    finally:
        _mark(folder, f"{name}-closed")


@task(slots=8, step_timeout=1)
async def async_gates(request: Request) -> AsyncGenerator[Step, None]:
    """``gates`` for coroutines: awaits at ``at`` until somebody opens; at ``hang`` it awaits for ever, once."""
    folder, name = request.payload["folder"], request.payload["name"]
    try:
        for index in range(request.state or 0, request.payload["n"]):
            if index == request.payload.get("hang") and _once(folder, f"{name}-hung"):
                await asyncio.Event().wait()
            if index == request.payload.get("at"):
                _mark(folder, f"{name}-waits")
                while not Path(folder, f"{name}-open").exists():  # noqa: ASYNC110, ASYNC240  # another process opens
                    await asyncio.sleep(0.01)
            yield Step(output=index, state=index + 1)
        yield Step(result=name)
    finally:
        _mark(folder, f"{name}-closed")


class Starving(BatchTask):
    """Meets the end of the memory once: where, stands in the payload."""

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}

    def admit(self, request: Request) -> None:
        if request.payload["where"] == "admit" and _once(request.payload["folder"], "raised"):
            raise MemoryError("once")
        self.running[request.id] = [len(request.outputs), request.payload]

    def step(self) -> Iterable[Step]:
        for identifier, entry in list(self.running.items()):
            where, folder = entry[1]["where"], entry[1]["folder"]
            if where == "step" and _once(folder, "raised"):
                del self.running[identifier]
                yield Step(request_id=identifier, error=MemoryError("once"))
            elif entry[0] == 1:
                del self.running[identifier]
                yield Step(request_id=identifier, result="done")
            else:
                entry[0] = 1
                yield Step(request_id=identifier, output=0)

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


class Model(BatchTask):
    """Its fingerprint, slots, loading time and whether it loads come from the environment.

    With ``signed`` in the payload, the outputs are those of this model alone; with ``gate`` and ``folder``, it puts out
    so many and goes on when somebody opens.
    """

    slots = int(os.environ.get("LAB_SLOTS", "1"))

    def load(self) -> None:
        if os.environ.get("LAB_LOAD") == "fail":
            raise OSError("no weights here")
        if folder := os.environ.get("LAB_FOLDER"):
            _mark(folder, "loading")
        time.sleep(float(os.environ.get("LAB_LOAD", "0")))

    def fingerprint(self) -> str:
        return os.environ.get("LAB_FINGERPRINT", "")

    def __init__(self) -> None:
        self.running: dict[str, list[Any]] = {}

    def admit(self, request: Request) -> None:
        self.running[request.id] = [len(request.outputs), request.payload]

    def step(self) -> Iterable[Step]:
        steps = []
        for identifier, entry in list(self.running.items()):
            index, payload = entry
            time.sleep(payload.get("sleep", 0))
            if index == payload.get("gate") and not Path(payload["folder"], "open").exists():
                time.sleep(0.01)
            elif index == payload["n"]:
                del self.running[identifier]
                steps.append(Step(request_id=identifier, result=self.fingerprint()))
            else:
                entry[0] += 1
                output = [self.fingerprint(), index] if payload.get("signed") else index
                steps.append(Step(request_id=identifier, output=output))
        return steps

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


model = Model()


def no_task(request: Any) -> None:
    """A callable that is no task; leaves a trace if somebody runs it all the same."""
    _mark(request.payload["folder"], "ran")


def double(number: int) -> int:
    """A plain job."""
    return 2 * number


def fail(number: int) -> None:
    """A plain job that fails."""
    raise KeyError(number)


def nap(seconds: float) -> str:
    """A plain job that takes a while."""
    time.sleep(seconds)
    return "rested"


def succeeded(job: Any, connection: Any, result: Any) -> None:
    """A success callback of RQ's: notes the result beside the job."""
    connection.set(f"called:{job.id}", f"success {result}", ex=600)


def failed(job: Any, connection: Any, *error: Any) -> None:
    """A failure callback of RQ's: notes the kind of the error."""
    connection.set(f"called:{job.id}", f"failure {error[0].__name__}", ex=600)


def second_time(folder: str) -> str:
    """A plain job that runs on for a minute the first time, and returns at once from then on."""
    if _once(folder, "first"):
        time.sleep(60)
    return "done"


def handled(job: Any, *error: Any) -> None:
    """An exception handler of RQ's: notes the kind of the error."""
    job.connection.set(f"handled:{job.id}", error[0].__name__, ex=600)


def stopped(job: Any, connection: Any) -> None:
    """A callback of RQ's for a job that was stopped."""
    connection.set(f"called:{job.id}", f"stopped {job.func_name}", ex=600)
