"""A batch on a real pool: every line ends once in one of the two files, whatever is killed in between."""

from __future__ import annotations

import json
import os
import pty
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from perdure.producer.session import Session
from perdure.protocol.connection import connect
from perdure.protocol.errors import UsageError
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.scripts.batch import bodies
from perdure.scripts.batch.ledger import Ledger
from perdure.scripts.batch.lines import Source, check
from perdure.scripts.batch.models import served_models
from perdure.scripts.batch.progress import ProgressScreen
from perdure.scripts.batch.run import BatchRun
from perdure.scripts.batch.tally import Tally
from perdure.scripts.main import main
from perdure.scripts.pool.server import Server
from tests.kit.lab import LONG, Lab, eventually, laboratory
from tests.kit.scripts.batch import Job


@pytest.fixture(scope="module")
def pool(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One worker for the tests here; their requests have different ids, as their files differ."""
    with (
        Server(binary=server_binary, die_with_parent=True) as server,
        laboratory(server.url, tmp_path_factory.mktemp("pool")) as lab,
    ):
        lab.worker()
        yield lab


@pytest.fixture
def job(pool: Lab, tmp_path: Path) -> Iterator[Job]:
    made = Job(pool.url, tmp_path)
    yield made
    made.close()


def counting(name: str, lines: int, **body: float) -> dict[str, tuple[str, object]]:
    return {f"{name}{number}": ("lab_tasks.many", {"n": 1, **body}) for number in range(lines)}


def test_answers_and_failures_have_the_shapes_of_openai(job: Job, pool: Lab) -> None:
    """What failed stands in the other file, with kind and reason where readers of either look; the exit
    code says it.
    """
    job.environment["PERDURE_MAX_RETRIES"] = "0"
    job.write(
        {
            "good": ("lab_tasks.many", {"n": 2}),
            "bad": ("lab_tasks.refuse", {"n": 0}),
            "worse": ("lab_tasks.boom", {}),
        }
    )
    code, summary, _ = job.run()
    assert (code, summary["lines"], summary["answered"], summary["failed"]) == (1, 3, 1, 2)
    (good,) = job.read(job.out).values()
    identifier = good["response"]["request_id"]
    assert good == {
        "id": f"batch_req_{identifier}",
        "custom_id": "good",
        "error": None,
        "response": {"status_code": 200, "request_id": identifier, "body": {"counted": 2}},
    }
    failed = job.read(job.errors)
    assert {name: row["response"]["status_code"] for name, row in failed.items()} == {"bad": 400, "worse": 500}
    assert failed["bad"]["error"] == {"code": "INVALID_REQUEST", "message": "n must be at least 1"}
    assert failed["worse"]["response"]["body"]["error"] == {
        "message": failed["worse"]["error"]["message"],
        "type": "server_error",
        "param": None,
        "code": "ERROR",
    }
    assert "boom" in failed["worse"]["error"]["message"]
    record = pool.record(failed["worse"]["response"]["request_id"])
    assert (record.status, record.queue) == ("failed", "gpu")

    before = job.out.read_bytes() + job.errors.read_bytes()
    code, summary, _ = job.run()
    assert (code, summary["kept"], summary["seconds"] < LONG) == (1, 3, True), "it says again that lines have failed"
    assert job.out.read_bytes() + job.errors.read_bytes() == before


BAD = (
    b"{\n"
    b'{"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {}}\n'
    b'{"custom_id": "good0", "method": "POST", "url": "lab_tasks.many", "body": {}}\n'
    b"\xff\n"
)


@pytest.mark.slow
def test_one_bad_line_is_one_failure(job: Job) -> None:
    """The others are answered. A second run finds each of them, also after a kill that tore the file."""
    job.write(counting("good", 3))
    job.source.write_bytes(job.source.read_bytes() + BAD)
    code, summary, said = job.run()
    assert (code, summary["lines"], summary["answered"], summary["failed"]) == (1, 7, 3, 4)
    assert "4 bad lines in" in said
    rows = [json.loads(row) for row in job.errors.read_bytes().splitlines()]
    assert [(row["custom_id"], row["response"]["status_code"], row["error"]["code"]) for row in rows] == [
        (None, 400, "INVALID_REQUEST"),
        ("b", 400, "INVALID_REQUEST"),
        (None, 400, "INVALID_REQUEST"),
        (None, 400, "INVALID_REQUEST"),
    ]
    assert [row["error"]["message"].partition(":")[0] for row in rows] == ["line 4", "line 5", "line 6", "line 7"]
    whole = job.errors.read_bytes()
    for torn in (whole, whole[:-20], whole[: whole.index(b"\n") + 1], b""):
        job.errors.write_bytes(torn)
        code, summary, _ = job.run()
        assert (code, summary["failed"], summary["kept"]) == (1, 4, 3 + torn.count(b"\n"))
        assert sorted(job.errors.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_strict_refuses_a_file_with_a_bad_line(job: Job) -> None:
    job.write(counting("good", 2))
    job.source.write_bytes(job.source.read_bytes() + BAD)
    code, _, said = job.run("--strict")
    assert code == 2
    assert "4 bad lines in" in said
    assert "nothing was started" in said
    assert not job.out.exists()


@pytest.mark.slow
def test_a_line_may_name_what_is_served_and_nothing_else(job: Job, pool: Lab) -> None:
    """By what the workers of its queue say; nobody can tell where none lives, and --any-model asks nobody."""
    body = {"prompt": "x", "max_tokens": 2}
    names = {"tiny": "tiny", "none": None, "other": "gpt-4o"}
    job.write(
        {
            name: ("/v1/completions", body if model is None else {**body, "model": model})
            for name, model in names.items()
        }
    )
    worker = pool.worker(queues=("text",), model="tiny", slots=4)
    code, summary, _ = job.run("--queue", "text", timeout=3 * LONG)
    assert (code, summary["answered"], summary["failed"]) == (1, 2, 1)
    (refused,) = job.read(job.errors).values()
    assert refused["custom_id"] == "other"
    assert "'gpt-4o' is not served; the workers have tiny" in refused["error"]["message"]
    for path in (job.out, job.errors):
        path.unlink()
    code, summary, _ = job.run("--queue", "text", "--any-model", timeout=3 * LONG)
    assert (code, summary["answered"]) == (0, 3)
    assert {row["response"]["body"]["model"] for row in job.read(job.out).values()} == {
        "tiny",
        "gpt-4o",
        bodies.GENERATE,
    }
    worker.send(signal.SIGTERM)
    worker.end()
    assert served_models(pool.store, "text") is None


@pytest.mark.slow
def test_a_run_that_was_killed_is_gone_on_with(job: Job) -> None:
    """Kill -9 of the batch alone, twice: what was done is kept, what runs is found, and a full queue is waited for."""
    job.environment["PERDURE_QUEUE_LIMIT"] = "30"
    job.write(counting("k", 100, sleep=0.01))
    for number in (20, 60):
        process = job.start("--in-flight", "100")
        job.reached(number)
        process.kill()
        process.wait()
    kept = job.done()
    code, summary, _ = job.run()
    assert code == 0
    assert summary["answered"] == summary["lines"] == 100
    assert summary["kept"] >= kept
    assert summary["found"] > 0
    assert set(job.read(job.out)) == {f"k{number}" for number in range(100)}
    assert job.errors.read_bytes() == b""


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(job: Job) -> None:
    job.write(counting("c", 60, sleep=0.05))
    process = job.start()
    job.reached(5)
    process.send_signal(signal.SIGINT)
    code, _, said = job.end(process)
    assert code == 130
    assert "of 60 lines are done and on disk" in said
    assert "The same command goes on from here" in said
    done = job.done()
    assert 5 <= done < 60
    assert job.run()[0] == 0
    assert len(job.read(job.out)) == 60


@pytest.mark.slow
def test_two_runs_at_once_are_one(job: Job, pool: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first lives, and takes its place when it is killed."""
    job.write(counting("t", 3))
    first = job.start("--queue", "nobody")
    eventually(lambda: len(pool.waiting("nobody")) == 3)
    command = ["batch", "run", str(job.source), "-o", str(job.out), "-e", str(job.errors), "--url", job.url]
    assert main(command) == 2
    assert "is being written by another batch run" in capsys.readouterr().err
    first.kill()
    first.wait()
    pool.worker("--burst", queues=("nobody",))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] == 3
    assert len(job.read(job.out)) == 3


@pytest.mark.slow
def test_canceled_and_foreign_requests_are_failures(
    redis_url: str, connection: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No worker is needed for either; the others' request is left alone."""
    job = Job(redis_url, tmp_path)
    job.write(counting("x", 2))
    with Source(str(job.source), tmp_path) as source:
        ids = [check(source, Settings(), {}).request_id(f"x{number}") for number in range(2)]
    connection.hset(key("job", ids[0]), mapping={"task": "app.other", "nonce": "foreign"})
    process = job.start()
    try:
        store = Store(connection, Settings())
        eventually(lambda: (record := store.fetch(ids[1])) and record.status == "queued")
        assert store.cancel([(ids[1], "")], reason="enough") == ["canceled"]
        code, _, _ = job.end(process)
    finally:
        job.close()
    assert code == 1
    failed = job.read(job.errors)
    assert {name: row["error"]["code"] for name, row in failed.items()} == {"x0": "ID_TAKEN", "x1": "CANCELED"}
    assert failed["x1"]["response"]["status_code"] == 409
    assert connection.hget(key("job", ids[0]), "nonce") == b"foreign"


def test_cancel_ends_what_was_submitted(
    redis_url: str, connection: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that waits for them ends; the bar counts to the end, and stdout has the summary alone."""
    job = Job(redis_url, tmp_path)
    job.write(counting("w", 3))
    ours, theirs = pty.openpty()
    try:
        process = job.start(stderr=theirs)
        eventually(lambda: connection.llen(key("queue", "gpu")) == 3)
        assert main(["batch", "cancel", str(job.source), "--url", redis_url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"canceled": 3, "requested": 0, "ended": 0}
        code, summary, _ = job.end(process)
        assert (code, summary["failed"]) == (1, 3)
        shown = os.read(ours, 100_000).decode()
        assert "3/3" in shown
        assert "3 failed" in shown
    finally:
        job.close()
        os.close(ours)
        os.close(theirs)
    assert main(["batch", "cancel", str(job.source), "--url", redis_url]) == 0
    assert "3 canceled, 0 running ones asked to stop, 0 had ended" in capsys.readouterr().out


class Enough(Exception):
    """Ends a run from what watches it."""


class Listener:
    """Ends the run when it says something."""

    def show(self, tally: Tally) -> None:
        pass

    def say(self, line: str) -> None:
        raise Enough(line)


def test_a_queue_that_nobody_serves_is_told(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.scripts.batch.run.ALONE", 0.0)
    job = Job(redis_url, tmp_path)
    job.write(counting("n", 1))
    session = Session(redis_url, Settings(), None, 5.0)
    options = {"queue": "gpu", "priority": "low"}
    try:
        with Source(str(job.source), tmp_path) as source, Ledger(job.out, job.errors, source.stat()) as ledger:
            run = BatchRun(
                session,
                source,
                check(source, Settings(), options),
                ledger,
                Listener(),
                in_flight=10,
                patience=5.0,
                options=options,
            )
            with pytest.raises(Enough, match="no worker serves the queue gpu-low"):
                run.go()
    finally:
        session.close()


def test_an_input_that_changes_under_way_stops_the_run(redis_url: str, tmp_path: Path) -> None:
    """Before a line is run that nobody has checked."""
    job = Job(redis_url, tmp_path)
    job.write(counting("v", 3))
    session = Session(redis_url, Settings(), None, 5.0)
    options = {"queue": "gpu"}
    try:
        for change in (b"", b'{"custom_id": "new"}\n', job.source.read_bytes()[::-1]):
            job.write(counting("v", 3))
            with Source(str(job.source), tmp_path) as source:
                checked = check(source, Settings(), options)
                content = job.source.read_bytes()
                if len(change) == len(content):
                    content = b""
                # In place: another file under the same name would not be read.
                job.source.write_bytes(content[: len(content) // 2] if not change else content + change)
                with Ledger(job.out, job.errors, source.stat()) as ledger:
                    run = BatchRun(
                        session,
                        source,
                        checked,
                        ledger,
                        ProgressScreen(terminal=False),
                        in_flight=10,
                        patience=5.0,
                        options=options,
                    )
                    with pytest.raises(UsageError, match="was changed while it was being run"):
                        run.go()
    finally:
        session.close()
    assert job.out.read_bytes() == b""


def test_mistakes_are_told_before_anything_is_made(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the exit code of a mistake, no traceback, and no file."""
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "app.tasks.t", "body": 1}
    good.write_text(json.dumps(line) + "\n")
    bad.write_text("{\n")
    out = str(tmp_path / "out.jsonl")
    for arguments, word in (
        ((str(bad), "-o", out, "--strict"), "line 1: not JSON"),
        ((str(tmp_path / "none"), "-o", out), "cannot read"),
        ((str(good), "-o", str(tmp_path / "none" / "out")), "there is no folder"),
        ((str(good), "-o", out, "--priority", "urgent"), "priority is"),
        ((str(good), "-o", out, "--queue", "x" * 501), "queue name"),
        ((str(good), "-o", out, "--in-flight", "0"), "in-flight"),
    ):
        assert main(["batch", "run", *arguments, "--url", redis_url]) == 2, arguments
        said = capsys.readouterr().err
        assert word in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]
    assert main(["batch", "run", str(good), "-o", str(good), "--url", redis_url]) == 2
    assert main(["batch", "run", str(good), "-o", out, "--url", "redis://127.0.0.1:1"]) == 3
    assert main(["batch", "check", str(bad)]) == 2
    capsys.readouterr()
    assert main(["batch", "check", str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"lines": 1}
    assert json.loads(good.read_text()) == line


# --- everything at once ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_of_everything_at_half_way(server_binary: Path, tmp_path: Path) -> None:
    """Kill -9 of batch, workers, guardians, reaper and Redis: started again, each id is there exactly once.

    ``TEST_BATCH_LINES`` makes it longer.
    """
    lines = int(os.environ.get("TEST_BATCH_LINES", "1000"))
    job = Job("", tmp_path)
    job.write(counting("e", lines, sleep=0.002))
    with (
        Server(tmp_path / "redis", binary=server_binary, die_with_parent=True) as server,
        laboratory(server.url, tmp_path) as lab,
    ):
        job.url = server.url
        try:
            reaper = lab.reaper()
            workers = [lab.worker() for _ in range(2)]
            process = job.start("--in-flight", "200")
            job.reached(lines // 2)
            for worker in workers:
                worker.kill_tree()
            for killed in (process, reaper, server):
                killed.kill()
            process.wait()
            assert lines // 2 <= job.done() < lines
            # What a crash of the whole host would have torn.
            with job.out.open("ab") as file:
                file.write(b'{"id": "batch_req_i01')
            server.restart()
            lab.reaper()
            lab.worker()
            code, summary, said = job.run(timeout=2 * LONG)
            print(lines, "lines:", summary)
        finally:
            job.close()
    assert (code, summary["answered"], summary["failed"]) == (0, lines, 0), said
    assert summary["kept"] >= lines // 2
    found = job.read(job.out)
    assert set(found) == {f"e{number}" for number in range(lines)}
    assert all(row["response"]["body"] == {"counted": 1} for row in found.values())


@pytest.mark.slow
def test_an_outage_and_the_loss_of_all_data_are_ridden_out(server_binary: Path, tmp_path: Path) -> None:
    """Redis is killed and comes back, then comes back empty: the run says so, submits what vanished, and ends."""
    lines = 400
    job = Job("", tmp_path)
    job.write(counting("o", lines, sleep=0.02))
    with (
        Server(tmp_path / "redis", binary=server_binary, die_with_parent=True) as server,
        laboratory(server.url, tmp_path) as lab,
    ):
        job.url = server.url
        lab.worker()
        try:
            process = job.start("--in-flight", "100")
            job.reached(20)
            server.kill()
            server.restart()
            job.reached(job.done() + 150)
            with connect(server.url) as connection:
                connection.flushall()
            code, summary, said = job.end(process, 2 * LONG)
        finally:
            job.close()
    assert (code, summary["answered"]) == (0, lines), said
    assert "are not in Redis any more; they are submitted again" in said
    assert set(job.read(job.out)) == {f"o{number}" for number in range(lines)}
