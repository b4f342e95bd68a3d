"""What is read from the driver, over a fake one whose names are the real package's."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from perdure.workers.health import nvml
from perdure.workers.health.nvml import Counts, Devices, RecoveryAction, located
from tests.kit.workers.nvml import FAKE, FakeDriver, driver

__all__ = ["driver"]


def opened() -> Devices:
    devices = Devices.open()
    assert devices is not None
    return devices


def loaded(name: str, path: Path) -> ModuleType:
    """A module by its file, whatever else is imported under its name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the real one looks itself up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_every_name_of_the_fake_is_the_real_packages() -> None:
    """Constants are equal, functions take the same arguments: a test over the fake is one of real names."""
    files = importlib.metadata.files("nvidia-ml-py") or []
    (place,) = [file.locate() for file in files if file.name == "pynvml.py"]
    real = loaded("real_pynvml", Path(str(place)))
    fake = loaded("fake_pynvml", FAKE / "pynvml.py")
    names = {name for name in vars(fake) if name.lower().startswith("nvml")}
    assert len(names) > 30
    for name in names:
        ours, theirs = getattr(fake, name), getattr(real, name)
        if inspect.isfunction(ours):
            wanted = list(inspect.signature(theirs).parameters.values())
            given = list(inspect.signature(ours).parameters)
            assert given == [item.name for item in wanted][: len(given)], name
            assert all(item.default is not item.empty for item in wanted[len(given) :]), name
        elif not isinstance(ours, type):
            assert ours == theirs, name
    assert isinstance(real.NVMLError(real.NVML_ERROR_TIMEOUT).value, int)


def test_what_is_used_of_the_package_is_in_the_fake() -> None:
    """Otherwise "not known" would be tested where the real driver answers."""
    fake = loaded("fake_pynvml", FAKE / "pynvml.py")
    tree = ast.parse(Path(nvml.__file__).read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.lower().startswith("nvml") and node.attr != "nvmlReturn"
    }
    assert len(used) > 20
    assert {name for name in used if not hasattr(fake, name)} == set()


def test_without_a_driver_there_are_no_devices(driver: FakeDriver) -> None:
    driver.state["driver"] = False
    driver.write()
    assert Devices.open() is None


def test_without_the_package_there_are_no_devices() -> None:
    """And importing ours needs nothing."""
    code = (
        "import sys; sys.modules['pynvml'] = None\n"
        "from perdure.workers.health.nvml import Devices; print(Devices.open())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "None"


@pytest.mark.parametrize("action", [item for item in RecoveryAction if item.name not in ("OTHER", "UNKNOWN")])
def test_the_recovery_action_is_the_drivers(driver: FakeDriver, action: RecoveryAction) -> None:
    driver.set(action=action.value)
    assert opened().action(0) is action


def test_only_some_actions_leave_a_device_fit() -> None:
    """Every further one, known or not, makes it unfit."""
    fit = {item for item in RecoveryAction if not item.unfit}
    assert fit == {
        RecoveryAction.NONE,
        RecoveryAction.UNKNOWN,
        RecoveryAction.DRAIN_P2P,
        RecoveryAction.RECOVER_IMEX_DOMAIN,
    }


@pytest.mark.parametrize(
    ("facts", "action"),
    [
        ({"action": 99}, RecoveryAction.OTHER),
        ({"old": True}, RecoveryAction.UNKNOWN),
        ({"error": 15}, RecoveryAction.NODE_REBOOT),
        ({"error": 16}, RecoveryAction.GPU_RESET),
        ({"error": 999}, RecoveryAction.UNKNOWN),
    ],
)
def test_a_device_that_does_not_say_is_judged_by_how_it_fails(
    driver: FakeDriver, facts: dict[str, Any], action: RecoveryAction
) -> None:
    driver.set(**facts)
    assert opened().action(0) is action


def test_a_device_says_what_it_has_and_who_uses_it(driver: FakeDriver) -> None:
    driver.devices(
        {"name": "NVIDIA H200", "uuid": "GPU-1"},
        {"uuid": "GPU-2", "total": 100, "free": 40, "processes": [7, 9], "ecc": [3, 1], "remapped": [2, 1, 1, 0]},
    )
    devices = opened()
    assert devices.count() == 2
    assert devices.identity(0) == "NVIDIA H200 GPU-1"
    assert devices.memory(1) == (40, 100)
    assert devices.processes(1) == {7, 9}
    assert devices.processes(0) == frozenset()
    assert devices.counts(0) == Counts()
    assert devices.counts(1) == Counts(corrected=3, uncorrected=1, remapped=3, pending=True, failed=False)
    devices.close()
    devices.close()
    assert devices.count() == 0


def test_a_lost_device_answers_nothing_and_raises_nothing(driver: FakeDriver) -> None:
    driver.set(error=15)
    devices = opened()
    assert devices.memory(0) == (0, 0)
    assert devices.processes(0) == frozenset()
    assert devices.counts(0) == Counts()
    assert devices.identity(0) == "GPU-00000000"


def test_an_index_without_a_device_is_a_mistake(driver: FakeDriver) -> None:
    with pytest.raises(IndexError, match="no device 1"):
        opened().action(1)


def test_events_are_told_once_with_their_device(driver: FakeDriver) -> None:
    """An Xid with its number, a change of the recovery action without; what came before is not told."""
    driver.devices({"events": [[8, 1]]}, {})
    devices = opened()
    assert devices.wait((0, 1), 0.001) is None
    driver.set(1, events=[[8, 79]])
    driver.set(0, events=[[8, 1], [32768, 0]])
    told = [devices.wait((0, 1), 1.0) for _ in range(2)]
    assert sorted((event.xid, event.index) for event in told if event and event.xid) == [(79, 1)]
    assert [event.index for event in told if event and event.xid is None] == [0]
    assert devices.wait((0, 1), 0.001) is None


def test_an_old_driver_reports_nothing_by_itself(driver: FakeDriver) -> None:
    driver.set(old=True)
    with pytest.raises(NotImplementedError, match="no events"):
        opened().wait((0,), 0.01)


SAME = ({"uuid": "GPU-aa"}, {"uuid": "GPU-ab"}, {"uuid": "GPU-b"})
MIXED = ({"name": "NVIDIA H200"}, {"name": "NVIDIA T4"})


@pytest.mark.parametrize(
    ("devices", "device", "environment", "found"),
    [
        (SAME, "auto", {}, 0),
        (SAME, "cuda:2", {}, 2),
        (SAME, "cuda:1", {"CUDA_VISIBLE_DEVICES": "2,0"}, 0),
        (SAME, "cuda", {"CUDA_VISIBLE_DEVICES": "GPU-ab"}, 1),
        (SAME, "cuda", {"CUDA_VISIBLE_DEVICES": "GPU-a"}, "no device has the UUID GPU-a"),
        (SAME, "cuda:1", {"CUDA_VISIBLE_DEVICES": "0,-1,2"}, "CUDA_VISIBLE_DEVICES=0,-1,2 shows no device 1"),
        (SAME, "cuda", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES= shows no device 0"),
        (SAME, "cuda", {"CUDA_VISIBLE_DEVICES": "7"}, "there is no device 7: there are 3"),
        (SAME, "cuda", {"CUDA_VISIBLE_DEVICES": "MIG-x"}, "MIG-x is a part of a device, whose health is not looked at"),
        (SAME, "cpu", {}, "the device is cpu"),
        ((), "auto", {}, "there is no device"),
        (MIXED, "cuda:1", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1),
        (
            MIXED,
            "cuda:1",
            {},
            "device 1 may be any of 2 different ones; set CUDA_DEVICE_ORDER=PCI_BUS_ID, or show a UUID",
        ),
    ],
)
def test_the_workers_device_is_found_as_cuda_counts(
    driver: FakeDriver, devices: Any, device: str, environment: dict[str, str], found: int | str
) -> None:
    """A number is given only where it is certain."""
    driver.devices(*devices)
    assert located(opened(), device, environment) == found
