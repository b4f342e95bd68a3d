"""Retries with real workers: when they come, beside what, and how a person gives a dead letter another life."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from perdure.protocol.keys import key
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.backoff import schedule

BASE, CAP, RETRIES = 0.3, 0.9, 4


@pytest.mark.slow
def test_the_delays_are_those_of_the_schedule(lab: Lab) -> None:
    """First the base, then doubled, then the cap, each less up to a quarter: known before the first failure."""
    settings: dict[str, Any] = {"retry_base": BASE, "retry_cap": CAP}
    lab.reaper(**settings)
    lab.worker(**settings)
    names = [lab.submit("outage_tasks.flaky", {"failures": RETRIES}, max_retries=RETRIES) for _ in range(3)]
    expected = {name: schedule(name, RETRIES, BASE, CAP) for name in names}
    seen: dict[str, dict[float, int]] = {name: {} for name in names}

    def look() -> bool:
        for name in names:
            due = lab.connection.zscore(key("retries", "gpu"), name)
            if due is not None:
                seen[name].setdefault(float(due) / 1000, len(seen[name]))
        return all(lab.record(name).ended for name in names)

    eventually(look)
    for name in names:
        record = lab.record(name)
        assert (record.status, record.attempt, record.executions) == ("finished", RETRIES, RETRIES + 1)
        failures = [event for event in lab.store.history(name) if event.event == "retry"]
        starts = [float(raw) for raw in lab.outputs(name)]
        assert starts == [1, 2, 3, 4, 5]
        assert len(seen[name]) == len(failures) == RETRIES
        for number, (event, due, delay) in enumerate(zip(failures, seen[name], expected[name], strict=True), 1):
            ceiling = min(CAP, BASE * 2 ** (number - 1))
            assert 0.75 * ceiling <= delay <= ceiling
            # The server's clock at the failure and the time that it gave: no process takes part in this.
            assert due - event.at == pytest.approx(delay, abs=0.002)
            # And it was kept: the next failure is at least so much later.
            if number < RETRIES:
                assert failures[number].at >= due
    assert len({tuple(delays) for delays in expected.values()}) == 3, "they do not come back together"


def test_a_retry_neither_overtakes_nor_starves(lab: Lab) -> None:
    """Fresh work comes faster than it can be done, all the time: the retry runs behind what waited before it."""
    settings: dict[str, Any] = {"retry_base": 0.3}
    worker = lab.worker(**settings)
    retry = lab.submit("lab_tasks.starve", {"folder": str(lab.folder), "error": "ordinary"})
    eventually(lambda: lab.connection.zscore(key("retries", "gpu"), retry))
    order: list[str] = []
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            if len(lab.waiting()) < 30:
                order.append(lab.submit("lab_tasks.count", {"n": 1, "sleep": 0.02}))

    producer = threading.Thread(target=flood, daemon=True)
    producer.start()
    try:
        assert lab.ended(retry).status == "finished"
    finally:
        stop.set()
        producer.join()
    log = worker.log
    done = [name for name in order if f"OK ({name})" in log]
    place = log.rindex(f"OK ({retry})")
    before = [name for name in done if log.index(f"OK ({name})") < place]
    # What was there when it became due is done before it, and much of what came later after it.
    assert len(before) >= 5
    assert before == order[: len(before)]
    assert lab.waiting(), "it did not have to wait for an empty queue"


def rq(lab: Lab, *arguments: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("rq")), *arguments, "--url", lab.url],
        capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rq_requeue_revives_dead_letters(lab: Lab) -> None:
    """``rq requeue --all``: from the checkpoint where it is young, from zero and in a new epoch where it is stale."""
    lab.reaper()
    lab.worker(checkpoint_ttl=3600)
    young, stale, bare = (
        lab.submit("outage_tasks.stumble", {"n": 6, "at": at, "folder": str(lab.folder)}, max_retries=0)
        for at in (3, 3, 0)
    )
    for name in (young, stale, bare):
        assert lab.ended(name).status == "failed"
    # An hour later.
    old = int(time.time() * 1000) - 3_601_000
    lab.connection.hset(key("checkpoint", stale), "at", old)
    lab.connection.zadd(key("checkpoints"), {stale: old})
    (lab.folder / "mended").touch()
    assert "Requeueing 3 jobs" in rq(lab, "requeue", "--all", "--queue", "gpu")
    for name in (young, stale, bare):
        record = lab.ended(name)
        assert (record.status, record.attempt, record.executions) == ("finished", 0, 1)
        assert lab.outputs(name) == list(range(6))
    began = {name: lab.store.result(name)["began"] for name in (young, stale, bare)}
    assert began == {young: 3, stale: 0, bare: 0}
    assert [lab.record(name).epoch for name in (young, stale, bare)] == [0, 1, 0]
    assert [event for event, _ in lab.events(young)] == ["failed", "requeued"]
    assert [event for event, _ in lab.events(stale)] == ["failed", "requeued", "restart"]
    assert lab.nothing_held()
