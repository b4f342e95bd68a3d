"""Which GPUs a pool runs on, and who is on them. Asked from outside: a supervisor never touches CUDA itself."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ...protocol.errors import SettingsError

ORDER: Final = "PCI_BUS_ID"
"""``CUDA_DEVICE_ORDER`` under which CUDA's numbers are those of NVML and nvidia-smi; CUDA's own is another."""

COUNT_TIMEOUT: Final = 120.0
"""Seconds for a process that imports torch and counts devices."""


class DeviceQueries(Protocol):
    """What is asked of NVML."""

    def count(self) -> int: ...
    def identity(self, index: int) -> str: ...
    def action(self, index: int) -> Any: ...
    def processes(self, index: int) -> Set[int]: ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, for one worker."""

    token: str
    """What goes into ``CUDA_VISIBLE_DEVICES``."""
    index: int | None
    """NVML's number; ``None`` if it is not known, and then NVML is not asked."""

    @property
    def name(self) -> str:
        """Of its place in the pool."""
        return f"gpu-{self.token if self.index is None else self.index}"

    def environment(self) -> dict[str, str]:
        """What makes it the only one that a process sees."""
        return {"CUDA_VISIBLE_DEVICES": self.token} | ({} if self.index is None else {"CUDA_DEVICE_ORDER": ORDER})


def open_devices() -> DeviceQueries | None:
    """NVML, or ``None`` where it or its package is not installed."""
    try:
        module = importlib.import_module("..health.nvml", __package__)
    except ImportError:
        return None
    found: DeviceQueries | None = module.Devices.open()
    return found


def choose(
    wanted: str,
    *,
    devices: DeviceQueries | None,
    environment: Mapping[str, str] | None = None,
    count: Callable[[], int] | None = None,
) -> list[Gpu]:
    """The GPUs of ``--gpus``: ``all``, or numbers as nvidia-smi shows them (``0,2``).

    ``all`` means those of ``CUDA_VISIBLE_DEVICES`` where that is set. ``count`` counts where there is no NVML. Raises
    :class:`SettingsError` for what is no list of numbers and for a GPU that is not there (``CUDA_UNAVAILABLE: …``).
    """
    environment = os.environ if environment is None else environment
    numbers = None if wanted.strip() == "all" else _numbers(wanted)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _visible(visible, numbers, devices, environment)
    there = devices.count() if devices is not None else (count or count_by_torch)()
    if there == 0:
        raise _unavailable(f"--gpus {wanted}, but no CUDA device was found")
    if numbers is not None and max(numbers) >= there:
        raise _unavailable(f"--gpus {wanted}, but this host has {there} (numbers 0 to {there - 1})")
    return [Gpu(str(index), index) for index in (range(there) if numbers is None else numbers)]


def count_by_torch() -> int:
    """Devices that torch sees, asked in a process of its own; 0 without torch. Takes seconds."""
    code = "import torch; print(torch.cuda.device_count())"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=COUNT_TIMEOUT, check=False
        )
        return int(done.stdout.strip() or 0) if done.returncode == 0 else 0
    except (subprocess.TimeoutExpired, ValueError):
        return 0


def is_orphan(pid: int) -> bool:
    """Whether a process is a worker whose supervisor has gone: it drains, and will leave the device soon."""
    if b"perdure.workers.Worker" not in _command(pid):
        return False
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    parent = int(fields[1])
    return parent != os.getpid() and b"perdure" not in _command(parent)


def _command(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""


def _numbers(wanted: str) -> list[int]:
    parts = [part.strip() for part in wanted.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise SettingsError(f'--gpus takes "all" or numbers as nvidia-smi shows them, such as 0,2, not {wanted!r}')
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise SettingsError(f"--gpus {wanted} names a GPU twice; a GPU takes one worker")
    return numbers


def _visible(
    visible: str, numbers: list[int] | None, devices: DeviceQueries | None, environment: Mapping[str, str]
) -> list[Gpu]:
    """What CUDA itself would see of this list: up to the first entry that is none."""
    tokens: list[str] = []
    for part in visible.split(","):
        token = part.strip()
        if not token or token == "-1":
            break
        tokens.append(token)
    # Under another order the numbers are not those of NVML.
    known = environment.get("CUDA_DEVICE_ORDER", ORDER) == ORDER
    gpus = [Gpu(token, _index(token, devices) if known or not token.isdecimal() else None) for token in tokens]
    if numbers is not None:
        gpus = [
            next((gpu for gpu in gpus if number in (gpu.index, _whole(gpu.token))), None)  # type: ignore[misc]
            for number in numbers
        ]
    if not gpus or None in gpus:
        shown = "all" if numbers is None else ",".join(map(str, numbers))
        raise _unavailable(f"--gpus {shown}, but CUDA_VISIBLE_DEVICES={visible} does not have it")
    return gpus


def _whole(token: str) -> int | None:
    return int(token) if token.isdecimal() else None


def _index(token: str, devices: DeviceQueries | None) -> int | None:
    if token.isdecimal():
        return int(token)
    if devices is None or not token.startswith("GPU-"):
        return None  # an instance of a divided GPU: NVML numbers only whole ones
    return next((index for index in range(devices.count()) if token in devices.identity(index)), None)


def _unavailable(what: str) -> SettingsError:
    return SettingsError(
        f"CUDA_UNAVAILABLE: {what}; check nvidia-smi and that torch is a CUDA build, or run on the CPU: --workers N"
    )
