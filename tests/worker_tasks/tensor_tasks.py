"""Tasks whose state is a tensor. Apart from the others: not every worker is to import torch."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import torch

from perdure.workers import Request, Step, task


def digest(tensor: torch.Tensor) -> int:
    """All bits count."""
    weights = torch.arange(tensor.numel()) % 1009 + 1
    return int((tensor.view(torch.int32).long() * weights).sum())


@task
def diffuse(request: Request) -> Generator[Step, None, Any]:
    """Changes one large tensor in place at each step; what it puts out depends on all of its bits."""
    payload = request.payload
    state = request.state or {"next": 0, "latents": torch.arange(payload["size"], dtype=torch.float32)}
    latents = state["latents"]
    for index in range(state["next"], payload["n"]):
        time.sleep(payload.get("sleep", 0))
        latents.mul_(1.0009765625).sub_(index * 0.37)
        yield Step(output=[index, digest(latents)], state={"next": index + 1, "latents": latents})
    return {"digest": digest(latents)}
