"""What stands in Redis may have been written by anybody: nothing of it is run, and it ends no process."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.serializers import DefaultSerializer

from perdure.producer import Client
from perdure.protocol.codec import pack
from perdure.protocol.errors import PerdureError
from perdure.protocol.keys import key
from perdure.protocol.transitions.calls import Progress
from perdure.scripts.main import main
from perdure.workers.rq.dependents import Dependents
from perdure.workers.rq.notices import Notices
from tests.kit.lab import Lab, eventually

STATE = pack(1, limit=100, what="state")

JOB = (
    "task", "payload", "status", "origin", "last", "execution", "attempt", "executions", "epoch", "client",
    "created_at",
    "enqueued_at", "started_at", "ended_at", "worker_name", "cancel", "error_kind", "error_reason", "retries_left",
    "max_retries", "result_ttl", "failure_ttl", "claimed", "holder", "nonce", "digest", "meta", "description", "data",
    "timeout", "deadline", "queue_deadline", "step_ms", "degraded", "stretched", "payload_aside", "company", "losses",
    "crashes",
    "crashes_total", "best_offset", "best_seq", "waits", "suspected", "success_callback_name", "failure_callback_name",
    "stopped_callback_name", "webhooks", "result", "exc_info", "dependency_id", "dependency_ids", "retry_intervals",
)  # fmt: skip
"""Every field of a job hash that Perdure or RQ reads."""

CHECKPOINT = (
    "seq", "offset", "at", "fingerprint", "crc", "state", "chunks", "sum", "length", "writing", "stepped",
)  # fmt: skip

SHARED: dict[str, str] = {
    "leases": "zset of gpu", "retries": "zset of gpu", "deadlines": "zset of gpu", "suspects": "zset of gpu",
    "isolating": "zset", "beats": "zset", "unready": "zset", "checkpoints": "zset", "fingerprints": "zset",
    "parents": "set",
    "notices": "set", "counters": "hash", "pulse": "hash", "mode": "hash", "queue": "list of gpu",
    "bell": "list of gpu",
    "queues": "set", "workers": "set", "workers_of": "set of gpu", "wip": "zset of gpu", "finished": "zset of gpu",
    "failed": "zset of gpu", "canceled": "zset of gpu", "scheduled": "zset of gpu", "deferred": "zset of gpu",
    "incarnation": "hash of false", "held": "hash of false", "execution": "hash of false",
    "executions": "zset of false",
    "worker": "hash of false", "limited": "set",
}  # fmt: skip
"""Keys that no single request owns: their types, and of what."""

FIELDS = (
    "at", "since", "mode", "until", "live", "expected", "seen", "recovering", "dwell", "lowest", "lowest_since",
    "asked",
    "asked_until", "peaks", "ready_at", "claimed:gpu", "fenced:gpu", "finished:gpu", "failed:gpu", "redelivered:gpu",
    "reaped",
    "worker", "queues", "pid", "host", "device", "ready", "started", "wip", "had", "hung", "hung_at", "id", "job_id",
    "created_at", "last_heartbeat", "worker_name", "birth", "state", "current_job", "version",
)  # fmt: skip
"""Fields of those of them that are hashes."""


class Hostile:
    """What an attacker with access to Redis would store."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


HARMLESS = {"garbage": b"\xff\xfe\x00\n\tgarbage", "infinite": b"1e999"}


def hostile(marker: Path, field: str = "") -> bytes:
    """A pickle that leaves a mark when it is read, in the form in which the reader of this field would take it."""
    raw = pickle.dumps(Hostile(marker), protocol=4)
    if field in ("data", "exc_info"):
        return zlib.compress(raw)
    if field == "exc_string":
        return base64.b64encode(zlib.compress(raw))
    return base64.b64encode(raw) if field == "return_value" else raw


def victims(lab: Lab, number: int) -> list[str]:
    """So many requests that wait with a checkpoint: one output and a state of 1, of two still to come."""
    names = [lab.submit("count", {"n": 3}) for _ in range(number)]
    store = lab.store
    for start in range(0, number, 128):
        claims = store.claim(
            incarnation="made", worker="made", queues=["gpu"], task="", free=128, slots={}, known=names[:start]
        ).claims
        rows = [
            Progress(
                id=claim.id,
                execution=claim.execution,
                seq=1,
                offset=0,
                outputs=1,
                blob=pack([claim.epoch, 0, [0]], limit=100, what="output"),
                state=STATE,
                fingerprint=claim.fingerprint,
            )
            for claim in claims
        ]
        assert set(store.progress("made", rows)) == {"ok"}
        keys = [(claim.id, claim.execution) for claim in claims]
        assert set(store.release("made", "made", keys, reason="made")) == {"queued"}
    store.reap(incarnation="made", kind="WORKER_LOST", reason="made")
    return names


def harm_shared(connection: redis.Redis, value: bytes) -> None:
    """Put it wherever no single request is meant."""
    for name, kind in SHARED.items():
        kind, _, whose = kind.partition(" of ")
        place = key(name, whose)
        if kind == "zset":
            connection.zadd(place, {value: 1})
        elif kind == "set":
            connection.sadd(place, value)
        elif kind == "list":
            connection.rpush(place, value)
        else:
            connection.hset(place, mapping=dict.fromkeys(FIELDS, value))
    connection.zadd(key("beats"), {"false": 1})
    connection.sadd(key("notices"), value + b":failed:x", b"x:failed:" + value)


def speak(connection: redis.Redis, worker: str, value: bytes) -> None:
    """Say it on every channel, and as every part of RQ's commands."""
    for channel in (key("commands", worker), key("replies", "tester")):
        connection.publish(channel, value)
    parts: list[Any] = [{}, [], 1, None, value.decode("latin1")]
    for part in parts:
        connection.publish(key("commands", worker), json.dumps(part))
        for command in ("stop-job", "stop-execution", "shutdown-not", part):
            connection.publish(key("commands", worker), json.dumps({"command": command, "job_id": part}))
            connection.publish(
                key("commands", worker), json.dumps({"command": command, "job_id": "x", "execution_id": part})
            )


def spared(lab: Lab, identifier: str, number: int = 3) -> None:
    """It ran to its end beside all that."""
    assert lab.ended(identifier).status == "finished"
    assert lab.outputs(identifier) == list(range(number))


@pytest.mark.parametrize("noted", ["notices", "parents"])
def test_a_request_s_meta_is_no_pickle_for_rq(connection: redis.Redis, tmp_path: Path, noted: str) -> None:
    """RQ's code, which calls callbacks and enqueues dependents, reads a job's meta as soon as it fetches it."""
    marker = tmp_path / "hostile-was-here"
    lab = Lab("", tmp_path, connection)
    name = lab.submit("count", {"n": 3})
    connection.hset(key("job", name), mapping={"meta": hostile(marker), "failure_callback_name": "nowhere.nothing"})
    connection.sadd(key(noted), f"x:failed:{name}" if noted == "notices" else name)
    if noted == "notices":
        assert Notices(connection, Job, DefaultSerializer).tell() == 1
    else:
        Dependents(connection, ["gpu"], Queue, Job, DefaultSerializer).enqueue()
    assert connection.exists(key(noted)) == 0
    assert not marker.exists()
    Job.fetch(name, connection=connection)
    assert marker.exists(), "RQ's own way"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["os.system", "builtins.eval", "subprocess.run", "lab_tasks.plain", "perdure.workers.task"]
)
def test_only_tasks_run(lab: Lab, path: str) -> None:
    """Whatever else can be imported is refused, and never called."""
    lab.worker(missing_timeout=1.0)
    name = lab.submit(path, {"n": 1})
    record = lab.ended(name)
    assert (record.status, record.error_kind) == ("failed", "INVALID_REQUEST")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pickle", *HARMLESS])
def test_nothing_that_stands_in_redis_is_run(lab: Lab, tmp_path: Path, form: str, capsys: Any) -> None:
    """In every field of every key, one request harmed in one field: worker, guardian, reaper and readers live on."""
    marker = tmp_path / "hostile-was-here"
    value = HARMLESS.get(form) or hostile(marker)
    connection = lab.connection
    places = [("job", field) for field in JOB] + [("checkpoint", field) for field in CHECKPOINT]
    places += [("output", ""), ("history", ""), ("results", ""), ("results", "return_value"), ("results", "exc_string")]
    names = victims(lab, len(places))
    door = lab.submit("gate", {"folder": str(tmp_path)}, queue="door")
    reaper, worker = lab.reaper(), lab.worker(queues=("door", "gpu"))
    lab.moved(door, 3)  # it has no room for others until somebody opens
    for name, (kind, field) in zip(names, places, strict=True):
        place, entry = key(kind, name), HARMLESS.get(form) or hostile(marker, field)
        if kind in ("output", "history"):
            connection.rpush(place, entry)
        elif kind == "results":
            connection.xadd(place, {field or "type": entry})
        else:
            connection.hset(place, field, entry)
    # As if somebody waited for each of them, and callbacks were to be called.
    connection.sadd(key("parents"), *names)
    connection.sadd(
        key("notices"), *(f"x:{word}:{name}" for name in names for word in ("failed", "finished", "stopped"))
    )
    harm_shared(connection, value)
    speak(connection, worker.name, value)
    innocent = [lab.submit("count", {"n": 3}) for _ in range(3)]
    (tmp_path / "open").touch()
    for name in innocent:
        spared(lab, name)

    # Harmed while they run, too; and their worker is lost in the middle of it.
    gates = [lab.submit("gates", {"n": 3, "at": 1, "folder": str(tmp_path)}) for _ in range(4)]
    eventually(lambda: all(lab.record(name).execution for name in gates))
    speak(connection, worker.name, value)
    second = lab.worker()
    worker.kill()
    last = lab.submit("count", {"n": 3})
    (tmp_path / "gate-open").touch()
    for name in gates:
        spared(lab, name)
    spared(lab, last)
    eventually(lambda: connection.zcard(key("beats")) <= 2)

    with Client(lab.url) as client:
        for name in [*names, *innocent]:
            for question in ("status", "outputs", "history", "checkpoint", "details"):
                try:
                    getattr(client.get(name), question)()
                except (PerdureError, ValueError):
                    pass
            try:
                client.get(name).result(timeout=0.01)
                list(client.get(name).stream(timeout=0.01))
            except (PerdureError, ValueError, TimeoutError):
                pass
        assert len(client.list(limit=1000).items) >= len(innocent)
    for arguments in (
        ["list", "--limit", "1000"],
        *(["show", name] for name in names),
        *(["result", name, "--timeout", "0.01"] for name in names),
    ):
        assert main([*arguments, "--url", lab.url]) in range(5), arguments
    assert "Traceback" not in capsys.readouterr().err
    for process in (second, reaper):
        assert process.running, process.log
        assert "Exception in thread" not in process.log, process.log
    assert len(second.children()) == 1
    assert "starting another" not in second.log

    def told() -> bool:
        # A note that the lost worker had begun with is left to it for a while longer.
        notes: Any = connection.smembers(key("notices"))
        left = [note for note in notes if not connection.exists(key("notice", note.decode(errors="replace")))]
        return not left and not connection.exists(key("parents"))

    eventually(told)
    assert not marker.exists()
    pickle.loads(hostile(marker))
    assert marker.exists(), "it would have been seen"
