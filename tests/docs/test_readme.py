"""The programs of the README, of docs/clients.md and of docs/text-generation.md, on a real pool."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import json
import re
import shlex
import signal
import sys
import textwrap
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perdure.producer import AsyncClient
from perdure.protocol.tasks import is_task
from perdure.scripts.demonstration.screen import Screen
from perdure.scripts.demonstration.verdict import DemoVerdict, Row
from tests.kit.docs.pages import blocks, commands
from tests.kit.lab import Lab, eventually
from tests.kit.places import ROOT

README = blocks(ROOT / "README.md")
CLIENTS = blocks(ROOT / "docs" / "clients.md")
TEXT = blocks(ROOT / "docs" / "text-generation.md")
HERE = "redis://localhost:6379"


def execute(text: str, url: str, namespace: dict[str, Any]) -> str:
    """Run a program of a page against a server; returns what it prints. ``await`` may stand at the top."""
    code = compile(text.replace(HERE, url), "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        waiting = eval(code, namespace)
        if waiting is not None:
            asyncio.run(waiting)
    return shown.getvalue()


@pytest.mark.slow
def test_the_programs_run(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task, its pool and its producer; those of clients.md; then those of text-generation.md, with its shapes."""
    pytest.importorskip("torch")
    (task,) = [block for block in README if block.kind == "tasks"]
    (pool,) = [block for block in README if block.kind == "pool"]
    (produce,) = [block for block in README if block.kind == "produce"]
    (thread,) = [block for block in CLIENTS if block.kind == "produce"]
    (awaited,) = [block for block in CLIENTS if block.kind == "await"]
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "tasks.py").write_text(task.text, encoding="utf-8")
    environment = {
        "PYTHONPATH": str(tmp_path),
        "PERDURE_MODEL": "tiny",
        "PERDURE_DEVICE": "cpu",
        "PERDURE_THREADS": "1",
    }
    monkeypatch.setenv("PERDURE_REDIS_URL", lab.url)
    ((command, _),) = commands(pool)
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    process = lab._start("readme", words, {}, environment)
    eventually(lambda: sum(item["ready"] for item in lab.store.workers()) == 2 or not process.running)
    assert process.running, process.log

    namespace: dict[str, Any] = {}
    assert execute(produce.text, lab.url, namespace) == "0\n1\n2\n{'counted': 3}\n"
    for text in (thread.text, awaited.text):
        printed = execute(text, lab.url, {})
        assert printed.startswith("0\n1\n2\n{'counted': 3}\n")
        assert sorted(eval(line.split(" ", 1)[1])["counted"] for line in printed.splitlines()[4:]) == list(range(100))

    # The program that the reference shows.
    _, _, text = (inspect.getdoc(AsyncClient) or "").partition("::\n\n")
    example, _, _ = text.partition("\n\nArguments")
    assert example.lstrip().startswith("async with")
    execute(textwrap.dedent(example), lab.url, {"AsyncClient": AsyncClient})

    (block,) = [block for block in TEXT if block.kind == "produce"]
    with namespace["Client"](lab.url) as client:
        assert execute(block.text, lab.url, {"client": client})
        shapes = [json.loads(block.text) for block in TEXT if block.language == "json"]
        for shape, more in zip(shapes, ({}, {"n": 2}), strict=True):
            payload = {"prompt": "Once", "max_tokens": 4, **more}
            result = client.submit("perdure.workers.text.generate", payload, queue="gpu").result(timeout=60)
            assert _keys(result) == _keys(shape)
    process.send(signal.SIGTERM)
    assert process.end() == 0, process.log


def _keys(value: Any) -> Any:
    """The names in a value, as deep as they go; of a list those of its first entry."""
    if isinstance(value, dict):
        return {name: _keys(item) for name, item in value.items()}
    if isinstance(value, list) and value:
        return [_keys(value[0])]
    return None


@pytest.mark.slow
def test_the_adapter_is_a_task() -> None:
    """The model of text-generation.md is loaded by a worker, not by who names it."""
    pytest.importorskip("transformers")
    (block,) = [block for block in TEXT if block.kind == "adapter"]
    namespace: dict[str, Any] = {"__name__": "app.tasks"}
    execute(block.text, HERE, namespace)
    assert is_task(namespace["chat"])


def test_the_last_lines_of_the_demonstration_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """What the README shows is what the demonstration prints for a run with such figures."""
    (block,) = [block for block in README if block.language == "text"]
    lines = block.text.splitlines()
    kills, numbers = (
        [],
        [
            [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line.removeprefix("kill -9"))]
            for line in lines
        ],
    )
    for kind, (interrupted, delay) in zip(("worker", "tree"), numbers, strict=False):
        kills.append({"kind": kind, "interrupted": interrupted, "recovery_ms": delay})
    requests, tokens, *none, seconds = numbers[2]
    assert none == [0, 0, 0, 0]
    row = Row(
        id="a",
        workers=["a", "b"],
        tokens=0,
        recomputed=0,
        allowed=0,
        interruptions=1,
        equal=True,
        lost=False,
        duplicated=0,
        text="",
    )
    report = DemoVerdict([replace(row, tokens=tokens), *[row] * (requests - 1)], kills)
    Screen(1.0).report(report, seconds)
    assert capsys.readouterr().out.splitlines()[-len(lines) :] == lines


def test_the_readme_can_be_read_anywhere() -> None:
    """It is short, and no link or picture of it needs the checkout around it: a package index shows it too."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"git clone {project['urls']['Repository']} " in text
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []
