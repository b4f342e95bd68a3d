"""docs/migrating-from-rq.md, from RQ's own worker to ours and back, on a real server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rq import Queue
from rq.defaults import DEFAULT_FAILURE_TTL, DEFAULT_RESULT_TTL
from rq.job import Job

from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from tests.kit.docs.pages import Block, blocks, commands, rows, run, section
from tests.kit.lab import Lab, Process, eventually
from tests.kit.places import ROOT

PAGE = ROOT / "docs" / "migrating-from-rq.md"
LISTED = blocks(PAGE)
DAY = 86_400


def of(kind: str) -> Block:
    (block,) = [block for block in LISTED if block.kind == kind]
    return block


@pytest.fixture
def app(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The page's modules, and where Redis is, for this process and those that it starts."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "jobs.py").write_text(of("jobs").text, encoding="utf-8")
    (tmp_path / "app" / "tasks.py").write_text(of("tasks").text, encoding="utf-8")
    monkeypatch.setenv("RQ_REDIS_URL", lab.url)
    return {"PYTHONPATH": str(tmp_path), "RQ_REDIS_URL": lab.url}


def start(lab: Lab, command: str, environment: dict[str, str], name: str) -> Process:
    """A process by a command of the page, until it serves."""
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    if words[1] == "worker":
        words += ["--name", name]
    process = lab._start(name, words, {}, environment)
    trace = key("worker", name) if words[1] == "worker" else key("pulse")
    eventually(lambda: lab.connection.exists(trace) or not process.running)
    assert process.running, process.log
    return process


def stop(*processes: Process) -> None:
    for process in processes:
        process.send(signal.SIGTERM)
    for process in processes:
        process.end()


def program(namespace: dict[str, Any], first: int, last: int) -> None:
    """Some of the page's programs, in order: each prints what stands below it."""
    produced = [(block, LISTED[place + 1]) for place, block in enumerate(LISTED) if block.kind == "produce"]
    assert len(produced) == 4
    for block, text in produced[first:last]:
        assert text.language == "text"
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile("\n" * block.line + block.text, str(PAGE), "exec"), namespace)
        assert shown.getvalue() == text.text, f"line {block.line}"


def test_its_numbers_are_those_of_rq_and_ours() -> None:
    """What the table says of lifetimes and of a step."""
    table = {row[0]: row[1:] for row in rows(section(PAGE, "What stays, what changes"))}
    assert table["how long it may run"][0] == f"`job_timeout`, {Queue.DEFAULT_TIMEOUT} s"
    assert f"one *step* {Settings().step_timeout:g} s" in table["how long it may run"][2]
    assert table["its result is kept"][0] == f"`result_ttl`, {DEFAULT_RESULT_TTL} s"
    assert (DEFAULT_FAILURE_TTL, Settings().result_ttl, Settings().failure_ttl) == (365 * DAY, DAY, 7 * DAY)


@pytest.mark.slow
def test_from_rq_to_ours_and_back(lab: Lab, app: dict[str, str], tmp_path: Path) -> None:
    """The old program on RQ's worker and on ours, the new ones on ours, and the old one on RQ's again."""
    namespace: dict[str, Any] = {}
    (before,) = [command for command, _ in commands(of("before"))]
    stock = start(lab, before, app, "stock")
    program(namespace, 0, 1)
    assert lab.connection.ttl(namespace["job"].key) <= DEFAULT_RESULT_TTL
    stop(stock)
    ours = [start(lab, command, app, f"ours-{n}") for n, (command, _) in enumerate(commands(of("after")))]
    try:
        program(namespace, 0, 4)
        kept: Any = lab.connection.ttl(namespace["job"].key)
        assert DEFAULT_RESULT_TTL < kept <= Settings().result_ttl, "the job did not say, so ours holds"
        # None is left, says the page, when these print no item.
        for command, _ in commands(of("back")):
            done = run(command, folder=tmp_path, environment={**os.environ, **app})
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["items"] == []
        stop(*ours)
    finally:
        namespace["client"].close()
    again = start(lab, before, app, "again")
    program({}, 0, 1)
    stop(again)
    # What is left of requests, read without Perdure.
    script = (
        "import sys, os; from redis import Redis; from rq.job import Job\n"
        "job = Job.fetch(sys.argv[1], connection=Redis.from_url(os.environ['RQ_REDIS_URL']))\n"
        "print(job.get_status().value, job.return_value())\n"
        "assert not any(name.startswith('perdure') for name in sys.modules)"
    )
    read = subprocess.run(
        [sys.executable, "-c", script, namespace["late"].id], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, **app},
    )  # fmt: skip
    assert read.stdout == "finished ['c.txt 0']\n"
    left: Any = list(lab.connection.scan_iter("rq:perdure:*"))
    immortal = {name.decode() for name in left if lab.connection.ttl(name) == -1}
    assert immortal <= {f"rq:perdure:{name}" for name in ("counters", "pulse", "schema", "queues", "beats")}
    assert all(lab.connection.ttl(name) <= 7 * 86_400 for name in left)


@pytest.mark.slow
def test_both_kinds_of_worker_serve_one_queue(lab: Lab, app: dict[str, str]) -> None:
    """Functions run on either. RQ's does not run a request, and says why; ours does once it comes by it."""
    (other, ours) = [command for command, _ in commands(of("both"))]
    queue = Queue("gpu", connection=lab.connection)
    stock = start(lab, other, app, "stock")
    name = lab.submit("app.tasks.embed", {"document": "a", "pieces": 2})
    eventually(lambda: "needs Perdure's worker" in stock.log)
    assert not lab.record(name).ended
    jobs = [queue.enqueue("app.jobs.embed", "a", 1) for _ in range(4)]
    worker = start(lab, ours, app, "ours")
    eventually(lambda: all(job.get_status() == "finished" for job in jobs))
    assert [job.return_value() for job in jobs] == [["a 0"]] * 4
    stop(stock)
    assert lab.ended(name).status == "finished"
    stop(worker)


@pytest.mark.slow
def test_a_function_does_not_go_on_and_a_task_does(lab: Lab, app: dict[str, str]) -> None:
    """The two columns of ours, when the worker is killed: failed at once, or from the checkpoint."""
    (ours, _) = [command for command, _ in commands(of("after"))]
    queue = Queue("gpu", connection=lab.connection)
    first = start(lab, ours, app, "first")
    job = queue.enqueue("app.jobs.embed", "a", 1000)
    eventually(lambda: job.get_status() == "started")
    first.kill()
    eventually(lambda: Job.fetch(job.id, connection=lab.connection).get_status() == "failed")
    second = start(lab, ours, app, "second")
    going = queue.enqueue("app.tasks.embed", document="a", pieces=40)
    eventually(lambda: lab.store.fetch(going.id))
    lab.moved(going.id, 5)
    second.kill()
    third = start(lab, ours, app, "third")
    record = lab.ended(going.id)
    assert (record.status, record.attempt) == ("finished", 0)
    assert going.return_value() == [f"a {i}" for i in range(40)]
    assert ("redelivered", "WORKER_LOST") in lab.events(going.id)
    stop(third)
