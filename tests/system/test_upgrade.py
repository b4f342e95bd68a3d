"""A rolling upgrade: an earlier release and the working tree on one queue, neither of which knows of the other.

The releases are wheels (see ``releases/README.md``), each in an environment of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

import perdure.producer
from perdure.producer import Client
from perdure.protocol.keys import SCHEMA, key
from perdure.protocol.settings import Settings
from tests.kit.lab import LONG, Lab, Process, eventually
from tests.kit.releases import WHEELS, environment_of, version_of

PRODUCER = """
import json, sys
from perdure.producer import Client
import perdure.producer
with Client(sys.argv[1]) as client:
    handles = client.submit_many([("lab_tasks.laden", {"n": 20, "sleep": 0.01})] * int(sys.argv[3]), queue="gpu")
    mine = client.submit("lab_tasks.laden", {"n": 20, "sleep": 0.01}, queue=sys.argv[2])
    streamed = list(mine.stream(timeout=60))
    print(json.dumps({
        "from": perdure.producer.__file__, "ids": [handle.id for handle in (*handles, mine)], "streamed": streamed,
        "results": [handle.result(60) for handle in (*handles, mine)],
    }))
"""


@pytest.fixture(scope="module", params=WHEELS, ids=version_of)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with a release."""
    return environment_of(request.param, tmp_path_factory.mktemp("release"))


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, settings=Settings()) as client:
        yield client


class Releases:
    """Processes of either release; each is made sure of (those of the old one by themselves)."""

    def __init__(self, lab: Lab, release: Path) -> None:
        self.lab = lab
        self.release = release
        assert self.made_by(perdure.producer.__file__ or "") == "new"

    def python(self, which: str) -> Path | None:
        return self.release if which == "old" else None

    def worker(self, which: str, **options: Any) -> Process:
        process = self.lab.worker(python=self.python(which), **options)
        for pid in process.children():  # its guardian is started with the same Python
            assert (psutil.Process(pid).cmdline()[0] == str(self.release)) is (which == "old")
        return process

    def made_by(self, place: str) -> str:
        """Which release's code a file is of."""
        return "old" if Path(place).is_relative_to(self.release.parent.parent) else "new"

    def produce(self, which: str, queue: str, number: int) -> subprocess.Popen[str]:
        command = [str(self.python(which) or sys.executable), "-c", PRODUCER, self.lab.url, queue, str(number)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def releases(lab: Lab, release: Path) -> Releases:
    return Releases(lab, release)


def held_by(lab: Lab, name: str, worker: Process) -> bool:
    return lab.record(name).worker == worker.name


def other(which: str) -> str:
    return "new" if which == "old" else "old"


@pytest.mark.parametrize("wheel", WHEELS, ids=version_of)
def test_a_release_is_the_one_that_is_written_down(wheel: Path) -> None:
    """Its digest stands beside it, and it names no path of the machine that built it."""
    table = wheel.with_name("README.md").read_text(encoding="utf-8")
    assert f"`{wheel.name}`" in table
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in table
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert not re.search(rb"(?<![\w./])/(home|root|work|Users|tmp/\w+)/", archive.read(name)), name


def test_a_process_of_a_release_does_not_run_the_tree(release: Path, tmp_path: Path) -> None:
    """Not even where a path says so: it ends with 86, and says what it would have run."""
    tree = Path(perdure.producer.__file__ or "").parent.parent
    code = "import perdure.producer; print(perdure.producer.__file__)"
    well = subprocess.run([release, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert well.returncode == 0, well.stderr
    assert Path(well.stdout.strip()).is_relative_to(release.parent.parent)
    (tmp_path / "perdure").mkdir()
    for entry in tree.iterdir():
        (tmp_path / "perdure" / entry.name).symlink_to(entry)
    (tmp_path / "perdure" / "__init__.py").touch()
    bad = subprocess.run(
        [release, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path)}
    )
    assert (bad.returncode, bad.stdout) == (86, "")
    assert "this is not the release" in bad.stderr


def test_environments_of_releases_share_no_compiled_code(tmp_path: Path) -> None:
    """Two made in the same second, with paths of one length: each runs its own check, and so its own release."""
    environments = [environment_of(WHEELS[0], tmp_path / name) for name in ("one", "two")]
    for python in environments:
        for check in python.parent.parent.rglob("_perdure_release.py"):
            os.utime(check, (0, 0))
    for python in environments:
        done = subprocess.run(
            [python, "-c", "import perdure.producer"], capture_output=True, text=True, check=False, env={}, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_both_releases_serve_one_queue(lab: Lab, releases: Releases) -> None:
    """Producers of both, workers of both, a reaper of each: every request ends once, with the right outputs."""
    lab.reaper(python=releases.python("old"))
    lab.reaper()
    for which in ("old", "new"):
        releases.worker(which, queues=("gpu", f"only-{which}"))
    producers = {which: releases.produce(which, f"only-{other(which)}", 16) for which in ("old", "new")}
    ran_by: set[str] = set()
    for which, process in producers.items():
        said = json.loads(process.communicate(timeout=2 * LONG)[0])
        assert releases.made_by(said["from"]) == which
        assert said["streamed"] == list(range(20))
        *shared, mine = (releases.made_by(place) for place in said["results"])
        assert mine == other(which)
        ran_by.update(shared)
        for identifier in said["ids"]:
            record = lab.check(identifier, 20)
            assert (record.executions, record.attempt) == (1, 0)
    assert ran_by == {"old", "new"}
    assert lab.nothing_held()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["old", "new"])
def test_the_other_release_follows_a_killed_worker(lab: Lab, releases: Releases, first: str) -> None:
    """There and back again, kill -9 each time, with a small state and one of more than a MiB.

    What the tree has written the old release may begin again from zero; it never goes on from the wrong place, and
    the tree never takes an old part of its own for the checkpoint that the old release has written since.
    Each moves for more than a second before the second loss: without that it would be a suspect, which only workers
    of the tree take.
    """
    # The small one goes on where the large one may begin again: it must not be over before both have moved enough.
    sizes = {
        lab.submit("laden", {"n": number, "sleep": 0.02, "bytes": size}): number
        for number, size in ((400, 10), (110, 1_500_000))
    }
    names = list(sizes)
    worker = releases.worker(first)
    for which, least in ((other(first), 10), (first, 85)):
        for name in names:
            lab.moved(name, least)
        worker.kill()
        worker = releases.worker(which, wait=False)
        for name in names:
            eventually(partial(held_by, lab, name, worker))
    for name in names:
        record = lab.check(name, sizes[name])
        assert record.attempt == 0
        assert releases.made_by(lab.store.result(name)) == first
        events = [event.event for event in lab.store.history(name)]
        assert events.count("redelivered") + events.count("retry") == 2
        if first == "old":
            # The tree reads everything that the release before has written.
            resumed = re.findall(rf"{name}\), attempt \d+, resumed at output (\d+)", lab.processes[1].log)
            assert int(resumed[0]) >= 10
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_payload_that_was_degraded_stays_so_in_an_old_worker(lab: Lab, releases: Releases, client: Client) -> None:
    """The old release knows of no overrides; it runs what the new one has begun."""
    lab.connection.hset(key("mode"), mapping={"mode": "degraded", "until": 2**53, "asked": 9, "asked_until": 2**53})
    new = releases.worker("new")
    payload = {"n": 80, "sleep": 0.02}
    handle = client.submit("lab_tasks.laden", payload, queue="gpu", degraded={"n": 40}, step_timeout=60)
    lab.moved(handle.id, 5)
    lab.connection.delete(key("mode"))
    new.kill()
    releases.worker("old", wait=False)
    lab.check(handle.id, 40)
    assert releases.made_by(handle.result()) == "old"
    assert handle.degraded()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["old", "new"])
def test_the_guardian_of_one_release_reaps_the_other(lab: Lab, releases: Releases, lost: str) -> None:
    """No reaper runs; a worker and its guardian are lost together, as with their host."""
    victim = releases.worker(lost)
    one = lab.submit("laden", {"n": 40, "sleep": 0.02})
    lab.moved(one, 5)
    releases.worker(other(lost), wait=False)
    victim.kill_tree()
    lab.check(one, 40)
    assert releases.made_by(lab.store.result(one)) == other(lost)
    assert ("redelivered", "WORKER_LOST") in lab.events(one)


# --- a newer protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("submit", "app.tasks.count", "{}"),
        ("show", "a"),
        ("list",),
        ("result", "a", "--timeout", "0"),
        ("cancel", "a"),
        ("requeue", "--all"),
        ("up", "gpu"),
        ("reaper",),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_a_newer_protocol_stops_every_command(
    redis_url: str,
    client: Client,
    arguments: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 4 and a message that says what to do, whatever it was to do; nothing is written."""
    from perdure.scripts.main import main

    client.submit("app.tasks.count", 1, id="a")
    connection = client._session._connection
    connection.set(key("schema"), SCHEMA + 1)
    monkeypatch.setenv("PERDURE_REDIS_URL", redis_url)
    before = connection.hgetall(key("job", "a"))
    if arguments[0] in ("up", "reaper"):  # they set signal handlers, and so want a process of their own
        done = subprocess.run(
            [sys.executable, "-m", "perdure.scripts.main", *arguments], capture_output=True, text=True, timeout=LONG,
            check=False,
        )  # fmt: skip
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code = main(arguments)
        out, err = capsys.readouterr()
    assert (code, out) == (4, "")
    assert "newer Perdure protocol" in err
    assert "upgrade this process" in err
    assert "Traceback" not in err
    assert connection.hgetall(key("job", "a")) == before


def test_a_worker_does_not_start_on_a_newer_protocol(lab: Lab) -> None:
    """Old and new alike: it ends with a message before it has claimed anything."""
    one = lab.submit("count", {"n": 1})
    lab.connection.set(key("schema"), SCHEMA + 1)
    worker = lab.worker(wait=False)
    assert worker.end() == 1
    assert "perdure worker: Redis holds data of a newer Perdure protocol" in worker.log
    assert "Traceback" not in worker.log
    assert lab.waiting() == [one]
