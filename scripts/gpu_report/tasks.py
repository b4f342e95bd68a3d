"""Tasks that meet what only a device has. Each goes wrong once for all processes, in the folder of its step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from ...protocol.settings import Settings
from ...workers.tasks.base import BatchTask, Request, Step

WRONG_AT: Final = 3
"""The output at which something goes wrong."""

PATH: Final = __name__


class Counting(BatchTask):
    """Counts to ``n`` for each request; of one with ``fails``, :meth:`fail` is called once for all processes."""

    slots = 4

    def __init__(self) -> None:
        self.running: dict[str, list[Any]] = {}

    def load(self) -> None:
        import torch

        kind = Settings.from_environment().device
        self.cuda = kind.startswith("cuda")
        self.numbers = torch.arange(16, device=kind)

    def admit(self, request: Request) -> None:
        self.running[request.id] = [len(request.outputs), request.payload]

    def step(self) -> Iterable[Step]:
        time.sleep(0.02)
        for name, entry in list(self.running.items()):
            index, payload = entry
            if payload.get("fails") and index == WRONG_AT and once(payload["folder"], "failed"):
                self.fail()
            entry[0] += int(self.numbers[1])
            if index == payload["n"]:
                del self.running[name]
                yield Step(request_id=name, result=index)
            else:
                yield Step(request_id=name, output=index)

    def fail(self) -> None:
        raise NotImplementedError

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


class Spinning(Counting):
    """Its kernel does not end; without a device, its step."""

    def fail(self) -> None:
        import torch

        if self.cuda:
            torch.cuda._sleep(10**13)  # cycles: more than an hour
            torch.cuda.synchronize()
        while True:
            pass


class Faulty(Counting):
    """One of its kernels reads where there is no memory; without a device, nothing goes wrong."""

    def fail(self) -> None:
        if self.cuda:
            out_of_bounds(self.numbers)


def out_of_bounds(tensor: Any) -> None:
    """Read 256 GiB behind a tensor: torch checks indices against the size, which is a lie here."""
    import torch

    class Huge:
        __cuda_array_interface__ = {  # noqa: RUF012 - a protocol, not a default
            "shape": (2**40,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3, "strides": None,
        }  # fmt: skip

    huge = torch.as_tensor(Huge(), device=tensor.device)
    huge[2**38 : 2**38 + 1024].sum().item()


class Greedy(Counting):
    """Each request takes a fifth of what the device had free, and puts out how many were in the batch."""

    slots = 8

    def load(self) -> None:
        import torch

        super().load()
        self.part = torch.cuda.mem_get_info()[0] // 5 if self.cuda else 2**20

    def admit(self, request: Request) -> None:
        self.running[request.id] = [len(request.outputs), request.payload, None]

    def step(self) -> Iterable[Step]:
        import torch

        batch = len(self.running)
        for name, entry in list(self.running.items()):
            if entry[2] is None:
                entry[2] = torch.ones(self.part, dtype=torch.uint8, device=self.numbers.device)
            entry[0] += int(entry[2][0])
            yield Step(request_id=name, output=batch)
            if entry[0] == entry[1]["n"]:
                del self.running[name]
                yield Step(request_id=name, result="done")


class Leaking(Counting):
    """The first of its processes keeps all that is free: no request fits then, however often it is tried alone."""

    slots = 1

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

    def step(self) -> Iterable[Step]:
        import torch

        if self.cuda:
            folders = [payload["folder"] for _, payload in self.running.values()]
            if folders and once(folders[0], "leaked"):
                self.kept = torch.empty(torch.cuda.mem_get_info()[0] - 2**30, dtype=torch.uint8, device="cuda")
            torch.empty(2**31, dtype=torch.uint8, device="cuda")
        yield from super().step()


class Halves(BatchTask):
    """Products of a row with a vector, of which each of two ranks computes a half on its device; the sum is by gloo."""

    ranks = 2
    slots = 2

    def load(self) -> None:
        import torch

        assert self.group is not None
        kind = Settings.from_environment().device
        numbers = torch.arange(64 * 64, dtype=torch.float32, device=kind).reshape(64, 64) % 17 / 7
        self.half = numbers.chunk(2, dim=1)[self.group.rank]

    def meet(self) -> None:
        self.running: dict[str, int] = {}

    def admit(self, request: Request) -> None:
        self.running[request.id] = len(request.outputs)

    def step(self) -> list[Step]:
        assert self.group is not None
        steps = []
        for name, row in list(self.running.items()):
            value = self.group.all_reduce(self.half[row].dot(self.half[row]).reshape(1).cpu()).item()
            self.running[name] += 1
            steps.append(Step(request_id=name, output=value))
            if row + 1 == len(self.half):
                del self.running[name]
                steps[-1] = Step(request_id=name, output=value, result="done")
        return steps

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


def once(folder: str, name: str) -> bool:
    """True for the first of all processes that asks."""
    try:
        Path(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
