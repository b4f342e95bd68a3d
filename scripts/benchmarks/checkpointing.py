"""The part ``checkpoints``: what storing while generating costs, in tokens/s of a full batch.

One worker for each way, all loaded at the beginning, each on a queue of its own; in each round every one generates
the same batch alone, in an order that goes on by one with each round. The rounds are short and many, since a machine's
speed moves by a tenth from one second to the next, which is more than what is looked for. Tokens/s are those of the
forward passes in which every slot had a token (the engine's trace); bytes, calls and processor time are the server's
over the whole of it. *Off* stores nothing before the end. *Far* is the default with 50 ms put before Redis.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...producer import Client
from ...protocol.settings import Settings
from ..demonstration import read_trace
from .figures import Series, median
from .latency import SlowRoad
from .processes import BenchmarkFailed, Child, Crew
from .stage import Stage

TASK = "perdure.workers.text.generate"
OFF = 100_000.0
"""Seconds between checkpoints where there are to be none."""

EVERY = 0.0005
"""Seconds: shorter than any step."""

FAR = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """``tokens`` are those of each answer; ``slots`` answers are generated at once."""

    rounds: int = 15
    tokens: int = 64
    slots: int = 8
    model: str = "smollm2"
    ways: int = 4


QUICK = Sizes(rounds=3, tokens=300, model="tiny")
SMOKE = Sizes(rounds=1, tokens=60, model="tiny", ways=1)

Figures = dict[str, float | None]


class CheckpointBenchmark:
    """All ways, in rounds that alternate."""

    def __init__(self, stage: Stage, crew: Crew, sizes: Sizes, say: Callable[[str], None]) -> None:
        self.stage, self.crew, self.sizes, self.say = stage, crew, sizes, say
        self.series = Series()
        self.traces: dict[str, Path] = {}

    def run(self) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        place = urlsplit(self.stage.url)
        with (
            SlowRoad(str(place.hostname), int(place.port or 0), FAR) as road,
            Client(self.stage.url, settings=Settings(response_timeout=600)) as client,
        ):
            far = f"redis://127.0.0.1:{road.port}/0"
            self._start("off", OFF, self.stage.url)
            step = self.sizes.slots / (self._generate(client, "off")["tokens_per_s"] or 1.0)
            ways = [
                ("100 ms", 0.1, self.stage.url),
                ("every 16 tokens", 16 * step, self.stage.url),
                ("every token", EVERY, self.stage.url),
                ("100 ms, far", 0.1, far),
            ]
            ways = ways[-self.sizes.ways :]
            for name, interval, url in ways:
                self._start(name, interval, url)
            for name, _, _ in ways:
                self._generate(client, name)  # not counted: buffers, caches, the pages of the weights
            for number in range(1, self.sizes.rounds + 1):
                names = list(self.traces)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    found = self._generate(client, name)
                    self.series.add(name, found)
                    self.say(f"round {number}: {name}: {found['tokens_per_s']:,.1f} tokens/s")
        return {"sizes": asdict(self.sizes), "step_ms": step * 1000, "far_ms": FAR * 1000, **self.series.to_json()}

    def _start(self, name: str, interval: float, url: str) -> Child:
        queue = _queue(name)
        self.traces[name] = self.crew.folder / f"trace-{queue}"
        settings = Settings(
            tasks=(TASK,), model=self.sizes.model, slots=self.sizes.slots, checkpoint_interval=interval,
            trace=str(self.traces[name]), device="cpu", model_path=os.environ.get("PERDURE_MODEL_PATH", ""),
        )  # fmt: skip
        command = [sys.executable, "-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--quiet", queue]
        return self.crew.start(command, url, queue, **settings.environment())

    def _generate(self, client: Client, name: str) -> Figures:
        """One full batch; returns when all of it has ended."""
        tokens = self.sizes.tokens
        payload = {"prompt": "Once upon a time", "max_tokens": tokens, "min_tokens": tokens}
        with self._counted() as counted:
            items = [(TASK, {**payload, "seed": seed}) for seed in range(self.sizes.slots)]
            handles = client.submit_many(items, queue=_queue(name))
            for handle in handles:
                generated = handle.result()["usage"]["completion_tokens"]
                if generated != tokens:
                    raise BenchmarkFailed(f"{name}: {generated} tokens came instead of {tokens}")
        return {"tokens_per_s": self._rate(name, {handle.id for handle in handles}), **counted}

    def _rate(self, name: str, ours: set[str]) -> float:
        """Tokens/s between the first and the last pass in which every slot got a token."""
        files = list(self.traces[name].glob("*")) if self.traces[name].is_dir() else [self.traces[name]]
        full = [
            line["at"] / 1e9
            for file in files
            for line in read_trace(file)
            if sum(row[0].split("/")[0] in ours and row[3] == "decode" for row in line["rows"]) == self.sizes.slots
        ]
        if len(full) < 3:
            raise BenchmarkFailed(f"{name}: the batch was full for {len(full)} passes only; take more tokens")
        # Over all passes: a checkpoint disturbs some of them only.
        seconds: float = full[-1] - full[0]
        return self.sizes.slots * (len(full) - 1) / seconds

    @contextmanager
    def _counted(self) -> Iterator[Figures]:
        """Bytes and packets that come to the server, and the milliseconds that it is busy, per second."""
        found: Figures = {}
        before, began = self._traffic(), time.monotonic()
        yield found
        seconds = time.monotonic() - began
        sent, calls, busy = (b - a for a, b in zip(before, self._traffic(), strict=True))
        found |= {"bytes_per_s": sent / seconds, "calls_per_s": calls / seconds, "redis_ms_per_s": busy / seconds}

    def _traffic(self) -> tuple[int, int, float]:
        info: dict[str, Any] = self.stage.connection.info("stats", "cpu")
        busy = 1000 * (float(info["used_cpu_user"]) + float(info["used_cpu_sys"]))
        return int(info["total_net_input_bytes"]), int(info["total_reads_processed"]), busy


def ratios(series: Series) -> Figures:
    """Tokens/s of each way against none, round by round."""
    base = series.rounds["off"]["tokens_per_s"]
    return {
        f"checkpoints_{_queue(name).replace('-', '_')}": median(
            a / b for a, b in zip(figures["tokens_per_s"], base, strict=False) if a is not None and b
        )
        for name, figures in series.rounds.items()
        if name != "off"
    }


def _queue(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
