"""The environments of the peers: one each, made at the first run and kept under the folder given with --folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .processes import BenchProcess, environment
from .systems import PEERS

NODE = "bullmq"

_TIMEOUT = 900.0
_STAMP = "installed.json"


class Missing(Exception):
    """A peer cannot be measured here; the text says why."""


def releases() -> dict[str, list[str]]:
    """Environment -> what is installed into it, with versions."""
    found: dict[str, list[str]] = json.loads((PEERS / "versions.json").read_text(encoding="utf-8"))
    return found


def provide(name: str, folder: Path, say: Callable[[str], None]) -> str:
    """The interpreter of an environment, which is made if it is not there. Raises :class:`Missing`."""
    wanted = releases()[name]
    home = folder / name
    stamp = home / _STAMP
    interpreter = shutil.which("node") if name == NODE else str(home / "bin" / "python")
    if interpreter is None or (name == NODE and shutil.which("npm") is None):
        raise Missing("there is no node and npm on this machine")
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return interpreter
    say(f"installing {', '.join(wanted)} into {home}")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    if name == NODE:
        (home / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        _run([str(shutil.which("npm")), "install", "--no-audit", "--no-fund", "--save-exact", *wanted], home)
    else:
        _run([sys.executable, "-m", "venv", str(home)], home)
        _run([interpreter, "-m", "pip", "install", "--disable-pip-version-check", *wanted], home)
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return interpreter


def interpreter_of(name: str, folder: Path, say: Callable[[str], None]) -> str:
    """The same; without a name, the interpreter of this environment."""
    return provide(name, folder, say) if name else sys.executable


def _run(command: Sequence[str], home: Path) -> None:
    child = BenchProcess(command, environment(""), home / "install.log", folder=home)
    try:
        status = child.process.wait(_TIMEOUT)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        child.stop()
    if status:
        raise Missing(f"{Path(command[0]).name} failed ({status}): {child.tail(3)}")
