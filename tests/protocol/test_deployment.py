"""Servers that would lose requests are named, with the line to change."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from perdure.protocol.queries.deployment import judge, look_at
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, eventually, laboratory

WELL = {"redis_version": "7.2.4", "role": "master", "maxmemory": 0, "aof_enabled": 1, "cluster_enabled": 0}


def test_our_own_server_is_well(connection: redis.Redis):
    assert look_at(connection) == []


@pytest.mark.parametrize(
    ("change", "said", "line", "fatal"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16 is too old: Perdure needs 6.2", "", True),
        ({"redis_version": "5.0"}, "too old", "", True),
        ({"role": "slave"}, "replica", "", True),
        ({"cluster_enabled": 1}, "RQ_KEY_PREFIX='{rq}'", "", True),
        ({"maxmemory": 1, "maxmemory_policy": "allkeys-lru"}, "is allkeys-lru", "maxmemory-policy noeviction", False),
        ({"aof_enabled": 0}, "append-only file is off", "appendonly yes", False),
        ({"aof_last_write_status": "err"}, "look at its disk", "", False),
    ],
)
def test_each_danger_is_named(change: dict[str, Any], said: str, line: str, fatal: bool):
    (finding,) = judge(WELL | change)
    assert said in str(finding)
    assert (finding.line, finding.fatal) == (line, fatal)
    assert line in str(finding)


@pytest.mark.parametrize(
    "change",
    [
        {"redis_version": "6.2.0"},
        {"redis_version": "10.0.1"},
        {"maxmemory": 0, "maxmemory_policy": "allkeys-lru"},
        {"maxmemory": 5, "maxmemory_policy": "noeviction"},
    ],
)
def test_what_is_no_danger_is_not_named(change: dict[str, Any]):
    assert judge(WELL | change) == []
    assert judge({}) == [], "a proxy that says little is not accused"


def test_a_worker_warns_and_works(lab: Lab, connection: redis.Redis):
    """With the very line, at its start; the requests are run all the same."""
    before: Any = connection.config_get("maxmemory*")
    connection.config_set("appendonly", "no")
    try:
        connection.config_set("maxmemory", 10**9)
        connection.config_set("maxmemory-policy", "allkeys-lru")
        worker = lab.worker()
        one = lab.submit("count", {"n": 2})
        lab.check(one, 2)
    finally:
        connection.config_set("maxmemory", before["maxmemory"])
        connection.config_set("maxmemory-policy", before["maxmemory-policy"])
        connection.config_set("appendonly", "yes")
        eventually(lambda: not connection.info("persistence")["aof_rewrite_in_progress"])
    assert "Set 'appendonly yes' in redis.conf." in worker.log
    assert "Set 'maxmemory-policy noeviction' in redis.conf." in worker.log


def test_a_worker_does_not_start_on_a_replica(server_binary, tmp_path):
    """It says why, without a traceback."""
    with Server(binary=server_binary, die_with_parent=True) as server, laboratory(server.url, tmp_path) as lab:
        lab.connection.replicaof("127.0.0.1", 1)
        worker = lab.worker(wait=False)
        assert worker.end() == 1
        assert "this server is a replica: it refuses writes; connect to its primary." in worker.log
        assert "Traceback" not in worker.log


def test_a_user_without_info_is_told(connection: redis.Redis, redis_url: str):
    connection.acl_setuser("shy", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-info"])
    try:
        with redis.Redis.from_url(redis_url.replace("redis://", "redis://shy:x@")) as shy:
            (finding,) = look_at(shy)
    finally:
        connection.acl_deluser("shy")
    assert "may not call INFO" in str(finding)
