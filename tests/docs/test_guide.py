"""The guide's code does what the page says, no block is left out; tables of the reference are what the code gives."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perdure.protocol.codec import pack, unpack
from perdure.protocol.tasks import is_task, resolve
from perdure.recovery import Snapshots
from perdure.workers import BatchTask, Request, Step, task
from perdure.workers.engine.engines import as_batch
from perdure.workers.tasks.base import NOTHING, AnyTask
from perdure.workers.testing import resume_at_every_step
from tests.kit.docs.pages import Block, blocks
from tests.kit.lab import Lab
from tests.kit.places import ROOT

GUIDE = ROOT / "docs" / "writing-tasks.md"
KINDS = {"tasks", "produce", "test", "wrong", "right"}


def of(kind: str) -> list[Block]:
    return [block for block in blocks(GUIDE) if (block.language, block.kind) == ("python", kind)]


def execute(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block; returns what it prints."""
    shown = io.StringIO()
    code = compile("\n" * block.line + block.text, str(GUIDE), "exec")
    with contextlib.redirect_stdout(shown):
        exec(code, namespace)
    return shown.getvalue()


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's app/tasks.py, in a folder from which Python imports."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "tasks.py").write_text("\n".join(block.text for block in of("tasks")), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("APP_STATE", str(tmp_path / "state"))
    yield tmp_path
    for name in ("app", "app.tasks"):
        sys.modules.pop(name, None)


def test_every_block_is_of_a_kind_that_is_run() -> None:
    """Python is run in one of five ways, what it prints stands below it, and commands are only shown."""
    listed = blocks(GUIDE)
    for block, following in zip(listed, [*listed[1:], None], strict=True):
        match block.language:
            case "python":
                assert block.kind in KINDS, f"line {block.line}: a Python block that no test runs"
                shown = following is not None and following.language == "text"
                assert (block.kind == "produce") == shown, (
                    f"line {block.line}: produce, and only that, shows its output"
                )
            case _:
                assert block.language in ("text", "console"), f"line {block.line}"
    assert {block.kind for block in listed if block.language == "python"} == KINDS
    assert [block.name for block in of("wrong")] == [block.name for block in of("right")]


@pytest.mark.slow
def test_the_guide_runs_on_a_real_worker(lab: Lab, app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks, run by plain rq worker, give a producer what the page shows."""
    pytest.importorskip("torch")
    monkeypatch.setenv("PERDURE_REDIS_URL", lab.url)
    lab.worker(environment={"PYTHONPATH": str(app), "OMP_NUM_THREADS": "1"}, wait=False)
    listed = blocks(GUIDE)
    namespace: dict[str, Any] = {}
    try:
        for block, following in zip(listed, [*listed[1:], None], strict=True):
            if block.kind == "produce":
                assert following is not None
                assert execute(block, namespace) == following.text, f"line {block.line}"
    finally:
        if "client" in namespace:
            namespace["client"].close()


@pytest.mark.slow
def test_the_test_of_the_guide_passes(app: Path) -> None:
    """And it is one: it has a function that pytest would collect."""
    pytest.importorskip("torch")
    for block in of("test"):
        namespace: dict[str, Any] = {}
        execute(block, namespace)
        tests = [value for name, value in namespace.items() if name.startswith("test_")]
        assert tests
        for each in tests:
            each()


PAYLOADS: dict[str, Any] = {
    "squares": {"n": 5},
    "bill": {"amounts": [3, 5, 8]},
    "shout": {"text": "to be or not to be"},
    "slow": {"n": 5},
    "echo": {"text": "to be or not to be"},
    "Ramble": {"prompt": [4, 7], "n": 6},
    "Thumbnails": {"n": 4, "size": 10},
    "Roots": {"degrees": [1, 2, 3, 4, 5]},
}


@pytest.mark.slow
def test_every_task_of_the_guide_resumes_at_every_step(app: Path) -> None:
    """Each of them, cut at each step, ends as it does uncut."""
    pytest.importorskip("torch")
    module = importlib.import_module("app.tasks")
    found = {name: value for name, value in vars(module).items() if is_task(value)}
    assert set(found) == set(PAYLOADS)
    for name, each in found.items():
        resume_at_every_step(each, PAYLOADS[name])
    roots = Snapshots(app / "state", "roots").load()
    assert roots is not None
    assert set(roots.value) == {1, 2, 3, 4}


@pytest.mark.parametrize("name", [block.name for block in of("wrong")])
def test_the_wrong_examples_fail_and_the_right_ones_pass(name: str) -> None:
    """The wrong form gives something else, after some cut or at all; the right form never does."""
    for kind in ("wrong", "right"):
        (block,) = [block for block in of(kind) if block.name == name]
        namespace: dict[str, Any] = {"task": task, "Step": Step, "BatchTask": BatchTask, "__name__": "app.tasks"}
        execute(block, namespace)
        (each,) = [value for value in namespace.values() if is_task(value)]
        payload = {"n": 5, "seed": 7, "sent": []}
        if name == "mutable":  # wrong without any cut
            found = [
                at for at, output in enumerate(run(each, Run([], None, payload)).outputs, 1) if output != {"at": at}
            ]
        else:
            found = differing(each, payload, steps=name == "one")
        assert bool(found) == (kind == "wrong"), f"line {block.line}: steps {found}"


@pytest.mark.slow
def test_the_group_of_the_docs_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes compute what one would, and go on in the middle."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(tmp_path))
    listed = [block for block in blocks(ROOT / "docs" / "collectives.md") if block.language == "python"]
    assert [block.kind for block in listed] == ["tasks"]
    (tmp_path / "group_of_the_docs.py").write_text(listed[0].text, encoding="utf-8")
    group = as_batch(resolve("group_of_the_docs.Dot"))
    x = [1.0, 2.0, 3.0, 4.0]
    expected = (torch.arange(12.0).reshape(3, 4) @ torch.tensor(x)).tolist()
    try:
        group.load()
        for known in (0, 1):
            group.admit(Request(id="a", payload={"x": x}, outputs=expected[:known]))
            steps = [step for _ in expected[known:] for step in group.step()]
            assert [step.output for step in steps] == expected[known:]
            assert steps[-1].result == "done"
    finally:
        group.close()  # type: ignore[attr-defined]


# --- cutting -----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is stored of a request, and what its task did to the world."""

    outputs: list[Any]
    state: Any
    payload: Any
    result: Any = NOTHING
    steps: int = 0


def run(each: AnyTask, begin: Run, cut: int | None = None) -> Run:
    """Run a task in a process of its own, as far as it is concerned, until its end or for so many steps."""
    batch = as_batch(each)
    batch.load()
    run = Run(list(begin.outputs), begin.state, begin.payload)
    batch.admit(Request(id="a", payload=run.payload, outputs=list(run.outputs), state=run.state))
    while run.result is NOTHING and (cut is None or run.steps < cut):
        for step in list(batch.step()):
            assert step.error is None, step.error
            run.steps += 1
            if step.output is not NOTHING:
                run.outputs.append(copied(step.output))
            if step.state is not NOTHING:
                run.state = copied(step.state)
            run.result = step.result
    return run


def copied(value: Any) -> Any:
    """As it comes back from Redis."""
    return unpack(pack(value, limit=10**6, what="output"))


def differing(each: AnyTask, payload: Any, *, steps: bool = False) -> list[int]:
    """After which steps a cut changes outputs, result or side effects; with ``steps``, or loses what was computed."""
    whole = run(each, Run([], None, copied(payload)))
    found = []
    for cut in range(1, whole.steps):
        first = run(each, Run([], None, copied(payload)), cut)
        if first.result is not NOTHING:
            continue
        # One that dies between a side effect and the checkpoint: the step before is what was stored.
        before = run(each, Run([], None, copied(payload)), cut - 1) if cut > 1 else Run([], None, copied(payload))
        for stored in (first, Run(before.outputs, before.state, first.payload)):
            rest = run(each, stored)
            same = (rest.outputs, rest.result, rest.payload) == (whole.outputs, whole.result, whole.payload)
            if not same or (steps and stored is first and rest.steps + first.steps > whole.steps):
                found.append(cut)
    return found


# --- the page for operators ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_command_for_operators_runs(lab: Lab, tmp_path: Path) -> None:
    """On a pool with running, waiting and failed requests, each with the columns that the page shows."""
    lab.worker()
    lab.reaper()
    failed = lab.submit("boom", {}, max_retries=0)
    lab.ended(failed)
    runs = lab.submit("count", {"n": 100_000, "sleep": 0.02})
    lab.moved(runs)
    lab.submit("count", {"n": 1})
    listed = [block for block in blocks(ROOT / "docs" / "operations.md") if block.language != "text"]
    here = Path(sys.executable).parent  # the environment need not be active
    assert {(block.language, block.kind) for block in listed} == {("console", "run")}
    for block in listed:
        for command, shown in re.findall(r"^\$ (.+)\n((?:(?!\$).+\n)*)", block.text, re.MULTILINE):
            done = subprocess.run(
                shlex.split(command.replace("REQUEST", runs)),
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                env={**os.environ, "PERDURE_REDIS_URL": lab.url, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"},
                check=False,
            )
            # This machine may have something to change; that nothing is broken is seen by what is printed.
            assert done.returncode in ((0, 4) if block.name == "doctor" else (0,)), f"{command}: {done.stderr}"
            assert done.stdout or "--svg" in command, command
            lines = [line.split() for line in done.stdout.splitlines()]
            assert all(line.split() in lines for line in shown.splitlines()), f"{command}: {done.stdout}"
    assert (tmp_path / "request.svg").read_text(encoding="utf-8").startswith("<svg")


# --- the reference -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages() -> Any:
    """The module that makes the tables of the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("reference_pages")


def test_the_tables_of_the_reference_are_what_the_code_gives(pages: Any) -> None:
    """No such page is edited by hand, out of date, or left over."""
    made = pages.pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").iterdir()}
    there = {name: text for name, text in there.items() if text.startswith(pages.NOTE)}
    differing = sorted(name for name in made | there if made.get(name) != there.get(name))
    assert not differing, f"{', '.join(differing)} in docs/reference: run scripts/reference and commit what it writes"


def test_links_of_the_docs_lead_somewhere() -> None:
    """Files exist, and headings do; also where a link is that of the project's repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    owner = project["urls"]["Repository"].removeprefix("https://github.com/")
    ours = re.compile(rf"https://(?:github\.com/{owner}/(?:blob|tree)|raw\.githubusercontent\.com/{owner})/main/")
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/reference/*.md")]
    files = [url for name, url in project["urls"].items() if name not in ("Repository", "Issues")]
    links = [("pyproject.toml", ROOT, url) for url in files]
    for path in pages:
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        links += [(path.name, path, target) for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]+)?)\)", text)]
    seen = 0
    for page, path, target in links:
        name, _, anchor = target.partition("#")
        if ours.match(name):
            file = ROOT / ours.sub("", name)
            seen += 1
        elif "://" in name:
            assert owner not in name, f"{page}: {target}"
            continue
        else:
            file = path.parent / name if name else path
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
            assert anchor in anchors, f"{page}: {target}"
    assert seen > 20
