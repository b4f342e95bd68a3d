"""A real ``perdure metrics``, and how it is scraped."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit.lab import Process, eventually


def get(url: str, **headers: str) -> tuple[int, str, str]:
    """Status, type and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
            return reply.status, reply.headers["Content-Type"], reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


@contextmanager
def exporter(url: str, folder: Path) -> Iterator[tuple[str, Process]]:
    """A real ``perdure metrics``, and where it serves."""
    output = folder / "metrics.log"
    with output.open("wb") as file:
        command = [sys.executable, "-m", "perdure.scripts.main", "metrics", "--url", url, "--port", "0"]
        process = Process(subprocess.Popen(command, stdout=file, stderr=file), output)
    try:
        found = eventually(lambda: re.findall(r"serving (http://127\.0\.0\.1:\d+)/metrics", process.log))
        yield found[0], process
    finally:
        if process.running:
            process.kill()
