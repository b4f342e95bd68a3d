"""What a device does to a worker: memory that runs out, a kernel that does not end, a kernel that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from ....protocol.records import FailureKind
from ....protocol.settings import Settings
from ....workers.engine.batch_size import ENOUGH
from ....workers.health.state import CheckState
from ....workers.pool import statuses
from ....workers.pool.gpus import Gpu, choose, open_devices
from ....workers.probe import probe
from ..ground import PATIENCE, QUEUE, Ground, ground
from ..stage import ReportStage
from ..tasks import PATH, WRONG_AT

COUNT: Final = 10
"""Outputs of each request."""

STEP_TIMEOUT: Final = 3.0
"""Seconds after which a step counts as hung here; 20 by default."""


def memory(stage: ReportStage) -> None:
    """Eight requests of which four fit, and a process that has no memory left for any."""
    stage.needs_cuda("memory that is really full")
    task = f"{PATH}.Greedy"
    with ground(stage.folder / "batch", _settings(stage, task)) as found:
        began = time.monotonic()
        outputs = found.count(task, [{"n": COUNT}] * 8)
        sizes = [size for each in outputs for size in each]
        stage.expect("every request puts out all that it should", all(len(each) == COUNT for each in outputs))
        if not stage.rehearsal:
            stage.expect(f"the batch is halved to 4 (it was {min(sizes)} to {max(sizes)})", 4 in sizes)
        stage.row(
            "eight fifths of the memory",
            {
                "requests": 8,
                "finished": len(outputs),
                "largest_batch": max(sizes),
                "smallest_batch": min(sizes),
                "seconds": time.monotonic() - began,
            },
        )
    task = f"{PATH}.Leaking"
    with ground(stage.folder / "leak", _settings(stage, task)) as found:
        began = time.monotonic()
        payload = {"n": 3, "folder": str(stage.folder)}
        outputs = found.count(task, [payload] * ENOUGH)
        replaced = found.text().count("loaded ") - 1
        if not stage.rehearsal:
            stage.expect(f"a worker without memory is replaced once ({replaced} were)", replaced == 1)
        stage.row(
            "a process that keeps all of it",
            {
                "requests": len(outputs),
                "finished": len(outputs),
                "replaced": replaced,
                "seconds": time.monotonic() - began,
            },
        )


def spin(stage: ReportStage) -> None:
    """The step's time-out finds it, the process is replaced, and the device computes afterwards."""
    stage.needs_cuda("a kernel that does not end; here it is a loop of Python")
    task = f"{PATH}.Spinning"
    with ground(stage.folder / "spin", _settings(stage, task), gpus=_gpus(stage)) as found:
        seconds, outputs = _through(stage, found, task, 1)
        stage.expect("the request goes on where it was", outputs == [list(range(COUNT))])
        stage.expect("the worker was found to hang", FailureKind.HANG in _kinds(found))
        stage.note(step_timeout_s=STEP_TIMEOUT, next_output_s=seconds, starts=found.text().count("loaded "))
    _usable(stage)


def fault(stage: ReportStage) -> None:
    """One request's kernel reads where nothing is: the context is lost, and with it the process, but no neighbour."""
    real = not stage.needs_cuda("an illegal memory access")
    task = f"{PATH}.Faulty"
    with ground(stage.folder / "fault", _settings(stage, task), gpus=_gpus(stage)) as found:
        seconds, outputs = _through(stage, found, task, 3)
        stage.expect("all three requests end with all of their outputs", outputs == [list(range(COUNT))] * 3)
        stage.note(requests=3, finished=len(outputs), starts=found.text().count("loaded "))
        if real:
            stage.expect("the error is told as one of the device", FailureKind.GPU_ERROR in _kinds(found))
            stage.expect(
                f"the worker leaves with {statuses.UNFIT_DEVICE}", "unfit after AcceleratorError" in found.text()
            )
            stage.expect("nobody is charged for it", not any(record.attempt for record in _records(found)))
            stage.note(next_output_s=seconds)
    _usable(stage)


def _settings(stage: ReportStage, task: str) -> Settings:
    return Settings(device=stage.device, tasks=(task,), step_timeout=STEP_TIMEOUT, retry_base=0.2, threads=1)


def _gpus(stage: ReportStage) -> Sequence[Gpu]:
    """As ``perdure up --gpus all`` has them: then the device is looked at before a process starts on it again."""
    return [] if stage.rehearsal else choose("all", devices=open_devices())[:1]


def _through(stage: ReportStage, found: Ground, task: str, number: int) -> tuple[float, list[list[Any]]]:
    """Requests of which the first goes wrong; the longest pause between two of its outputs, and all outputs."""
    payloads = [{"n": COUNT, "folder": str(stage.folder), "fails": place == 0} for place in range(number)]
    handles = found.client.submit_many([(task, payload) for payload in payloads], queue=QUEUE)
    times: list[float] = []

    def listen() -> None:
        times.extend(time.monotonic() for _ in handles[0].stream(timeout=PATIENCE))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    for handle in handles:
        handle.result(timeout=PATIENCE)
    thread.join(5)
    pauses = [after - before for before, after in zip(times[WRONG_AT - 1 :], times[WRONG_AT:], strict=False)]
    return max(pauses, default=0.0), [found.store.all_outputs(handle.id) for handle in handles]


def _records(found: Ground) -> list[Any]:
    ended = found.store.connection.scan_iter("*:perdure:history:*")
    return [found.record(name.decode().rpartition(":")[2]) for name in ended]


def _kinds(found: Ground) -> set[str]:
    return {event.kind for record in _records(found) for event in found.store.history(record.id)}


def _usable(stage: ReportStage) -> None:
    """The device computes what is known, in a process of its own."""
    verdict = probe("cuda:0" if stage.device == "cuda" else "cpu", on_device=15)
    stage.expect(f"the device is usable afterwards ({verdict.reason})", verdict.state is CheckState.OK)
    stage.note(probe_afterwards=str(verdict.state), probe_s=verdict.seconds)
