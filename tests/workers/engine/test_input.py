"""Bad input: each ends as a failed request that says why; the worker and everybody else's requests go on."""

from __future__ import annotations

import os
import pickle
import zlib
from typing import Any

import pytest

from perdure.protocol.errors import ProtocolMismatch
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.workers.rq.arrival import check_rq
from tests.kit.lab import Lab, eventually


def test_bad_requests_fail_with_a_reason(lab: Lab) -> None:
    """Unknown task, no task, no msgpack, no module, refused by the task: dead letters; the worker goes on."""
    worker = lab.worker(missing_timeout=1.0)
    broken = lab.submit("count", {"n": 3}, queue="later")
    lab.connection.hset(key("job", broken), "payload", b"\xc1 no msgpack")
    lab.connection.rpoplpush(key("queue", "later"), key("queue", "gpu"))
    lab.connection.hset(key("job", broken), "origin", "gpu")
    cases = {
        lab.submit("nothing_here"): ("INVALID_REQUEST", "no task named nothing_here", 0),
        lab.submit("no_task", {"folder": str(lab.folder)}): ("INVALID_REQUEST", "not a task", 0),
        lab.submit("os.system", "touch ran"): ("INVALID_REQUEST", "not a task", 0),
        broken: ("INVALID_REQUEST", "payload", 1),
        lab.submit("refuse"): ("INVALID_REQUEST", "n must be at least 1", 1),
        lab.submit("no_such_module.task", max_retries=2): ("INVALID_REQUEST", "cannot import no_such_module", 0),
        lab.submit("boom", max_retries=1): ("ERROR", "boom", 2),
    }
    for name, (kind, reason, attempts) in cases.items():
        record = lab.ended(name)
        assert (record.status, record.error_kind, record.attempt) == ("failed", kind, attempts), record
        assert reason in record.error_reason
        assert lab.connection.zscore(key("failed", "gpu"), name) is not None
        assert lab.store.traceback(name)
    assert not (lab.folder / "ran").exists()
    lab.check(lab.submit("count", {"n": 3}), 3)
    assert worker.running
    assert worker.log.count("Traceback") == 2, "of boom, at each attempt"
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_hostile_envelope_is_never_unpickled(lab: Lab) -> None:
    """The worker runs a request without looking at its ``data``: a pickle that runs code stays bytes."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(lab.folder / "hacked"),)

    one = lab.submit("count", {"n": 3})
    two = lab.submit("nothing_here")
    for name in (one, two):
        lab.connection.hset(key("job", name), "data", zlib.compress(pickle.dumps(Hostile())))
    lab.worker("--burst").end()
    lab.check(one, 3)
    assert lab.record(two).status == "queued", "a burst leaves what it could not load"
    lab.worker(missing_timeout=1.0)
    assert lab.ended(two).status == "failed"
    assert not (lab.folder / "hacked").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_restarts_from_zero(lab: Lab) -> None:
    """A log that cannot be read takes no worker down: the request begins again in a new epoch, and says so."""
    first = lab.worker()
    one = lab.submit("count", {"n": 60, "sleep": 0.02})
    lab.moved(one, 5)
    first.kill_tree()
    lab.reaper()
    eventually(lambda: lab.record(one).status == "queued")
    lab.connection.lset(key("output", one), 0, b"\xc1 damaged")  # type: ignore[arg-type]
    second = lab.worker()
    record = lab.check(one, 60)
    assert (record.epoch, record.attempt) == (1, 0)
    assert [event for event, _ in lab.events(one)] == ["redelivered", "released", "restart"]
    assert second.running


def test_a_model_that_does_not_load_hands_its_requests_back(lab: Lab) -> None:
    """load() raises: the request is handed back uncharged, and a worker that can load it runs it."""
    unfit = lab.worker(environment={"LAB_LOAD": "fail"})
    one = lab.submit("model", {"n": 3})
    eventually(lambda: lab.events(one))
    unfit.kill()
    assert lab.events(one) == [("released", "")]
    assert "no weights here" in lab.store.history(one)[0].reason
    assert lab.record(one).status == "queued"
    lab.worker(wait=False)
    assert lab.check(one, 3).attempt == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "environment", "words"),
    [
        ({"tasks": ("lab_tasks.model",)}, {"LAB_LOAD": "fail"}, "no weights here"),
        ({"tasks": ("lab_tasks.nothing",)}, {}, "no task named nothing"),
        ({}, {"PERDURE_HEARTBEET": "3"}, "did you mean PERDURE_HEARTBEAT?"),
        ({}, {"PERDURE_STEP_TIMEOUT": "soon"}, "PERDURE_STEP_TIMEOUT must be a number"),
    ],
    ids=["load", "task", "name", "value"],
)
def test_an_unfit_worker_says_why_and_ends(
    lab: Lab, settings: dict[str, Any], environment: dict[str, str], words: str
) -> None:
    """Preloading that fails and settings that cannot be: status 1, one message, no traceback, nothing claimed."""
    one = lab.submit("count", {"n": 1})
    worker = lab.worker(wait=False, environment=environment, **settings)
    assert worker.end() == 1
    assert words in worker.log
    assert worker.log.count(words) == 1
    assert "Traceback" not in worker.log
    assert lab.record(one).status == "queued"
    eventually(lambda: lab.store.workers() == [])


def test_a_queue_name_that_cannot_be_is_refused(lab: Lab) -> None:
    """Status 1 and a message that shows it, bounded."""
    worker = lab.worker(wait=False, queues=("x" * 501,))
    assert worker.end() == 1
    assert "a queue name must be a string of 1 to 500 characters, but this one is 'xxx" in worker.log
    assert "Traceback" not in worker.log


def test_an_untested_rq_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another RQ than the tested ones stops the worker with what to do; a setting allows it."""
    check_rq(Settings())
    monkeypatch.setattr("perdure.workers.rq.arrival.VERSION", "3.1.4")
    with pytest.raises(ProtocolMismatch, match=r"RQ 3\.1\.4 .* PERDURE_UNTESTED_RQ=1"):
        check_rq(Settings())
    check_rq(Settings(untested_rq=True))


@pytest.mark.parametrize("kind", ["rq.SimpleWorker", "rq.Worker"])
@pytest.mark.slow
def test_a_stock_worker_gives_requests_back(lab: Lab, kind: str) -> None:
    """RQ's own worker on our queue loses nothing and names the class that is missing; ours runs it later."""
    stock = lab.worker("-w", kind, ours=False)
    one = lab.submit("count", {"n": 3})
    eventually(lambda: "rq worker -w perdure.workers.Worker" in stock.log)
    stock.send(15)
    stock.end()
    eventually(lambda: lab.record(one).status == "scheduled")
    lab.worker(wait=False)
    assert lab.check(one, 3).attempt == 0
