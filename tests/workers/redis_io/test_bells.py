"""How an idle worker waits: long in Redis, and here for moments."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import JobStatus

from perdure.protocol.keys import crowd, key
from perdure.protocol.scripts import digest, load
from perdure.scripts.pool.server import Server
from perdure.workers.redis_io import bells as module
from perdure.workers.redis_io.bells import Bells
from tests.kit.lab import Lab, eventually


@pytest.fixture
def bells(connection: redis.Redis) -> Iterator[Bells]:
    bells = Bells(connection.connection_pool)
    yield bells
    bells.close()


def blocked(connection: redis.Redis) -> int:
    found: Any = connection.info("clients")
    return int(found["blocked_clients"])


def test_one_wait_in_redis_outlasts_many_here(
    bells: Bells, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOMENT", 0.001)
    connection.config_resetstat()  # here: some servers count a call when it begins to wait, others when it ends
    assert not any(bells.wait(["bell"], 60) for _ in range(20))
    assert (bells.waiting, blocked(connection)) == (True, 1)
    connection.lpush("bell", "1")
    eventually(lambda: bells.wait(["bell"], 60))
    assert (bells.waiting, connection.llen("bell")) == (False, 0)
    stats: Any = connection.info("commandstats")
    assert stats["cmdstat_blpop"]["calls"] == 1


def test_its_time_is_over_without_a_ring(bells: Bells) -> None:
    eventually(lambda: bells.wait(["bell"], 0.05))
    assert not bells.waiting


def test_who_stops_waits_no_more(bells: Bells, connection: redis.Redis) -> None:
    """Nothing is left in Redis that would take a ring from others, and it may wait again."""
    bells.wait(["bell"], 60)
    bells.close()
    eventually(lambda: blocked(connection) == 0)
    bells.wait(["bell"], 60)
    connection.lpush("bell", "1")
    eventually(lambda: bells.wait(["bell"], 60))


def test_a_server_that_does_not_answer_is_noticed(
    server_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead connection says nothing."""
    monkeypatch.setattr(module, "LATE", 0.0)
    monkeypatch.setattr(module, "MOMENT", 0.01)
    with Server(tmp_path, binary=server_binary) as own, redis.Redis.from_url(own.url) as connection:
        bells = Bells(connection.connection_pool)
        assert not bells.wait(["bell"], 0.2)
        os.kill(own.pid, signal.SIGSTOP)
        try:
            with pytest.raises(redis.TimeoutError, match="does not answer"):
                eventually(lambda: bells.wait(["bell"], 0.2))
        finally:
            os.kill(own.pid, signal.SIGCONT)
        assert not bells.waiting


# --- what an idle pool asks of Redis -------------------------------------------------------------------


def test_of_idle_workers_one_asks_and_all_beat_briefly(lab: Lab) -> None:
    """What three idle workers send while the heart of one beats thirty times."""
    lab.reaper()
    for _ in range(3):
        lab.worker()
    names = {name: digest(load(name).source) for name in ("claim", "beat", "heartbeat")}
    number = dict.fromkeys(names, 0)
    askers: set[str] = set()
    with lab.connection.monitor() as monitor:  # type: ignore[no-untyped-call]
        while number["beat"] < 90:
            command = monitor.next_command()
            words = command["command"].split(" ")
            for name, sha in names.items():
                if words[0].upper() == "EVALSHA" and words[1] == sha:
                    number[name] += 1
                    assert number["heartbeat"] <= 90 // 4
                    if name == "claim":
                        askers.add(words[4])
    assert len(askers) == 1


def test_when_the_one_that_asks_is_busy_the_next_one_does(lab: Lab) -> None:
    """Two jobs of a stock producer, who rings no bell: the second is done while the first is."""
    for _ in range(3):
        lab.worker()
    eventually(lambda: lab.connection.exists(key("looker", crowd(("gpu-high", "gpu", "gpu-low")))))
    queue = Queue("gpu", connection=lab.connection)
    first = queue.enqueue("lab_tasks.nap", 60.0)
    eventually(lambda: first.get_status() == JobStatus.STARTED)
    second = queue.enqueue("lab_tasks.double", 4)
    eventually(lambda: second.get_status() == JobStatus.FINISHED)
    assert (second.return_value(), first.get_status()) == (8, JobStatus.STARTED)


def test_a_pool_that_redis_forgot_is_known_again(lab: Lab) -> None:
    """FLUSHALL, or a lost second of its file: the short heartbeat has nothing to renew, and the whole one follows."""
    lab.worker()
    eventually(lambda: lab.store.workers())
    lab.connection.flushall()
    (worker,) = eventually(lambda: lab.store.workers())
    assert (worker["worker"], worker["queues"], worker["ready"]) == ("worker-0", ["gpu"], True)
    assert lab.connection.exists(key("worker", "worker-0")) == 0  # RQ's own registration is RQ's to make
