"""``scripts/bench``: which parts are measured, and where the figures go."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...protocol.errors import PerdureError
from ..server import Server
from .environments import NODE, Missing, interpreter_of
from .figures import ratio
from .machine import describe, describe_server, one_line
from .processes import Crew
from .reports import (
    Pictures,
    checkpoint_pictures,
    checkpoint_tables,
    queue_pictures,
    queue_tables,
    recovery_pictures,
    recovery_tables,
    scale_pictures,
    scale_tables,
)
from .stage import Stage
from .tables import Table

PARTS = ("queue", "checkpoints", "engine", "recovery", "goodput", "scale")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    folder: Path
    quick: bool = False
    smoke: bool = False
    rounds: int = 0
    requests: int = 0
    systems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """What a part has found: figures for the JSON file, tables, and pictures by their file names."""

    figures: dict[str, Any]
    tables: list[Table]
    pictures: Pictures


Part = Callable[[Options, Stage, Crew, str], Finding]


def say(text: str) -> None:
    """A line for the person who waits; figures go to the standard output."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def queue(options: Options, stage: Stage, crew: Crew, note: str) -> Finding:
    """No-op requests, ours beside those of others."""
    from .queueing import QUICK, SMOKE, QueueBenchmark, Sizes, ratios
    from .systems import OWN, PEERS_OF_THE_QUEUE

    sizes = SMOKE if options.smoke else QUICK if options.quick else Sizes()
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds, requests=options.requests or sizes.requests)
    few = _QUICK_SYSTEMS if options.quick or options.smoke else ()
    chosen = [system for system in (*OWN, *PEERS_OF_THE_QUEUE) if not few or system.name in few]
    systems, missing = _with_interpreters(chosen, options)
    benchmark = QueueBenchmark(stage, crew, systems, sizes, say)
    found = benchmark.run()
    found["problems"] |= missing
    found["ratios"] = ratios(benchmark.series)
    return Finding(found, queue_tables(found), queue_pictures(found, note))


def recovery(options: Options, stage: Stage, crew: Crew, note: str) -> Finding:
    """Kills, ours beside those of others."""
    from .recovery import QUICK, SMOKE, RecoveryBenchmark, Sizes
    from .scenarios import OWN, PEERS_OF_RECOVERY

    sizes = SMOKE if options.smoke else QUICK if options.quick else Sizes()
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
    return Finding(found, recovery_tables(found), recovery_pictures(found, note))


def checkpoints(options: Options, stage: Stage, crew: Crew, note: str) -> Finding:
    """What storing while generating costs."""
    from .checkpointing import QUICK, SMOKE, CheckpointBenchmark, Sizes, ratios

    sizes = SMOKE if options.smoke else QUICK if options.quick else Sizes()
    benchmark = CheckpointBenchmark(stage, crew, replace(sizes, rounds=options.rounds or sizes.rounds), say)
    found = benchmark.run()
    found["ratios"] = ratios(benchmark.series)
    return Finding(found, checkpoint_tables(found), checkpoint_pictures(found, note))


def scale(options: Options, stage: Stage, crew: Crew, note: str) -> Finding:
    """What operations cost beside many requests."""
    from .scale import QUICK, SMOKE, ScaleBenchmark, Sizes

    sizes = SMOKE if options.smoke else QUICK if options.quick else Sizes()
    if options.requests:
        sizes = replace(sizes, queued=tuple(number for number in sizes.queued if number <= options.requests))
    found = ScaleBenchmark(stage, sizes, say).run()
    last = found["rows"][-1]
    found["ratios"] = {
        "scale_queued": last["queued"],
        "sweep_nothing_expired_redis_us": last["costs"]["sweep, 0 expired"]["redis_us"],
        "claim_32_against_smallest": ratio(
            last["costs"]["claim 32"]["redis_us"], found["rows"][0]["costs"]["claim 32"]["redis_us"]
        ),
    }
    return Finding(found, scale_tables(found), scale_pictures(found, note))


class Subject(Protocol):
    """What has a name and an environment: a system or a scenario."""

    @property
    def name(self) -> str: ...
    @property
    def environment(self) -> str: ...


Chosen = TypeVar("Chosen", bound=Subject)


def _with_interpreters(chosen: Sequence[Chosen], options: Options) -> tuple[list[tuple[Chosen, str]], dict[str, str]]:
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

RUNNERS: dict[str, Part] = {"queue": queue, "recovery": recovery, "checkpoints": checkpoints, "scale": scale}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; print the tables; write JSON, Markdown and pictures where asked. 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure Perdure, beside others where there are any."
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, nothing is installed; under a minute for queue"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: only whether it works; the figures mean nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--svg-dir", type=Path, metavar="FOLDER", help="write the pictures into FOLDER")
    parser.add_argument("--rounds", type=int, default=0, help="instead of 5 (quick: 3)")
    parser.add_argument("--requests", type=int, default=0, help="requests of a drain, instead of 20,000")
    parser.add_argument("--systems", default="", help="only these, comma-separated")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the peers' environments lie")
    given = parser.parse_args(arguments)
    names = tuple(name.strip() for name in given.systems.split(",") if name.strip())
    options = Options(given.folder.absolute(), given.quick, given.smoke, given.rounds, given.requests, names)
    chosen = [part for part in RUNNERS if given.part in (part, "all")]
    os.environ["BENCH_MODULES"] = str(options.folder / NODE)  # where node finds its package
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options, chosen, given.json, given.markdown, given.svg_dir)
    except KeyboardInterrupt:
        say("interrupted; all processes are ended")
        return 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run(
    options: Options, chosen: Sequence[str], json_file: Path | None, markdown: Path | None, svg_folder: Path | None
) -> int:
    machine = describe()
    results: dict[str, Any] = {"machine": machine, "parts": {}, "ratios": {}}
    texts: list[str] = []
    failed = False
    for part in chosen:
        began = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="perdure-bench-") as folder,
            Server(Path(folder) / "redis", die_with_parent=True) as server,
        ):
            stage = Stage(server)
            machine |= describe_server(server, stage.connection)
            try:
                with Crew(Path(folder) / "logs") as crew:
                    found = RUNNERS[part](options, stage, crew, one_line(machine))
            except PerdureError as error:
                say(f"{part}: FAILED: {error}")
                results["parts"][part] = {"failed": str(error)}
                failed = True
                continue
            finally:
                stage.close()
        found.figures["seconds"] = round(time.monotonic() - began, 1)
        results["parts"][part] = found.figures
        results["ratios"] |= found.figures.get("ratios", {})
        for table in found.tables:
            print(table.text(), flush=True)
        texts += [table.markdown() for table in found.tables]
        if svg_folder is not None:
            svg_folder.mkdir(parents=True, exist_ok=True)
            for name, text in found.pictures.items():
                (svg_folder / name).write_text(text, encoding="utf-8")
    machine["load_at_the_end"] = round(os.getloadavg()[0], 2)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text("\n".join([one_line(machine) + "\n", *texts]), encoding="utf-8")
    assert threading.current_thread() is threading.main_thread()  # the children are bound to its life
    return int(failed)
