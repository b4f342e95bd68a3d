"""How an idle worker waits to be rung: in Redis, for as long as it may, and here for moments."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

MOMENT: Final = 0.25
"""Seconds that one call waits here: a courier looks after its guardian, and hears of a stop, in between."""

LATE: Final = 5.0
"""Seconds after its time from which no answer means that the connection is dead."""


@dataclass(slots=True)
class Bells:
    """One ``BLPOP`` that outlasts the calls which wait for it, on a connection of its own meanwhile."""

    pool: redis.ConnectionPool
    _connection: Any = None
    _until: float = 0.0

    @property
    def waiting(self) -> bool:
        """Whether Redis has been asked, and has not answered yet."""
        return self._connection is not None

    def wait(self, names: Sequence[str], seconds: float) -> bool:
        """True once one of the lists was rung, or so many seconds after the first call; False: call again.

        Raises what redis-py raises, and ``redis.TimeoutError`` for a server that does not answer in time.
        """
        try:
            if not self.waiting:
                self._connection = self.pool.get_connection()
                self._connection.send_command("BLPOP", *names, seconds)
                self._until = time.monotonic() + seconds + LATE
            if not self._connection.can_read(MOMENT):
                if time.monotonic() > self._until:
                    raise redis.TimeoutError("Redis does not answer an idle worker")
                return False
            self._connection.read_response()
        except BaseException:
            self.close()
            raise
        self._release()
        return True

    def close(self) -> None:
        """Wait no more. A ring that comes in this moment is lost: one of the idle asks each second in any case."""
        if self.waiting:
            self._connection.disconnect()
            self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        self.pool.release(connection)
