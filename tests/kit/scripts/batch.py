"""What the tests of batch files share: a file of lines, and the command that runs it as a person would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit.lab import LONG, eventually

PERDURE = str(Path(sys.executable).with_name("perdure"))


@dataclass
class Job:
    """One input, its two files, and the runs over them."""

    url: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source, self.out, self.errors = (self.folder / name for name in ("in.jsonl", "out.jsonl", "errors.jsonl"))

    def write(self, lines: dict[str, tuple[str, Any]]) -> None:
        """Write the input: ``custom_id`` → url and body."""
        rows = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name, (url, body) in lines.items()]
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def start(self, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        command = [
            PERDURE, "batch", "run", str(self.source), "-o", str(self.out), "-e", str(self.errors),
            "--queue", "gpu", "--url", self.url, "--json", *arguments,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, **self.environment}
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes], timeout: float = LONG) -> tuple[int, dict[str, Any], str]:
        """Exit status, summary and what was said, once it has ended by itself."""
        out, err = process.communicate(timeout=timeout)
        said = (err or b"").decode()
        assert "Traceback" not in said, said
        return process.returncode, json.loads(out) if out else {}, said

    def run(self, *arguments: str, timeout: float = LONG) -> tuple[int, dict[str, Any], str]:
        return self.end(self.start(*arguments), timeout)

    def read(self, path: Path) -> dict[str, dict[str, Any]]:
        """The whole lines of one of the files, by ``custom_id``; each is there once."""
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        rows = [json.loads(line) for line in lines]
        twice = [name for name, count in Counter(row["custom_id"] for row in rows).items() if count > 1]
        assert not twice, twice
        return {row["custom_id"]: row for row in rows}

    def done(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in (self.out, self.errors) if path.exists())

    def reached(self, number: int, timeout: float = LONG) -> None:
        """Wait until so many lines are done."""
        eventually(lambda: self.done() >= number, timeout)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
