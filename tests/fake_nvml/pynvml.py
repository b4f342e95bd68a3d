"""A driver for tests: NVML's names over a JSON file, named by FAKE_NVML, that a test may change at any time.

The file is ``{"driver": true, "devices": [{...}]}``. A device has ``name uuid action free total processes ecc remapped
events``, all optional. ``action`` is a name or a number; ``ecc`` is ``[corrected, uncorrected]``; ``remapped`` NVML's
four; ``events`` a list of ``[type, data]`` that only grows. ``error``: every call on it fails with that code. ``old``:
its driver knows no recovery action and no events. ``hang``: seconds that its next calls take.
Every name of this module is one of the real package (a test compares).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

NVML_SUCCESS = 0
NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_TIMEOUT = 10
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_RESET_REQUIRED = 16

NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
NVML_GPU_RECOVERY_ACTION_NONE = 0
NVML_GPU_RECOVERY_ACTION_GPU_RESET = 1
NVML_GPU_RECOVERY_ACTION_NODE_REBOOT = 2
NVML_GPU_RECOVERY_ACTION_DRAIN_P2P = 3
NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET = 4
NVML_GPU_RECOVERY_ACTION_RECOVER_IMEX_DOMAIN = 5
NVML_GPU_RECOVERY_ACTION_BUS_RESET = 6
NVML_GPU_RECOVERY_ACTION_SYSTEM_REBOOT = 7

NVML_VALUE_TYPE_UNSIGNED_INT = 1
NVML_VALUE_TYPE_UNSIGNED_LONG = 2
NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3
NVML_VALUE_TYPE_SIGNED_LONG_LONG = 4
NVML_VALUE_TYPE_SIGNED_INT = 5

NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
NVML_VOLATILE_ECC = 0

nvmlEventTypeXidCriticalError = 8
nvmlEventTypeGpuRecoveryAction = 32768


class NVMLError(Exception):
    """As the real one: ``value`` is NVML's code."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML Error with code {value}")
        self.value = value


class _Device:
    def __init__(self, index: int) -> None:
        self.index = index

    def read(self) -> dict[str, Any]:
        facts: dict[str, Any] = _state()["devices"][self.index]
        if facts.get("hang"):
            time.sleep(facts["hang"])
        if facts.get("error"):
            raise NVMLError(facts["error"])
        return facts


class _Answer:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class _Events:
    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.masks: dict[int, int] = {}


_initialised = False


def _state() -> dict[str, Any]:
    if not _initialised:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)
    state: dict[str, Any] = json.loads(Path(os.environ["FAKE_NVML"]).read_text())
    return state


def nvmlInit() -> None:
    global _initialised
    _initialised = True
    if not _state().get("driver", True):
        _initialised = False
        raise NVMLError(NVML_ERROR_DRIVER_NOT_LOADED)


def nvmlShutdown() -> None:
    global _initialised
    _state()
    _initialised = False


def nvmlDeviceGetCount() -> int:
    return len(_state()["devices"])


def nvmlDeviceGetHandleByIndex(index: int) -> _Device:
    if not 0 <= index < nvmlDeviceGetCount():
        raise NVMLError(NVML_ERROR_NOT_FOUND)
    return _Device(index)


def nvmlDeviceGetName(handle: _Device) -> str:
    name: str = handle.read().get("name", "NVIDIA H200")
    return name


def nvmlDeviceGetUUID(handle: _Device) -> str:
    # The real one answers this from what it read at the start, also for a device that is lost.
    uuid: str = _state()["devices"][handle.index].get("uuid", f"GPU-{handle.index:08d}")
    return uuid


def nvmlDeviceGetFieldValues(handle: _Device, fieldIds: list[int]) -> list[_Answer]:
    facts = handle.read()
    answers = []
    for field in fieldIds:
        known = field == NVML_FI_DEV_GET_GPU_RECOVERY_ACTION and not facts.get("old")
        action = facts.get("action", "NONE")
        number = action if isinstance(action, int) else globals()[f"NVML_GPU_RECOVERY_ACTION_{action}"]
        answers.append(
            _Answer(
                fieldId=field,
                nvmlReturn=NVML_SUCCESS if known else NVML_ERROR_NOT_SUPPORTED,
                valueType=NVML_VALUE_TYPE_UNSIGNED_INT,
                value=_Answer(uiVal=number),
            )
        )
    return answers


def nvmlDeviceGetTotalEccErrors(handle: _Device, errorType: int, counterType: int) -> int:
    facts = handle.read()
    if "ecc" not in facts:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    assert counterType == NVML_VOLATILE_ECC
    count: int = facts["ecc"][errorType]
    return count


def nvmlDeviceGetRemappedRows(device: _Device) -> tuple[int, ...]:
    facts = device.read()
    if "remapped" not in facts:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return tuple(facts["remapped"])


def nvmlDeviceGetComputeRunningProcesses(handle: _Device) -> list[_Answer]:
    return [_Answer(pid=pid, usedGpuMemory=None) for pid in handle.read().get("processes", [])]


def nvmlDeviceGetMemoryInfo(handle: _Device) -> _Answer:
    facts = handle.read()
    total = facts.get("total", 141 * 2**30)
    free = facts.get("free", total)
    return _Answer(total=total, free=free, used=total - free)


def nvmlEventSetCreate() -> _Events:
    _state()
    return _Events()


def nvmlEventSetFree(eventSet: _Events) -> None:
    eventSet.masks.clear()


def nvmlDeviceGetSupportedEventTypes(handle: _Device) -> int:
    old = handle.read().get("old")
    return 0 if old else nvmlEventTypeXidCriticalError | nvmlEventTypeGpuRecoveryAction


def nvmlDeviceRegisterEvents(handle: _Device, eventTypes: int, eventSet: _Events) -> None:
    facts = handle.read()
    eventSet.masks[handle.index] = eventTypes
    eventSet.seen[handle.index] = len(facts.get("events", []))
    Path(os.environ["FAKE_NVML"]).with_suffix(".watched").touch()


def nvmlEventSetWait_v2(eventSet: _Events, timeoutms: int) -> _Answer:
    deadline = time.monotonic() + timeoutms / 1000
    while True:
        for index, mask in eventSet.masks.items():
            events = _state()["devices"][index].get("events", [])
            while eventSet.seen[index] < len(events):
                kind, data = events[eventSet.seen[index]]
                eventSet.seen[index] += 1
                if kind & mask:
                    return _Answer(device=_Device(index), eventType=kind, eventData=data)
        if time.monotonic() >= deadline:
            raise NVMLError(NVML_ERROR_TIMEOUT)
        time.sleep(0.005)
