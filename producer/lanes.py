"""Lanes: the connections of a client, each for one call at a time.

An exception may come out of the middle of any call, between any two instructions: a signal handler that raises, Ctrl-C,
``gevent.Timeout``. So nothing here depends on that what was begun is ended in order:

1. A lane belongs to an *owner*, an object of the call. It is free when the call has given it back, and when the owner
   is gone.
2. A lane is *clean* only from the end of a call that went through until the next one begins. One that is not is made
   anew: nobody reads the answer of a call that was interrupted, or takes it for that of a later one.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any, Final

import redis
from redis.connection import Connection, HiredisRespSerializer
from redis.utils import HIREDIS_AVAILABLE

from ..protocol.settings import Settings
from ..protocol.store import Store

if HIREDIS_AVAILABLE:
    from hiredis import pack_command

LANES: Final = 8
"""Calls in flight at once. A thousand threads that wait share as many connections."""

HEAL: Final = 0.5
"""Seconds after which who waits for a lane looks for one that was given back without a word."""


class Owner:
    """One call; who it is, and nothing else."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True)
class Lane:
    """A connection, and the store on it, once it is used."""

    store: Store | None = None
    owner: weakref.ref[Owner] | None = None
    clean: bool = False

    @property
    def free(self) -> bool:
        return self.owner is None or self.owner() is None


class Lanes:
    """Used by any number of threads at once."""

    def __init__(self, connection: redis.Redis, settings: Settings) -> None:
        """``connection`` says where Redis is and how to connect; it is not used itself."""
        self._where = connection
        self._settings = settings
        most = connection.connection_pool.max_connections - 1  # the listener has one as well
        self._lanes = [Lane() for _ in range(max(1, min(LANES, most)))]
        self._lock = threading.Lock()
        # Rung when a lane is free. One too few costs HEAL, one too many a look.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def take(self, owner: Owner, wait: float) -> Lane | None:
        """A lane for this owner's call; ``None`` if all are taken for so many seconds."""
        until = time.monotonic() + wait
        while True:
            with self._lock:
                for lane in self._lanes:
                    if lane.free:
                        lane.owner = weakref.ref(owner)
                        if lane.store is None or not lane.clean:
                            _empty(lane)
                            lane.store = Store(separate(self._where), self._settings)
                        lane.clean = False
                        return lane
            left = until - time.monotonic()
            if left <= 0:
                return None
            try:
                self._bell.get(timeout=min(left, HEAL))
            except queue.Empty:
                pass

    def give_back(self, owner: Owner) -> None:
        """End the owner's use of a lane, if it has one."""
        for lane in self._lanes:
            if lane.owner is not None and lane.owner() is owner:
                if not lane.clean:
                    _empty(lane)
                lane.owner = None
                if self._bell.qsize() < LANES:
                    self._bell.put(None)

    def renew(self) -> None:
        """Have each lane connect anew before its next call: the address may lead to another server by now."""
        for lane in self._lanes:
            lane.clean = False

    def close(self) -> None:
        """Close the connections; who is in a call gets an error."""
        for lane in self._lanes:
            if lane.store is not None:
                lane.store.connection.close()


def _empty(lane: Lane) -> None:
    """Close the connection of a lane that the caller owns."""
    if lane.store is not None:
        lane.store.connection.close()
        lane.store = None


class Packer:
    """hiredis ends the process when a signal handler raises while it makes a number text (3.4); so it gets none."""

    def pack(self, *arguments: Any) -> Any:
        """A command in Redis' protocol. redis-py's own splits its name, and looks at each word once more."""
        plain: tuple[Any, ...] = tuple([repr(value) if type(value) in _NUMBERS else value for value in arguments])
        name = plain[0]
        return [pack_command(plain)] if type(name) is str and " " not in name else HiredisRespSerializer().pack(*plain)


_NUMBERS = (int, float)


def separate(connection: redis.Redis) -> redis.Redis:
    """A client of its own for the same server: it shares no connection with this one. Connects when it is used."""
    pool = connection.connection_pool
    # Locks of the old one may be held, by a thread that a fork has left behind, say: only its values are read.
    options = {name: value for name, value in pool.connection_kwargs.items() if not name.startswith(_OF_THE_POOL)}
    if HIREDIS_AVAILABLE and issubclass(pool.connection_class, Connection):
        options.setdefault("command_packer", Packer())
    return redis.Redis.from_pool(redis.ConnectionPool(connection_class=pool.connection_class, **options))


_OF_THE_POOL = ("maint_notifications", "orig_", "himport_")
