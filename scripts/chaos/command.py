"""``perdure chaos``: faults of every kind on real processes, and the count of what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ...protocol.errors import SettingsError, UsageError
from ...protocol.settings import Settings

if TYPE_CHECKING:
    from .conductor import ChaosOptions

OK, FAILED, INTERRUPTED = 0, 1, 130

SCALE = 20.0
"""Timeouts and outages are so much shorter than a pool's defaults. What a process needs to start is not scaled."""


def scaled(scale: float) -> Settings:
    """The settings of the pool: the defaults divided by ``scale``, but nothing shorter than a busy machine can keep."""
    usual = Settings()
    return usual.replace(
        heartbeat=max(0.1, usual.heartbeat / scale),
        heartbeat_timeout=max(1.5, usual.heartbeat_timeout / scale),
        step_timeout=max(1.5, usual.step_timeout / scale),
        checkpoint_interval=max(0.05, usual.checkpoint_interval / scale),
        retry_base=usual.retry_base / scale,
        retry_cap=usual.retry_cap / scale,
        reap_interval=max(0.1, usual.reap_interval / scale),
        drain_timeout=max(1.0, usual.drain_timeout / scale),
        model="tiny",
        threads=1,
    )


@click.command(
    epilog="""\b
Examples:
  perdure chaos --seconds 60
  perdure chaos --seed 7 --seconds 1800 --json report.json --svg report.svg
  perdure chaos --only kill_worker,zombie --seconds 30
  perdure chaos --url redis://localhost:6379 --seconds 120"""
)
@click.option("--seed", type=int, help="Makes the schedule and the requests; one of chance, which is printed.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    help="It ends within 15 s (a long run: a twentieth) more.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to FILE.")
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the picture to FILE.")
@click.option(
    "--url", metavar="URL", help="A Redis that runs; without, one is started. No environment variable names it."
)
@click.option(
    "--scale", type=click.FloatRange(min=1), default=SCALE, show_default=True, help="Divides timeouts and outages."
)
@click.option("--only", metavar="KIND,...", help="These faults and no others.")
@click.option("--without", metavar="KIND,...", help="All faults but these.")
@click.option("--kinds", "list_kinds", is_flag=True, help="List the kinds of faults, and end.")
@click.option("--keep", is_flag=True, help="Keep the folder with logs and journals.")
def chaos(
    seed: int | None,
    seconds: float,
    json_file: Path | None,
    svg_file: Path | None,
    url: str | None,
    scale: float,
    only: str | None,
    without: str | None,
    list_kinds: bool,
    keep: bool,
) -> None:
    """Kill, freeze, cut off and confuse every part of a real pool, and count what came of its requests.

    Exits with 0 only if every accepted request ended exactly once with the right answer, nothing was left behind,
    and every kind of fault happened. Against a server of yours (--url) it never stops, flushes, fills or
    reconfigures it, harms only processes that it started itself, and uses a key prefix of its own.
    """
    if {"rq", "perdure.protocol.keys"} & sys.modules.keys():
        raise SettingsError(
            "perdure chaos needs a process of its own: its key prefix is fixed when the names of keys are made"
        )
    # Not the braces of a server of ours: in a cluster, all keys of a run lie in one slot.
    prefix = f"{{chaos-{uuid.uuid4().hex[:12]}}}" if url else "chaos"
    os.environ["RQ_KEY_PREFIX"] = prefix
    for name in [name for name in os.environ if name.startswith(("PERDURE_", "RQ_REDIS"))]:
        del os.environ[name]  # what is set for the person's own pool rules no process of this one
    from .schedule import KINDS, Timing, plan

    if list_kinds:
        for kind in KINDS:
            click.echo(f"{kind.name:16} {kind.text}")
        return
    settings = scaled(scale)
    names = _chosen([kind.name for kind in KINDS], only, without)
    names = _possible(names, url)
    chosen = [kind for kind in KINDS if kind.name in names]
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    planned = plan(seed, seconds, chosen, Timing(scale, settings))
    text = importlib.util.find_spec("torch") is not None
    if not text:
        click.echo("perdure chaos: torch is not installed; no text is generated", err=True)
    from .conductor import ChaosOptions

    folder = Path(tempfile.mkdtemp(prefix="perdure-chaos-"))
    click.echo(f"perdure chaos: seed {seed}, {len(planned)} faults planned, {seconds:g} s", err=True)
    _run(
        ChaosOptions(seed, seconds, settings, planned, names, folder, url or "", text), scale, json_file, svg_file, keep
    )


def _run(options: ChaosOptions, scale: float, json_file: Path | None, svg_file: Path | None, keep: bool) -> NoReturn:
    from rich.console import Console

    from .conductor import Conductor
    from .judge import judge
    from .picture import picture
    from .report import figures, show

    # SIGTERM ends it as Ctrl-C does: nothing that it started may stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = True
    try:
        conductor = Conductor(options, lambda line: click.echo(line, err=True))
        evidence = conductor.run()
        verdict = judge(evidence)
        values = figures(options, evidence, verdict, scale)
        show(values, Console(highlight=False, soft_wrap=not sys.stdout.isatty()))
        if json_file is not None:
            _write(json_file, json.dumps(values, indent=2) + "\n")
        if svg_file is not None:
            title = (
                f"perdure chaos --seed {options.seed} --seconds {options.seconds:g}, scale {scale:g}, {values['date']}"
            )
            _write(svg_file, picture(evidence, title))
        failed = bool(verdict.problems)
        raise SystemExit(INTERRUPTED if conductor.interrupted else FAILED if failed else OK)
    finally:
        if keep or failed:
            click.echo(f"The logs are in {options.folder}", err=True)
        else:
            shutil.rmtree(options.folder, ignore_errors=True)


def _chosen(names: list[str], only: str | None, without: str | None) -> list[str]:
    """The kinds that were asked for. Raises ``UsageError`` for a name that is none."""
    wanted, unwanted = _words(only), _words(without)
    for word in [*wanted, *unwanted]:
        if word not in names:
            raise UsageError(f"{word} is no kind of fault; there are {', '.join(names)}")
    return [name for name in names if (not wanted or name in wanted) and name not in unwanted]


def _possible(names: list[str], url: str | None) -> list[str]:
    """Those that can be had here; of the others it is said why not."""
    from .conductor import needs

    missing = needs(
        names,
        server=not url,
        proxy=not url or url.startswith("redis://"),
        faketime=shutil.which("faketime") is not None,
    )
    for name, reason in missing.items():
        click.echo(f"perdure chaos: without {name}: {reason}", err=True)
    return [name for name in names if name not in missing]


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _write(path: Path, text: Any) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from None
