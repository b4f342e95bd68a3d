"""``scripts/gpu-report``: run the steps, and write down what they found."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .page import page
from .plan import REHEARSAL, STEPS, TOTAL
from .runner import FINDING, NOT_RUN, Runner


def command_line() -> argparse.ArgumentParser:
    """What it takes; ``--work`` and ``--began`` come from :mod:`.place`."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-report", description="Measure what only a GPU can show, in at most eight minutes."
    )
    parser.add_argument("out", type=Path, help="the folder for results.jsonl, gpu.md and logs.tar")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in small: only whether the steps run")
    parser.add_argument("--only", metavar="STEP,...", default="", help=", ".join(step.name for step in STEPS))
    parser.add_argument("--work", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, required=True, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every step has run, whatever it found; 1 if one could not be run; 130 after Ctrl-C."""
    parser = command_line()
    given = parser.parse_args(arguments)
    names = [name for name in given.only.split(",") if name]
    if unknown := sorted({*names} - {step.name for step in STEPS}):
        parser.error(f"no such step: {', '.join(unknown)}")
    steps = [step for step in STEPS if not names or step.name in names]
    device = "cpu" if given.rehearse else "cuda"
    given.out.mkdir(parents=True, exist_ok=True)
    longer = REHEARSAL if given.rehearse else 1.0
    deadline = given.began + longer * TOTAL
    runner = Runner(given.out.absolute(), given.work, device, deadline, lambda line: print(line, flush=True), longer)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        runner.run(steps)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        text = page(runner.outcomes, device, time.monotonic() - given.began)
        (given.out / "gpu.md").write_text(text, encoding="utf-8")
        shutil.rmtree(given.work, ignore_errors=True)
    states = [outcome.state for outcome in runner.outcomes]
    print(f"{len(states)} of {len(steps)} steps, {states.count(FINDING)} findings; {given.out / 'gpu.md'}")
    return 130 if interrupted else int(NOT_RUN in states)


if __name__ == "__main__":
    sys.exit(main())
