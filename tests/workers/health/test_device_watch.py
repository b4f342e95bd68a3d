"""The watch over a device: what follows from the driver's words, and what a worker does about it."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from perdure.workers.health import device_watch
from perdure.workers.health.device_watch import DeviceWatch, Judge, Look, wanted
from perdure.workers.health.nvml import Counts, RecoveryAction
from perdure.workers.health.state import CheckState
from perdure.workers.pool.statuses import UNFIT_DEVICE
from tests.kit.lab import Lab, eventually, gone
from tests.kit.places import TASKS
from tests.kit.workers.health import ask, free_port, status
from tests.kit.workers.nvml import FAKE, FakeDriver, driver

__all__ = ["driver"]

FINE = Counts(corrected=0, uncorrected=0, remapped=0)


def look(action: str = "NONE", xid: int | None = None, **counts: Any) -> Look:
    return Look("NVIDIA H200 GPU-1", RecoveryAction(action), Counts(**(asdict(FINE) | counts)), xid)


@pytest.mark.parametrize(
    ("history", "state", "certain", "reason"),
    [
        ([look()], "ok", True, "nothing to repair"),
        ([look(corrected=9)], "ok", True, "nothing to repair"),
        ([look("GPU_RESET")], "fail", True, "the driver asks for GPU_RESET"),
        ([look("OTHER")], "fail", True, "the driver asks for OTHER"),
        ([look("DRAIN_P2P")], "degraded", True, "the driver asks for DRAIN_P2P"),
        ([look("UNKNOWN")], "ok", False, "does not say whether it needs a repair"),
        ([look(failed=True)], "fail", True, "exchange the device"),
        ([look(pending=True)], "degraded", True, "replaced at the next reset"),
        ([look(uncorrected=3), look(uncorrected=3)], "ok", True, "nothing to repair"),  # from before this worker
        ([look(), look(uncorrected=2)], "degraded", True, "2 uncorrected memory error(s) since this worker began"),
        ([look(), look(remapped=1)], "degraded", True, "1 row(s) of memory replaced"),
        ([look(), look(xid=31)], "degraded", True, "Xid 31, 0 s ago"),  # many an Xid is a program's mistake
        ([look(xid=94), look()], "degraded", True, "Xid 94, 1 s ago"),
        ([look(xid=94), *[look()] * 601], "ok", True, "nothing to repair"),
        ([look(xid=79), look("NODE_REBOOT")], "fail", True, "NODE_REBOOT; the last error was Xid 79, 1 s ago"),
        ([look("GPU_RESET"), look("UNKNOWN")], "ok", False, "does not say"),  # which Standing does not believe
        ([look("GPU_RESET"), look()], "ok", True, "nothing to repair"),
    ],
)
def test_the_drivers_verdict_decides_and_its_counts_explain(
    history: list[Look], state: str, certain: bool, reason: str
) -> None:
    """One look a second."""
    judge = Judge()
    readings = [judge.hear(item, float(second)) for second, item in enumerate(history)]
    assert (readings[-1].state, readings[-1].certain) == (CheckState(state), certain)
    assert reason in readings[-1].reason
    assert readings[-1].reason.startswith("NVIDIA H200 GPU-1: ")


def test_a_watch_is_wanted_where_there_may_be_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_watch, "_NODES", (tmp_path / "nvidiactl",))
    assert [wanted(device) for device in ("cpu", "cuda", "cuda:1", "auto")] == [False, True, True, False]
    (tmp_path / "nvidiactl").touch()
    assert wanted("auto")
    assert not wanted("cpu")


# --- the process -----------------------------------------------------------------------------------------


@pytest.fixture
def watch(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceWatch]:
    """A watch over the fake driver's first device, with its real process."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = DeviceWatch("cuda:0", logging.getLogger("test"))
    processes: list[subprocess.Popen[bytes]] = []
    over = threading.Event()
    start = made._started

    def remembered() -> subprocess.Popen[bytes] | None:
        if over.is_set():
            # A watch goes on for as long as its process lives, but with nothing to watch.
            return subprocess.Popen(["true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = start()
        assert process is not None
        processes.append(process)
        return process

    monkeypatch.setattr(device_watch, "AGAIN", 0.01)
    monkeypatch.setattr(made, "_started", remembered)
    yield made
    over.set()
    for process in processes:
        process.kill()
        process.wait()
    eventually(lambda: "device" not in {thread.name for thread in threading.enumerate()})


def test_a_change_is_heard_at_once_when_the_driver_reports_it(driver: FakeDriver, watch: DeviceWatch) -> None:
    """Long before the next look is due; and the driver's word ends it again. One Xid alone condemns nobody."""
    watch.start(3600)
    eventually(lambda: watch.shown().state is CheckState.OK)
    assert watch.identity == "NVIDIA H200 GPU-00000000"
    eventually(driver.watched.exists)
    driver.set(events=[[8, 31]])
    eventually(lambda: watch.shown().state is CheckState.DEGRADED)
    assert watch.condemned == ""
    driver.set(action="GPU_RESET", events=[[8, 31], [32768, 1]])
    eventually(lambda: watch.shown().state is CheckState.FAIL)
    assert "the driver asks for GPU_RESET; the last error was Xid 31" in watch.condemned
    driver.set(action="NONE", events=[[8, 31], [32768, 1], [32768, 0]])
    eventually(lambda: watch.condemned == "")


def test_a_driver_that_hangs_is_told_and_mends_nothing(
    driver: FakeDriver, watch: DeviceWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without events, as an old driver, it is asked once per interval."""
    monkeypatch.setattr(device_watch, "PATIENCE", 0.3)
    driver.set(old=True)
    watch.start(0.05)
    eventually(lambda: watch.shown().state is CheckState.OK)
    driver.set(hang=600)
    eventually(lambda: watch.shown().state is CheckState.UNKNOWN)
    assert "has not answered for" in watch.shown().reason
    assert watch.condemned == ""


def run(*arguments: str, **environment: str) -> dict[str, Any]:
    """The first line of a watch that has nothing to watch, and ends with 0."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FAKE_NVML")}
    command = [sys.executable, "-P", "-m", "perdure.workers.health.device_watch", *arguments]
    said = subprocess.check_output(command, env=clean | environment, stdin=subprocess.DEVNULL, timeout=60)
    answer: dict[str, Any] = json.loads(said)
    return answer


def test_where_there_is_nothing_to_watch_it_says_why(driver: FakeDriver) -> None:
    driver.state["driver"] = False
    driver.write()
    fake = {"PYTHONPATH": str(FAKE), **driver.environment}
    assert run("cuda:0", "1", **fake) == {"unknown": "cuda:0: its driver does not answer"}
    driver.state["driver"] = True
    driver.write()
    assert "shows no device 5" in run("cuda:5", "1", **fake)["unknown"]


# --- a worker --------------------------------------------------------------------------------------------


def gpu_worker(lab: Lab, driver: FakeDriver, index: int, **settings: Any) -> Any:
    """A worker that believes to compute on one of the fake driver's devices."""
    environment = {
        **driver.environment,
        "PYTHONPATH": os.pathsep.join([str(TASKS), str(FAKE)]),
        "CUDA_VISIBLE_DEVICES": str(index),
    }
    return lab.worker(environment=environment, device="cuda", health_interval=0.1, **settings)


def listed(lab: Lab, *options: str) -> str:
    """What ``perdure workers`` prints."""
    command = [str(Path(sys.executable).with_name("perdure")), "workers", *options, "--url", lab.url]
    return subprocess.check_output(command, text=True, timeout=60)


def known(lab: Lab, name: str) -> dict[str, Any]:
    """What stands in Redis of a worker, once its guardian knows the device."""
    eventually(lambda: "GPU-" in (lab.ready(name) or {}).get("device", ""))
    record = lab.ready(name)
    assert record is not None
    return record


@pytest.mark.slow
def test_work_of_a_failed_device_goes_on_elsewhere(lab: Lab, driver: FakeDriver, tmp_path: Path) -> None:
    """While its step lasts it is not ready, in quarantine, and alive: nobody restarts it for that.

    Then it hands back, uncharged, and leaves with the status of an unfit device. The note of it outlives the worker.
    """
    driver.devices({"uuid": "GPU-a"}, {"uuid": "GPU-b"})
    first = gpu_worker(lab, driver, 0, health_port=free_port(), drain_timeout=60.0)
    record = known(lab, first.name)
    assert record["device"] == "NVIDIA H200 GPU-a"
    url = record["health"]
    name = lab.submit("gates", {"n": 20, "at": 10, "folder": str(tmp_path)})
    eventually(lambda: (tmp_path / "gate-waits").exists())
    assert status(url) == 200
    driver.set(0, action="GPU_RESET", events=[[8, 79]])
    eventually(lambda: status(url) == 503)
    assert ask(url)[1]["checks"]["gpu"]["state"] == "fail"
    assert ask(url, "/quarantine")[1]["quarantined"] is True
    assert ask(url, "/livez")[0] == 200
    eventually(lambda: "its device is not to be used" in first.log)
    (item,) = json.loads(listed(lab, "--json"))["items"]
    assert (item["name"], item["held"], item["ready"]) == (first.name, 1, False)
    assert "the driver asks for GPU_RESET" in item["unfit"]
    (tmp_path / "gate-open").touch()
    assert first.end() == UNFIT_DEVICE
    assert lab.waiting() == [name]
    assert len(lab.outputs(name)) == 11
    second = gpu_worker(lab, driver, 1)
    assert lab.check(name, 20).attempt == 0
    shown = listed(lab)
    assert (
        f"NVIDIA H200 GPU-a on {os.uname().nodename} is not used: NVIDIA H200 GPU-a: the driver asks for GPU_RESET"
        in shown
    )
    assert re.search(rf"^{second.name} .* yes +gpu +\d+\.\d s +0( of \d+)?$", shown, re.MULTILINE)
    (entry,) = lab.store.unfit_devices()
    assert (entry["device"], entry["worker"]) == ("NVIDIA H200 GPU-a", first.name)
    assert abs(entry["at"] - time.time()) < 60


@pytest.mark.slow
def test_a_ready_worker_ends_a_devices_quarantine(lab: Lab, driver: FakeDriver) -> None:
    """It leaves although it holds nothing; once the driver is content, the next one stays and takes the note away."""
    driver.set(error=15)  # it has fallen off its bus
    broken = gpu_worker(lab, driver, 0)
    assert broken.end() == UNFIT_DEVICE
    (entry,) = lab.store.unfit_devices()
    assert "the driver asks for NODE_REBOOT" in entry["reason"]
    driver.devices({})
    mended = gpu_worker(lab, driver, 0)
    lab.check(lab.submit("count", {"n": 3}), 3)
    eventually(lambda: lab.store.unfit_devices() == [])
    assert mended.running


@pytest.mark.slow
def test_the_watch_ends_with_its_guardian(lab: Lab, driver: FakeDriver) -> None:
    worker = gpu_worker(lab, driver, 0)
    known(lab, worker.name)
    below = worker.children()
    assert len(below) == 2
    for pid in below:
        if worker.pid != pid:
            lab.seen.add(pid)
    worker.send(signal.SIGTERM)
    worker.end()
    eventually(lambda: all(gone(pid) for pid in below))
