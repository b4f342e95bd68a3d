"""A server of one's own for a measurement, and what it says about itself: memory, processor, round trips."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from ...protocol.connection import connect
from ..pool.server import Server


@dataclass(frozen=True, slots=True)
class ServerSample:
    """The server at one moment. ``reads`` counts packets of requests that came in: the round trips of all clients."""

    at: float
    done: int
    cpu: float
    reads: int


class Stage:
    """The server and a connection to it; all systems run on the same settings."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.url
        self.connection = connect(server.url, timeout=60.0, name="benchmark")

    def clear(self) -> None:
        """Nothing is left of the last system."""
        self.connection.execute_command("FLUSHALL", "SYNC")  # type: ignore[no-untyped-call]
        self.connection.execute_command("CONFIG", "RESETSTAT")  # type: ignore[no-untyped-call]

    def memory(self) -> int:
        """Bytes that the data take, with the tables of the keys and without buffers of clients and of the file."""
        info: dict[str, Any] = self.connection.info("memory")
        return int(info["used_memory"]) - int(info["mem_clients_normal"]) - int(info.get("mem_aof_buffer", 0))

    def sample(self, count: Callable[[redis.Redis], int] | None = None) -> ServerSample:
        """How it stands; one count and one INFO."""
        done = count(self.connection) if count is not None else 0
        info: dict[str, Any] = self.connection.info("cpu", "stats")
        return ServerSample(
            time.monotonic(),
            done,
            float(info["used_cpu_user"]) + float(info["used_cpu_sys"]),
            int(info["total_reads_processed"]),
        )

    def commands(self) -> dict[str, tuple[int, int]]:
        """Command -> calls and microseconds since :meth:`clear`; those within scripts are counted too."""
        info: dict[str, Any] = self.connection.info("commandstats")
        return {
            name.removeprefix("cmdstat_"): (int(row["calls"]), int(row["usec"]))
            for name, row in info.items()
            if isinstance(row, dict)
        }

    def close(self) -> None:
        self.connection.close()
