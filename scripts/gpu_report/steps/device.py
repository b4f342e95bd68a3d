"""The machine itself: what it is, what a process pays before it computes, and what its driver says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Final

from ....protocol.settings import Settings
from ....workers.health.nvml import Devices
from ....workers.health.state import CheckState
from ....workers.probe import probe
from ..ground import ground
from ..stage import ReportStage, StepFailed
from ..tasks import PATH

START: Final = """
import json, sys, time
began = time.perf_counter()
import torch
imported = time.perf_counter()
device = sys.argv[1]
x = torch.ones(1024, 1024, device=device)
if device != "cpu":
    torch.cuda.synchronize()
made = time.perf_counter()
y = (x @ x).sum().item()
done = time.perf_counter()
took = {"import_torch_s": imported - began, "first_tensor_s": made - imported, "first_product_s": done - made}
print(json.dumps(took))
"""
"""What a fresh process pays: torch, the context of the device, the first library that is loaded for it."""


def machine(stage: ReportStage) -> None:
    """Names and versions, then the start of a process, twice: the first one reads everything from the disk."""
    import torch

    stage.note(
        torch_version=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        cuda=torch.version.cuda or "none",
    )
    if not stage.needs_cuda("the device, its driver, the start of CUDA"):
        if not torch.cuda.is_available():
            raise StepFailed("torch finds no CUDA device; --rehearse runs on the CPU")
        found = torch.cuda.get_device_properties(0)
        stage.note(device=found.name, memory_gb=round(found.total_memory / 2**30, 1), driver=_driver())
    for name in ("first start of a process", "second"):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-P", "-c", START, stage.device], capture_output=True, text=True, check=True
        )
        stage.row(name, json.loads(done.stdout) | {"whole_process_s": time.perf_counter() - began})


def driver(stage: ReportStage) -> None:
    """NVML, the probe, and health as a worker tells it."""
    if not stage.needs_cuda("NVML: there is no driver"):
        _nvml(stage)
    verdict = probe("cuda:0" if stage.device == "cuda" else "cpu", on_device=15)
    stage.expect(f"the probe finds the device well ({verdict.reason})", verdict.state is CheckState.OK)
    stage.note(probe=str(verdict.state), probe_s=verdict.seconds)
    settings = Settings(
        device=stage.device,
        tasks=(f"{PATH}.Faulty",),
        threads=1,
        health_port=9100,
        health_interval=0.5,
        health_folder=str(stage.folder),
    )
    wanted = {"worker", "network", "memory", "disk", *([] if stage.rehearsal else ["gpu"])}
    with ground(stage.folder / "health", settings) as found:
        (worker,) = found.workers()
        checks = found.wait("every check's first look", lambda: _checks(worker["health"], wanted))
    for name in sorted(wanted):
        stage.note(**{f"check_{name}": f"{checks[name]['state']}: {checks[name]['reason']}"})
    # The machine may be short of disk or memory; the device must be well.
    if not stage.rehearsal:
        stage.expect(f"the check of the device is ok ({checks['gpu']})", checks["gpu"]["state"] == CheckState.OK)


def _nvml(stage: ReportStage) -> None:
    import torch

    devices = Devices.open()
    if devices is None:
        stage.expect("NVML can be opened", kept=False)
        return
    before = devices.memory(0)[0]
    held = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    free, total = devices.memory(0)
    counts = devices.counts(0)
    stage.note(
        identity=devices.identity(0),
        recovery_action=str(devices.action(0)),
        total_gb=total / 2**30,
        taken_by_a_context_and_1_gib=(before - free) / 2**30,
        corrected=counts.corrected,
        uncorrected=counts.uncorrected,
        remapped_rows=counts.remapped,
        row_pending=str(counts.pending),
        row_failed=str(counts.failed),
        processes_seen=len(devices.processes(0)),
        own_process_seen=str(os.getpid() in devices.processes(0)),
        **_clocks(),
    )
    stage.expect("NVML sees that a process takes memory", before - free >= held.numel())
    stage.expect("the driver asks for no repair", not devices.action(0).unfit)
    devices.close()


def _clocks() -> dict[str, int]:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    kinds = {"sm_mhz": pynvml.NVML_CLOCK_SM, "memory_mhz": pynvml.NVML_CLOCK_MEM}
    return {name: int(pynvml.nvmlDeviceGetClockInfo(handle, kind)) for name, kind in kinds.items()}


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception as error:  # the step "driver" says more
        return f"unknown ({error})"


def _checks(address: str, wanted: set[str]) -> dict[str, Any] | None:
    """Once all of them have looked."""
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        text = error.read()
    except OSError:
        return None
    checks: dict[str, Any] = json.loads(text)["checks"]
    return checks if all(checks.get(name, {}).get("at") for name in wanted) else None
