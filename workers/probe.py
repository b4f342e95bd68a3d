"""The active probe: computes something whose answer is known, on one device, in a process of its own.

``python -m perdure.workers.probe cuda:0`` does it and prints one line of JSON; :func:`probe` runs that with a deadline
and kills it, since a call into a hung device never returns. It is for the moment before a device is used again (after a
fault, before a restart); a working device is not disturbed by it, beyond some megabytes and milliseconds.

The answer is known because it is computed by hand: the matrices repeat small integers with periods of 5 and 7, so that
each element of the product is one of 35, and every partial sum is exact in float32, in whatever order it is added.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .health.state import CheckState

SIZE: Final = 1024
"""Rows and columns of the matrices."""

ROUNDS: Final = 8
"""Products, one after the other: a fault that comes and goes has some time to come."""

ON_DEVICE: Final = 30.0
"""Seconds that the computation may take before the device counts as hung. Loading torch is not counted in it."""

ROOM: Final = 256 * 2**20
"""Bytes of device memory without which it is not tried."""

_DEVICE: Final = re.compile(r"cpu|cuda(:\d+)?")

_BUSY: Final = 46
"""CUDA's cudaErrorDevicesUnavailable: somebody has the device to himself."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe found. ``unknown``: the device may be well (it is full or taken, or torch could not be loaded)."""

    state: CheckState
    reason: str
    seconds: float
    """From the start of its process."""


def probe(
    device: str, timeout: float = 120.0, *, on_device: float = ON_DEVICE, environment: Mapping[str, str] | None = None
) -> Verdict:
    """Have a device compute, and compare. ``device`` is torch's name for it: ``cuda:0``, or ``cpu``.

    Returns after ``timeout`` seconds at the latest, and ``on_device`` seconds after the device was first used: a probe
    that is still at it is killed. ``environment`` is that of its process, for ``CUDA_VISIBLE_DEVICES``. Raises
    ``ValueError`` for what names no device, and nothing for what a device does.
    """
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"a device is cpu, cuda or cuda:N, not {device!r}")
    began = time.monotonic()
    command = [sys.executable, "-P", "-m", "perdure.workers.probe", device]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        state, reason = _hear(process, began + timeout, on_device)
    finally:
        _end(process)
    return Verdict(state, reason, time.monotonic() - began)


def _hear(process: subprocess.Popen[bytes], deadline: float, on_device: float) -> tuple[CheckState, str]:
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    text, touched = b"", False
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            if touched:
                return CheckState.FAIL, "the device did not answer in time; the probe was killed"
            return CheckState.UNKNOWN, "torch was not loaded in time; the probe was killed"
        data = os.read(pipe, 65536)
        text += data
        for line in text.splitlines():
            message = _message(line)
            if "state" in message:
                return CheckState(message["state"]), str(message["reason"])
            if "stage" in message and not touched:
                touched = True
                deadline = min(deadline, time.monotonic() + on_device)
        if not data:
            return (CheckState.FAIL if touched else CheckState.UNKNOWN), f"the probe ended with status {process.wait()}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it. One that hangs in the driver cannot be waited for: it ends when the driver lets go."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it is gone
    assert process.stdout is not None
    process.stdout.close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        pass


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}  # somebody else's line, or half of one
    return message if isinstance(message, dict) else {}


# --- the process -----------------------------------------------------------------------------------------


def left(row: int, column: int) -> int:
    """An element of the left matrix."""
    return (row + 2 * column) % 5 - 2


def right(row: int, column: int) -> int:
    """An element of the right matrix."""
    return (3 * row + column) % 7 - 3


def answer() -> list[list[int]]:
    """The product's elements by ``[row % 5][column % 7]``, in whole numbers."""
    return [[sum(left(i, k) * right(k, j) for k in range(SIZE)) for j in range(7)] for i in range(5)]


def compute(name: str) -> tuple[CheckState, str]:
    """Compute and compare on a device. Imports torch."""
    import torch

    from ..protocol.records import FailureKind
    from ..recovery.failures import classify, describe

    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.backends.cuda.is_built():
                return CheckState.UNKNOWN, f"this torch is built without CUDA; {name} was not looked at"
            if not torch.cuda.is_available():
                return CheckState.FAIL, f"torch finds no usable GPU for {name}"
            if torch.cuda.mem_get_info(device)[0] < ROOM:
                # Libraries that find no room for themselves raise what looks like a fault.
                return CheckState.UNKNOWN, f"{name} has no memory left: it may be well, and is full"
        wrong = _wrong_elements(torch, device)
    except Exception as error:
        if classify(error) is FailureKind.GPU_OOM:
            return CheckState.UNKNOWN, f"{name} has no memory left: it may be well, and is full"
        if getattr(error, "error_code", None) == _BUSY:
            return CheckState.UNKNOWN, f"{name} is taken by another process"
        return CheckState.FAIL, f"{name}: {describe(error)}"
    if wrong:
        return CheckState.FAIL, f"{name} computed {wrong} of {ROUNDS * SIZE * SIZE} elements wrong"
    return CheckState.OK, f"{name} computed {ROUNDS} known products"


def _wrong_elements(torch: Any, device: Any) -> int:
    """How many elements of all rounds differ from the known answer."""
    # Allocated before anything runs, and made on the host: only the product is the device's.
    index = torch.arange(SIZE)
    host = [
        torch.tensor([[left(i, k) for k in range(5)] for i in range(5)])[index[:, None] % 5, index % 5],
        torch.tensor([[right(k, j) for j in range(7)] for k in range(7)])[index[:, None] % 7, index % 7],
        torch.tensor(answer())[index[:, None] % 5, index % 7],
    ]
    one, two, known = [matrix.to(torch.float32).to(device) for matrix in host]
    product = torch.empty_like(known)
    if device.type != "cuda":
        return sum(_differing(torch, one, two, known, product) for _ in range(ROUNDS))
    # A stream of its own does not wait for others' kernels, and an event is asked, not waited for.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    differs = torch.empty_like(product, dtype=torch.bool)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    with torch.cuda.stream(stream):
        for _ in range(ROUNDS):
            torch.mm(one, two, out=product)
            wrong += torch.ne(product, known, out=differs).sum()
        done = torch.cuda.Event()
        done.record(stream)
        while not done.query():
            time.sleep(0.001)
        return int(wrong.item())


def _differing(torch: Any, one: Any, two: Any, known: Any, product: Any) -> int:
    torch.mm(one, two, out=product)
    return int((product != known).sum())


def main(arguments: list[str]) -> int:
    """``DEVICE``: print what a probe of it finds. Status 0 if it is well, else 1."""
    if len(arguments) != 1 or not _DEVICE.fullmatch(arguments[0]):
        print("usage: python -m perdure.workers.probe DEVICE  (cpu, cuda or cuda:N)", file=sys.stderr)  # noqa: T201
        return 2
    import torch  # noqa: F401 - the deadline of the device begins after it

    print(json.dumps({"stage": "device"}), flush=True)  # noqa: T201
    state, reason = compute(arguments[0])
    print(json.dumps({"state": state, "reason": reason}), flush=True)  # noqa: T201
    os._exit(0 if state is CheckState.OK else 1)  # the end of a process that holds a broken device may hang


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
