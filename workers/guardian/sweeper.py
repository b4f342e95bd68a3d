"""The sweeper: a guardian's thread that sweeps when no reaper does, over a connection of its own.

A sweep is several calls. Made between two heartbeats it would let a slow Redis kill the worker, whose heartbeat may be
late by a few calls at most.
"""

from __future__ import annotations

import threading

import redis

from ...protocol.connection import TIMEOUT
from ...protocol.errors import ProtocolMismatch
from ...protocol.settings import Settings
from ...protocol.transitions.sweeps import Sweeps
from ...recovery.reaper import Reaper
from .companion import portable, rebuild


class Sweeper:
    """Sweeps once for each time that it is asked, or for several times that came while it swept."""

    def __init__(self, connection: redis.Redis, settings: Settings) -> None:
        """``connection`` says where Redis is; the sweeper makes another one."""
        self._where = connection
        self._settings = settings
        self._asked = threading.Event()
        self._over = False
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Have it sweep soon; returns at once."""
        self._asked.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """No sweep begins after this one; does not wait for it."""
        self._over = True
        self._asked.set()

    def _run(self) -> None:
        connection = rebuild(portable(self._where), timeout=TIMEOUT, acknowledged=TIMEOUT)
        reaper = Reaper(Sweeps(connection, self._settings), self._settings)
        try:
            while self._asked.wait() and not self._over:
                self._asked.clear()
                try:
                    reaper.sweep()
                except (redis.RedisError, OSError):
                    # Another guardian is asked when this sweep has not ended in time.
                    connection.connection_pool.disconnect()
        except ProtocolMismatch:
            pass  # the next heartbeat tells the guardian
        finally:
            connection.close()
