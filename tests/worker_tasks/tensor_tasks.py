"""Tasks whose state is a tensor: of numpy, which takes less time to import than torch does."""

from __future__ import annotations

import time
import zlib
from collections.abc import Generator
from typing import Any

import numpy as np

from perdure.workers import Request, Step, task


@task
def diffuse(request: Request) -> Generator[Step, None, Any]:
    """Changes one large array in place at each step; what it puts out depends on all of its bits."""
    payload = request.payload
    state = request.state or {"next": 0, "latents": np.arange(payload["size"], dtype=np.float32)}
    latents = state["latents"]
    for index in range(state["next"], payload["n"]):
        time.sleep(payload.get("sleep", 0))
        latents *= np.float32(1.0009765625)
        latents -= np.float32(index * 0.37)
        yield Step(output=[index, zlib.crc32(latents)], state={"next": index + 1, "latents": latents})
    return {"digest": zlib.crc32(latents)}
