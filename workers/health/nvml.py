"""What the driver says of a GPU: which repair it wants, which errors it counted, who is on it.

Over NVML, by the optional package ``nvidia-ml-py`` (``pip install "perdure[nvml]"``). The driver's own verdict, the
*recovery action*, says whether a device needs a reset or its host a reboot: no table of error numbers is kept here.

A call into a broken driver may never come back, and cannot be killed. Where that matters it is made in a process of
its own (:mod:`.device_watch`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self, TypeVar

Value = TypeVar("Value")


class RecoveryAction(StrEnum):
    """What the driver wants done before a device is used again (NVML field 230)."""

    NONE = "NONE"
    GPU_RESET = "GPU_RESET"
    NODE_REBOOT = "NODE_REBOOT"
    DRAIN_P2P = "DRAIN_P2P"
    """Peers must stop talking to it; what it computes by itself is right."""
    DRAIN_AND_RESET = "DRAIN_AND_RESET"
    """It works, with less than it should have; to be reset once its work has ended."""
    RECOVER_IMEX_DOMAIN = "RECOVER_IMEX_DOMAIN"
    """Memory shared between hosts is broken; what it computes by itself is right."""
    BUS_RESET = "BUS_RESET"
    SYSTEM_REBOOT = "SYSTEM_REBOOT"
    OTHER = "OTHER"
    """A repair that this release does not know: the driver is newer."""
    UNKNOWN = "UNKNOWN"
    """The driver does not say: it is too old, or the call failed."""

    @property
    def unfit(self) -> bool:
        """Whether nothing should be computed on the device until that is done."""
        return self not in _USABLE


_USABLE: Final = frozenset(
    {
        RecoveryAction.NONE,
        RecoveryAction.UNKNOWN,
        RecoveryAction.DRAIN_P2P,
        RecoveryAction.RECOVER_IMEX_DOMAIN,
    }
)

_ACTIONS: Final = (
    "NONE", "GPU_RESET", "NODE_REBOOT", "DRAIN_P2P", "DRAIN_AND_RESET", "RECOVER_IMEX_DOMAIN", "BUS_RESET",
    "SYSTEM_REBOOT",
)  # fmt: skip
"""Names of NVML's constants ``NVML_GPU_RECOVERY_ACTION_…``; a package may be older than some of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Memory errors of one device; ``None`` where it does not count them."""

    corrected: int | None = None
    """By ECC since the driver was loaded; harmless by themselves."""
    uncorrected: int | None = None
    """By ECC since the driver was loaded; each has ended some process."""
    remapped: int | None = None
    """Rows of memory replaced for good."""
    pending: bool = False
    """A row waits for a reset to be replaced."""
    failed: bool = False
    """A row could not be replaced: the device is to be exchanged."""


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something that the driver reported by itself."""

    xid: int | None
    """Number of an Xid error; ``None``: the recovery action has changed."""
    index: int | None
    """The device, if it is one that was asked for."""


class Devices:
    """All devices of this host, by NVML's index: by PCI address, whatever ``CUDA_VISIBLE_DEVICES`` says.

    No method raises for a device that fails: they answer with what stands for "not known". An index that there
    is none for is a mistake (``IndexError``).
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handles: dict[int, Any] = {}
        self._events: Any = None

    @classmethod
    def open(cls) -> Self | None:
        """``None`` without the package, without a driver, or without permission; never raises."""
        try:
            # Not "import pynvml" at the top: it is optional, and the package of the same name that it replaced warns.
            import pynvml
        except Exception:  # a broken installation is as good as none
            return None
        try:
            pynvml.nvmlInit()
        except Exception:
            return None
        return cls(pynvml)

    def close(self) -> None:
        """Give NVML back. Harmless when repeated."""
        if self._events is not None:
            self._ask(lambda: self._nvml.nvmlEventSetFree(self._events), None)
            self._events = None
        self._handles.clear()
        self._ask(self._nvml.nvmlShutdown, None)

    def count(self) -> int:
        """How many devices there are; 0 when the driver does not say."""
        return self._ask(lambda: int(self._nvml.nvmlDeviceGetCount()), 0)

    def identity(self, index: int) -> str:
        """Name and UUID, such as ``NVIDIA H200 GPU-8c6f…``; what is not known is left out."""
        return " ".join(part for part in (self.name(index), self.uuid(index)) if part)

    def name(self, index: int) -> str:
        """The product's name, or an empty text."""
        return self._of(index, lambda handle: str(self._nvml.nvmlDeviceGetName(handle)), "")

    def uuid(self, index: int) -> str:
        """``GPU-…``, or an empty text."""
        return self._of(index, lambda handle: str(self._nvml.nvmlDeviceGetUUID(handle)), "")

    def action(self, index: int) -> RecoveryAction:
        """The driver's verdict. A device that every call fails on is judged by how it fails."""
        nvml = self._nvml
        try:
            (field,) = nvml.nvmlDeviceGetFieldValues(self._handle(index), [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        except nvml.NVMLError as error:
            return self._verdict(error.value)
        except IndexError:
            raise
        except Exception:
            return RecoveryAction.UNKNOWN
        if field.nvmlReturn != nvml.NVML_SUCCESS:
            return self._verdict(field.nvmlReturn)
        return self._named(_number(nvml, field))

    def counts(self, index: int) -> Counts:
        """Its memory errors so far."""
        nvml = self._nvml

        def errors(kind: int) -> int | None:
            ask = nvml.nvmlDeviceGetTotalEccErrors
            return self._of(index, lambda handle: int(ask(handle, kind, nvml.NVML_VOLATILE_ECC)), None)

        rows = self._of(index, lambda handle: tuple(nvml.nvmlDeviceGetRemappedRows(handle)), None)
        return Counts(
            corrected=errors(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            uncorrected=errors(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            remapped=None if rows is None else rows[0] + rows[1],
            pending=rows is not None and bool(rows[2]),
            failed=rows is not None and bool(rows[3]),
        )

    def processes(self, index: int) -> frozenset[int]:
        """Process ids of those that compute on it. The driver gives the host's: a container finds other numbers."""
        listed: Any = self._of(index, self._nvml.nvmlDeviceGetComputeRunningProcesses, ())
        return frozenset(int(process.pid) for process in listed)

    def memory(self, index: int) -> tuple[int, int]:
        """Free and total bytes; ``(0, 0)`` when not known."""
        info = self._of(index, self._nvml.nvmlDeviceGetMemoryInfo, None)
        return (0, 0) if info is None else (int(info.free), int(info.total))

    def wait(self, indexes: tuple[int, ...], seconds: float) -> DeviceEvent | None:
        """Wait for the next Xid or change of the recovery action, for so many seconds; ``None`` if none came.

        Raises ``NotImplementedError`` where the driver reports nothing by itself. ``indexes`` are those of the first
        call; events from before that are not told.
        """
        nvml = self._nvml
        if self._events is None:
            self._events = self._registered(indexes)
        if self._events is None:
            raise NotImplementedError("this driver reports no events")
        try:
            data = nvml.nvmlEventSetWait_v2(self._events, max(1, round(seconds * 1000)))
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_TIMEOUT:
                return None
            raise NotImplementedError(f"waiting for events failed: {error}") from None
        uuid = self._ask(lambda: nvml.nvmlDeviceGetUUID(data.device), "")
        index = next((index for index in indexes if uuid and self.uuid(index) == uuid), None)
        return DeviceEvent(int(data.eventData) if data.eventType == nvml.nvmlEventTypeXidCriticalError else None, index)

    # --- within ----------------------------------------------------------------------------------

    def _registered(self, indexes: tuple[int, ...]) -> Any:
        nvml = self._nvml
        wanted = nvml.nvmlEventTypeXidCriticalError | getattr(nvml, "nvmlEventTypeGpuRecoveryAction", 0)
        events = self._ask(nvml.nvmlEventSetCreate, None)
        registered = False
        for index in indexes if events is not None else ():
            # An older driver refuses the whole mask for one bit that it does not know.
            mask = wanted & self._of(index, lambda handle: int(nvml.nvmlDeviceGetSupportedEventTypes(handle)), 0)
            if mask:

                def register(handle: Any, mask: int = mask) -> bool:
                    nvml.nvmlDeviceRegisterEvents(handle, mask, events)
                    return True

                registered = self._of(index, register, False) or registered
        if events is not None and not registered:
            self._ask(lambda: nvml.nvmlEventSetFree(events), None)
            return None
        return events

    def _handle(self, index: int) -> Any:
        if index not in self._handles:
            if not 0 <= index < max(1, self.count()):
                raise IndexError(f"no device {index}: there are {self.count()}")
            self._handles[index] = self._nvml.nvmlDeviceGetHandleByIndex(index)
        return self._handles[index]

    def _verdict(self, code: int) -> RecoveryAction:
        """What an error of NVML says of the device itself."""
        if code == self._nvml.NVML_ERROR_RESET_REQUIRED:
            return RecoveryAction.GPU_RESET
        if code == self._nvml.NVML_ERROR_GPU_IS_LOST:
            return RecoveryAction.NODE_REBOOT  # it has fallen off its bus
        return RecoveryAction.UNKNOWN

    def _named(self, number: int) -> RecoveryAction:
        for name in _ACTIONS:
            if number == getattr(self._nvml, f"NVML_GPU_RECOVERY_ACTION_{name}", None):
                return RecoveryAction(name)
        return RecoveryAction.OTHER

    def _of(self, index: int, ask: Callable[[Any], Value], otherwise: Value) -> Value:
        return self._ask(lambda: ask(self._handle(index)), otherwise)

    def _ask(self, ask: Callable[[], Value], otherwise: Value) -> Value:
        try:
            return ask()
        except IndexError:
            raise
        except Exception:  # NVMLError; and what the binding raises for a driver without that function
            return otherwise


def located(devices: Devices, device: str, environment: Mapping[str, str] = os.environ) -> int | str:
    """NVML's index of the device on which a worker with ``PERDURE_DEVICE=device`` computes; or why it is not known.

    CUDA counts only what ``CUDA_VISIBLE_DEVICES`` shows, and unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` it may count
    the fastest first; NVML always counts all, by PCI address. With devices of one kind both orders are the same.
    """
    kind, _, position = device.partition(":")
    if kind not in ("auto", "cuda"):
        return f"the device is {device}"
    number = int(position) if position.isdecimal() else 0
    count = devices.count()
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    words = [str(index) for index in range(count)] if shown is None else [word.strip() for word in shown.split(",")]
    words = _until_wrong(words)
    if number >= len(words):
        return f"CUDA_VISIBLE_DEVICES={shown} shows no device {number}" if count else "there is no device"
    word = words[number]
    if word.startswith("GPU-"):
        matching = [index for index in range(count) if devices.uuid(index).startswith(word)]
        return matching[0] if len(matching) == 1 else f"no device has the UUID {word}"
    if not word.isdecimal():
        return f"{word} is a part of a device, whose health is not looked at"  # MIG
    if int(word) >= count:
        return f"there is no device {word}: there are {count}"
    kinds = {devices.name(index) for index in range(count)}
    if len(kinds) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return f"device {word} may be any of {count} different ones; set CUDA_DEVICE_ORDER=PCI_BUS_ID, or show a UUID"
    return int(word)


def _until_wrong(words: list[str]) -> list[str]:
    """As CUDA reads the list: it ends at the first entry that cannot be one."""
    for place, word in enumerate(words):
        if not (word.isdecimal() or word.startswith(("GPU-", "MIG-"))):
            return words[:place]
    return words


def _number(nvml: Any, field: Any) -> int:
    """The value of a field, by the type that the driver gives it."""
    names = {
        nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
        nvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    }
    return int(getattr(field.value, names.get(field.valueType, "uiVal")))
