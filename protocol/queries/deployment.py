"""Whether a server is set up to keep requests: its version, its eviction policy, its persistence.

Read from ``INFO``, which managed services allow as well; ``CONFIG`` they often do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import redis

from ..keys import PREFIX

OLDEST: Final = (6, 2)
"""The oldest release of Redis whose commands the scripts use only."""


@dataclass(frozen=True, slots=True)
class ServerProblem:
    """One thing that is wrong with a server, and the line that changes it."""

    problem: str
    why: str
    line: str
    """For ``redis.conf``; empty where no line helps."""
    fatal: bool = False
    """Nothing works like this: a worker does not start."""

    def __str__(self) -> str:
        change = f" Set {self.line!r} in redis.conf." if self.line else ""
        return f"{self.problem}: {self.why}.{change}"


def look_at(connection: redis.Redis) -> list[ServerProblem]:
    """What a person should change about this server; the worst first. Empty when all is well.

    A user whom an ACL forbids ``INFO`` gets one finding that says so. Raises what redis-py raises.
    """
    try:
        info: Any = connection.info()
    except redis.exceptions.NoPermissionError:
        return [ServerProblem("this user may not call INFO", "whether the server keeps requests cannot be checked", "")]
    return judge(info)


def judge(info: Mapping[str, Any]) -> list[ServerProblem]:
    """The findings from the fields of ``INFO``, as redis-py parses them."""
    found: list[ServerProblem] = []
    # Valkey says for compatibility which Redis it is; its own number is another field.
    version = str(info.get("redis_version", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        need = ".".join(map(str, OLDEST))
        found.append(ServerProblem(f"Redis {version} is too old", f"Perdure needs {need} or later", "", fatal=True))
    if info.get("role") == "slave":
        found.append(
            ServerProblem("this server is a replica", "it refuses writes; connect to its primary", "", fatal=True)
        )
    if str(info.get("cluster_enabled", "0")) == "1" and not re.search(r"\{[^{}]+\}", PREFIX):
        why = "its scripts need all keys in one slot; start every process with RQ_KEY_PREFIX='{rq}'"
        found.append(ServerProblem("this server is a cluster", why, "", fatal=True))
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if int(info.get("maxmemory", 0)) and policy != "noeviction":
        why = "at its maxmemory, Redis would delete keys of waiting and running requests"
        found.append(ServerProblem(f"maxmemory-policy is {policy}", why, "maxmemory-policy noeviction"))
    if str(info.get("aof_enabled", "1")) == "0":
        why = "requests accepted since the last snapshot are lost when the server dies"
        found.append(ServerProblem("the append-only file is off", why, "appendonly yes"))
    elif str(info.get("aof_last_write_status", "ok")) != "ok":
        why = "the last write to it failed; look at its disk"
        found.append(ServerProblem("the append-only file cannot be written", why, ""))
    return found
