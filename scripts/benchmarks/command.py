"""``scripts/bench``: which parts are measured, and where the figures go."""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...protocol.errors import PerdureError
from ..pool.server import Server
from .environments import NODE
from .machine import describe, describe_server, one_line
from .pages import TABLES, keep, pictures_of, refill_pages
from .parts import RUNNERS, BenchOptions, say
from .processes import Crew
from .stage import Stage


def command_line() -> argparse.ArgumentParser:
    """What ``scripts/bench`` takes."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure Perdure, beside others where there are any."
    )
    parser.add_argument("part", choices=[*RUNNERS, "all"])
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, nothing is installed; under a minute for queue"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: only whether it works; the figures mean nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--svg-dir", type=Path, metavar="FOLDER", help="write the pictures into FOLDER")
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="FOLDER",
        help="keep the figures and pictures in FOLDER (docs), and make the tables of the pages from them again",
    )
    parser.add_argument("--rounds", type=int, default=0, help="instead of 5 (quick: 3)")
    parser.add_argument("--requests", type=int, default=0, help="requests of a drain, instead of 20,000")
    parser.add_argument(
        "--budget",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="queue: nothing more begins after so long, once each system was measured once",
    )
    parser.add_argument("--systems", default="", help="only these, comma-separated")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the peers' environments lie")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; print the tables; write JSON, Markdown and pictures where asked. 1 if a part failed."""
    given = command_line().parse_args(arguments)
    names = tuple(name.strip() for name in given.systems.split(",") if name.strip())
    options = BenchOptions(
        given.folder.absolute(), given.quick, given.smoke, given.rounds, given.requests, names, given.budget
    )
    chosen = [part for part in RUNNERS if given.part in (part, "all")]
    os.environ["BENCH_MODULES"] = str(options.folder / NODE)  # where node finds its package
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options, chosen, given.json, given.markdown, given.svg_dir, given.docs)
    except KeyboardInterrupt:
        say("interrupted; all processes are ended")
        return 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run(
    options: BenchOptions,
    chosen: Sequence[str],
    json_file: Path | None,
    markdown: Path | None,
    svg_folder: Path | None,
    docs: Path | None,
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
                    found = RUNNERS[part](options, stage, crew)
            except PerdureError as error:
                say(f"{part}: FAILED: {error}")
                results["parts"][part] = {"failed": str(error)}
                failed = True
                continue
            finally:
                stage.close()
        found["seconds"] = round(time.monotonic() - began, 1)
        results["parts"][part] = found
        results["ratios"] |= found.get("ratios", {})
        tables = TABLES[part](found)
        for table in tables:
            print(table.text(), flush=True)
        texts += [table.markdown() for table in tables]
        if docs is not None:
            keep(docs, part, machine, found)
        if svg_folder is not None:
            svg_folder.mkdir(parents=True, exist_ok=True)
            for name, text in pictures_of(part, found, machine).items():
                (svg_folder / name).write_text(text, encoding="utf-8")
    if docs is not None:
        refill_pages(docs.absolute().parent)
    machine["load_at_the_end"] = round(os.getloadavg()[0], 2)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text("\n".join([one_line(machine) + "\n", *texts]), encoding="utf-8")
    return int(failed)
