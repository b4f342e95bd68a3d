"""Tasks that several ranks run together. Nothing here knows the tests, and only a group imports torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from perdure.workers import BatchTask, Request, Step


class Shares(BatchTask):
    """Each output is the sum of what every rank adds. The payload may say what goes wrong at an output, and where."""

    ranks = 2
    slots = 4

    def load(self) -> None:
        self.running: dict[str, tuple[dict[str, Any], int]] = {}
        if self.group is not None and self.group.rank and Path("doomed").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def meet(self) -> None:
        import torch

        assert self.group is not None
        assert not self.running
        assert self.group.all_reduce(torch.ones(1)).item() == self.ranks

    def admit(self, request: Request) -> None:
        self.running[request.id] = request.payload, len(request.outputs)

    def step(self) -> list[Step]:
        import torch

        assert self.group is not None
        steps = []
        for identifier, (payload, index) in list(self.running.items()):
            time.sleep(payload.get("sleep", 0))
            mine = payload.get("wrong", {})
            if mine.get("rank") == self.group.rank and mine["index"] == index:
                self.go_wrong(mine["how"])
            if payload.get("all") == index:
                raise ArithmeticError("on every rank")
            total = self.group.all_reduce(torch.tensor([0.1 * (self.group.rank + 1) * index]))
            output = total.item() + (1 if mine.get("how") == "lie" and mine["rank"] == self.group.rank else 0)
            if index + 1 == payload["n"]:
                del self.running[identifier]
                steps.append(Step(output=output, request_id=identifier, result="done"))
            else:
                self.running[identifier] = payload, index + 1
                steps.append(Step(output=output, request_id=identifier))
        return steps

    def go_wrong(self, how: str) -> None:
        if how == "raise":
            raise ZeroDivisionError("on this rank alone")
        if how in ("SIGKILL", "SIGSTOP") and not Path("done").exists():
            Path("done").touch()
            os.kill(os.getpid(), getattr(signal, how))

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


class Three(Shares):
    """The same on three ranks."""

    ranks = 3
