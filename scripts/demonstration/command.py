"""``perdure demo``: kill workers in the middle of real generations, and compare every answer with one that nobody
disturbed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

from ...protocol.errors import PerdureError, SettingsError
from ...protocol.settings import Settings
from ..present.console import write

CHECK_EVERY = 0.1
"""Seconds between two drawings of the screen at most."""


@click.command(
    epilog="\b\nExamples:\n"
    "  perdure demo\n"
    "  perdure demo --model tiny\n"
    "  perdure demo --json figures.json --svg run.svg"
)
@click.option("--model", help="smollm2 (default), tiny, or a path to a GGUF file or a model folder.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to FILE.")
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the run into FILE.")
@click.option("--keep", is_flag=True, help="Keep the folder with the logs.")
def demo(model: str | None, json_file: Path | None, svg_file: Path | None, keep: bool) -> None:
    """Generate text on two workers, kill both in turn, and show that no answer changed.

    Starts a Redis of its own. Exits with 1 unless nothing was lost, doubled or different, and unless every
    interrupted request went on from its last checkpoint.
    """
    settings = Settings.from_environment(strict=True).replace(model=model)
    raise SystemExit(run(settings, json_file, svg_file, keep=keep))


def run(settings: Settings, json_file: Path | None, svg_file: Path | None = None, *, keep: bool = False) -> int:
    """The demonstration, its tables and its exit status: 0 if everything promised was shown."""
    try:
        from ..present.drawing import draw
        from .picture import picture
        from .run import Demonstration, prompts
        from .screen import Screen
        from .verdict import judge
    except ImportError as error:
        raise SettingsError(f"the demonstration needs {error.name}: pip install 'perdure[demo]'") from None
    folder = Path(tempfile.mkdtemp(prefix="perdure-demo-"))
    began = time.monotonic()
    failed = True
    try:
        with Screen(CHECK_EVERY) as screen:
            demonstration = Demonstration(settings, folder, screen.say, screen.show)
            record = demonstration.run(prompts(settings.model))
            verdict = judge(record)
            screen.stop()
            screen.report(verdict, time.monotonic() - began)
        if json_file is not None:
            write(json_file, json.dumps(verdict.as_dict(), indent=2) + "\n")
        if svg_file is not None:
            write(svg_file, draw(picture(record, verdict)))
        failed = bool(verdict.problems)
        return 1 if failed else 0
    except PerdureError as error:
        print(f"perdure demo: {error}", file=sys.stderr)
        return 1
    finally:
        if keep or failed:
            print(f"The logs are in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
