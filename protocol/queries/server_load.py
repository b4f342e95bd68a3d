"""What an operator asks of the server: its memory, its disk, its load, how fast it answers.

A question that an ACL forbids is answered with ``None`` where the rest can be; other errors of redis-py come out as
they are.
"""

from __future__ import annotations

import time
from typing import Any

import redis

from .. import scripts


def pressure(connection: redis.Redis, *, slow: int = 10, pings: int = 20) -> dict[str, Any]:
    """How hard the server has it. Durations are seconds, sizes bytes; ``None`` is what this user may not ask.

    Arguments of slow commands are not read further than the command: they may be payloads.
    """
    times = []
    for _ in range(pings):
        began = time.perf_counter()
        connection.ping()
        times.append(time.perf_counter() - began)
    times.sort()
    info: dict[str, Any] = _allowed(lambda: connection.info()) or {}
    config: dict[str, Any] = _allowed(lambda: connection.config_get("appendfsync")) or {}
    entries = _allowed(lambda: connection.slowlog_get(slow))
    used, most = info.get("used_memory"), info.get("maxmemory")
    return {
        "version": info.get("valkey_version") or info.get("redis_version"),
        "uptime": info.get("uptime_in_seconds"),
        "keys": connection.dbsize(),
        "memory": {
            "used": used,
            "peak": info.get("used_memory_peak"),
            "limit": most or None,
            "ratio": round(used / most, 4) if used and most else None,
            "fragmentation": info.get("mem_fragmentation_ratio"),
            "policy": info.get("maxmemory_policy"),
            "evicted": info.get("evicted_keys"),
        },
        "persistence": {
            "aof": None if "aof_enabled" not in info else info["aof_enabled"] == 1,
            "fsync": _word(config.get("appendfsync")),
            "last_write": info.get("aof_last_write_status"),
            "rewriting": None if "aof_rewrite_in_progress" not in info else info["aof_rewrite_in_progress"] == 1,
            "delayed_fsyncs": info.get("aof_delayed_fsync"),
        },
        "load": {
            "commands_per_s": info.get("instantaneous_ops_per_sec"),
            "clients": info.get("connected_clients"),
            "blocked": info.get("blocked_clients"),
            "rejected": info.get("rejected_connections"),
        },
        "latency": {"min": times[0], "median": times[len(times) // 2], "max": times[-1]},
        "slow": None if entries is None else [_slow(entry) for entry in entries],
    }


def _allowed(ask: Any) -> Any:
    try:
        return ask()
    except redis.exceptions.NoPermissionError:
        return None
    except redis.ResponseError:
        return None  # renamed or switched off, as managed services do


def _word(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _slow(entry: dict[str, Any]) -> dict[str, Any]:
    words = (entry.get("command") or b"").split(b" ", 2)
    command = words[0].decode(errors="replace").upper()
    if command == "EVALSHA" and len(words) > 1:
        command = f"EVALSHA {_script_names().get(words[1].decode(errors='replace'), 'of somebody else')}"
    return {"at": entry["start_time"], "seconds": entry["duration"] / 1e6, "command": command}


def _script_names() -> dict[str, str]:
    return {scripts.digest(scripts.load(name).source): name for name in scripts.names()}
