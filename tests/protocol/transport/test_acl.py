"""The rules in docs/security.md, line by line: each user can do all of its work with them, and nobody else's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from perdure.producer import Client
from perdure.protocol.connection import connect
from perdure.protocol.errors import DeadlineExceeded
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.scripts.main import main
from tests.kit.lab import Lab, eventually
from tests.kit.places import DOCS

PAGE = DOCS / "security.md"


def rules() -> dict[str, list[str]]:
    """User -> the words after ``ACL SETUSER``, as the page has them."""
    lines = re.findall(r"^ACL SETUSER (perdure-(\w+) .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {role: line.split() for line, role in lines}


@pytest.fixture
def urls(redis_url: str) -> Iterator[dict[str, str]]:
    """A URL for each user of the page, on an empty server."""
    with connect(redis_url) as admin:
        version = str(admin.info("server")["redis_version"])
        users = {}
        for role, words in rules().items():
            # The one command that is younger than the rules.
            known = [word for word in words if word != "+waitaof" or not version.startswith("7.0")]
            admin.execute_command("ACL", "SETUSER", *known)
            users[role] = redis_url.replace("redis://", f"redis://perdure-{role}:{role.upper()}-PASSWORD@")
        assert set(users) == {"producer", "worker", "reaper", "viewer"}
        admin.acl_log_reset()
        yield users
        for role in users:
            admin.acl_deluser(f"perdure-{role}")


def refused(connection: redis.Redis) -> list[str]:
    """What any user was denied."""
    return [
        f"{entry['username']}: {entry['object']} ({entry['reason']}, {entry['context']})"
        for entry in connection.acl_log()
    ]


@pytest.mark.slow
def test_each_user_does_its_work(lab: Lab, urls: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A whole pool under these users: submits, a kill, a retry, a cancel, looks, and Redis denies nothing."""
    lab.reaper(environment={"RQ_REDIS_URL": urls["reaper"]})
    worker = lab.worker(url=urls["worker"])
    with Client(urls["producer"], settings=Settings(max_retries=1)) as client:
        running = client.submit("lab_tasks.gate", {"folder": str(lab.folder)}, queue="gpu", meta={"a": 1})
        lab.moved(running.id, 3)
        waiting = client.submit("lab_tasks.count", {"n": 3}, queue="gpu", idempotency_key="a", deadline=600)
        delayed = client.submit("lab_tasks.count", {"n": 3}, queue="gpu", delay=600)
        assert delayed.cancel()
        other = lab.worker(url=urls["worker"])
        assert waiting.result(30) == {"counted": 3}
        failing = client.submit("lab_tasks.boom", {}, queue="gpu")
        assert failing.wait(30)
        worker.kill()
        eventually(lambda: lab.record(running.id).worker == other.name)
        (lab.folder / "open").touch()
        assert list(running.stream(timeout=30)) == list(range(6))
        stopped = client.submit("lab_tasks.count", {"n": 10_000, "sleep": 0.01}, queue="gpu")
        lab.moved(stopped.id)
        assert stopped.cancel()
        assert stopped.wait(30)
        for handle in (running, waiting, delayed, failing, stopped):
            handle.history()
            handle.details()
        assert stopped.status() == "canceled"
        assert len(client.list().items) == 5
    # Its guardian was killed with it: this time the reaper has to find out.
    last = lab.submit("count", {"n": 1000, "sleep": 0.01})
    lab.moved(last)
    other.kill_tree()
    eventually(lambda: lab.record(last).status == "queued")
    for arguments in (["list"], ["show", running.id], ["show", failing.id], ["result", waiting.id]):
        assert main([*arguments, "--url", urls["viewer"]]) == 0
    with Client(urls["viewer"]) as client:
        assert list(client.get(running.id).stream(timeout=10)) == list(range(6))
    capsys.readouterr()
    assert refused(lab.connection) == []


@pytest.mark.slow
def test_a_producer_that_waits_may_end_what_is_late(connection: redis.Redis, urls: dict[str, str]) -> None:
    """Where nobody sweeps; a viewer may not, and is told that nobody has."""
    with Client(urls["producer"], settings=Settings()) as client:
        first = client.submit("app.tasks.count", {"n": 1}, deadline=0.3)
        with (
            Client(urls["viewer"], settings=Settings()) as viewer,
            pytest.raises(TimeoutError, match="after its deadline: it is waiting in the queue default"),
        ):
            viewer.get(first.id).result()
        connection.acl_log_reset()
        with pytest.raises(DeadlineExceeded):
            first.result()
    assert refused(connection) == []


def test_durable_submits_need_no_more(server: object, connection: redis.Redis, urls: dict[str, str]) -> None:
    if str(connection.info("server")["redis_version"]).startswith("7.0"):
        pytest.skip("WAITAOF came with Redis 7.2")
    with Client(urls["producer"], settings=Settings()) as client:
        client.submit("app.tasks.count", {"n": 1}, durable=True)
    assert refused(connection) == []


def test_nobody_does_the_work_of_another(connection: redis.Redis, urls: dict[str, str]) -> None:
    """As far as Redis can tell: by the keys that a script touches, not by the script."""
    own = Store(connection, Settings())
    with Client(urls["producer"], settings=Settings()) as client:
        name = client.submit("app.tasks.count", {"n": 1}, queue="gpu").id

    def claim(store: Store) -> None:
        store.claim(incarnation="i", worker="w", queues=["gpu"], task="", free=1, slots={}, known=[])

    def beat(store: Store) -> None:
        store.heartbeat(incarnation="i", worker="w", queues=["gpu"], pid=1, host="h")

    def sweep(store: Store) -> None:
        store.reap(["gpu"], kind="WORKER_LOST", reason="")

    def cancel(store: Store) -> None:
        store.cancel([(name, "")], reason="")

    def write(store: Store) -> None:
        store.connection.hset(key("job", name), "task", "os.system")

    def outside(store: Store) -> None:
        store.connection.get("another:key")

    def flush(store: Store) -> None:
        store.connection.flushdb()

    def keys(store: Store) -> None:
        store.connection.keys("*")

    def configure(store: Store) -> None:
        store.connection.config_get("*")

    everybody = (outside, flush, keys, configure)
    forbidden = {
        "producer": (claim, beat, sweep, *everybody),
        "viewer": (claim, beat, sweep, cancel, write, *everybody),
        "reaper": everybody,
        "worker": everybody,
    }
    for role, actions in forbidden.items():
        with connect(urls[role]) as theirs:
            for action in actions:
                with pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL failure|can't access|can't run"):
                    action(Store(theirs, Settings()))
                assert connection.lrange(key("queue", "gpu"), 0, -1) == [name.encode()], (role, action.__name__)
    record = own.fetch(name)
    assert record is not None
    assert (record.status, record.task, record.executions) == ("queued", "app.tasks.count", 0)
    with connect(urls["reaper"]) as theirs, pytest.raises(redis.exceptions.NoPermissionError):
        theirs.publish(key("commands", "worker"), "{}")


@pytest.mark.parametrize(("role", "fits"), [("producer", True), ("viewer", False)])
def test_rqs_tools_need_the_producers_rules(urls: dict[str, str], role: str, fits: bool) -> None:
    command = [str(Path(sys.executable).with_name("rq")), "info", "--url", urls[role], "gpu"]
    with Client(urls["producer"], settings=Settings()) as client:
        client.submit("app.tasks.count", {"n": 1}, queue="gpu")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) is fits


def test_a_viewer_may_serve_metrics(
    urls: dict[str, str], connection: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but what Redis says of itself (INFO), which is left out."""
    with Client(urls["producer"], settings=Settings()) as client:
        client.submit("lab_tasks.count", {"n": 3}, queue="gpu")
    assert main(["metrics", "--once", "--url", urls["viewer"]]) == 0
    page = capsys.readouterr().out
    assert 'perdure_requests_waiting{priority="normal",queue="gpu"} 1.0' in page
    assert "perdure_redis_up 1.0" in page
    assert [entry for entry in refused(connection) if ": info (" not in entry] == []
