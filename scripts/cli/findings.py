"""What ``perdure doctor`` finds in the server and the pool. Each answer is a finding, also a good one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import redis

from ...protocol.keys import all_served, key
from ...protocol.queries.deployment import look_at
from ...protocol.queries.inspection import checkpoints, leases, queue_facts
from ...protocol.queries.server_load import pressure
from ...protocol.records import whole
from ...protocol.settings import Settings
from ...protocol.store import Store
from ...recovery.strays import Stray
from ..present.reading import duration, size


class Level(StrEnum):
    """``fail``: requests are or will be lost, or nothing works. ``warn``: something costs more than it should."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer; ``change`` is the line to change, a command or a setting, empty where none helps."""

    level: Level
    what: str
    why: str = ""
    change: str = ""


FULL: Final = 0.8
"""Share of the server's memory above which new requests are close to being refused."""

SLOW: Final = 0.005
SKEW: Final = 1.0
COMPACT: Final = 1024
NODE: Final = 512
"""Bytes: what ``hash-max-listpack-value`` and ``stream-node-max-bytes`` are where this project sets up a server."""


# --- the server ----------------------------------------------------------------------------------


def examine_server(connection: redis.Redis) -> list[Finding]:
    """What the server is set up to, and how it does."""
    found = [
        Finding(Level.FAIL, item.problem, item.why, f"redis.conf: {item.line}" if item.line else "")
        for item in look_at(connection)
    ]
    before = time.time()
    seconds, micros = connection.time()
    middle = (before + time.time()) / 2
    found += judge_server(pressure(connection, slow=0), skew=seconds + micros / 1e6 - middle)
    try:
        compact: Any = connection.config_get("hash-max-*-value")
        nodes: Any = connection.config_get("stream-node-max-bytes")
    except redis.ResponseError:
        return found  # this user may not ask, or its host has renamed CONFIG
    return found + judge_memory(int(next(iter(compact.values()), 0)), int(next(iter(nodes.values()), 0)))


def judge_memory(value: int, node: int) -> list[Finding]:
    """From ``hash-max-listpack-value`` and ``stream-node-max-bytes``, in bytes; 0 is unknown."""
    found = []
    if 0 < value < COMPACT:
        why = "a waiting request takes twice the memory: its hash is kept compact only while no value is longer"
        change = f"redis.conf: hash-max-listpack-value {COMPACT}"
        found.append(Finding(Level.WARN, f"hash-max-listpack-value is {value}", why, change))
    if node > NODE:
        why = "a finished request takes 4 KB more: RQ keeps one stream of one entry for each result"
        found.append(
            Finding(Level.WARN, f"stream-node-max-bytes is {node}", why, f"redis.conf: stream-node-max-bytes {NODE}")
        )
    return found


def judge_server(facts: Mapping[str, Any], *, skew: float) -> list[Finding]:
    """From :func:`perdure.protocol.queries.server_load.pressure`; ``skew``: seconds that the server is ahead."""
    memory, disk, latency = facts["memory"], facts["persistence"], facts["latency"]["median"]
    found = [Finding(Level.OK, f"the server is {facts['version'] or 'of an unknown version'}, {facts['keys']} keys")]
    if disk["fsync"] == "no":
        why = "what was acknowledged in the last half minute may not be on its disk when the machine dies"
        found.append(Finding(Level.WARN, "appendfsync is no", why, "redis.conf: appendfsync everysec"))
    if disk["delayed_fsyncs"]:
        why = "a slow disk holds up every client"
        found.append(
            Finding(Level.WARN, f"its disk was too slow for the append-only file {disk['delayed_fsyncs']} times", why)
        )
    if memory["evicted"]:
        why = "keys of requests may be among them"
        found.append(
            Finding(
                Level.FAIL, f"{memory['evicted']} keys were evicted", why, "redis.conf: maxmemory-policy noeviction"
            )
        )
    if memory["ratio"] is None:
        pass
    elif memory["ratio"] > FULL:
        why = "at its limit new requests are refused and checkpoints give way"
        change = "maxmemory, or fewer and smaller results: PERDURE_RESULT_TTL"
        found.append(
            Finding(Level.WARN, f"{100 * memory['ratio']:.0f} % of its {size(memory['limit'])} are in use", why, change)
        )
    else:
        found.append(Finding(Level.OK, f"{100 * memory['ratio']:.0f} % of its {size(memory['limit'])} are in use"))
    if latency > SLOW:
        why = "each claim and each checkpoint waits for it"
        found.append(
            Finding(Level.WARN, f"a round trip takes {1000 * latency:.1f} ms", why, "run workers closer to Redis")
        )
    else:
        found.append(Finding(Level.OK, f"a round trip takes {1000 * latency:.2f} ms"))
    if abs(skew) > SKEW:
        why = "deadlines are the server's, so nothing breaks; dates in logs do not fit together"
        found.append(
            Finding(
                Level.WARN,
                f"its clock and this machine's differ by {duration(abs(skew))}",
                why,
                "run an NTP client on both",
            )
        )
    return found


# --- the pool ------------------------------------------------------------------------------------


def examine_pool(store: Store, settings: Settings) -> list[Finding]:
    """Who works, what waits for nobody, and what should have been seen to."""
    names = store.queues()
    workers = store.workers()
    stock = _stock_workers(store, {worker["worker"] for worker in workers})
    seconds, micros = store.connection.time()
    at: Any = store.connection.hget(key("pulse"), "at")
    pulse = whole(at)
    states, number = checkpoints(store, begin=0, limit=100, newest=True)
    return judge_pool(
        workers=workers,
        stock=stock,
        queues=queue_facts(store, names),
        overdue=[lease.id for lease in leases(store, names, within=0.0, limit=100)],
        pulse_age=None if not pulse else seconds + micros / 1e6 - pulse / 1000,
        unfit=store.unfit_devices(),
        mode=str(store.mode()) if store.mode().degraded else "",
        states=number * sum(item.bytes for item in states) // max(1, len(states)),
        room=_room(store.connection),
        reap_interval=settings.reap_interval,
        heartbeat=settings.heartbeat,
    )


def _stock_workers(store: Store, ours: set[str]) -> dict[str, list[str]]:
    """Workers that are registered with RQ and send no heartbeats of ours -> their queues."""
    members: Any = store.connection.smembers(key("workers"))
    names = sorted(raw.decode(errors="replace").removeprefix(key("worker")) for raw in members)
    others = [name for name in names if name not in ours]
    with store.connection.pipeline(transaction=False) as pipe:
        for name in others:
            pipe.hmget(key("worker", name), "queues", "death")
        rows = pipe.execute() if others else []
    return {
        name: [queue for queue in (queues or b"").decode(errors="replace").split(",") if queue]
        for name, (queues, death) in zip(others, rows, strict=True)
        if queues and not death
    }


def _room(connection: redis.Redis) -> int | None:
    """Bytes until the server's memory is full; ``None`` without a limit, or where it is not told."""
    try:
        info: Any = connection.info("memory")
    except redis.ResponseError:
        return None
    return info["maxmemory"] - info["used_memory"] if info.get("maxmemory") else None


def judge_pool(
    *,
    workers: Sequence[Mapping[str, Any]],
    stock: Mapping[str, Sequence[str]],
    queues: Sequence[Any],
    overdue: Sequence[str],
    pulse_age: float | None,
    unfit: Sequence[Mapping[str, Any]],
    mode: str,
    states: int,
    room: int | None,
    reap_interval: float,
    heartbeat: float,
) -> list[Finding]:
    """Findings from what was read. ``pulse_age``: seconds since a sweep; ``states``: bytes of all checkpoints."""
    ready = [worker for worker in workers if worker["ready"] and worker["dead_in"] > 0]
    found = [Finding(Level.OK, f"{len(ready)} of {len(workers)} workers are ready")] if workers else []
    served = all_served(queue for worker in workers for queue in worker["queues"])
    for item in queues:
        if item.waiting and item.name not in served:
            why = "no worker that lives serves it" if workers else "no worker lives"
            change = f"perdure worker {item.name}"
            found.append(Finding(Level.FAIL, f"{item.waiting} requests wait in {item.name}", why, change))
    ours = {item.name for item in queues if item.counters.get("submitted")}
    for name, theirs in stock.items():
        if shared := sorted(ours & set(theirs)):
            why = "each request that it takes comes up to a second later to a worker that can run it"
            change = f"rq worker -w perdure.workers.Worker {' '.join(shared)}"
            found.append(Finding(Level.WARN, f"worker {name} on {', '.join(shared)} is RQ's own", why, change))
    for worker in workers:
        if worker["dead_in"] < 0:
            what = f"worker {worker['worker']} on {worker['host']} has been silent for {duration(worker['age'])}"
            found.append(Finding(Level.WARN, what, "it is dead, and a sweep takes its requests", "perdure reaper"))
        if worker["unfit"]:
            what = f"worker {worker['worker']} leaves its device"
            found.append(Finding(Level.WARN, what, worker["unfit"], "repair the device, or take it out"))
    found += _slow(ready)
    found += _unable(ready)
    found += _stale(ready)
    for entry in unfit:
        what = f"{entry['device']} on {entry['host']} is not used"
        found.append(Finding(Level.WARN, what, entry["reason"], "repair the device, then start a worker on it"))
    # Without a reaper the guardians sweep, once per heartbeat.
    late = 4 * max(reap_interval, heartbeat) + 5
    if workers and (pulse_age is None or pulse_age > late):
        said = "nobody has ever swept" if pulse_age is None else f"nobody has swept for {duration(pulse_age)}"
        found.append(Finding(Level.FAIL, said, "lost hosts and hung steps are not noticed", "perdure reaper"))
    if overdue:
        more = "100 or more" if len(overdue) >= 100 else str(len(overdue))
        why = f"they have not moved for one and a half step timeouts, {overdue[0]} longest"
        found.append(
            Finding(Level.WARN, f"{more} leases are overdue", why, "perdure leases --within 0; perdure reaper")
        )
    if mode:
        found.append(Finding(Level.WARN, mode, "low priority is refused, batches are halved", "perdure workers"))
    failed = sum(item.failed for item in queues)
    if failed:
        found.append(Finding(Level.OK, f"{failed} failures are kept", "", "perdure dead-letters"))
    if room is not None and states > room:
        what = f"checkpoints have {size(states)}, and the server has room for {size(room)} more"
        found.append(Finding(Level.WARN, what, "as many again as there are now do not fit", "redis.conf: maxmemory"))
    return found


def _slow(workers: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Whose checkpoints come less often, since Redis is busy."""
    stretched = [
        item for item in workers if item["held"] and (item["interval"] or 0) > 1.5 * (item["usual"] or math.inf)
    ]
    if not stretched:
        return []
    worst = max(stretched, key=lambda item: item["interval"])
    what = (
        f"{len(stretched)} of {len(workers)} workers checkpoint less often, {worst['worker']} every "
        f"{worst['interval']:.1f} s instead of every {worst['usual']:g} s"
    )
    why = "calls take long: Redis is busy, or far away; until that ends, a crash costs that much work"
    return [Finding(Level.WARN, what, why, "redis-cli --latency; give Redis a core of its own")]


def _unable(workers: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What workers could not load; it fails requests where no worker of a queue could."""
    found = []
    lacks = {(lack["task"], worker["worker"]): lack["reason"] for worker in workers for lack in worker["unable"]}
    for (task, name), reason in lacks.items():
        queues = next(all_served(worker["queues"]) for worker in workers if worker["worker"] == name)
        others = {worker["worker"] for worker in workers if queues & all_served(worker["queues"])}
        nobody = all((task, other) in lacks for other in others)
        what = f"worker {name} could not load {task}{', and no other one of its queues could' if nobody else ''}"
        change = "install there what is missing; it tries again by itself"
        found.append(Finding(Level.FAIL if nobody else Level.WARN, what, reason, change))
    return found


def _stale(workers: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Who runs code that was edited since."""
    return [
        Finding(
            Level.WARN,
            f"worker {worker['worker']} runs old code",
            f"{worker['stale']} was edited after it had been loaded",
            "restart it; perdure up --reload does so by itself",
        )
        for worker in workers
        if worker["stale"]
    ]


def strays_found(strays: Sequence[Stray], fixed: Sequence[str], *, deep: bool) -> list[Finding]:
    """What became of requests that RQ's own worker was killed with."""
    left = [stray for stray in strays if stray.id not in fixed]
    found = []
    if fixed:
        found.append(Finding(Level.OK, f"{len(fixed)} requests that RQ's own worker was killed with wait again"))
    if left:
        places = ", ".join(sorted({stray.where for stray in left}))
        some = ", ".join(stray.id for stray in left[:5]) + (", …" if len(left) > 5 else "")
        why = f"no worker finds them: {some} ({places})"
        what = f"{len(left)} requests are where RQ's own worker was killed with them"
        found.append(Finding(Level.FAIL, what, why, f"perdure doctor --fix{' --deep' if deep else ''}"))
    if not strays:
        found.append(Finding(Level.OK, "RQ's own workers have left no request behind"))
    return found
