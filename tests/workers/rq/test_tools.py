"""rq-dashboard and django-rq, started as their users start them, show our requests as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.kit.deploy.deployment import SCRIPTS, free_port
from tests.kit.lab import Lab, eventually
from tests.kit.places import TESTS

SITE = TESTS / "django_site" / "rq_pages.py"

SHOWN = {"queued": 2, "started": 2, "finished": 1, "failed": 1, "deferred": 0, "scheduled": 0}
"""What RQ's tools count of :func:`pool`. A retry that waits is none of its scheduled jobs: docs/rq.md."""


@dataclass
class Pages:
    """A server of pages, and what shows it who asks."""

    base: str
    cookie: str = ""

    def get(self, path: str) -> tuple[int, str]:
        asked = urllib.request.Request(self.base + path, headers={"Cookie": self.cookie})
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def text(self, path: str) -> str:
        status, text = self.get(path)
        assert status == 200, (path, status, text[-2000:])
        return text

    def data(self, path: str) -> Any:
        return json.loads(self.text(path))

    def answers(self) -> bool:
        try:
            return self.get("/")[0] != 0
        except OSError:
            return False


@contextmanager
def served(command: list[str], folder: Path, port: int) -> Iterator[Pages]:
    """A server process, ended in the end."""
    log = folder / "pages.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    pages = Pages(f"http://127.0.0.1:{port}")
    try:
        eventually(lambda: pages.answers() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        found = re.search(r"sessionid=\w+", log.read_text())
        pages.cookie = found[0] if found else ""
        yield pages
        said = log.read_text()
        assert "Traceback" not in said, said
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def pool(lab: Lab) -> dict[str, list[str]]:
    """Requests in every state, and a worker that runs two of them."""
    lab.worker(retry_base=600.0, retry_cap=600.0)
    found = {
        "finished": [lab.submit("count", {"n": 2})],
        "failed": [lab.submit("refuse", {})],
        "scheduled": [lab.submit("boom", {})],
    }
    for name in found["finished"] + found["failed"]:
        lab.ended(name)
    eventually(lambda: lab.record(found["scheduled"][0]).status == "scheduled")
    found["started"] = [lab.submit("many", {"n": 10_000, "sleep": 0.02}) for _ in range(2)]
    for name in found["started"]:
        lab.moved(name, 2)
    # Of another task: they wait until the worker is empty.
    found["queued"] = [lab.submit("count", {"n": 1}) for _ in range(2)]
    return found


def unharmed(lab: Lab, pool: dict[str, list[str]]) -> None:
    """Who looks changes nothing: what ran still runs, in the same execution."""
    for name in pool["started"]:
        assert (lab.record(name).status, lab.events(name)) == ("started", [])
        lab.moved(name, len(lab.outputs(name)) + 1)
    assert lab.waiting() == pool["queued"]
    assert lab.record(pool["scheduled"][0]).status == "scheduled"


@pytest.mark.slow
def test_rq_dashboard_shows_the_pool_as_it_is(lab: Lab, pool: dict[str, list[str]], tmp_path: Path):
    """Every page of it, for every state and request, with the true numbers and names."""
    port = free_port()
    command = [str(SCRIPTS / "rq-dashboard"), "--bind", "127.0.0.1", "--port", str(port), "--redis-url", lab.url]
    with served(command, tmp_path, port) as pages:
        for page in ("/", "/0/view/queues", "/0/view/workers", "/0/view/jobs"):
            assert "RQ" in pages.text(page)
        (queue,) = pages.data("/0/data/queues.json")["queues"]
        counted = {"queued": queue["count"]} | {
            state: queue[f"{state}_job_registry_count"] for state in SHOWN if state != "queued"
        }
        assert (queue["name"], counted) == ("gpu", SHOWN)
        for state, number in SHOWN.items():
            pages.text(f"/0/view/jobs/gpu/{state}/8/asc/1")
            listed = pages.data(f"/0/data/jobs/gpu/{state}/8/asc/1.json")["jobs"]
            assert len(listed) == number
            assert {job["id"] for job in listed} == (set(pool[state]) if number else set())
        for state, names in pool.items():
            for name in names:
                assert name in pages.text(f"/0/view/job/{name}")
                assert pages.data(f"/0/data/job/{name}.json")["status"] == state
        (one,) = pool["finished"]
        assert pages.data(f"/0/data/job/{one}.json")["result"] == {"counted": 2}
        assert "n must be at least 1" in pages.data(f"/0/data/job/{pool['failed'][0]}.json")["exc_info"]
        (worker,) = pages.data("/0/data/workers.json")["workers"]
        assert (worker["name"], worker["state"], worker["queues"]) == ("worker-0", "busy", ["gpu"])
        assert worker["current_job"]["job_id"] in pool["started"]
        unharmed(lab, pool)

        # Its buttons work too.
        asked = urllib.request.Request(f"{pages.base}/job/{pool['failed'][0]}/requeue", method="POST")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert json.load(answer) == {"status": "OK"}
        assert lab.waiting() == [*pool["queued"], *pool["failed"]]


@pytest.mark.slow
def test_django_rq_shows_the_pool_as_it_is(lab: Lab, pool: dict[str, list[str]], tmp_path: Path):
    """Its pages too, though opening them runs RQ's own clean-up."""
    port = free_port()
    command = [sys.executable, str(SITE), str(port), str(urlsplit(lab.url).port), str(tmp_path)]
    with served(command, tmp_path, port) as pages:
        assert pages.cookie
        assert "gpu" in pages.text("/rq/")
        (queue,) = pages.data("/rq/stats.json")["queues"]
        counted = {"queued": queue["jobs"]} | {state: queue[f"{state}_jobs"] for state in SHOWN if state != "queued"}
        assert (queue["name"], queue["workers"], counted) == ("gpu", 1, SHOWN)
        for state, number in SHOWN.items():
            page = pages.text(f"/rq/queues/0/{'' if state == 'queued' else state + '/'}")
            for other, names in pool.items():
                for name in names:
                    assert (f"/{name}/" in page) == (bool(number) and other == state), (state, other)
        pages.text("/rq/queues/0/details/")
        for state, names in pool.items():
            for name in names:
                page = pages.text(f"/rq/queues/0/{name}/")
                assert name in page
                assert re.search(rf"\b{state}\b", page, re.IGNORECASE), (state, page)
        found = re.search(r'href *= *[\'"](/rq/workers/0/[^\'"]+)', pages.text("/rq/workers/0/"))
        assert found
        page = pages.text(found[1])
        assert "worker-0" in page
        assert "busy" in page.lower()
        assert any(name in page for name in pool["started"])
        unharmed(lab, pool)
