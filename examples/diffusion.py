"""Make an image in many small steps; a run that was killed in the middle gives the same bytes.

In one terminal, from this folder (torch must be installed: ``pip install "perdure[torch]"``):

    $ perdure up examples --tasks diffusion.Diffuse

and in another one, from this folder too:

    $ python diffusion.py

That writes a PNG beside this file, named after the request. Kill a worker while it runs (``kill -9``), run it again
without, and compare the images. With a Redis of your own, one or more of these do instead of the pool:

    $ PERDURE_TASKS=diffusion.Diffuse rq worker -w perdure.workers.Worker --url redis://localhost:6379 examples

The model is a small network with invented weights: what it paints is of no interest, how it survives is. The state is
the latents and the number of the step. The noise of a step is made from the request's seed and that number alone, so
that there is no generator whose position would have to be stored.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perdure.producer import Client
from perdure.workers import BatchTask, InvalidRequest, Request, Step

CHANNELS = 3


@dataclass
class Image:
    """One request that is being worked on."""

    seed: int
    steps: int
    step: int
    latents: torch.Tensor


class Diffuse(BatchTask):
    """Payload: ``seed``; ``steps``; ``size``, pixels of each side. Result: ``{"png": bytes}``.

    A batch task, since a model is loaded once for all requests, and its fingerprint has to be told: a worker with other
    weights must not go on with somebody's latents.
    """

    slots = 2

    def __init__(self) -> None:
        self.images: dict[str, Image] = {}

    def load(self) -> None:
        """Make the weights: always the same ones."""
        numbers = torch.Generator().manual_seed(20)
        self.weights = [
            torch.randn(outputs, inputs, 3, 3, generator=numbers) * (2 / (9 * inputs)) ** 0.5
            for inputs, outputs in ((CHANNELS + 1, 16), (16, 16), (16, CHANNELS))
        ]

    def fingerprint(self) -> str:
        """The weights, and what else has a part in the last bit of a result."""
        digest = hashlib.sha256(f"{torch.__version__} {torch.get_num_threads()} threads".encode())
        for weight in self.weights:
            digest.update(weight.numpy().tobytes())
        return digest.hexdigest()

    def prepare(self, payload: Any) -> Any:
        """Refuse at submit what :meth:`admit` would refuse later."""
        read(payload)
        return payload

    def admit(self, request: Request) -> None:
        """From noise, or from the latents of the last checkpoint."""
        seed, steps, size = read(request.payload)
        shape = (1, CHANNELS, size, size)
        step, latents = 0, noise(seed, 0, shape)
        if request.state is not None:
            step, latents = request.state["step"], request.state["latents"]
        self.images[request.id] = Image(seed, steps, step, latents)

    def step(self) -> Iterable[Step]:
        """One step of each image. Each alone: in one pass, the bits of one would depend on who else is there."""
        for identifier, image in list(self.images.items()):
            if image.step == image.steps:
                del self.images[identifier]
                yield Step(request_id=identifier, result={"png": png(image.latents)})
                continue
            # A new tensor each time: the one that was put out as state stays as it was.
            image.latents = self._denoise(image)
            image.step += 1
            yield Step(
                request_id=identifier,
                output={"step": image.step, "of": image.steps},
                state={"step": image.step, "latents": image.latents},
            )

    def drop(self, request_id: str) -> None:
        """Forget an image."""
        self.images.pop(request_id, None)

    def _denoise(self, image: Image) -> torch.Tensor:
        left = 1 - image.step / image.steps
        x = torch.cat([image.latents, torch.full_like(image.latents[:, :1], left)], dim=1)
        with torch.inference_mode():
            for weight in self.weights[:-1]:
                x = torch.nn.functional.silu(torch.nn.functional.conv2d(x, weight, padding=1))
            predicted = torch.nn.functional.conv2d(x, self.weights[-1], padding=1)
        fresh = noise(image.seed, image.step + 1, tuple(image.latents.shape))
        return 0.95 * image.latents - 0.1 * predicted + 0.1 * left * fresh


def read(payload: Any) -> tuple[int, int, int]:
    """Seed, steps and size of a payload. What is wrong with one is told by name, and is never retried."""
    payload = payload if isinstance(payload, dict) else {}
    seed, steps, size = payload.get("seed"), payload.get("steps", 50), payload.get("size", 64)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InvalidRequest("seed is a whole number from 0 to 2**63 - 1", "seed")
    if type(steps) is not int or not 1 <= steps <= 10_000:
        raise InvalidRequest("steps is a whole number from 1 to 10,000", "steps")
    if type(size) is not int or not 8 <= size <= 1024:
        raise InvalidRequest("size is a whole number of pixels from 8 to 1024", "size")
    return seed, steps, size


def noise(seed: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise of one step. Hashed, since neighbouring seeds would share their numbers: 7 + 1 = 8 + 0."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))


def png(latents: torch.Tensor) -> bytes:
    """An image file of latents with three channels."""
    pixels = (latents[0].sigmoid() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: the row is stored without a filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, colour, no options
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def main() -> None:
    """Have one image made, and write it into a file."""
    with Client() as client:
        # By its dotted path: in this process the task's module is __main__, which no worker could import.
        handle = client.submit("diffusion.Diffuse", {"seed": 7, "steps": 60, "size": 64}, queue="examples")
        print(f"request {handle.id}")
        for output in handle.stream():
            print(f"  step {output['step']} of {output['of']}", end="\r", flush=True)
        print()
        path = Path(f"{handle.id}.png")
        path.write_bytes(handle.result()["png"])
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
