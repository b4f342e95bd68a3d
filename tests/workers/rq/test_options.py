"""The options of ``rq worker`` and RQ's other commands, on requests and plain jobs, each by the real command."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rq import Callback, Queue
from rq.group import Group
from rq.job import Job

from perdure.protocol.keys import key
from perdure.workers.rq.dependents import Dependents
from tests.kit.lab import LONG, Lab, eventually
from tests.kit.protocol.pool import Hand, Pool


def rq(lab: Lab, *arguments: str) -> str:
    """Run one of RQ's commands; what it prints."""
    path = str(Path(sys.executable).with_name("rq"))
    done = subprocess.run([path, *arguments, "--url", lab.url], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


def started(lab: Lab, names: list[str]) -> list[str]:
    """The names in the order in which they were started, once all have finished."""
    assert {lab.ended(name).status for name in names} == {"finished"}
    return sorted(names, key=lambda name: lab.record(name).started_at or "")


@pytest.mark.slow
def test_a_worker_leaves_after_its_idle_time(lab: Lab) -> None:
    """``--max-idle-time``: what comes in time is run first."""
    one = lab.submit("count", {"n": 3})
    began = time.monotonic()
    assert lab.worker("--max-idle-time", "1", wait=False).end() == 0
    assert time.monotonic() - began >= 1
    lab.check(one, 3)


def test_max_jobs_counts_requests_and_plain_jobs_together(lab: Lab) -> None:
    """``--max-jobs``: one of each, and the third waits for another worker."""
    one = lab.submit("count", {"n": 3})
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.double", 4)
    two = lab.submit("count", {"n": 3})
    assert lab.worker("--max-jobs", "2", wait=False).end() == 0
    lab.check(one, 3)
    assert job.return_value() == 8
    assert lab.waiting() == [two]


def test_a_name_is_had_by_one_worker_at_a_time(lab: Lab) -> None:
    """``--name``: RQ shows it at the request; a second worker of this name does not start."""
    worker = lab.worker()  # the kit names it
    one = lab.submit("count", {"n": 3})
    lab.check(one, 3)
    assert Job.fetch(one, connection=lab.connection).worker_name == worker.name
    second = lab.worker("--name", worker.name, wait=False)
    assert second.end() == 1
    assert "active worker named" in second.log
    lab.check(lab.submit("count", {"n": 3}), 3)
    assert worker.running


def test_round_robin_takes_turns(lab: Lab) -> None:
    """``--dequeue-strategy round_robin``: two queues are served by turns, the one that is named first at first, as in
    RQ.
    """
    left, right = ([lab.submit("count", {"n": 1}, queue=queue) for _ in range(4)] for queue in ("left", "right"))
    lab.worker("--burst", "--dequeue-strategy", "round_robin", queues=("left", "right")).end()
    order = ["left" if name in left else "right" for name in started(lab, [*left, *right])]
    assert order == ["left", "right"] * 4


def test_random_leaves_no_queue_out(lab: Lab) -> None:
    """``--dequeue-strategy random``: requests of two queues run, in whatever order."""
    names = [lab.submit("count", {"n": 1}, queue=queue) for queue in ("left", "right") for _ in range(10)]
    lab.worker("--burst", "--dequeue-strategy", "random", queues=("left", "right")).end()
    assert started(lab, names) != names, "once in 92378 times it is"


def test_requeue_all_revives_what_failed(lab: Lab) -> None:
    """``rq requeue --all``: requests and plain jobs run again, and the requests to their end."""
    lab.worker()
    request = lab.submit("starve", {"folder": str(lab.folder), "error": "ordinary"}, max_retries=0)
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.fail", 4)
    assert lab.ended(request).status == "failed"
    eventually(lambda: job.get_status() == "failed")
    assert "Requeueing 2 jobs" in rq(lab, "requeue", "--queue", "gpu", "--all")
    eventually(lambda: lab.record(request).status == "finished")
    eventually(lambda: len(job.results()) == 2 and job.get_status() == "failed")
    assert lab.outputs(request) == [0]


def test_empty_removes_what_waits(lab: Lab) -> None:
    """``rq empty``: what waits is gone with all its keys, what runs goes on, what comes later runs."""
    worker = lab.worker(step_timeout=LONG)
    running = lab.submit("gate", {"folder": str(lab.folder)})
    eventually((lab.folder / "gate").exists)
    waiting = [lab.submit("count", {"n": 3}) for _ in range(3)]
    job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.double", 4)
    assert "4 jobs removed from gpu queue" in rq(lab, "empty", "gpu")
    (lab.folder / "open").touch()
    lab.check(running, 6)
    lab.check(lab.submit("count", {"n": 3}), 3)
    for name in (*waiting, job.id):
        assert list(lab.connection.scan_iter(f"*{name}*")) == []
    assert worker.running


@pytest.mark.slow
def test_info_shows_a_worker_and_what_it_does(lab: Lab) -> None:
    """``rq info``: the worker's name and state, the queue's counts."""
    worker = lab.worker(step_timeout=LONG)
    assert re.search(rf"worker {worker.name} .*idle.* gpu", rq(lab, "info", "--raw"))
    one, two = lab.submit("gate", {"folder": str(lab.folder)}), lab.submit("count", {"n": 3})
    eventually((lab.folder / "gate").exists)
    shown = rq(lab, "info", "--raw", "-w", "perdure.workers.Worker")
    assert re.search(rf"worker {worker.name} .*busy.* gpu", shown)
    assert "queue gpu 1" in shown
    assert "1 executing" in rq(lab, "info")
    (lab.folder / "open").touch()
    lab.check(one, 6)
    lab.check(two, 3)
    assert "2 finished" in rq(lab, "info")


def test_a_queue_of_a_priority_is_shown_with_who_serves_it(lab: Lab) -> None:
    """A worker is started for ``gpu`` and serves ``gpu-high`` and ``gpu-low``; one for ``solo-low`` serves that
    alone.
    """
    pool = Pool.over(lab.connection)
    both, solo = Hand(pool, "both", queues=["gpu"]), Hand(pool, "solo", queues=["solo-low"])
    for hand in (both, solo):
        lab.connection.hset(key("worker", hand.name), mapping={"pid": "4711", "queues": ",".join(hand.queues)})
        hand.beat()
    shown = rq(lab, "info", "--raw", "--by-queue", "gpu-low", "gpu-high", "gpu", "solo-low", "solo-low-high")
    served = dict(re.findall(r"^(\S+): +(\S+)", shown, re.MULTILINE))
    assert served == {"gpu": "both", "gpu-high": "both", "gpu-low": "both", "solo-low": "solo", "solo-low-high": "–"}
    for hand in (both, solo):
        pool.reap(hand.incarnation)
    assert list(lab.connection.scan_iter(key("workers_of", "*"))) == []


def test_a_name_that_nobody_has_is_not_shown(lab: Lab) -> None:
    """Redis lost its last second, or its worker's record ran out: neither ``rq info`` nor a list of
    workers shows it.
    """
    pool = Pool.over(lab.connection)
    hand = Hand(pool, "lost")
    pool.submit("a")
    hand.take("a")
    hand.beat()
    stale = [key("worker", name) for name in ("ghost", "lost")]
    for name in (key("workers"), key("workers_of", "gpu")):
        lab.connection.sadd(name, *stale)
    shown = rq(lab, "info")
    assert "0 workers" in shown
    assert "ghost" not in shown
    assert not lab.connection.exists(key("workers"), key("workers_of", "gpu"))
    # Without anybody who looks, the reaper takes away what it knows of, and a worker's maintenance the rest.
    for name in (key("workers"), key("workers_of", "gpu")):
        lab.connection.sadd(name, *stale)
    pool.reap(hand.incarnation)
    assert lab.connection.smembers(key("workers")) == {stale[0].encode()}
    assert lab.connection.smembers(key("workers_of", "gpu")) == {stale[0].encode()}
    Dependents(lab.connection, ["gpu"], Queue, Job, None)._clean()
    assert not lab.connection.exists(key("workers"), key("workers_of", "gpu"))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
def test_plain_jobs_keep_what_rq_promises(lab: Lab, ours: bool) -> None:
    """Callbacks, groups, dependents and meta of plain jobs: the same on our worker as on RQ's own."""
    queue = Queue("gpu", connection=lab.connection)
    good = queue.enqueue("lab_tasks.double", 4, on_success=Callback("lab_tasks.succeeded"), meta={"who": "me"})
    bad = queue.enqueue("lab_tasks.fail", 4, on_failure=Callback("lab_tasks.failed"))
    after = queue.enqueue("lab_tasks.double", 5, depends_on=good)
    never = queue.enqueue("lab_tasks.double", 6, depends_on=bad)
    group = Group.create(connection=lab.connection)
    members = group.enqueue_many(queue, [Queue.prepare_data("lab_tasks.double", (n,)) for n in range(3)])
    gone = queue.enqueue("lab_tasks.double", 7, result_ttl=0)
    assert lab.worker("--burst", ours=ours).end() == 0
    assert lab.connection.get(f"called:{good.id}") == b"success 8"
    assert lab.connection.get(f"called:{bad.id}") == b"failure KeyError"
    assert (after.return_value(), never.get_status()) == (10, "deferred")
    assert [member.return_value() for member in members] == [0, 2, 4]
    assert len(group.get_jobs()) == 3
    assert good.get_meta() == {"who": "me"}
    assert not lab.connection.exists(key("job", gone.id))


def test_a_plain_job_has_its_timeout(lab: Lab) -> None:
    """``job_timeout``: RQ interrupts it, and what waits behind it runs."""
    queue = Queue("gpu", connection=lab.connection)
    late, next_one = queue.enqueue("lab_tasks.nap", 60, job_timeout=1), queue.enqueue("lab_tasks.double", 4)
    assert lab.worker("--burst").end() == 0
    assert (late.get_status(), next_one.return_value()) == ("failed", 8)
    result = late.latest_result()
    assert result is not None
    assert "JobTimeoutException" in (result.exc_string or "")
