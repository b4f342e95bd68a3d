"""Who works, and why a device has nobody: ``perdure workers``, and what heartbeats leave in Redis for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.protocol.transitions.heartbeats import MAX_UNFIT
from tests.kit.scripts.commands import call


def beat(connection: redis.Redis, name: str, **facts: Any) -> None:
    given: dict[str, Any] = {"queues": ["gpu"], "pid": 7, "host": "here", "ready": True} | facts
    answer = Store(connection, Settings()).heartbeat(incarnation=f"i-{name}", worker=name, **given)
    assert answer.status == "ok"


def unfit(connection: redis.Redis) -> list[tuple[str, str, str]]:
    return [(item["device"], item["host"], item["reason"]) for item in Store(connection, Settings()).unfit_devices()]


def test_an_unfit_device_is_remembered_until_one_is_ready(connection: redis.Redis) -> None:
    """By its UUID, whatever else it is called, on whichever host; said twice it is noted once."""
    for _ in range(2):
        beat(connection, "a", device="NVIDIA H200 GPU-1", unfit="GPU_RESET")
    beat(connection, "b", device="cuda:0", unfit="lost")
    assert unfit(connection) == [("NVIDIA H200 GPU-1", "here", "GPU_RESET"), ("cuda:0", "here", "lost")]
    left: Any = connection.ttl(key("unfit"))
    assert 0 < left <= 86400
    beat(connection, "c", device="NVIDIA H200 GPU-2")
    beat(connection, "c", device="GPU-1", ready=False)
    beat(connection, "c", device="cuda:0", host="elsewhere")
    assert len(unfit(connection)) == 2
    beat(connection, "c", device="GPU-1", host="elsewhere")
    assert unfit(connection) == [("cuda:0", "here", "lost")]
    beat(connection, "c", device="cuda:0")
    assert unfit(connection) == []


def test_a_reason_is_bounded(connection: redis.Redis) -> None:
    beat(connection, "a", device="GPU-1", unfit="x" * 10_000)
    assert unfit(connection) == [("GPU-1", "here", "x" * MAX_UNFIT)]


def test_workers_of_an_older_release_are_listed_too(connection: redis.Redis) -> None:
    """Their records lack what came later."""
    beat(connection, "old", device="cpu")
    connection.hdel(key("incarnation", "i-old"), "timeout", "unfit", "health", "unable")
    (item,) = Store(connection, Settings()).workers()
    assert (item["age"], item["unfit"], item["health"]) == (None, "", "")
    assert "old  " in call("workers", PERDURE_REDIS_URL=_url(connection)).stdout


def test_workers_are_listed_with_what_became_of_devices(connection: redis.Redis) -> None:
    """For people in a table and lines; for programs with the same facts. What others wrote steers no terminal."""
    beat(connection, "b", device="NVIDIA H200 GPU-2", queues=["gpu", "cpu"], health="http://127.0.0.1:9100")
    beat(connection, "a", device="NVIDIA H200 GPU-1", unfit="the driver asks\x1b[2J for GPU_RESET")
    connection.hset(key("held", "i-b"), mapping={"x": "1", "y": "2"})
    done = call("workers", PERDURE_REDIS_URL=_url(connection))
    assert done.returncode == 0, done.stderr
    header, first, second, *rest = done.stdout.splitlines()
    assert header.split() == ["NAME", "HOST", "PID", "DEVICE", "READY", "QUEUES", "BEAT", "HELD"]
    assert first.split()[:7] == ["a", "here", "7", "NVIDIA", "H200", "GPU-1", "leaving"]
    assert second.split()[6:8] == ["yes", "gpu,cpu"]
    assert second.split()[-1] == "2"
    assert rest[0] == r"a leaves its device: the driver asks\x1b[2J for GPU_RESET"
    assert rest[1].startswith(r"NVIDIA H200 GPU-1 on here is not used: the driver asks\x1b[2J for GPU_RESET (a, 20")
    told = json.loads(call("workers", "--json", PERDURE_REDIS_URL=_url(connection)).stdout)
    assert set(told) == {"items", "unfit_devices"}
    assert set(told["items"][0]) == {
        "name",
        "incarnation",
        "host",
        "pid",
        "device",
        "ready",
        "leaving",
        "queues",
        "beat_age",
        "dead_in",
        "held",
        "slots",
        "checkpoint_interval",
        "usual_checkpoint_interval",
        "task",
        "unfit",
        "unable",
        "health",
        "model",
        "stale",
    }
    assert told["items"][1]["health"] == "http://127.0.0.1:9100"
    assert told["items"][1]["unfit"] is None
    assert all(0 <= item["beat_age"] < 60 for item in told["items"])
    assert told["unfit_devices"][0]["worker"] == "a"


@pytest.mark.usefixtures("connection")
def test_without_workers_it_says_so(redis_url: str) -> None:
    done = call("workers", PERDURE_REDIS_URL=redis_url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "No worker lives.\n")


def _url(connection: redis.Redis) -> str:
    kwargs = connection.connection_pool.connection_kwargs
    return f"redis://{kwargs['host']}:{kwargs['port']}/{kwargs['db']}"
