"""Failures that only a real device has: memory that is really full, and a kernel that really failed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import redis

from perdure.protocol.settings import Settings
from perdure.workers.pool import statuses
from perdure.workers.tasks.base import BatchTask, Request, Step
from perdure.workers.text import Generate
from perdure.workers.text.golden import answers
from tests.kit.lab import Lab
from tests.kit.workers.bench import Turns

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class Greedy(BatchTask):
    """Each request takes a fifth of what the device had free at the start, and puts out what it has counted there."""

    slots = 8

    def load(self) -> None:
        self.part = torch.cuda.mem_get_info()[0] // 5
        self.running: dict[str, list[Any]] = {}
        self.sizes: list[int] = []

    def admit(self, request: Request) -> None:
        self.running[request.id] = [len(request.outputs), None]

    def step(self) -> Iterable[Step]:
        self.sizes.append(len(self.running))
        for name, entry in list(self.running.items()):
            if entry[1] is None:
                entry[1] = torch.ones(self.part, dtype=torch.uint8, device="cuda")
            yield Step(request_id=name, output=entry[0])
            entry[0] += int(entry[1][0])
            if entry[0] == 10:
                del self.running[name]
                yield Step(request_id=name, result="done")

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


def test_a_device_that_is_full_takes_a_smaller_batch(connection: redis.Redis) -> None:
    """Eight fifths do not fit: all end, in smaller batches, without a charge, and the memory is there again."""
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    task = Greedy()
    turns = Turns(connection, task)
    names = [f"r{number}" for number in range(8)]
    turns.submit_all({name: {} for name in names})
    turns.run(*names)
    for name in names:
        assert (turns.record(name).status, turns.record(name).attempt) == ("finished", 0), turns.reasons(name)
        assert turns.pool.store.all_outputs(name) == list(range(10))
    assert turns.engine.size.limit == 4
    assert max(task.sizes) == 8
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] > before - 2**28


def test_the_text_engine_fits_its_requests_into_a_full_device(connection: redis.Redis) -> None:
    """Another program has taken nearly all: what does not fit waits, and the answers are those of an empty device."""
    settings = Settings(model="tiny", device="cuda", slots=8)
    payloads = {f"t{number}": {"prompt": "x" * 40, "max_tokens": 200, "seed": number} for number in range(8)}
    expected = answers(payloads.items(), settings)
    task = Generate(settings)
    turns = Turns(connection, task)
    free = task.memory_free()
    needed = task.memory_needed(payloads["t0"])
    assert free is not None
    assert needed is not None
    room = 3 * needed + 2**20
    ballast = torch.empty(max(0, free - room), dtype=torch.uint8, device="cuda")
    most = 0

    def over() -> bool:
        nonlocal most
        most = max(most, len(turns.engine.admitted))
        return all(turns.record(name).ended for name in payloads)

    turns.submit_all(payloads)
    turns.until(over, most=20_000)
    del ballast
    torch.cuda.empty_cache()
    assert most < 8
    assert [turns.pool.store.result(name) for name in payloads] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the workers' tests are Linux's")
def test_a_device_side_assert_ends_the_process_at_once(lab: Lab) -> None:
    """A real one: the context is lost, the process leaves by itself with status 70, and its requests end elsewhere."""
    Path(lab.folder, "go").touch()
    payload = {"n": 10, "folder": str(lab.folder)}
    names = [lab.submit("memory_tasks.Asserting", payload | {"fails": number == 1}) for number in range(3)]
    worker = lab.worker(wait=False)
    assert worker.end(60) == statuses.UNFIT_DEVICE
    assert "unfit after AcceleratorError" in worker.log
    assert not Path(lab.folder, "end of the interpreter").exists()
    lab.worker(wait=False)
    for name in names:
        assert lab.check(name, 10).attempt == 0
