"""RQ's commands to a running worker: stop a job, stop an execution, shut down."""

from __future__ import annotations

import json
import signal

import pytest
from rq import Queue
from rq.command import send_shutdown_command, send_stop_execution_command, send_stop_job_command
from rq.job import Job, JobStatus
from rq.worker import Worker as StockWorker

from perdure.protocol.keys import key
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool

FOREVER = {"n": 100_000, "sleep": 0.01}


@pytest.mark.parametrize("how", ["job", "execution"])
def test_a_stopped_request_ends_as_rq_says_it(lab: Lab, how: str) -> None:
    """Its status is RQ's word, it stays where it stopped, and the next one gets its slot at once."""
    worker = lab.worker(step_timeout=600)  # no renewal tells the worker: the command does
    one, two = lab.submit("count", FOREVER), lab.submit("count", {"n": 3})
    lab.moved(one, 3)
    job = Job.fetch(one, connection=lab.connection)
    if how == "job":
        send_stop_job_command(lab.connection, one)
    else:
        (execution,) = job.get_executions()
        send_stop_execution_command(lab.connection, one, execution.id)
    assert lab.ended(one).status == "stopped"
    lab.check(two, 3)
    assert job.get_status() is JobStatus.STOPPED
    assert lab.events(one) == [("stopped", "")]
    assert lab.connection.zscore(key("canceled", "gpu"), one) is not None
    assert lab.nothing_held()
    assert worker.running


def test_rq_knows_an_execution_without_outputs(lab: Lab) -> None:
    """Long before a renewal is due: its record is there within a few checkpoint intervals, and goes with the end."""
    worker = lab.worker(step_timeout=600)
    one = lab.submit("count", {"n": 1, "sleep": 600})
    (execution,) = eventually(Job.fetch(one, connection=lab.connection).get_executions)
    assert (execution.job_id, execution.worker_name) == (one, worker.name)
    (shown,) = StockWorker.all(lab.connection)
    assert [item.id for item in shown.get_current_executions()] == [execution.id]
    worker.kill_tree()


def test_one_of_a_batch_is_stopped(lab: Lab) -> None:
    """Its mates go on; a command that names another execution, and one that is none, do nothing."""
    worker = lab.worker()
    one, two = lab.submit("many", FOREVER), lab.submit("many", {"n": 60, "sleep": 0.01})
    lab.moved(one, 3)
    channel = key("commands", worker.name)
    lab.connection.publish(channel, json.dumps({"command": "stop-execution", "job_id": one, "execution_id": "old"}))
    for nonsense in (b"\xff", "[]", "{}", '"stop-job"', '{"command": "stop-job"}'):
        lab.connection.publish(channel, nonsense)
    lab.moved(two, 5)
    assert lab.record(one).status == "started"
    send_stop_job_command(lab.connection, one)
    assert lab.ended(one).status == "stopped"
    lab.check(two, 60)


def test_a_stop_outlives_its_worker(connection) -> None:
    """Marked, and its worker lost before it could end it: whoever hands it on ends it as stopped. Resends change
    nothing.
    """
    pool = Pool.over(connection)
    hand = Hand(pool)
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    keys = [(first.id, first.execution), (second.id, "another")]
    assert [pool.store.stop(hand.incarnation, keys) for _ in range(2)] == [["cancel", "lost"]] * 2
    pool.reap(hand.incarnation)
    assert (pool.status("a"), pool.status("b")) == ("stopped", "queued")


def test_a_cancel_that_came_first_keeps_its_word(connection) -> None:
    """Canceled, then stopped: it ends as canceled."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    pool.submit("a")
    claim = hand.take("a")
    assert pool.cancel("a") == "requested"
    assert pool.store.stop(hand.incarnation, [(claim.id, claim.execution)]) == ["cancel"]
    pool.reap(hand.incarnation)
    assert pool.status("a") == "canceled"


def test_a_plain_job_cannot_be_stopped(lab: Lab) -> None:
    """As with RQ's SimpleWorker: it runs to its end, and the log says so."""
    worker = lab.worker()
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.nap", 1)
    eventually(lambda: job.get_status() == "started")
    send_stop_job_command(lab.connection, job.id)
    eventually(lambda: "cannot interrupt a plain job" in worker.log)
    eventually(lambda: job.get_status() == "finished")
    assert job.return_value() == "rested"
    lab.check(lab.submit("count", {"n": 3}), 3)


@pytest.mark.slow
def test_the_shutdown_command_drains(lab: Lab) -> None:
    """What runs is handed back, and the worker leaves with status 0."""
    worker = lab.worker()
    one = lab.submit("count", {"n": 80, "sleep": 0.02})
    lab.moved(one, 3)
    send_shutdown_command(lab.connection, worker.name)
    assert worker.end() == 0
    assert signal.SIGINT.name in worker.log
    assert (lab.waiting(), lab.events(one)) == ([one], [("released", "")])
    lab.worker("--burst").end()
    lab.check(one, 80)
