"""Which GPUs a pool takes, on a host that the test makes up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from perdure.protocol.errors import SettingsError
from perdure.workers.pool.gpus import Gpu, choose


class Host:
    """NVML of a host with so many GPUs."""

    def __init__(self, number: int) -> None:
        self.number = number

    def count(self) -> int:
        return self.number

    def identity(self, index: int) -> str:
        return f"NVIDIA H200 GPU-{index}{index}{index}-abc"

    def action(self, index: int) -> str:
        return "NONE"

    def processes(self, index: int) -> frozenset[int]:
        return frozenset()


def chosen(wanted: str, environment: dict[str, str] | None = None, number: int = 4) -> list[Gpu]:
    return choose(wanted, devices=Host(number), environment=environment or {})


def test_all_and_some_by_the_numbers_of_nvidia_smi() -> None:
    """CUDA's own order is another: a worker is told which one is meant."""
    assert [gpu.index for gpu in chosen("all")] == [0, 1, 2, 3]
    gpus = chosen(" 2, 0")
    assert [gpu.name for gpu in gpus] == ["gpu-2", "gpu-0"]
    assert gpus[0].environment() == {"CUDA_VISIBLE_DEVICES": "2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_a_host_that_shows_only_some_of_its_gpus() -> None:
    """``CUDA_VISIBLE_DEVICES`` of a batch system is what all means; by number or by UUID."""
    assert chosen("all", {"CUDA_VISIBLE_DEVICES": "1,3"}) == [Gpu("1", 1), Gpu("3", 3)]
    assert chosen("3", {"CUDA_VISIBLE_DEVICES": "1,3"}) == [Gpu("3", 3)]
    assert chosen("all", {"CUDA_VISIBLE_DEVICES": "GPU-222,-1,0"}) == [Gpu("GPU-222", 2)]
    assert chosen("all", {"CUDA_VISIBLE_DEVICES": "MIG-1f"})[0].index is None
    other = chosen("all", {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert (other[0].index, other[0].environment()) == (None, {"CUDA_VISIBLE_DEVICES": "1"})


def test_without_nvml_somebody_else_counts() -> None:
    """The package is optional."""
    assert choose("all", devices=None, environment={}, count=lambda: 2) == [Gpu("0", 0), Gpu("1", 1)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chosen("all", number=0), "CUDA_UNAVAILABLE: --gpus all, but no CUDA device was found.*--workers N"),
        (lambda: chosen("4"), r"CUDA_UNAVAILABLE: --gpus 4, but this host has 4 \(numbers 0 to 3\)"),
        (lambda: chosen("all", {"CUDA_VISIBLE_DEVICES": ""}), "CUDA_UNAVAILABLE.*CUDA_VISIBLE_DEVICES="),
        (lambda: chosen("0", {"CUDA_VISIBLE_DEVICES": "1"}), "CUDA_UNAVAILABLE: --gpus 0"),
        (lambda: chosen("0,0"), "names a GPU twice"),
        (lambda: chosen("0-2"), "--gpus takes"),
        (lambda: chosen("-1"), "--gpus takes"),
        (lambda: chosen(""), "--gpus takes"),
        (lambda: chosen("²"), "--gpus takes"),
    ],
)
def test_what_is_not_there_is_told(call: Callable[[], object], message: str) -> None:
    """With the next command, and before anything is started."""
    with pytest.raises(SettingsError, match=message):
        call()
