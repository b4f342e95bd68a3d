"""An environment of the report's own: the checkout as a package, the wheels that were brought along, and behind them
all that the Python has which runs this. Standard library only: nothing else is there yet.

``python3 place.py [--wheels FOLDER] ARGUMENTS OF THE REPORT``
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protocol", "producer", "workers", "recovery", "scripts")

SECONDS = 25.0
"""That the installation may take, of the report's eight minutes."""


def make(folder: Path, wheels: Path | None = None, root: Path = ROOT) -> Path:
    """Make the environment in a folder; its Python. Raises ``subprocess.SubprocessError`` when pip fails."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # Appended, so that what was brought along comes first. As a site folder: it may have .pth files of its own.
    behind = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    lines = [f"import site; site.addsitedir({path!r})" for path in behind]
    (site / "behind.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    package = site / "perdure"
    package.mkdir()
    for source in [*(root / "src" / "perdure").iterdir(), *(root / name for name in PACKAGES)]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    if wheels is not None:
        install = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
        install += ["--quiet", "--no-index", "--no-deps", "--no-compile", *map(str, sorted(wheels.glob("*.whl")))]
        subprocess.run(install, check=True, timeout=SECONDS)
    return python


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Make the environment, and become the report in it. Exits with 1 if it could not be made."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--wheels", type=Path)
    given, others = parser.parse_known_args(arguments)
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="gpu-report-"))
    try:
        if given.wheels is not None and not any(given.wheels.glob("*.whl")):
            raise FileNotFoundError(
                f"{given.wheels} has no wheels; scripts/gpu-report --pack {given.wheels} fetches them"
            )
        python = make(work / "environment", given.wheels)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise SystemExit(f"gpu-report: the environment could not be made: {error}") from None
    report = [str(python), "-P", "-m", "perdure.scripts.gpu_report", f"--work={work}", f"--began={began}", *others]
    os.execv(report[0], report)


if __name__ == "__main__":
    main()
