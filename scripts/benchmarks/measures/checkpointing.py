"""The part ``checkpoints``: what storing while generating costs, in tokens/s of a full batch.

One worker for each way, all loaded at the beginning, each on a queue of its own; in each round every one generates
the same batch alone, in an order that goes on by one with each round. The rounds are short and many, since a machine's
speed moves by a tenth from one second to the next, which is more than what is looked for. Tokens/s are those of the
forward passes in which every slot had a token (the engine's trace); bytes, calls and processor time are the server's
over the whole of it. *Off* stores nothing before the end. *Far* is the default with 50 ms put before Redis.

What is looked for is less than that noise. So the default is measured a second time, within one generation that has
checkpoints in some windows and none in others (:mod:`.switching`).
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ....producer import Client
from ....protocol.settings import Settings
from ...demonstration.run import read_trace
from ..figures import Series, median
from ..processes import BenchmarkFailed, BenchProcess, Crew
from ..stage import Stage
from .latency import SlowRoad
from .switching import NOTES, OFF, WINDOW, Pass, compare, read_switches

TASK = "perdure.workers.text.generate"
DEFAULT = 0.1
EVERY = 0.0005
"""Seconds between checkpoints: as it comes, and shorter than any step."""

FAR = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSizes:
    """``tokens`` are those of each answer; ``slots`` answers are generated at once."""

    rounds: int = 15
    tokens: int = 64
    slots: int = 8
    model: str = "smollm2"
    ways: int = 4
    generations: int = 5
    long: int = 600
    """Tokens of an answer of a generation that is cut into windows."""
    window: float = 2.0
    """Seconds with checkpoints, and as many without."""
    device: str = "cpu"
    dtype: str = "float32"


QUICK = CheckpointSizes(rounds=3, tokens=300, model="tiny", generations=1, long=900, window=0.25)
SMOKE = CheckpointSizes(rounds=1, tokens=60, model="tiny", ways=1, generations=1, window=0.1)

Figures = dict[str, float | None]


class CheckpointBenchmark:
    """All ways, in rounds that alternate."""

    def __init__(self, stage: Stage, crew: Crew, sizes: CheckpointSizes, say: Callable[[str], None]) -> None:
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
            self.start("off", OFF, self.stage.url)
            step = self.sizes.slots / (self._generate(client, "off")["tokens_per_s"] or 1.0)
            ways = [
                ("100 ms", DEFAULT, self.stage.url),
                ("every 16 tokens", 16 * step, self.stage.url),
                ("every token", EVERY, self.stage.url),
                ("100 ms, far", DEFAULT, far),
            ]
            ways = ways[-self.sizes.ways :]
            for name, interval, url in ways:
                self.start(name, interval, url)
            for name, _, _ in ways:
                self._generate(client, name)  # not counted: buffers, caches, the pages of the weights
            for number in range(1, self.sizes.rounds + 1):
                names = list(self.traces)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    found = self._generate(client, name)
                    self.series.add(name, found)
                    self.say(f"round {number}: {name}: {found['tokens_per_s']:,.1f} tokens/s")
            self.crew.stop()
            windows = {name: self._windows(client, name, url) for name, interval, url in ways if interval == DEFAULT}
        return {
            "sizes": asdict(self.sizes), "step_ms": step * 1000, "far_ms": FAR * 1000, "windows": windows,
            **self.series.to_json(),
        }  # fmt: skip

    def _windows(self, client: Client, name: str, url: str) -> dict[str, Any]:
        """One worker that stores checkpoints in every other window."""
        subject = f"{name}, in turn"
        child = self.start_switching(subject, url)
        names: set[str] = set()
        for number in range(self.sizes.generations):
            names |= self.batch(client, subject, self.sizes.long)
            self.say(f"{subject}: {number + 1} of {self.sizes.generations} generations")
        self.crew.stop(child)
        found = self.compared(subject, names)
        self.say(f"{subject}: {found['ratio'] or 0:.3f} of the tokens/s without, {found['windows']} windows")
        return found

    def start_switching(self, subject: str, url: str) -> BenchProcess:
        """A worker that stores checkpoints in every other window."""
        worker = "perdure.scripts.benchmarks.measures.switching.SwitchingWorker"
        return self.start(
            subject, DEFAULT, url, worker, {NOTES: str(self._notes(subject)), WINDOW: str(self.sizes.window)}
        )

    def compared(self, subject: str, names: set[str]) -> dict[str, Any]:
        """What the windows of these requests show."""
        passes = [Pass(line["at"] / 1e9, self._full(line, names)) for line in self._lines(subject)]
        return compare(passes, read_switches(self._notes(subject)))

    def _notes(self, subject: str) -> Path:
        return self.crew.folder / f"switches-{_queue(subject)}"

    def start(
        self,
        name: str,
        interval: float,
        url: str,
        worker: str = "perdure.workers.Worker",
        variables: Mapping[str, str] | None = None,
    ) -> BenchProcess:
        """A worker on a queue of this name."""
        queue = _queue(name)
        self.traces[name] = self.crew.folder / f"trace-{queue}"
        settings = Settings(
            tasks=(TASK,),
            model=self.sizes.model,
            slots=self.sizes.slots,
            checkpoint_interval=interval,
            trace=str(self.traces[name]),
            device=self.sizes.device,
            dtype=self.sizes.dtype,
            model_path=os.environ.get("PERDURE_MODEL_PATH", ""),
        )
        command = [sys.executable, "-P", "-m", "rq.cli", "worker", "-w", worker, "--quiet", queue]
        return self.crew.start(command, url, queue, **settings.environment(), **(variables or {}))

    def _generate(self, client: Client, name: str) -> Figures:
        """One full batch; returns when all of it has ended."""
        with self._counted() as counted:
            names = self.batch(client, name, self.sizes.tokens)
        return {"tokens_per_s": self.rate(name, names), **counted}

    def batch(self, client: Client, name: str, tokens: int, *, read: bool = False) -> set[str]:
        """The ids of as many requests as there are slots, each of so many tokens, when all have ended; ``read``: each
        by a stream.
        """
        payload = {"prompt": "Once upon a time", "max_tokens": tokens, "min_tokens": tokens}
        items = [(TASK, {**payload, "seed": seed}) for seed in range(self.sizes.slots)]
        handles = client.submit_many(items, queue=_queue(name))
        if read:
            with ThreadPoolExecutor(len(handles)) as pool:
                deque(pool.map(lambda handle: deque(handle.stream(), 0), handles), 0)
        for handle in handles:
            generated = handle.result()["usage"]["completion_tokens"]
            if generated != tokens:
                raise BenchmarkFailed(f"{name}: {generated} tokens came instead of {tokens}")
        return {handle.id for handle in handles}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        files = list(self.traces[name].glob("*")) if self.traces[name].is_dir() else [self.traces[name]]
        return [line for file in files for line in read_trace(file)]

    def _full(self, line: Mapping[str, Any], ours: set[str]) -> bool:
        rows = [row for row in line["rows"] if row[3] == "decode" and row[0].split("/")[0] in ours]
        return len(rows) == self.sizes.slots

    def rate(self, name: str, ours: set[str]) -> float:
        """Tokens/s between the first and the last pass in which every slot got a token."""
        full = [line["at"] / 1e9 for line in self._lines(name) if self._full(line, ours)]
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


def ratios(series: Series, windows: Mapping[str, Mapping[str, Any]]) -> Figures:
    """Tokens/s of each way against none, round by round; and window by window."""
    base = series.rounds["off"]["tokens_per_s"]
    found = {
        f"checkpoints_{_name(name)}": median(
            a / b for a, b in zip(figures["tokens_per_s"], base, strict=False) if a is not None and b
        )
        for name, figures in series.rounds.items()
        if name != "off"
    }
    return found | {f"checkpoints_{_name(name)}__in_turn": item["ratio"] for name, item in windows.items()}


def _name(way: str) -> str:
    return _queue(way).replace("-", "_")


def _queue(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
