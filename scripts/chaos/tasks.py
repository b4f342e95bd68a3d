"""The tasks that run under faults. Every output can be computed again, and says which execution put it out.

An output is ``[index, value, execution]``. A value depends on all values before it: whoever goes on from a wrong
place puts out something else.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import select
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from ...workers import BatchTask, InvalidRequest, Request, Step, task

MODEL = "CHAOS_MODEL"
"""Environment variable: which model a worker of :class:`Blend` has."""

LACKS = "CHAOS_LACKS"
"""Environment variable: a worker that has it cannot import these tasks."""

if os.environ.get(LACKS):
    raise ModuleNotFoundError("this worker lacks a module that its tasks need", name="chaos_lacks")

FIRST, OTHER = "first", "other"

REFUSED = "this request asks to be refused"


def first(seed: int, model: str = "") -> str:
    """What the first value follows."""
    return hashlib.blake2b(f"{seed} {model}".encode(), digest_size=8).hexdigest()


def following(value: str, index: int) -> str:
    """The value at an index, from the one before it."""
    return hashlib.blake2b(f"{value} {index}".encode(), digest_size=8).hexdigest()


def golden(seed: int, number: int, model: str = "") -> list[str]:
    """All values of an answer that nothing has disturbed."""
    values = []
    value = first(seed, model)
    for index in range(number):
        value = following(value, index)
        values.append(value)
    return values


@task(slots=4)
def walk(request: Request) -> Generator[Step, None, Any]:
    """``n`` values, ``sleep`` seconds each; the state alone says where to go on.

    ``trap`` in the payload harms its worker once, before the value at ``at``: see :func:`_spring`. ``poison`` ends its
    process each time.
    """
    payload = request.payload
    if payload.get("refuse"):
        raise InvalidRequest(REFUSED)
    state = request.state or {"i": 0, "v": first(payload["seed"]), "sprung": False}
    if state["i"] != len(request.outputs):
        raise RuntimeError(f"the state is that of {state['i']} outputs, but {len(request.outputs)} were given")
    index, value, sprung = state["i"], state["v"], state["sprung"]
    trap = payload.get("trap")
    while index < payload["n"]:
        if trap and index == trap["at"] and not sprung:
            sprung = True
            # Stored before it springs: the next execution must know that it has.
            yield Step(state={"i": index, "v": value, "sprung": True}, durable=True)
            _spring(trap)
        if index == 3 and "poison" in payload:
            Path(payload["poison"]["mark"]).touch()
            os._exit(3)
        _pause(payload["sleep"])
        value = following(value, index)
        yield Step(output=[index, value, request.execution], state={"i": index + 1, "v": value, "sprung": sprung})
        index += 1
    return {"n": payload["n"], "last": value}


def _pause(seconds: float) -> None:
    # Not time.sleep(): it asks for an absolute time of the monotonic clock, which libfaketime refuses when it leaves
    # that clock as it is.
    select.select([], [], [], seconds)


def _spring(trap: dict[str, Any]) -> None:
    """Harm the process: ``hang`` sleeps, ``gil`` sleeps in native code without giving the interpreter away, and
    ``crash`` reads at address 0. ``mark`` names a file that says that it happened.
    """
    Path(trap["mark"]).touch()
    if trap["kind"] == "hang":
        _pause(trap["seconds"])
    elif trap["kind"] == "gil":
        # PyDLL does not release the GIL for the call; poll() without descriptors is a sleep in milliseconds.
        ctypes.PyDLL(None).poll(None, 0, int(trap["seconds"] * 1000))
    else:
        ctypes.string_at(0)


class Blend(BatchTask):
    """``n`` values that depend on the model too; outputs alone say where to go on. ``poison`` raises each time."""

    slots = 4

    def __init__(self) -> None:
        self.model = os.environ.get(MODEL, FIRST)
        self._running: dict[str, tuple[Request, int, str]] = {}

    def fingerprint(self) -> str:
        return f"blend-{self.model}"

    def admit(self, request: Request) -> None:
        outputs = request.outputs
        value = outputs[-1][1] if outputs else first(request.payload["seed"], self.model)
        self._running[request.id] = (request, len(outputs), value)

    def step(self) -> Iterable[Step]:
        for identifier, (request, index, value) in list(self._running.items()):
            if index == request.payload["n"]:
                del self._running[identifier]
                yield Step(request_id=identifier, result={"n": index, "last": value, "model": self.model})
                continue
            if index == 3 and "poison" in request.payload:
                Path(request.payload["poison"]["mark"]).touch()
                raise ArithmeticError("this request raises in the step of all")
            _pause(request.payload["sleep"])
            value = following(value, index)
            self._running[identifier] = (request, index + 1, value)
            yield Step(request_id=identifier, output=[index, value, request.execution])

    def drop(self, request_id: str) -> None:
        self._running.pop(request_id, None)
