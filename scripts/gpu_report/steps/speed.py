"""Tokens/s of a full batch, what checkpoints cost of them, and how much of the memory's bandwidth decoding reaches."""

from __future__ import annotations

import time
from typing import Any, Final

import torch

from ....producer import Client
from ....protocol.connection import connect
from ....protocol.settings import Settings
from ....protocol.store import Store
from ...benchmarks.measures.checkpointing import CheckpointBenchmark, CheckpointSizes
from ...benchmarks.processes import BenchProcess, Crew
from ...benchmarks.stage import Stage as Place
from ...pool.server import Server
from ..models import folder, parameters, shape_of
from ..stage import ReportStage

LOADING: Final = 80.0
"""Seconds for all workers to load, at once: the self-check of many slots takes many passes."""

WARM: Final = 24
"""Tokens of the first generation, which is not counted."""

PROMPT: Final = 16


def speed(stage: ReportStage) -> None:
    """A worker for each size of a batch, all loaded before the first is measured; then one after the other."""
    sizes = {2: (0.1, 1.0), 4: (0.1, 1.0)} if stage.rehearsal else {8: (1.0, 9.0), 64: (1.0, 9.0), 256: (3.0, 14.0)}
    shape = shape_of(stage)
    bandwidth = copy_bandwidth(stage)
    stage.note(parameters=parameters(shape), copy_gb_per_s=bandwidth / 1e9)
    model = str(folder(stage))
    with Server(stage.folder / "redis", die_with_parent=True) as server, Crew(stage.folder / "crew") as crew:
        place = Place(server)
        benches: dict[int, tuple[CheckpointBenchmark, BenchProcess]] = {}
        for slots, (window, _) in sizes.items():
            given = CheckpointSizes(slots=slots, model=model, window=window, device=stage.device, dtype="bfloat16")
            bench = CheckpointBenchmark(place, crew, given, lambda line: None)
            benches[slots] = bench, bench.start_switching(f"{slots} at once", server.url)
        _wait_loaded(stage, crew, server.url, benches)
        with Client(server.url, settings=Settings(response_timeout=100)) as client:
            for slots, (bench, child) in benches.items():
                found = measure(bench, client, f"{slots} at once", sizes[slots][1], shape.context)
                crew.stop(child)
                length = PROMPT + found.pop("tokens") / 2
                keys = slots * length * 2 * shape.layers * shape.kv_heads * shape.head_width * 4
                needed = 2 * parameters(shape) + keys
                share = needed * found["tokens_per_s"] / slots / bandwidth
                stage.row(f"{slots} at once", found | {"share_of_copy_bandwidth": share})
        place.close()


def measure(bench: CheckpointBenchmark, client: Client, subject: str, seconds: float, context: int) -> dict[str, Any]:
    """One generation of about so many seconds, cut into windows."""
    slots = bench.sizes.slots
    step = slots / bench.rate(subject, bench.batch(client, subject, WARM))
    tokens = max(WARM, min(int(seconds / step), context - 2 * PROMPT))
    names = bench.batch(client, subject, tokens)
    rate = bench.rate(subject, names)
    found = bench.compared(subject, names)
    return {
        "tokens": tokens, "tokens_per_s": rate, "ms_a_token": 1000 * slots / rate,
        "with_checkpoints": found["ratio"], "from": found["low"], "to": found["high"], "windows": found["windows"],
    }  # fmt: skip


def _wait_loaded(
    stage: ReportStage, crew: Crew, url: str, benches: dict[int, tuple[CheckpointBenchmark, BenchProcess]]
) -> None:
    """Those that have not loaded in time are left out, and end: they would take what is measured."""
    began = time.monotonic()
    waiting = {child: slots for slots, (_, child) in benches.items()}
    with connect(url) as connection:
        store = Store(connection, Settings())
        while waiting and time.monotonic() - began < LOADING:
            ready = {row["pid"] for row in store.workers() if row["ready"]}
            for child in [child for child in waiting if child.pid in ready]:
                stage.row(f"{waiting.pop(child)} at once: loading", {"load_s": time.monotonic() - began})
            time.sleep(0.05)
    for child, slots in waiting.items():
        stage.expect(f"a worker with {slots} slots loads within {LOADING:g} s", kept=False)
        crew.stop(child, at_once=True)
        del benches[slots]


def copy_bandwidth(stage: ReportStage, rounds: int = 20) -> float:
    """Bytes a second that a copy within the memory reads and writes."""
    source = torch.ones((2**24 if stage.rehearsal else 2**31), dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)

    def copied(times: int) -> float:
        if not stage.rehearsal:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            target.copy_(source)
        if not stage.rehearsal:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    copied(2)
    return 2.0 * int(source.numel()) * rounds / copied(rounds)
