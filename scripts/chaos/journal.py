"""A producer's journal: what it was promised and what it saw, on disk before it counts.

One file per process, lines of JSON that are written whole. What a SIGKILL leaves half-written is the last line, and
it is not read.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTENT, ACCEPTED, REFUSED, OUTPUT, END, NOTE = "intent", "accepted", "refused", "output", "end", "note"

WITHDRAWN = "withdrawn"
"""It is going to be deleted: nobody is promised it any more, and it may be there or not."""


class Journal:
    """Appends; used by several threads. ``durable`` lines are on the disk when :meth:`write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()

    def write(self, what: str, identifier: str, *, durable: bool = False, **values: Any) -> None:
        line = json.dumps({"at": time.monotonic(), "what": what, "id": identifier, **values}) + "\n"
        with self._lock:
            os.write(self._file, line.encode())
        if durable:
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of one journal in order."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
