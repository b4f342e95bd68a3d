"""``scripts/exactness``: each engine in a process of its own, since one process can have one vLLM."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ...protocol.settings import Settings
from ...workers.text import Generate
from .trials import trials

ENGINES: Final = ("builtin", "vllm", "transformers")
QUICK: Final = 120
FULL: Final = 3400
"""Interruptions of each engine."""

FOUND: Final = ("lost", "doubled", "changed", "invalid_json", "different")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing was lost, doubled, changed or invalid, and nothing is different where an engine says exact."""
    parser = argparse.ArgumentParser(prog="scripts/exactness", description="Interrupt answers, and compare them.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} interruptions of each engine instead of {FULL}")
    parser.add_argument("--interruptions", type=int, metavar="N", help="so many of each engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there as well")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    number = given.interruptions or (QUICK if given.quick else FULL)
    if given.engine:
        return _one(given.engine, given.model, number)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        model = _model(Path(scratch) / "tiny")
        rows = [row for engine in ENGINES for row in _apart(engine, model, number)]
    found = summary(rows) | {"seconds": round(time.monotonic() - began, 1), "rows": rows}
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(rows))
    print(", ".join(f"{name} {found[name]}" for name in ("interruptions", "engines", *FOUND)))
    return int(any(found[name] for name in FOUND) or found["engines"] < len(ENGINES))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all engines. ``different`` counts where *exact* is said; ``different_continued`` where it is not."""
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in ("interruptions", *FOUND[:-1])}
    total["engines"] = len({row["engine"] for row in rows})
    total["different"] = sum(row["different"] for row in rows if row["exact"])
    total["different_continued"] = sum(row["different"] for row in rows if not row["exact"])
    return total


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a page, in Markdown."""
    heads = ("engine", "answers", "promise", "interruptions", *FOUND)
    lines = [f"| {' | '.join(heads)} |", f"|---|---|---|{'---:|' * (len(heads) - 3)}"]
    for row in rows:
        cells = [row["engine"], row["way"], "exact" if row["exact"] else "continued"]
        lines.append(f"| {' | '.join([*cells, *(f'{row[name]:,}' for name in heads[3:])])} |")
    return "\n".join(lines)


def _model(folder: Path) -> str:
    """The tiny model, with a token that ends a text, as a folder that every engine reads."""
    import dataclasses

    import torch

    from ...workers.text.weights.export import write
    from ...workers.text.weights.tiny import tiny

    bundle = tiny(torch.float32)
    vocabulary = dataclasses.replace(bundle.vocabulary, ends=(258,))
    write(dataclasses.replace(bundle, vocabulary=vocabulary), folder)
    return str(folder)


def _apart(engine: str, model: str, number: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-P", "-W", "ignore", "-m", "perdure.scripts.interruptions"]
    command += ["--engine", engine, "--model", model, "--interruptions", str(number)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    process = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **environment}, check=False)
    if process.returncode:
        print(f"{engine}: ended with status {process.returncode}", file=sys.stderr)
        return []
    return [json.loads(line[len(MARK) :]) for line in process.stdout.decode().splitlines() if line.startswith(MARK)]


MARK: Final = "found: "


def _one(engine: str, model: str, number: int) -> int:
    arguments = ("enforce_eager=true",) if engine == "vllm" else ()
    settings = Settings(engine=engine, model=model, device="cpu", threads=1, slots=8, engine_args=arguments)
    task = Generate(settings)
    task.load()
    for tally in trials(task, engine, number, seed=1):
        print(MARK + json.dumps(tally.to_json()), flush=True)
    task._loaded().close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
