"""A line for every forward pass: which request had which rows in it.

For counting, from outside and after the fact, what was computed twice. One ``write`` a line to a
file opened for appending: what is written stays written when the process is killed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

Row = tuple[str, str, int, str]
"""Request id, execution, index, kind.

``"prefill"``: a position of the prompt. ``"replay"``: an output that was known and was only put back
into the cache. ``"decode"``: an output that was sampled. Indices count from 0; those of outputs are
``token * n + sibling``.
"""


class Trace:
    """The file ``<folder>/<pid>.jsonl``; with an empty folder name, nothing."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pid = 0
        self._file = -1

    def write(self, rows: Sequence[Row]) -> None:
        """Append the rows of one forward pass."""
        if not self._folder or not rows:
            return
        if self._pid != os.getpid():
            self._pid = os.getpid()
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            path = Path(self._folder) / f"{self._pid}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        line = {"at": time.monotonic_ns(), "pid": self._pid, "rows": rows}
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")
