"""Reading the pages: fenced blocks, commands with what they print, tables."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, what the page says it is, and where it stands."""

    language: str
    kind: str
    name: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*) ?(\w*)=?(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, kind, name, body = match.groups()
        found.append(Block(language, kind, name, body, text.count("\n", 0, match.start()) + 1))
    assert 2 * len(found) == len(re.findall(r"^```", text, re.MULTILINE)), f"{page.name}: a fence is not read as one"
    return found


def commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, and what stands below each."""
    return re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)


def run(
    command: str, *, folder: Path, environment: Mapping[str, str] = os.environ, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """A command of a page, as it stands there, with the scripts of this environment in front of the path.

    A leading ``NAME=value`` is set; nothing else of a shell is known.
    """
    words = shlex.split(command, comments=True)
    extra = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        extra[name] = value
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return subprocess.run(
        words,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**environment, **extra, "PATH": path},
    )


def matches(shown: str, printed: str) -> bool:
    """Whether a command prints what the page shows.

    ``…`` stands for anything on its line, and a line that is nothing else for any number of lines.
    """
    pattern = "".join(
        r"(?:.*\n)*" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
        for line in shown.splitlines()
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in printed.splitlines())) is not None


def section(page: Path, heading: str) -> str:
    """What stands under a heading, up to the next of any level."""
    text = page.read_text(encoding="utf-8")
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"{page.name} has no heading {heading}"
    return match[1]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables in a text, without their heads."""
    found: list[list[str]] = []
    before = ""
    for line in text.splitlines():
        if re.fullmatch(r"\|[-:| ]+\|", line):
            found = found[:-1] if before.startswith("|") else found
        elif line.startswith("|"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        before = line
    return found


def names(cell: str) -> list[str]:
    """What stands between backquotes."""
    return re.findall(r"`([^`]+)`", cell)
