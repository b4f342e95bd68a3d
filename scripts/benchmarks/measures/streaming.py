"""The part ``streams``: how long an output is on its way, what that costs, and how many streams one client reads.

*Lag* is from the end of a step to the caller of ``async for``, by one clock of the machine. Beside ours, in the same
run: Redis' own streams (``XADD`` and ``XREAD``), which keep nothing of who runs what. *Tokens/s* are those of a full
batch that is read, against the same batch that nobody reads, one after the other. *Many* streams are played by a
writer, and read by a client that has one core.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ....producer import Client
from ....protocol.settings import Settings
from ..figures import Series, median, percentile, ratio
from ..processes import BenchmarkFailed, Crew, PeerProcess
from ..stage import Stage
from ..systems import PEERS, QUEUE
from .checkpointing import CheckpointBenchmark, CheckpointSizes

TASK = "bench_streams.Clock"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSizes:
    """``streams``: how many at once, of so many steps of so many seconds. ``many``: how many one client reads, so many
    outputs a second of each, for so many seconds.
    """

    rounds: int = 5
    streams: tuple[int, ...] = (1, 8, 64)
    steps: int = 200
    pause: float = 0.025
    many: tuple[int, ...] = (1_000, 10_000)
    rate: float = 3.0
    seconds: int = 20
    silence: float = 10.0
    """Seconds for which silent streams are watched."""
    generations: int = 5
    model: str = "smollm2"
    imports: int = 15


QUICK = StreamSizes(rounds=2, steps=100, many=(2_000,), seconds=8, generations=2, model="tiny")
SMOKE = StreamSizes(
    rounds=1, streams=(2,), steps=10, many=(100,), seconds=2, silence=1.0, generations=1, model="tiny", imports=2
)


class StreamBenchmark:
    """Ours and the bare way in turn."""

    def __init__(self, stage: Stage, crew: Crew, sizes: StreamSizes, say: Callable[[str], None]) -> None:
        self.stage, self.crew, self.sizes, self.say = stage, crew, sizes, say
        self.series = Series()

    def run(self) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        for number in range(1, self.sizes.rounds + 1):
            for streams in self.sizes.streams:
                for way in (self._ours, self._bare)[:: 1 if number % 2 else -1]:
                    self.stage.clear()
                    name, found = way(streams)
                    self.series.add(name, found)
                    self.say(f"round {number}: {name}: p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms")
                    self.crew.stop()
        many = [self._many(number) for number in self.sizes.many]
        tokens = self._tokens()
        return {
            "sizes": asdict(self.sizes),
            **self.series.to_json(),
            "many": many,
            "tokens": tokens,
            "import": _imports(self.sizes.imports),
        }

    def _ours(self, streams: int) -> tuple[str, dict[str, float]]:
        settings = Settings(tasks=(TASK,))
        worker = [sys.executable, "-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--quiet", QUEUE]
        self.crew.start(worker, self.stage.url, "streams-worker", **settings.environment())
        reader = self._agent("read")
        with Client(self.stage.url) as client:  # once it has answered, it is loaded
            client.submit(TASK, {"steps": 1, "pause": 0.0}, queue=QUEUE).result(60)
        # A client has its threads and connections from its first stream on.
        reader.ask(60, do="submit", number=2, payload={"steps": 3, "pause": 0.01})
        reader.ask(60, do="ended", steps=3)
        before = self.stage.sample()
        reader.ask(60, do="submit", number=streams, payload={"steps": self.sizes.steps, "pause": self.sizes.pause})
        found = reader.ask(120, do="ended", steps=self.sizes.steps)
        return f"perdure, {streams} streams", self._figures(found, before.cpu)

    def _bare(self, streams: int) -> tuple[str, dict[str, float]]:
        reader, writer = self._agent("bare"), self._agent("bare-write")
        ids = reader.ask(60, do="submit", number=2, payload={"steps": 3})["ids"]
        writer.ask(60, do="write", ids=ids, rate=100.0, steps=3, together=True)
        reader.ask(60, do="ended", steps=3)
        self.stage.clear()
        before = self.stage.sample()
        ids = reader.ask(60, do="submit", number=streams, payload={"steps": self.sizes.steps})["ids"]
        writer.ask(120, do="write", ids=ids, rate=1 / self.sizes.pause, steps=self.sizes.steps, together=True)
        found = reader.ask(120, do="ended", steps=self.sizes.steps)
        return f"XADD and XREAD, {streams} streams", self._figures(found, before.cpu)

    def _agent(self, what: str, cpu: int | None = None) -> PeerProcess:
        command = [sys.executable, str(PEERS / "bench_streams.py"), what]
        agent = self.crew.agent(command, self.stage.url, f"streams-{what}")
        if "write" not in what:
            agent.ask(60, do="open", url=self.stage.url, cpu=cpu)
        return agent

    def _figures(self, found: dict[str, Any], cpu: float) -> dict[str, float]:
        if found["wrong"]:
            raise BenchmarkFailed(f"{found['wrong']} outputs were missing, twice or out of order")
        lags, firsts = found["lags"], found["firsts"]
        return {
            "p50_ms": 1000 * percentile(lags, 0.5),
            "p99_ms": 1000 * percentile(lags, 0.99),
            "first_ms": 1000 * percentile(firsts, 0.5),
            "redis_us": 1e6 * (self.stage.sample().cpu - cpu) / (len(lags) + len(firsts)),
            "client_us": 1e6 * found["cpu"] / (len(lags) + len(firsts)),
        }

    def _many(self, number: int) -> dict[str, Any]:
        """One client on one core; server and writer have the rest."""
        self.stage.clear()
        cores = sorted(os.sched_getaffinity(0))
        reader, writer = self._agent("read", cores[0]), self._agent("write")
        if len(cores) > 1:
            for pid in (writer.pid, self.stage.server.pid):
                os.sched_setaffinity(pid, set(cores[1:]))
        steps = int(self.sizes.rate * self.sizes.seconds)
        ids = reader.ask(120, do="submit", number=number, payload={"steps": 1, "pause": 1.0})["ids"]
        share = reader.ask(300, do="subscribed", seconds=self.sizes.silence)["share"]
        writer.tell(do="write", ids=ids, rate=self.sizes.rate, steps=steps, together=False)
        found = reader.ask(600, do="ended", steps=steps)
        written = writer.hear(60)
        self.crew.stop()
        os.sched_setaffinity(self.stage.server.pid, set(cores))
        lags = found["lags"] + found["firsts"]
        self.say(f"{number} streams: {len(lags)} outputs, {found['wrong']} wrong, silent {share:.1%} of a core")
        return {
            "streams": number, "outputs": len(lags), "wrong": found["wrong"], "asked_per_s": number * self.sizes.rate,
            "read_per_s": len(lags) / found["seconds"], "writer_late_s": written["late"],
            "p50_ms": 1000 * percentile(lags, 0.5), "p99_ms": 1000 * percentile(lags, 0.99),
            "cpu": found["cpu"] / found["seconds"], "silent_cpu": share,
        }  # fmt: skip

    def _tokens(self) -> dict[str, Any]:
        """Tokens/s of batches that are read against those of batches that are not, in turn."""
        sizes = CheckpointSizes(model=self.sizes.model, tokens=300 if self.sizes.model == "tiny" else 64)
        bench = CheckpointBenchmark(self.stage, self.crew, sizes, self.say)
        series = Series()
        with Client(self.stage.url, settings=Settings(response_timeout=600)) as client:
            bench.start("heard", 0.1, self.stage.url)
            bench.batch(client, "heard", sizes.tokens)
            for _ in range(self.sizes.generations):
                series.add("alone", {"tokens_per_s": bench.rate("heard", bench.batch(client, "heard", sizes.tokens))})
                names = bench.batch(client, "heard", sizes.tokens, read=True)
                series.add("read", {"tokens_per_s": bench.rate("heard", names)})
        self.crew.stop()
        pairs = zip(series.rounds["read"]["tokens_per_s"], series.rounds["alone"]["tokens_per_s"], strict=True)
        return {**series.to_json(), "ratio": median(ratio(one, other) for one, other in pairs)}


def _imports(times: int) -> dict[str, float]:
    """Milliseconds of processor time of a Python that imports redis, and of one that imports us and makes a client."""

    def cost(code: str) -> float:
        timed = f"import time; {code}; print(time.process_time())"
        return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, check=True, text=True).stdout)

    ours = "from perdure import Client; Client('redis://127.0.0.1:1')"
    found = [(1000 * cost("import redis"), 1000 * cost(ours)) for _ in range(times)]
    own, others = (statistics.median(pair[place] for pair in found) for place in (1, 0))
    return {"redis_ms": others, "perdure_ms": own, "ratio": own / others}


def ratios(found: dict[str, Any]) -> dict[str, float | None]:
    """Against the aims of docs/performance.md."""
    medians = found["medians"]
    last = found["many"][-1]
    return {
        **{
            f"streams_{name.split(', ')[1].replace(' ', '_')}_{figure}": row[figure]
            for name, row in medians.items()
            if name.startswith("perdure")
            for figure in ("p50_ms", "p99_ms", "first_ms")
        },
        "streams_tokens_per_s": found["tokens"]["ratio"],
        "streams_many_read_against_asked": ratio(last["read_per_s"], last["asked_per_s"]),
        "streams_silent_cpu": last["silent_cpu"],
        "import_against_redis": found["import"]["ratio"],
    }
