"""The parts of scripts/bench: what each measures, and in which size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .environments import Missing, interpreter_of
from .figures import ratio
from .processes import BenchmarkFailed, Crew
from .stage import Stage


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What the command line says."""

    folder: Path
    quick: bool = False
    smoke: bool = False
    rounds: int = 0
    requests: int = 0
    systems: tuple[str, ...] = ()
    budget: float = 0.0


Figures = dict[str, Any]
"""What a part has found; its tables and pictures are made from it (:mod:`.pages`)."""

Part = Callable[[BenchOptions, Stage, Crew], Figures]


def say(text: str) -> None:
    """A line for the person who waits; figures go to the standard output."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def queue(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """No-op requests, ours beside those of others."""
    from .measures.queueing import QUICK, SMOKE, QueueBenchmark, QueueSizes, ratios
    from .systems import OWN, PEERS_OF_THE_QUEUE

    sizes = SMOKE if options.smoke else QUICK if options.quick else QueueSizes()
    sizes = replace(
        sizes,
        rounds=options.rounds or sizes.rounds,
        requests=options.requests or sizes.requests,
        budget=options.budget or sizes.budget,
    )
    few = _QUICK_SYSTEMS if (options.quick or options.smoke) and not options.systems else ()
    chosen = [system for system in (*OWN, *PEERS_OF_THE_QUEUE) if not few or system.name in few]
    systems, missing = _with_interpreters(chosen, options)
    benchmark = QueueBenchmark(stage, crew, systems, sizes, say)
    found = benchmark.run()
    found["problems"] |= missing
    found["ratios"] = ratios(benchmark.series)
    return found


def recovery(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """Kills, ours beside those of others."""
    from .measures.recovery import QUICK, SMOKE, RecoveryBenchmark, RecoverySizes
    from .scenarios import OWN, PEERS_OF_RECOVERY

    sizes = SMOKE if options.smoke else QUICK if options.quick else RecoverySizes()
    sizes = replace(sizes, kills=options.rounds or sizes.kills)
    few = options.quick or options.smoke
    chosen = OWN[: 1 if options.smoke else 2] if few else (*OWN, *PEERS_OF_RECOVERY)
    scenarios, missing = _with_interpreters(chosen, options)
    found = RecoveryBenchmark(stage, crew, sizes, say).run(scenarios)
    found["problems"] |= missing
    found["ratios"] = {
        f"recovery_{name.removeprefix('perdure: ').replace(' (0.5 s)', '_fast')}_{figure}": row[figure]
        for name, row in found["medians"].items()
        if name.startswith("perdure")
        for figure in ("p50_ms", "p99_ms", "repeated_most")
    }
    return found


def checkpoints(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """What storing while generating costs."""
    from .measures.checkpointing import QUICK, SMOKE, CheckpointBenchmark, CheckpointSizes, ratios

    sizes = SMOKE if options.smoke else QUICK if options.quick else CheckpointSizes()
    benchmark = CheckpointBenchmark(stage, crew, replace(sizes, rounds=options.rounds or sizes.rounds), say)
    found = benchmark.run()
    found["ratios"] = ratios(benchmark.series, found["windows"])
    return found


def scale(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """What operations cost beside many requests."""
    from .measures import fleet
    from .measures.scale import QUICK, SMOKE, ScaleBenchmark, ScaleSizes

    sizes = SMOKE if options.smoke else QUICK if options.quick else ScaleSizes()
    if options.requests:
        sizes = replace(sizes, queued=tuple(number for number in sizes.queued if number <= options.requests))
    benchmark = ScaleBenchmark(stage, sizes, say)
    found = benchmark.run()
    many = fleet.SMOKE if options.smoke else fleet.QUICK if options.quick else fleet.FleetSizes()
    found["fleet"] = fleet.FleetBenchmark(stage, many, benchmark.enqueue).run(say)
    last = found["rows"][-1]
    found["ratios"] = {
        "scale_queued": last["queued"],
        "sweep_nothing_expired_redis_us": last["costs"]["sweep, 0 expired"]["redis_us"],
        "claim_32_against_smallest": ratio(
            last["costs"]["claim 32"]["redis_us"], found["rows"][0]["costs"]["claim 32"]["redis_us"]
        ),
        **fleet.ratios(found["fleet"]),
    }
    return found


def saturation(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """More requests than Redis can checkpoint at the usual interval."""
    from .measures.saturation import QUICK, SMOKE, SaturationBenchmark, SaturationSizes, ratios

    sizes = SMOKE if options.smoke else QUICK if options.quick else SaturationSizes()
    found = SaturationBenchmark(stage, crew, sizes, say).run()
    found["ratios"] = ratios(found)
    return found


def streams(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """How long outputs are on their way to who reads them, and how many streams one client reads."""
    from .measures.streaming import QUICK, SMOKE, StreamBenchmark, StreamSizes, ratios

    sizes = SMOKE if options.smoke else QUICK if options.quick else StreamSizes()
    found = StreamBenchmark(stage, crew, replace(sizes, rounds=options.rounds or sizes.rounds), say).run()
    found["ratios"] = ratios(found)
    return found


def engine(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """The engine against transformers, which is taken from here if nothing may be installed."""
    from .measures.engine import QUICK, SMOKE, EngineBenchmark, EngineSizes, own_interpreter, ratios

    few = options.quick or options.smoke
    sizes = SMOKE if options.smoke else QUICK if options.quick else EngineSizes()
    try:
        python = own_interpreter() if few else interpreter_of("transformers", options.folder, say)
    except Missing as error:
        raise BenchmarkFailed(f"there is nothing to compare with: {error}") from None
    if not python:
        raise BenchmarkFailed("transformers is not installed here; run without --quick")
    benchmark = EngineBenchmark(crew, replace(sizes, rounds=options.rounds or sizes.rounds), python, say)
    found = benchmark.run()
    found["ratios"] = ratios(benchmark.series)
    return found


def goodput(options: BenchOptions, stage: Stage, crew: Crew) -> Figures:
    """What is left of the workers' time when they die."""
    from .measures.goodput import QUICK, SMOKE, GoodputBenchmark, GoodputSizes

    sizes = SMOKE if options.smoke else QUICK if options.quick else GoodputSizes()
    found = GoodputBenchmark(stage, crew, sizes, say).run()
    found["ratios"] = {
        f"goodput_{'resumed' if point['resume'] else 'from_zero'}_mtbf_{point['mtbf']:g}": point["goodput"]
        for point in found["points"]
    }
    return found


class Subject(Protocol):
    """What has a name and an environment: a system or a scenario."""

    @property
    def name(self) -> str: ...
    @property
    def environment(self) -> str: ...


Chosen = TypeVar("Chosen", bound=Subject)


def _with_interpreters(
    chosen: Sequence[Chosen], options: BenchOptions
) -> tuple[list[tuple[Chosen, str]], dict[str, str]]:
    """The systems that can be measured here with their interpreters, and of the others why not."""
    systems: list[tuple[Chosen, str]] = []
    missing: dict[str, str] = {}
    for system in chosen:
        if options.systems and system.name not in options.systems:
            continue
        try:
            systems.append((system, interpreter_of(system.environment, options.folder, say)))
        except Missing as error:
            say(f"{system.name} is not in this run: {error}")
            missing[system.name] = f"not in this run: {error}"
    return systems, missing


_QUICK_SYSTEMS = ("perdure", "rq SimpleWorker", "bare loop (one by one)")

RUNNERS: dict[str, Part] = {
    "queue": queue,
    "recovery": recovery,
    "checkpoints": checkpoints,
    "streams": streams,
    "engine": engine,
    "goodput": goodput,
    "scale": scale,
    "saturation": saturation,
}
