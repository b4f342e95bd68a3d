"""The active probe: a known answer, in a process that is killed when the device does not give it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perdure.workers import probe as module
from perdure.workers.health.nvml import Devices
from perdure.workers.health.state import CheckState
from perdure.workers.probe import ROUNDS, SIZE, Verdict, answer, compute, left, probe, right
from tests.kit.lab import eventually, gone


def test_the_answer_is_the_product_in_whole_numbers() -> None:
    """Computed another way; and no sum of products, in whatever order, leaves what float32 holds exactly."""
    numpy = pytest.importorskip("numpy")
    index = range(SIZE)
    one = numpy.array([[left(i, k) for k in index] for i in range(5)])
    two = numpy.array([[right(k, j) for j in range(7)] for k in index])
    assert answer() == (one @ two).tolist()
    assert (abs(one) @ abs(two)).max() < 2**24
    for row, column in ((7, 11), (1023, 1022), (500, 3)):
        assert left(row, column) == left(row % 5, column % 5)
        assert right(row, column) == right(row % 7, column % 7)


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "-h", "cpu:0"])
def test_what_names_no_device_is_a_mistake_of_the_caller(device: str) -> None:
    with pytest.raises(ValueError, match="a device is cpu, cuda or cuda:N"):
        probe(device)


@pytest.mark.slow
def test_a_processor_that_computes_right_is_well() -> None:
    """And the command says the same by its status."""
    pytest.importorskip("torch")
    verdict = probe("cpu", 110.0, on_device=100.0)
    assert verdict == Verdict(CheckState.OK, f"cpu computed {ROUNDS} known products", verdict.seconds)
    assert 0 < verdict.seconds < 110


def test_one_wrong_element_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    multiply = torch.mm
    calls = []

    def wrong(one: Any, two: Any, *, out: Any) -> Any:
        result = multiply(one, two, out=out)
        calls.append(1)
        if len(calls) == ROUNDS:
            result[SIZE - 1, 3] += 1.0
        return result

    monkeypatch.setattr(torch, "mm", wrong)
    assert compute("cpu") == (CheckState.FAIL, f"cpu computed 1 of {ROUNDS * SIZE * SIZE} elements wrong")


def test_a_full_or_taken_device_is_not_called_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows; a device error, and any other, is a verdict."""
    torch = pytest.importorskip("torch")

    def found(error: Exception) -> tuple[CheckState, str]:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(torch, "mm", fail)
        return compute("cpu")

    assert found(torch.OutOfMemoryError("full"))[0] is CheckState.UNKNOWN
    for code, state in ((2, CheckState.UNKNOWN), (46, CheckState.UNKNOWN), (719, CheckState.FAIL)):
        error = torch.AcceleratorError("CUDA error")
        error.error_code = code
        assert found(error)[0] is state, code
    assert found(RuntimeError("cuDNN error"))[0] is CheckState.FAIL


def test_a_torch_without_cuda_says_nothing_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert compute("cuda:0") == (CheckState.UNKNOWN, "this torch is built without CUDA; cuda:0 was not looked at")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute("cuda:0") == (CheckState.FAIL, "torch finds no usable GPU for cuda:0")


# A module in place of torch, which hangs where no SIGTERM reaches it, and says with which process id.
HANGS = """
import os, pathlib, signal, time
def hang(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    file = pathlib.Path(os.environ["HANGING"])
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").rename(file)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("where", "state", "reason"),
    [
        ("hang()", CheckState.UNKNOWN, "torch was not loaded in time"),
        ("device = hang", CheckState.FAIL, "the device did not answer in time"),
        ("device = lambda name: os._exit(9)", CheckState.FAIL, "the probe ended with status 9"),
        ("os._exit(9)", CheckState.UNKNOWN, "the probe ended with status 9"),
    ],
)
def test_a_probe_that_hangs_is_killed_and_one_that_dies_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, state: CheckState, reason: str
) -> None:
    """Before it touches the device nothing is said of it; the time for the device begins with its first use."""
    (tmp_path / "torch.py").write_text(HANGS + where + "\n")
    hanging = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HANGING": str(hanging)}
    if "hang()" in where:
        # The deadline of all comes when it is known to hang.
        monkeypatch.setattr(module, "_hear", _patient(module._hear, hanging))
    # Only the one that hangs there is to run into the bound.
    verdict = probe("cpu", 60.0, on_device=0.5 if where == "device = hang" else 60.0, environment=environment)
    assert (verdict.state, reason in verdict.reason) == (state, True), verdict
    if hanging.exists():
        eventually(lambda: gone(int(hanging.read_text())))


def _patient(hear: Any, hanging: Path) -> Any:
    def wait_first(process: Any, deadline: float, on_device: float) -> Any:
        eventually(hanging.exists)
        return hear(process, 0.0, on_device)

    return wait_first


def test_a_wrong_call_is_told_how(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perdure.workers.probe", "tpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m perdure.workers.probe DEVICE")


@pytest.mark.gpu
def test_a_real_gpu_is_probed_and_read() -> None:
    """A known answer from the device, and its driver's word."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    assert probe("cuda:0", 110.0).state in (CheckState.OK, CheckState.UNKNOWN)
    pytest.importorskip("pynvml")
    devices = Devices.open()
    assert devices is not None
    assert "GPU-" in devices.identity(0)
    free, total = devices.memory(0)
    assert 0 < free <= total
    assert not devices.action(0).unfit
    devices.close()
