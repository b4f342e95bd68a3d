"""The worker's side of its guardian: starts it, tells it what changed, and replaces it when it is gone."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import redis

from ...protocol.settings import PREFIX, Settings
from ..tasks.forks import in_child
from . import kin
from .watchdog import Page

PIPE_SIZE = 256 * 1024
"""Bytes that the stacks of a crash or a hang may have without waiting for a guardian to read them. Linux only."""

RESTART_INTERVAL = 1.0
"""Seconds between two starts of a guardian, so that one that cannot start does not use up the machine."""


class Guarded(Enum):
    """What the guardian has to say of this worker's incarnation; the value is its exit status."""

    WELL = 0
    REAPED = 10
    """It was declared dead, and all that it held runs elsewhere."""
    OUTDATED = 11
    """Redis holds a newer protocol than this worker speaks."""


@dataclass(slots=True, weakref_slot=True)
class Companion:
    """Keeps one guardian process beside this worker.

    The guardian learns everything through its standard input, whose other end only this process has:
    its end of file is the worker's death. A word on it says that the end is clean.
    """

    connection: redis.Redis
    settings: Settings
    worker: str
    queues: Sequence[str]
    device: str = ""
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    fingerprints: list[str] = field(default_factory=list)
    ready: bool | str = False
    unable: list[dict[str, Any]] = field(default_factory=list)
    """Tasks that this worker could not load: task, kind, reason, and since when by the monotonic clock."""
    sources: dict[str, str] = field(default_factory=dict)
    """Files of the code that it has loaded, with the digests of what it has loaded."""
    page: Page = field(default_factory=Page.create)
    """The counters of the engine loop and the courier; the guardian reads them."""
    crash_file: int = field(default_factory=lambda: os.open(os.devnull, os.O_WRONLY))
    """Descriptor on which faulthandler writes: at any time the pipe to the guardian, if there is one. It stays open,
    so that what was once told to write on it never writes into another file that got its number.
    """
    token: str = ""
    """By which the worker's kin is known (:mod:`.kin`)."""
    _incarnation: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _started: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """The courier's thread starts guardians while the main thread has something to tell."""

    @property
    def pid(self) -> int | None:
        """Process id of the guardian, if one was started."""
        return self._process.pid if self._process else None

    def __post_init__(self) -> None:
        in_child(self._forked)

    def _forked(self) -> None:
        # A child that a task forks would report its own crash as this worker's, and keep the pipe open after its end.
        faulthandler.disable()
        pipes = [self.crash_file]
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.closed:
            pipes.append(self._process.stdin.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for pipe in pipes:
            os.dup2(nowhere, pipe, inheritable=False)
        os.close(nowhere)

    def watch(self, incarnation: str) -> None:
        """Have this incarnation guarded, in place of any earlier one."""
        self.dismiss()
        self._incarnation = incarnation
        self._start()

    def tend(self) -> Guarded:
        """Start another guardian if this one is gone, unless it left with a verdict. Cheap: for every round."""
        status = None if self._process is None else self._process.poll()
        if self._process is None or status is None:
            return Guarded.WELL
        if status in (Guarded.REAPED.value, Guarded.OUTDATED.value):
            return Guarded(status)
        if time.monotonic() - self._started >= RESTART_INTERVAL:
            self.log.warning("the guardian (pid %d) is gone; starting another", self._process.pid)
            self._start()
        return Guarded.WELL

    def tell(
        self,
        *,
        fingerprints: list[str] | None = None,
        ready: bool | str | None = None,
        unable: list[dict[str, Any]] | None = None,
        sources: dict[str, str] | None = None,
    ) -> None:
        """The fingerprints that this worker can continue, whether it claims now (``"spare"``: once it is told to;
        ``"leaving"``: no longer, for it was told to stop), what it could not load, and the files of what it has
        (:mod:`..tasks.sources`).
        """
        if fingerprints is not None:
            self.fingerprints = fingerprints
        if ready is not None:
            self.ready = ready
        if unable is not None:
            self.unable = unable
        if sources is not None:
            self.sources = sources
        with self._lock:
            self._report_crashes()  # what was just loaded may have turned it elsewhere
        news: dict[str, Any] = {"fingerprints": self.fingerprints, "ready": self.ready, "unable": self.unable}
        self._send(news if sources is None else {**news, "sources": self.sources})

    def abandon(self) -> None:
        """Leave without the word that the end is clean: the guardian reaps as soon as Redis answers."""
        self._send({"left": True})  # in order, though: no request is to blame for this end
        faulthandler.disable()
        self._process = None  # its pipe is closed with this process

    def give_up(self, why: str) -> None:
        """Nothing in this process can go on: have the guardian end it as one that hangs."""
        self._send({"hung": why})

    def dismiss(self) -> None:
        """The end is clean: the guardian exits without reaping."""
        if self._process is None:
            return
        self._send({"bye": True})
        faulthandler.disable()
        self._turn_crashes(None)  # or the guardian would see no end of its pipe
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                pass  # it was gone already
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            # It waits for a Redis that does not answer; without its word it would reap a live worker.
            self._process.kill()
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                pass  # it writes to a disk that does not answer, where no signal reaches it
        self._process = None

    def _start(self) -> None:
        with self._lock:
            self._launch()

    def _launch(self) -> None:
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            # -P: whatever lies in the current folder is not imported in place of ours.
            [sys.executable, "-P", "-m", "perdure.workers.guardian.process"],
            stdin=subprocess.PIPE,
            pass_fds=[self.page.fd],
            # A session of its own: Ctrl-C in the terminal is the worker's to handle, and the guardian outlives it.
            start_new_session=True,
            env=_environment(self.settings),
        )
        _widen(self._process)
        self._write(
            {
                "connection": portable(self.connection),
                "incarnation": self._incarnation,
                "worker": self.worker,
                "queues": list(self.queues),
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "device": self.device,
                "fingerprints": self.fingerprints,
                "ready": self.ready,
                "unable": self.unable,
                "sources": self.sources,
                "drains": True,
                "page": self.page.fd,
                "token": self.token,
            }
        )
        self._report_crashes()

    def _report_crashes(self) -> None:
        """Have a native crash of this process (SIGSEGV and the like) write its stacks to the guardian."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.closed:
            self._turn_crashes(self._process.stdin.fileno())
            faulthandler.enable(self.crash_file)

    def _turn_crashes(self, pipe: int | None) -> None:
        target = os.open(os.devnull, os.O_WRONLY) if pipe is None else pipe
        os.dup2(target, self.crash_file, inheritable=False)
        if pipe is None:
            os.close(target)

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._write(message)

    def _write(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            # It is gone, which tend() will see; or the other thread dismisses it in this moment (closed: ValueError).
            pass


def _widen(process: subprocess.Popen[bytes]) -> None:
    """Let a dump of many threads into the pipe at once, as far as the system allows it."""
    if process.stdin is None or not hasattr(fcntl, "F_SETPIPE_SZ"):
        return
    try:
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # this user has as many pipes as the system gives; a guardian that reads makes room as well


def _environment(settings: Settings) -> dict[str, str]:
    """The environment of this process with exactly these settings; the server comes through the pipe."""
    rest = {
        name: value
        for name, value in kin.environment().items()
        if not name.startswith(PREFIX) and name != "RQ_REDIS_URL"
    }
    return rest | settings.replace(redis_url="").environment()


def portable(connection: redis.Redis) -> dict[str, Any]:
    """What another process needs to make the same connection, as JSON: plain values only.

    It holds the password: it goes through a pipe, never through a command line or the environment.
    """
    pool = connection.connection_pool
    kwargs = pool.connection_kwargs
    plain = {name: value for name, value in kwargs.items() if isinstance(value, str | int | float | bool)}
    names = ("host", "port", "db", "username", "password", "path")
    result = {name: value for name, value in plain.items() if name in names or name.startswith("ssl_")}
    kind = pool.connection_class
    result["ssl"] = issubclass(kind, redis.SSLConnection)
    if issubclass(kind, redis.UnixDomainSocketConnection):
        result["unix_socket_path"] = result.pop("path")
    return result


def private_connection(connection: redis.Redis, *, timeout: float) -> redis.Redis:
    """A connection of one's own to the same server, without redis-py's retries; ``timeout`` in seconds."""
    return rebuild(portable(connection), timeout=timeout)


def rebuild(values: dict[str, Any], *, timeout: float, acknowledged: float = 0.0) -> redis.Redis:
    """A connection from what :func:`portable` gave. Nothing is sent twice behind our back.

    ``acknowledged`` makes it one for a slow server, where a deadline is meant for one answer: it asks nothing of its
    own when it connects, waits ``timeout`` seconds for an answer, and yet notices within ``acknowledged`` seconds that
    nobody takes what it has sent (the network is cut), where the system can tell that.
    """
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    options: dict[str, Any] = {}
    if acknowledged:
        options = {"protocol": 2, "driver_info": None}
        if hasattr(socket, "TCP_USER_TIMEOUT") and "unix_socket_path" not in values:
            options["socket_keepalive"] = True
            options["socket_keepalive_options"] = {socket.TCP_USER_TIMEOUT: round(acknowledged * 1000)}
    return redis.Redis(
        **values,
        **options,
        socket_timeout=timeout,
        socket_connect_timeout=min(timeout, 2.0),
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )
