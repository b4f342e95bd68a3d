"""Workers that cannot load a task: others run it; if none can, its requests end with the reason, in bounded time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from perdure.producer import Client
from perdure.protocol.keys import key
from tests.kit.lab import Lab, Process, eventually
from tests.kit.places import TASKS

MODULES = {
    "no module": "",
    "no task": "",
    "raises": "raise RuntimeError('libcuda.so.1: cannot open shared object file')\n",
    "no library": "import a_library_that_nobody_has\n",
    "does not load": (
        "from perdure.workers import BatchTask\n"
        "class Work(BatchTask):\n"
        "    def load(self): raise FileNotFoundError('/models/x: no such file')\n"
        "    def admit(self, request): ...\n"
        "    def step(self): return []\n"
        "    def drop(self, request_id): ...\n"
        "work = Work()\n"
    ),
    "no task at all": "def work(request): return 1\n",
}
KINDS = [
    kind if kind in ("no module", "does not load") else pytest.param(kind, marks=pytest.mark.slow) for kind in MODULES
]
GOOD = """
from perdure.workers import Step, task

@task
def work(request):
    yield Step(output=0)
    return "ok"
"""


@pytest.fixture
def lab(lab: Lab) -> Lab:
    lab.settings |= {"missing_timeout": 2.0, "unloadable_timeout": 4.0}
    return lab


def folder(lab: Lab, name: str, text: str | None) -> dict[str, str]:
    """An environment in which the module `special` has this text; none without."""
    place = lab.folder / name
    place.mkdir(exist_ok=True)
    if text is not None:
        (place / "special.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(place), str(TASKS)])}


def broken(lab: Lab, kind: str) -> dict[str, str]:
    return folder(lab, "broken", None if kind == "no module" else MODULES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_cannot_load_a_task_costs_the_queue_nothing(lab: Lab, kind: str) -> None:
    """Beside one that can, every request is answered, none is charged, and the first keeps no request for a moment."""
    lab.settings |= {"missing_timeout": 60.0, "unloadable_timeout": 60.0}
    bad = lab.worker(environment=broken(lab, kind))
    first = lab.submit("special.work")
    eventually(lambda: ("released", "") in lab.events(first))
    lab.worker(environment=folder(lab, "good", GOOD))
    names = [first, *(lab.submit("special.work") for _ in range(20))]
    for name in names:
        record = lab.check(name, 1)
        assert record.attempt == 0
    released = sum(event == "released" for name in names for event, _ in lab.events(name))
    assert released <= 3, "it went on claiming what it cannot run"
    assert "left to others for 5 s" in bad.log
    lab.check(lab.submit("count", {"n": 2}), 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_worker_can_load_ends_with_the_reason(lab: Lab, kind: str) -> None:
    """Also what comes later, and what waits in a priority; other tasks of the queue run meanwhile."""
    lab.reaper()
    for _ in range(2):
        lab.worker(environment=broken(lab, kind))
    early = lab.submit("special.work")
    lab.check(lab.submit("count", {"n": 2}), 2)
    low = lab.submit("special.work", queue="gpu-low")
    missing = kind in ("no module", "no task", "no task at all")
    for name in (early, low):
        record = lab.ended(name)
        assert (record.status, record.error_kind) == ("failed", "INVALID_REQUEST" if missing else "ERROR")
        assert record.error_reason.startswith(
            f"none of the 2 workers of queue {record.queue} could load special.work: "
        )
        assert record.attempt == 0
    assert not lab.connection.exists(key("leases", "gpu"))


@pytest.mark.slow
def test_nothing_ends_while_no_worker_lives(lab: Lab) -> None:
    """The clock starts anew with a worker that joins; the one that has the module then runs it."""
    lab.reaper()
    bad = lab.worker(environment=broken(lab, "no module"))
    name = lab.submit("special.work")
    eventually(lambda: ("released", "") in lab.events(name))
    bad.kill()
    eventually(lambda: not lab.connection.exists(key("unable")))
    began = time.monotonic()
    eventually(lambda: time.monotonic() - began > 2.5)
    assert not lab.record(name).ended
    lab.worker(environment=folder(lab, "good", GOOD))
    lab.check(name, 1)


@pytest.mark.slow
def test_a_module_that_comes_later_is_loaded_by_the_same_worker(lab: Lab) -> None:
    lab.settings |= {"missing_timeout": 60.0}
    environment = broken(lab, "no module")
    lab.worker(environment=environment)
    name = lab.submit("special.work")
    eventually(lambda: ("released", "") in lab.events(name))
    folder(lab, "broken", GOOD)
    lab.check(name, 1)
    eventually(lambda: not lab.store.words()[0])


@pytest.mark.slow
def test_everybody_is_told_why_nothing_moves(lab: Lab) -> None:
    """The client's error, `workers`, `doctor`, `/readyz`, and the metrics' count."""
    lab.settings |= {"unloadable_timeout": 60.0}
    worker = lab.worker(environment=broken(lab, "does not load"), health_port=18091)
    said = "could not load special.work: FileNotFoundError: /models/x: no such file"
    with Client(lab.url) as client:
        handle = client.submit("special.work", {}, queue="gpu")
        eventually(lambda: lab.store.words()[0])
        with pytest.raises(TimeoutError, match=re.escape(f"the only worker of queue gpu {said}")):
            handle.result(timeout=0.5)
        with pytest.raises(TimeoutError, match=re.escape(said)):
            list(handle.stream(timeout=0.5))
    (item,) = lab.store.workers()
    assert [(lack["task"], lack["kind"]) for lack in item["unable"]] == [("special.work", "broken")]
    assert re.search(
        r"could not load special.work \([\d.]+ s ago\): FileNotFoundError: /models/x", perdure(lab, "workers")
    )
    assert said.partition(": ")[0] in perdure(lab, "doctor")
    assert json.loads(perdure(lab, "workers", "--json"))["items"][0]["unable"][0]["task"] == "special.work"
    url = eventually(lambda: lab.store.workers()[0]["health"])
    eventually(lambda: "special.work" in ready(url)["checks"]["worker"]["reason"])
    assert ready(url)["checks"]["worker"]["state"] == "degraded"
    assert worker.running


def perdure(lab: Lab, *words: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("perdure")), *words, "--url", lab.url],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


def ready(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/readyz") as answer:
        return json.load(answer)


def test_a_queue_of_unloadable_tasks_makes_no_spin(lab: Lab) -> None:
    """Two hundred entries that it leaves alone: it asks as often as an idle worker does."""
    lab.settings |= {"missing_timeout": 60.0}
    worker: Process = lab.worker(environment=broken(lab, "no module"))
    first = lab.submit("special.work")
    eventually(lambda: ("released", "") in lab.events(first))
    for _ in range(200):
        lab.submit("special.work")

    def claims() -> int:
        return int(lab.connection.info("commandstats")["cmdstat_blpop"]["calls"])

    before = claims()
    eventually(lambda: claims() >= before + 3)
    assert worker.running
    assert len(lab.waiting()) == 201
