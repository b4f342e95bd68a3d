"""What the figures were measured on: the machine, the interpreters, the server and its settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import redis

from ..pool.server import Server

_SETTINGS = (
    "appendonly", "appendfsync", "save", "maxmemory-policy", "stream-node-max-bytes", "hash-max-ziplist-value",
    "io-threads",
)  # fmt: skip

_PACKAGES = ("redis", "hiredis", "rq", "msgpack", "torch", "transformers", "numpy")


def describe() -> dict[str, Any]:
    """Of this machine and this environment; ``load`` is the one minute average as it is now."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "load": round(os.getloadavg()[0], 2),
    }


def describe_server(server: Server, connection: redis.Redis) -> dict[str, Any]:
    """Which server, and the settings that move figures; the same for all systems of a run."""
    info: dict[str, Any] = connection.info("server")
    name = info.get("server_name", "redis")
    settings: dict[str, str] = {}
    for option in _SETTINGS:
        found: dict[Any, Any] = connection.config_get(option)
        settings |= {_text(key): _text(value) for key, value in found.items()}
    return {
        "server": f"{_text(name)} {info.get('valkey_version') or info['redis_version']}",
        "binary": server.binary.name,
        "settings": settings,
    }


def one_line(machine: dict[str, Any]) -> str:
    """The description in a line, for tables and pictures."""
    packages = machine["packages"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores",
        f"Python {machine['python']}",
        *([f"torch {packages['torch']}"] if "torch" in packages else []),
        *([machine["server"]] if "server" in machine else []),
        machine["date"],
        f"load at the start {machine['load']:g}",
    ]
    return ", ".join(parts)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
