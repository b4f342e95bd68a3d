"""A change touches as many files as docs/design.md says: each is made in a copy of the sources, and works there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.docs.pages import rows, section
from tests.kit.places import ROOT

FOLDERS = ("protocol", "producer", "workers", "recovery", "scripts")
PRODUCT = ("protocol", "producer", "workers", "recovery")

Change = dict[str, dict[str, str]]
"""File name -> texts of it, and what is put in front of each; a new file has one that stands in its folder."""

OPTION: Change = {
    "options.py": {
        "    result_ttl: Seconds": (
            '    colour: str = field(default="", metadata=_option("its colour.", lambda value, name: value.upper()))\n'
        ),
    },
    "records.py": {
        '    "payload": ("payload",),\n': '    "colour": ("paint",),\n',
        '    degraded_payload: bytes = b""\n': '    colour: str = ""\n',
    },
}
SUBMITS = """
import asyncio, json, sys
from perdure.producer import AsyncClient, Client
from perdure.protocol.connection import connect
from perdure.scripts.main import main

async def third():
    async with AsyncClient(sys.argv[1]) as client:
        await client.submit("a.b", 1, id="c", colour="green")

with Client(sys.argv[1]) as client, connect(sys.argv[1]) as connection:
    client.submit("a.b", 1, id="a", colour="red")
    client.submit_many([{"task": "a.b", "payload": 1, "id": "b", "colour": "blue"}], colour="red")
    asyncio.run(third())
    assert main(["submit", "a.b", "1", "--id", "d", "--colour", "grey", "--url", sys.argv[1]]) == 0
    client.submit("a.b", 1, id="e")
    print(json.dumps([(connection.hget(f"rq:job:{id}", "paint") or b"").decode() for id in "abcde"]))
"""

FIELD: Change = {
    "calls.py": {"    stepped: float = 0.0\n": '    host: str = ""\n'},
    "holding.py": {
        "                fingerprint=self.fingerprint,\n                stepped": '                host="here",\n'
    },
}
RUNS = """
import json, subprocess, sys
from perdure.producer import Client
from perdure.protocol.connection import connect

with Client(sys.argv[1]) as client, connect(sys.argv[1]) as connection:
    handle = client.submit("changed_tasks.fail", 1, max_retries=0)
    worker = [sys.executable, "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--burst", "--url", sys.argv[1]]
    subprocess.run([*worker, "default"], check=True, capture_output=True, timeout=60)
    assert handle.status() == "failed"
    print(json.dumps(connection.hget(f"rq:perdure:checkpoint:{handle.id}", "host").decode()))
"""
TASKS = """
from perdure.workers import Step, task

@task
def fail(request):
    for i in range(4):
        yield Step(output=i, state=i)
    raise ValueError("meant")
"""

TRANSITION: Change = {
    "poke.lua": {
        "": (
            "-- Count a poke.\n--\n-- ARGV queue  queue name\n--\n-- Returns  'ok'\n"
            "--- @include lib/basics/arguments\n--- @include lib/basics/counters\n\n"
            "local queue = arg()\ncount('poked', queue)\nreturn 'ok'\n"
        )
    },
    "store.py": {
        "    def renew(self": (
            '    def poke(self, queue: str) -> str:\n        return str(self._call("poke", {"queue": queue}, {}))\n\n'
        )
    },
}
POKES = """
import json, sys
from perdure.protocol.connection import connect
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store

with connect(sys.argv[1]) as connection:
    assert Store(connection, Settings()).poke("gpu") == "ok"
    print(json.dumps(connection.hget("rq:perdure:counters", "poked:gpu").decode()))
"""

COMMAND: Change = {
    "hello.py": {"": "import click\n\n\n@click.command()\ndef hello() -> None:\n    click.echo('\"hello\"')\n"},
    "main.py": {'    "demo": (': '    "hello": ("cli.hello", "hello", "Say hello."),\n'},
}
SAYS = "from perdure.scripts.main import main\nassert main(['hello']) == 0\n"

PLACES = {"poke.lua": "protocol/lua", "hello.py": "scripts/cli"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, as a folder perdure, with tasks beside it."""
    root = importlib.util.find_spec("perdure")
    assert root is not None
    assert root.origin is not None
    (tmp_path / "perdure").mkdir()
    shutil.copyfile(root.origin, tmp_path / "perdure" / "__init__.py")
    for name in FOLDERS:
        shutil.copytree(_folder(name), tmp_path / "perdure" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "changed_tasks.py").write_text(TASKS, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(tree: Path, redis_url: str) -> Callable[[str], Any]:
    """Runs a program with that copy; gives what it prints last, in JSON."""

    def program(code: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", code, redis_url],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return program


def make(tree: Path, change: Change) -> None:
    for name, additions in change.items():
        if name in PLACES:
            (tree / "perdure" / PLACES[name] / name).write_text(additions[""], encoding="utf-8")
            continue
        texts = {file: file.read_text(encoding="utf-8") for file in (tree / "perdure").rglob(name)}
        ((file, text),) = ((file, text) for file, text in texts.items() if all(part in text for part in additions))
        for part, more in additions.items():
            assert text.count(part) == 1, (name, part)
            text = text.replace(part, more + part)
        file.write_text(text, encoding="utf-8")


def _folder(name: str) -> Path:
    spec = importlib.util.find_spec(f"perdure.{name}")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def told() -> dict[str, int]:
    """What the page says: kind of change -> files of code today."""
    table = rows(section(ROOT / "docs" / "design.md", "What a change touches"))
    return {row[0]: int(re.match(r"\d+", row[2])[0]) for row in table}  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "change", "program", "answer"),
    [
        ("a submit option", OPTION, SUBMITS, ["RED", "BLUE", "GREEN", "GREY", ""]),
        ("a checkpoint field", FIELD, RUNS, "here"),
        ("a transition", TRANSITION, POKES, "1"),
        ("a command", COMMAND, SAYS, "hello"),
    ],
)
def test_a_change_is_as_local_as_the_page_says(
    tree: Path, run: Callable[[str], Any], kind: str, change: Change, program: str, answer: object
) -> None:
    """It works in the copy, everywhere where it should, and no file was touched but those that are counted."""
    assert told()[kind] == len(change)
    make(tree, change)
    assert run(program) == answer


def test_a_retry_flag_is_as_local_as_the_page_says() -> None:
    """The files that name one of those that there are."""
    files = [file for name in PRODUCT for file in _folder(name).rglob("*") if file.suffix in (".py", ".lua")]
    naming = {file.name for file in files if re.search(r"\bcharge\b", file.read_text(encoding="utf-8"))}
    assert told()["a retry flag"] == len(naming), sorted(naming)
