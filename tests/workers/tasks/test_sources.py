"""Code that was edited after a worker had loaded it: it is said, and with reload the worker is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perdure.scripts.main import main
from perdure.workers.tasks.sources import Loaded, Sources, digests
from tests.kit.lab import Lab, eventually

FIRST = """
from edited_helper import WORD
from perdure.workers import Step, task

@task
def say(request):
    for index in range(request.state or 0, request.payload.get("n", 1)):
        yield Step(output=WORD, state=index + 1)
        __import__("time").sleep(request.payload.get("sleep", 0))
    return WORD
"""
MORE = """

@task
def more(request):
    yield Step(result="more")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "edited_tasks.py").write_text(FIRST)
    (folder / "edited_helper.py").write_text('WORD = "one"\n')
    return folder


def stale(lab: Lab) -> list[str]:
    return [worker["stale"] for worker in lab.store.workers()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edited_tasks.py", "edited_helper.py"])
def test_it_is_said_that_a_worker_runs_old_code(
    lab: Lab, code: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the task's module, and of what it imports; by the log, the list of workers and doctor. Put back, it is true no
    more.
    """
    worker = lab.worker(environment={"PYTHONPATH": str(code)})
    one = lab.submit("edited_tasks.say", {})
    assert lab.ended(one).status == "finished"
    before = (code / name).read_text()
    assert stale(lab) == [""]
    (code / name).write_text(before)  # saved again, and the same
    (code / name).write_text(before.replace("one", "two") + "\n# edited\n")
    eventually(lambda: stale(lab) == [str(code / name)])
    eventually(lambda: f"{code / name} was edited after {worker.name} had loaded it" in worker.log)
    assert main(["workers", "--url", lab.url]) == 0
    assert "runs old code" in capsys.readouterr().out
    main(["doctor", "--url", lab.url])
    assert f"worker {worker.name} runs old code" in capsys.readouterr().out
    two = lab.submit("edited_tasks.say", {})
    assert lab.ended(two).status == "finished"
    assert lab.outputs(two) == ["one"]
    (code / name).write_text(before)
    eventually(lambda: stale(lab) == [""])
    assert worker.log.count("was edited after") == 1
    assert worker.running


@pytest.mark.slow
def test_with_reload_the_next_worker_runs_the_new_code(lab: Lab, code: Path) -> None:
    """What runs goes on from its checkpoint in the new code, uncharged."""
    worker = lab.worker(environment={"PYTHONPATH": str(code)}, reload=True)
    one = lab.submit("edited_tasks.say", {"n": 400, "sleep": 0.01})
    lab.moved(one)
    (code / "edited_helper.py").write_text('WORD = "two"\n')
    assert worker.end() == 0
    second = lab.worker(environment={"PYTHONPATH": str(code)}, reload=True)
    record = lab.ended(one)
    assert (record.status, record.worker, record.attempt) == ("finished", second.name, 0)
    words = lab.outputs(one)
    assert words == ["one"] * words.index("two") + ["two"] * (400 - words.index("two"))


@pytest.mark.slow
def test_a_task_that_could_not_be_loaded_is_watched_too(lab: Lab, code: Path) -> None:
    """A mistake in a file that it imports: mending it brings a worker that can, at once."""
    (code / "edited_helper.py").write_text("WORD = \n")
    worker = lab.worker(environment={"PYTHONPATH": str(code)}, reload=True)
    one = lab.submit("edited_tasks.say", {})
    eventually(lambda: lab.store.workers()[0]["unable"])
    (code / "edited_helper.py").write_text('WORD = "two"\n')
    assert worker.end() == 0
    lab.worker(environment={"PYTHONPATH": str(code)}, reload=True)
    assert lab.ended(one).status == "finished"


@pytest.mark.slow
def test_a_task_added_to_a_loaded_module_says_why_it_lacks(lab: Lab, code: Path) -> None:
    lab.worker(environment={"PYTHONPATH": str(code)}, missing_timeout=0.5)
    lab.reaper(missing_timeout=0.5)
    assert lab.ended(lab.submit("edited_tasks.say", {})).status == "finished"
    (code / "edited_tasks.py").write_text(FIRST + MORE)
    record = lab.ended(lab.submit("edited_tasks.more", {}))
    assert record.error_kind == "INVALID_REQUEST"
    assert (
        f"but {code / 'edited_tasks.py'} has it by now: this process loaded it before; restart it"
        in record.error_reason
    )


def test_what_is_installed_is_not_watched(code: Path) -> None:
    """Nor is Perdure itself, nor what the interpreter brings."""
    names = [
        json.__file__,
        pytest.__file__,
        main.__code__.co_filename,
        str(code / "edited_tasks.py"),
        "<string>",
        "gone.py",
    ]
    assert list(digests(names)) == [str(code / "edited_tasks.py")]


def test_a_file_keeps_the_digest_that_was_loaded(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is not read again because another task is loaded later."""
    monkeypatch.syspath_prepend(str(code))
    helper = code / "edited_helper.py"
    __import__("edited_helper")
    loaded, sources = Loaded(), Sources()
    first = loaded.now()[str(helper)]
    helper.write_text("WORD = 3\n")
    sources.watch(loaded.well())
    assert loaded.well()[str(helper)] == first
    assert sources.stale() == [str(helper)]
    helper.unlink()
    assert sources.stale() == [], "it is being replaced, or gone with its folder"
