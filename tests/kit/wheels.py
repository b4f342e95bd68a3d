"""Building the package as it is published, for tests of what is in it and of who installs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.kit.places import ROOT

PACKAGES = ("src/perdure", "protocol", "producer", "workers", "recovery", "scripts")
SUFFIXES = (".py", ".lua", ".typed", ".html", ".css", ".js", ".svg")
OF_THE_CHECKOUT = ("scripts/benchmarks/", "scripts/chaos/", "scripts/gpu_report/", "scripts/interruptions/")
"""What runs from a checkout, and is in no wheel."""


def in_tree() -> set[str]:
    """What the package consists of, as paths below the root."""
    found = (
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
    )
    return {name for name in found if not name.startswith(OF_THE_CHECKOUT)}


def build(copy: Path) -> Path:
    """A source distribution of a copy of what belongs to it, and a wheel of that: no left-over of an earlier build
    can help.

    ``copy`` is an empty folder; returns the folder in it that has both.
    """
    copy.mkdir(exist_ok=True)
    for name in (*sorted(in_tree()), "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"
