"""Workers of RQ's own on a queue with requests: they starve none, and what one was killed with comes back by itself."""

from __future__ import annotations

import signal

import pytest
from rq import Queue

from perdure.protocol.keys import key
from perdure.recovery import reaper, strays
from tests.kit.lab import Lab, eventually, send


@pytest.mark.slow
def test_an_idle_stock_worker_starves_no_request(lab: Lab) -> None:
    """It hands each request on once, to where only ours look; plain jobs are its own as ever."""
    stock = lab.worker(ours=False)
    eventually(lambda: "Listening on gpu" in stock.log)
    names = [lab.submit("count", {"n": 3}) for _ in range(3)]
    eventually(lambda: lab.connection.scard(key("bounced", "gpu")) == 3)
    eventually(lambda: lab.connection.zcard(key("scheduled", "gpu")) == 3)
    assert stock.log.count("needs Perdure's worker") == 3
    ours = lab.worker()
    for name in names:
        lab.check(name, 3)
    late = lab.submit("count", {"n": 2})
    lab.check(late, 2)
    assert not lab.connection.exists(key("bounced", "gpu"), key("scheduled", "gpu"))
    ours.send(signal.SIGTERM)
    ours.end()
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.double", 4)
    eventually(lambda: job.get_status() == "finished")


def test_a_bounced_request_meets_cancel_and_deadline(lab: Lab) -> None:
    stock = lab.worker(ours=False)
    canceled, late = lab.submit("count", {"n": 3}), lab.submit("count", {"n": 3}, deadline=2.0)
    eventually(lambda: lab.connection.zcard(key("scheduled", "gpu")) == 2)
    assert lab.store.cancel([(canceled, "")], reason="asked") == ["canceled"]
    assert not lab.connection.sismember(key("bounced", "gpu"), canceled)
    lab.reaper()
    assert lab.ended(late).error_kind == "DEADLINE"
    assert not lab.connection.exists(key("bounced", "gpu"), key("scheduled", "gpu"))
    stock.kill()


@pytest.mark.slow
def test_what_a_stock_worker_was_killed_with_runs_by_itself(lab: Lab) -> None:
    """No person, and no `doctor --fix`: the sweep finds what RQ's registries still show."""
    one = lab.submit("count", {"n": 3})
    stock = lab.worker("-w", "held_jobs.SlowStock", ours=False)
    eventually(lambda: lab.connection.zcard(key("wip", "gpu")) and stock.children())
    send(stock.pid, signal.SIGSTOP)
    for pid in [*stock.children(), stock.pid]:
        send(pid, signal.SIGKILL)
    stock.process.wait()
    lab.worker()
    lab.reaper()
    assert strays.STUCK + reaper.EXPIRE_INTERVAL < 30
    lab.check(one, 3)
    assert ("readmitted", "") in lab.events(one)
