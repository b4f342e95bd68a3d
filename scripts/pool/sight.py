"""What a supervisor sees of its pool in Redis, and shows of itself there. In a thread: Redis may not answer."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import redis

from ...protocol.connection import connect
from ...protocol.keys import key
from ...protocol.reading.reads import Reads

TIMEOUT: Final = 2.0
"""Seconds that Redis may take to answer."""

EAGER: Final = 0.2
"""Seconds between two looks while a process is on its way to readiness, or Redis does not answer."""

CALM: Final = 1.0
"""Seconds between two looks otherwise."""

SHOWN: Final = 5.0
"""Seconds between two renewals of what is shown."""

SHOWN_TTL: Final = 20
"""Seconds after which it is gone, if its supervisor is."""

DAY: Final = 86_400


@dataclass(slots=True)
class Sight:
    """Looks every now and then; answers questions at once.

    ``seen`` gets the standing of every watched process by name, ``None`` when Redis does not answer; ``judged`` a
    name and how many requests it held when it ended. Both are called in this object's thread.
    """

    url: str
    name: str
    """Of the supervisor."""
    seen: Callable[[dict[str, str] | None], None]
    judged: Callable[[str, int | None], None]
    eager: bool = True
    _watched: dict[str, str] = field(default_factory=dict)
    """Name of a process -> its incarnation."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _questions: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    _record: str = ""
    _shown: tuple[str, float] = ("", float("-inf"))
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Look from now on."""
        self._thread = threading.Thread(target=self._run, name="sight", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more, and show nothing more. Waits as long as Redis may take."""
        self._questions.put("")
        if self._thread is not None:
            self._thread.join(2 * TIMEOUT)

    def watch(self, run: str, incarnation: str) -> None:
        """A process has been started."""
        with self._lock:
            self._watched[run] = incarnation
        self.eager = True

    def ask(self, run: str) -> None:
        """It has ended: find out what it held, and watch it no longer."""
        self._questions.put(run)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show this of the supervisor from now on."""
        self._record = json.dumps(record, sort_keys=True)

    def _run(self) -> None:
        with connect(self.url, timeout=TIMEOUT, name="perdure-up", check=False) as connection:
            while True:
                self._look(connection)
                try:
                    run = self._questions.get(timeout=EAGER if self.eager else CALM)
                except queue.Empty:
                    continue
                if not run:
                    break
                self.judged(run, self._held(connection, run))
            with contextlib.suppress(redis.RedisError):
                connection.delete(key("supervisor", self.name))
                connection.srem(key("supervisors"), self.name)

    def _look(self, connection: redis.Redis) -> None:
        with self._lock:
            watched = dict(self._watched)
        try:
            with connection.pipeline(transaction=False) as pipe:
                pipe.ping()
                for incarnation in watched.values():
                    pipe.hmget(key("incarnation", incarnation), "ready", "reaped")
                _, *rows = pipe.execute()
            if any(reaped is not None for _, reaped in rows):
                self._find_again(connection, watched)
            self._show(connection)
        except redis.RedisError:
            connection.connection_pool.disconnect()
            self.eager = True
            self.seen(None)
            return
        self.seen({run: (ready or b"").decode() for run, (ready, _) in zip(watched, rows, strict=True)})

    def _find_again(self, connection: redis.Redis, watched: dict[str, str]) -> None:
        """One was declared dead by mistake and goes on under a new incarnation, or its end will be noticed soon."""
        now = {item["worker"]: item["incarnation"] for item in Reads(connection).workers()}
        with self._lock:
            for run in watched:
                if run in self._watched:
                    self._watched[run] = now.get(run, self._watched[run])

    def _held(self, connection: redis.Redis, run: str) -> int | None:
        """What it holds, or held when it was reaped: its guardian may or may not have been faster than this."""
        with self._lock:
            incarnation = self._watched.pop(run, "")
        try:
            with connection.pipeline(transaction=True) as pipe:
                pipe.hlen(key("held", incarnation))
                pipe.hget(key("incarnation", incarnation), "had")
                held, had = pipe.execute()
        except redis.RedisError:
            connection.connection_pool.disconnect()
            return None
        return max(int(held), int(had or 0))

    def _show(self, connection: redis.Redis) -> None:
        now = time.monotonic()
        record, at = self._shown
        if not self._record or (record == self._record and now - at < SHOWN):
            return
        self._shown = (self._record, now)
        with connection.pipeline(transaction=True) as pipe:
            pipe.set(key("supervisor", self.name), self._record, ex=SHOWN_TTL)
            pipe.sadd(key("supervisors"), self.name)
            pipe.expire(key("supervisors"), DAY)
            pipe.execute()
        for found in Reads(connection).lost_supervisors():
            connection.srem(key("supervisors"), found)
