"""What a step has: a device, folders, and a file that takes what it finds at once, since it may be killed.

``python -m perdure.scripts.gpu_report.stage TARGET DEVICE NOTES FOLDER SHARED`` runs one step.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...protocol.errors import PerdureError
from ...recovery.failures import describe


class StepFailed(PerdureError):
    """A step could not be carried through; the message says why."""


@dataclass(slots=True)
class StepNotes:
    """What a step has noted so far."""

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What is not as it was promised."""
    missing: list[str] = field(default_factory=list)
    """What this machine cannot show: ``needs CUDA: …``."""
    error: str = ""
    """What ended the step."""

    @classmethod
    def read(cls, path: Path) -> StepNotes:
        """From the file; what follows the last line end was still being written."""
        found = cls()
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:
                for kind, value in json.loads(line).items():
                    if kind == "figures":
                        found.figures |= value
                    elif kind == "error":
                        found.error = value
                    else:
                        getattr(found, kind).append(value)
        return found


@dataclass(frozen=True, slots=True)
class ReportStage:
    """Where a step runs. ``device`` is ``cuda``, or ``cpu`` in a rehearsal."""

    device: str
    notes: Path
    folder: Path
    """Of this step alone."""
    shared: Path
    """For models, which the first step that needs one makes."""

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def note(self, **figures: Any) -> None:
        """Figures: numbers and texts, or a mapping of such, which becomes a row of a table."""
        self._write({"figures": figures})

    def row(self, name: str, figures: Mapping[str, Any]) -> None:
        """A row of the step's table."""
        self._write({"figures": {name: dict(figures)}})

    def expect(self, promise: str, kept: object) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self._write({"problems": promise})

    def failed(self, error: BaseException) -> None:
        """Note what ended the step."""
        self._write({"error": describe(error)})

    def needs_cuda(self, what: str) -> bool:
        """Whether that cannot be had here; it is noted as not rehearsed then."""
        if self.rehearsal:
            self._write({"missing": f"needs CUDA: {what}"})
        return self.rehearsal

    def _write(self, found: Mapping[str, Any]) -> None:
        line = json.dumps(found, default=str)
        print(line, flush=True)
        with self.notes.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def main(arguments: Sequence[str]) -> int:
    """Run one step; 1 if it raised. The traceback is in the log."""
    target, device, *paths = arguments
    stage = ReportStage(device, *map(Path, paths))
    module, _, name = target.partition(":")
    try:
        getattr(importlib.import_module(module), name)(stage)
    except Exception as error:
        traceback.print_exc()
        stage.failed(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
