"""Names, classes and what RQ shows of a worker: whatever stock RQ serves is served."""

from __future__ import annotations

import json
import os

import pytest
from rq import Queue
from rq import Worker as StockWorker
from rq.group import Group
from rq.job import Job

from perdure.producer import Client
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.workers import Worker
from tests.kit.lab import Lab, Quiet, eventually
from tests.kit.scripts.commands import call
from tests.worker_tasks.prefix_classes import PrefixJob, PrefixQueue

NAMES = (
    "gpu", "bench:default", "default", "tenant/42", "with space", "große Schlange", "日本", "a,b", "a", "100%", "a%2Cb",
    "{tag}",
    "*", "[x]?", "two\nlines", "tab\there", 'quo"te', "back\\slash", "rq:queue:gpu", "gpu.large@1", "x" * 300,
)  # fmt: skip


# --- queues ----------------------------------------------------------------------------------------


def test_stock_rq_serves_these_names(lab: Lab) -> None:
    """What follows is asked of ours because it is so."""
    queues = [Queue(name, connection=lab.connection) for name in NAMES]
    jobs = [queue.enqueue("os.getpid") for queue in queues]
    Quiet(queues, connection=lab.connection).work(burst=True)
    assert [job.return_value() for job in jobs] == [os.getpid()] * len(NAMES)


@pytest.mark.slow
def test_a_queue_of_any_name_is_served(lab: Lab) -> None:
    """Requests of each priority and plain jobs; they survive the worker that had them; every view shows the names."""
    worker = lab.worker(queues=NAMES, slots=64)
    with Client(lab.url, settings=Settings()) as client:
        handles = [
            client.submit("lab_tasks.count", {"n": 2}, queue=name, priority=priority)
            for name in NAMES
            for priority in ("normal", "low")
        ]
        jobs = [Queue(name, connection=lab.connection).enqueue("lab_tasks.double", 4) for name in NAMES]
        assert [handle.result(timeout=60) for handle in handles] == [{"counted": 2}] * len(handles)
        eventually(lambda: [job.return_value() for job in jobs] == [8] * len(NAMES))
        assert {handle.record().queue for handle in handles} == {*NAMES, *(f"{name}-low" for name in NAMES)}
        cursor, listed = None, 0
        while listed < len(handles):
            page = client.list(status="finished", limit=10, cursor=cursor)
            listed, cursor = listed + len(page.items), page.cursor
            assert page.items
        long = [client.submit("lab_tasks.count", {"n": 300, "sleep": 0.01}, queue=name) for name in NAMES[:3]]
        eventually(lambda: any(handle.offset() for handle in long))
        (shown,) = json.loads(call("workers", "--json", PERDURE_REDIS_URL=lab.url).stdout)["items"]
        assert shown["queues"] == list(NAMES)
        queues = json.loads(call("queues", "--json", PERDURE_REDIS_URL=lab.url).stdout)["items"]
        assert {item["name"]: item["workers"] for item in queues if item["name"] in NAMES} == dict.fromkeys(NAMES, 1)
        told = json.loads(call("doctor", "--json", PERDURE_REDIS_URL=lab.url).stdout)["findings"]
        assert not [item for item in told if "wait in" in item["what"]]
        for name in ("bench:default", "two\nlines", "a,b"):
            assert call("list", "--queue", name, PERDURE_REDIS_URL=lab.url).returncode == 0
        worker.kill_tree()
        lab.reaper()
        eventually(lambda: not any(lab.connection.scard(key("workers_of", name)) for name in NAMES))
        lab.worker(queues=tuple(reversed(NAMES)))
        assert [handle.result(timeout=60) for handle in long] == [{"counted": 300}] * 3
        assert [handle.outputs() for handle in long] == [list(range(300))] * 3


# --- classes with a prefix of their own --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["job", "queue", "both"])
def test_a_class_with_a_prefix_of_its_own_is_honoured(lab: Lab, kind: str) -> None:
    job_class, queue_class = PrefixJob if kind != "queue" else Job, PrefixQueue if kind != "job" else Queue
    arguments = [
        *(["-j", "prefix_classes.PrefixJob"] if kind != "queue" else []),
        *(["--queue-class", "prefix_classes.PrefixQueue"] if kind != "job" else []),
    ]
    queue = queue_class("gpu", connection=lab.connection, job_class=job_class)
    job = queue.enqueue("lab_tasks.double", 4)
    worker = lab.worker("--burst", *arguments)
    assert worker.end() == 0, worker.log
    assert job.return_value() == 8
    assert "has a key prefix of its own" in worker.log


def test_a_worker_with_another_prefix_hands_requests_on(lab: Lab) -> None:
    """They wait in the same queue as its jobs; none is lost, and a worker of ours runs it."""
    name = lab.submit("count", {"n": 3})
    job = Queue("gpu", connection=lab.connection, job_class=PrefixJob).enqueue("lab_tasks.double", 4)
    assert lab.worker("--burst", "-j", "prefix_classes.PrefixJob").end() == 0
    assert job.return_value() == 8
    lab.worker()
    lab.check(name, 3)


# --- what RQ shows -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_is_idle_after_each_plain_job(lab: Lab) -> None:
    """As RQ's workers are, whether it returns or raises; and the time that it worked is counted."""
    worker = lab.worker()
    queue = Queue("gpu", connection=lab.connection)
    nap = queue.enqueue("lab_tasks.nap", 1)
    eventually(lambda: shown(lab, worker.name).get_state() == "busy")
    eventually(lambda: nap.is_finished and shown(lab, worker.name).get_state() == "idle")
    fails = queue.enqueue("lab_tasks.fail", 4)
    eventually(lambda: fails.is_failed and shown(lab, worker.name).get_state() == "idle")
    assert 0.9 < shown(lab, worker.name).total_working_time < 5
    lab.ended(lab.submit("count", {"n": 5, "sleep": 0.1}))
    eventually(lambda: shown(lab, worker.name).get_state() == "idle")
    assert 1.3 < shown(lab, worker.name).total_working_time < 6


def shown(lab: Lab, name: str) -> StockWorker:
    found = StockWorker.find_by_key(key("worker", name), connection=lab.connection)
    assert isinstance(found, StockWorker)
    return found


def test_a_plain_job_finds_its_names_in_the_environment(lab: Lab) -> None:
    """``RQ_JOB_ID`` and ``RQ_WORKER_ID``, as a work horse of RQ's does; the next one finds its own."""
    worker = lab.worker()
    queue = Queue("gpu", connection=lab.connection)
    jobs = [queue.enqueue("prefix_classes.names") for _ in range(2)]
    eventually(lambda: all(job.is_finished for job in jobs))
    assert [job.return_value() for job in jobs] == [[job.id, worker.name] for job in jobs]


def test_a_burst_cleans_groups_as_rqs_does(lab: Lab) -> None:
    """A group whose jobs are all gone is forgotten; one whose jobs live is not."""
    queue = Queue("gpu", connection=lab.connection)
    gone = Group.create(connection=lab.connection, name="gone")
    (job,) = gone.enqueue_many(queue, [Queue.prepare_data("lab_tasks.double", args=(4,))])
    lives = Group.create(connection=lab.connection, name="lives")
    lives.enqueue_many(queue, [Queue.prepare_data("lab_tasks.double", args=(4,))])
    lab.connection.delete(key("job", job.id))
    assert lab.worker("--burst").end() == 0
    assert [group.name for group in Group.all(connection=lab.connection)] == ["lives"]


def test_maintenance_by_hand_cleans_groups(lab: Lab) -> None:
    """``Worker.run_maintenance_tasks`` is public: a script may call it, as RQ's own tests do."""
    queue = Queue("gpu", connection=lab.connection)
    gone = Group.create(connection=lab.connection, name="gone")
    (job,) = gone.enqueue_many(queue, [Queue.prepare_data("lab_tasks.double", args=(4,))])
    lab.connection.delete(key("job", job.id))
    Worker([queue], connection=lab.connection).run_maintenance_tasks()
    assert Group.all(connection=lab.connection) == []


def test_stock_bursts_clean_groups(lab: Lab) -> None:
    """The right value of the test above."""
    gone = Group.create(connection=lab.connection, name="gone")
    queue = Queue("gpu", connection=lab.connection)
    (job,) = gone.enqueue_many(queue, [Queue.prepare_data("lab_tasks.double", args=(4,))])
    lab.connection.delete(key("job", job.id))
    Quiet([queue], connection=lab.connection).work(burst=True)
    assert Group.all(connection=lab.connection) == []
