"""Tasks that meet the end of a memory, or of a device."""

from __future__ import annotations

import atexit
import resource
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from perdure.workers import BatchTask, Request, Step, task


def _once(folder: str, name: str) -> bool:
    """True the first time that anybody asks."""
    seen = Path(folder, name).exists()
    Path(folder, name).touch()
    return not seen


class Counting(BatchTask):
    """Counts to ``n`` for each, and at three waits until somebody says go; subclasses fail there for one with
    ``fails``.
    """

    slots = 4

    def __init__(self) -> None:
        self.running: dict[str, list[Any]] = {}

    def admit(self, request: Request) -> None:
        self.running[request.id] = [len(request.outputs), request.payload]

    def step(self) -> Iterable[Step]:
        time.sleep(0.02)
        for name, entry in list(self.running.items()):
            index, payload = entry
            if index == 3 and not Path(payload["folder"], "go").exists():
                yield Step(request_id=name)
                continue
            if index == 3 and payload["fails"]:
                self.fail(payload)
            entry[0] += 1
            if index == payload["n"]:
                del self.running[name]
                yield Step(request_id=name, result=index)
            else:
                yield Step(request_id=name, output=index)

    def fail(self, payload: Any) -> None:
        raise NotImplementedError

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


class Cramped(Counting):
    """Has only so much address space left, really."""

    def fail(self, payload: Any) -> None:
        if _once(payload["folder"], "cramped"):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            room = pages * resource.getpagesize() + 64 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            bytearray(2**32)


def _lose_device(folder: str) -> None:
    """What torch raises of a device-side assert; afterwards nothing of a task should be called."""
    import torch

    atexit.register(Path(folder, "end of the interpreter").touch)
    Path(folder, "lost").touch()
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


class Sticky(Counting):
    """Its device fails, once for all processes; then it writes down what is called."""

    lost = ""

    def fail(self, payload: Any) -> None:
        if not Path(payload["folder"], "lost").exists():
            self.lost = payload["folder"]
            _lose_device(payload["folder"])

    def admit(self, request: Request) -> None:
        self.note("admit")
        super().admit(request)

    def drop(self, request_id: str) -> None:
        self.note("drop")
        super().drop(request_id)

    def memory_free(self) -> int | None:
        self.note("memory_free")
        return None

    def note(self, what: str) -> None:
        if self.lost:
            Path(self.lost, f"called {what}").touch()


@task(slots=4)
def sticky(request: Request) -> Generator[Step, None, Any]:
    """The same, each in its thread; the others would notice if they were closed."""
    folder = request.payload["folder"]
    if not Path(folder, "lost").exists():
        import torch  # noqa: F401  # it takes seconds, in which the others must not end
    try:
        for index in range(len(request.outputs), request.payload["n"]):
            time.sleep(0.02)
            while index == 3 and not Path(folder, "go").exists():
                time.sleep(0.01)
                yield Step()
            if index == 3 and request.payload["fails"] and not Path(folder, "lost").exists():
                _lose_device(folder)
            yield Step(output=index)
    except GeneratorExit:
        Path(folder, "called close").touch()
        raise


class Full(Counting):
    """Its device has no memory for a request with ``fails``, in the first process that tries."""

    slots = 1
    mine = False

    def fail(self, payload: Any) -> None:
        import torch

        self.mine = self.mine or _once(payload["folder"], "full")
        if self.mine:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Asserting(Counting):
    """Has a kernel fail on the device, once for all processes."""

    def load(self) -> None:
        import torch

        self.numbers = torch.arange(10, device="cuda")

    def fail(self, payload: Any) -> None:
        import torch

        if _once(payload["folder"], "asserted"):
            atexit.register(Path(payload["folder"], "end of the interpreter").touch)
            self.numbers[torch.full((4,), 99, device="cuda")].sum().item()
