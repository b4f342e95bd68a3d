"""Two hosts, and the cable of one is pulled: packets vanish without a reset, as when a switch dies."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.protocol.keys import key
from tests.kit.deploy.network import Hosts, hosts
from tests.kit.lab import eventually

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture
def lab(server_binary: Path, tmp_path: Path) -> Iterator[Hosts]:
    with hosts(server_binary, tmp_path, ("a", "b")) as started:
        yield started


def walked(lab: Hosts, name: str) -> int:
    """How many steps of ``walk`` were computed, by anybody."""
    return len((lab.folder / f"{name}.steps").read_text().split())


def test_a_worker_that_is_cut_off_pauses_and_rejoins(lab: Hosts) -> None:
    """Its request moves within seconds, nothing is doubled; it stops computing by itself, and works on without a
    restart.
    """
    cut_off = lab.on("a").worker(step_timeout=2.0)  # a lease of 3 s, after which it pauses
    name = lab.submit("outage_tasks.walk", {"n": 250, "sleep": 0.02, "folder": str(lab.folder)})
    lab.moved(name, 10)
    other = lab.on("b").worker(step_timeout=2.0)
    incarnation = (lab.ready(cut_off.name) or {})["incarnation"]
    lab.cut("a")
    begin = time.monotonic()
    eventually(lambda: lab.record(name).worker == other.name)
    moved = time.monotonic() - begin
    print(f"moved after {moved:.2f} s")
    assert moved < 20, "5 s by the settings; the rest is a loaded machine's"
    record = lab.check(name, 250)
    assert (record.worker, record.attempt) == (other.name, 0)
    assert lab.events(name) == [("redelivered", "WORKER_LOST")]
    # It went on into its buffer until its lease must have been over, and no further; its own clock said so.
    done = walked(lab, name)
    assert 250 <= done < 250 + 200, "a lease is at most 150 steps"
    assert "no contact to Redis" in cut_off.log
    assert not cut_off.log.count("declared dead"), "nobody can have told it"
    eventually(lambda: lab.connection.hexists(key("incarnation", incarnation), "reaped"))
    other.kill_tree()
    lab.wires.mend("a")
    after = lab.submit("outage_tasks.walk", {"n": 100_000, "sleep": 0.02, "folder": str(lab.folder)})
    lab.moved(after, 3)
    assert walked(lab, name) < done + 20, "it stood still all the time, until it heard that it has lost it"
    assert (lab.record(after).worker, cut_off.running) == (cut_off.name, True)
    assert eventually(lambda: lab.ready(cut_off.name) or {})["incarnation"] != incarnation
    # RQ's commands arrive as well: their connection only listens, and the server knew it no more.
    stop = json.dumps({"command": "stop-job", "job_id": after})
    eventually(lambda: lab.connection.publish(key("commands", cut_off.name), stop) and lab.record(after).ended)
    assert "Traceback" not in cut_off.log


READ = """
import sys
from perdure.producer import Client
with Client() as client:
    for output in client.get(sys.argv[1]).stream():
        print(output, flush=True)
"""

SUBMIT = """
from perdure.producer import Client
with Client(patience=60) as client:
    print(client.submit("lab_tasks.count", {"n": 5}, queue="gpu", idempotency_key="once").result(timeout=60))
"""


def test_producers_and_a_reaper_that_are_cut_off_go_on(lab: Hosts, tmp_path: Path) -> None:
    """A stream stands still and goes on gapless; a submit is stored once; a reaper sweeps again; the pool needed none
    of them.
    """
    lab.on("b").worker()
    lab.worker()
    name = lab.submit("count", {"n": 350, "sleep": 0.02})
    reaper = lab.on("a").reaper(reap_interval=0.5)
    reader = lab.run("reader", READ, name)
    eventually(lambda: reader.log.count("\n") >= 10)
    lab.cut("a")
    submitter = lab.run("submitter", SUBMIT)
    seen = reader.log.count("\n")
    eventually(lambda: "no sweep, trying again" in reaper.log)
    lab.moved(name, seen + 100)
    pulse = lab.connection.hget(key("pulse"), "at")
    eventually(lambda: lab.connection.hget(key("pulse"), "at") != pulse)  # a guardian sweeps now
    assert reader.log.count("\n") < seen + 50, "nothing comes through"
    assert submitter.running
    assert reader.running
    lab.wires.mend("a")
    assert submitter.end() == 0, submitter.log
    assert submitter.log == "{'counted': 5}\n"
    eventually(lambda: "Redis answers again" in reaper.log)
    lab.check(name, 350)
    assert reader.end() == 0, reader.log
    assert reader.log.split() == [str(index) for index in range(350)]
    assert reaper.running
