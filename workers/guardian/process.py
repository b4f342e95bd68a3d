"""The guardian: a small process beside every worker.

It sends the worker's heartbeats (loading weights can hold the GIL for longer than a heartbeat may be late) and
watches the worker: when the worker is gone, it reaps at once what the worker held, without waiting for any timeout.
When no reaper has swept lately, it sweeps, in a thread of its own (:mod:`.sweeper`): no heartbeat waits for that.
Beside that, in threads and processes of their own, it looks at the worker's health (:mod:`..health.state`).

It looks at the worker's two counters (:mod:`.watchdog`) and ends a worker that hangs. What it knows of the end (who
stood still, what faulthandler wrote, what the kernel counted) decides the kind of failure.

It imports only the standard library, redis and the protocol, so that it starts in a fraction of a
second and a failing driver cannot take it along.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import redis

from ...protocol.records import FailureKind
from ...protocol.settings import Settings
from ...protocol.store import Store
from ...protocol.telemetry import logs
from ...protocol.telemetry.log_writer import flush
from ...protocol.transitions.heartbeats import refreshed
from ...recovery.cgroups import OomKills
from ...recovery.deaths import Death, exit_status
from ...recovery.failures import POLICIES
from ..tasks.sources import Sources
from .companion import Guarded, rebuild
from .kin import LAST, Kin
from .sweeper import Sweeper
from .vitals import Vitals
from .watchdog import Lookout, Page

LAST_EFFORT = 60.0
"""Seconds that a guardian whose worker is gone tries to reach Redis; afterwards the heartbeat has long run out
and any reaper does the same."""

MOMENT = 0.05
"""Seconds between the end of the worker's pipe and that of its process, at most."""

PAUSE = 0.1
"""Seconds between two tries of a call that Redis did not answer."""

MAX_DUMP = 1_000_000
"""Bytes of faulthandler's dump that are read; what is kept of it is shorter."""

VERDICTS = {"ok": Guarded.WELL, "reaped": Guarded.REAPED, "newer": Guarded.OUTDATED}


@dataclass(slots=True)
class Guardian:
    """Beats for a worker until its pipe ends."""

    store: Store
    settings: Settings
    incarnation: str
    worker: str
    queues: list[str]
    pid: int
    host: str
    device: str
    fingerprints: list[str]
    ready: bool | str
    unable: list[dict[str, Any]] = field(default_factory=list)
    """Tasks that the worker could not load; see :class:`.companion.Companion`."""
    sources: Sources = field(default_factory=Sources)
    """What the worker has loaded of its user's code."""
    drains: bool = False
    """Whether the worker knows the signal that its device is unfit."""
    token: str = ""
    """By which the worker's kin is known."""
    page: int = -1
    """Descriptor of the memory with the worker's counters."""
    pipe: int = 0
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("perdure.guardian"))
    _rest: bytes = b""
    _dump: bytes = b""
    """What faulthandler wrote when a native signal ended the worker: name of the signal, stacks of all threads."""
    _clean: bool = False
    _left: bool = False
    """The worker left of its own accord, but could not tell Redis."""
    _status: int | None = None
    """Its exit status, or a signal negated, if that could still be read."""
    _hung: str = ""
    """What the worker itself says of a hang: every slot of a task is taken by a step that does not end."""
    _lookout: Lookout = field(init=False)
    _oom: OomKills = field(init=False)
    _kin: Kin = field(init=False)
    _verdict: Guarded = Guarded.WELL
    _said: dict[str, Any] = field(default_factory=dict)
    """What the last whole heartbeat said."""
    _refreshed_at: float = 0.0
    """When the next whole one is due (monotonic seconds)."""
    _told: list[str] = field(default_factory=list)
    _asked: bool = False
    _news: bool = False
    _vitals: Vitals = field(init=False)
    _sweeper: Sweeper = field(init=False)

    def __post_init__(self) -> None:
        self._sweeper = Sweeper(self.store.connection, self.settings)

    def run(self) -> int:
        """Beat and watch; returns the exit status."""
        pidfd = None
        try:
            # A child that the worker forked may keep its end of the pipe open; the process itself does not lie.
            pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            pass  # not Linux, or the worker is gone already, which the pipe will tell
        self._vitals = Vitals.start(
            self.settings, self.store.connection, self.pid, self.settings.device, self.drains, self.log
        )
        self._oom = OomKills.of(self.pid)
        page = Page.create() if self.page < 0 else Page(self.page, writable=False)
        self._lookout = Lookout(page, self.pid, pidfd, lambda why: self.log.error("%s hangs: %s", self._who(), why))
        self._kin = Kin(self.token, self.page)
        self._lookout.spot = self._spot
        self._vitals.health.hung = lambda: self._lookout.found
        self._lookout.start()
        try:
            return self._guard(pidfd)
        finally:
            self._lookout.stop()
            self._sweeper.stop()

    def _guard(self, pidfd: int | None) -> int:
        handles = [self.pipe, self._lookout.done, *([] if pidfd is None else [pidfd])]
        due = time.monotonic()
        while True:
            ready, _, _ = select.select(handles, [], [], max(0.0, due - time.monotonic()))
            if ready and self._worker_gone(ready):
                if self._clean:
                    return 0
                funeral = threading.Thread(target=self._end_kin, name="kin", daemon=True)
                funeral.start()  # beside what it held, which waits for nothing
                status = self._reap()
                funeral.join(2 * LAST)
                return status
            if self._hung:
                why, self._hung = self._hung, ""
                self._lookout.end(why)
                continue  # its end is to be read before anything else
            if time.monotonic() >= due or self._news:
                self._news = False
                self._vitals.health.claims = self.ready is True
                self._vitals.health.unable = self.unable
                due = time.monotonic() + (self.settings.heartbeat if self._beat() else PAUSE)
                self._vitals.health.act()
                if self._verdict is not Guarded.WELL:
                    return int(self._verdict.value)

    def _worker_gone(self, ready: list[int]) -> bool:
        """Read what the worker says; True at its end."""
        ended = ready != [self.pipe]  # the process ended, or cannot be ended
        data = b""
        # Its last words may still stand in the pipe.
        while select.select([self.pipe], [], [], 0)[0]:
            data = os.read(self.pipe, 65536)
            self._hear(data)
            if not (ended and data):
                break
        over = ended or not data or self._clean
        if over and not self._clean:
            self._look_at_end()
        return over

    def _hear(self, data: bytes) -> None:
        """Take in what the worker wrote: a message on each line, or what faulthandler writes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = None if self._dump else _message(line)
            if message is None:
                self._dump = (self._dump + line + b"\n")[:MAX_DUMP]
                continue
            self._clean = self._clean or bool(message.get("bye"))
            self._left = self._left or bool(message.get("left"))
            self._hung = message.get("hung", self._hung)
            self.fingerprints = message.get("fingerprints", self.fingerprints)
            self.ready = message.get("ready", self.ready)
            self.unable = message.get("unable", self.unable)
            if "sources" in message:
                self.sources.watch(message["sources"])
            self._news = True

    def _beat(self) -> bool:
        """One heartbeat; False when Redis did not answer."""
        # What other processes of this cgroup were killed for until now is not this worker's end.
        self._oom.look()
        says: dict[str, Any] = {
            "ready": self.ready, "fingerprints": self.fingerprints, "stale": self._stale(), **self._vitals.beat(),
        }  # fmt: skip
        now = time.monotonic()
        well = self.ready is True and not self.unable
        try:
            if well and says == self._said and now < self._refreshed_at and self.store.beat(self.incarnation):
                return True
            pulse = self.store.heartbeat(
                incarnation=self.incarnation,
                worker=self.worker,
                queues=self.queues,
                pid=self.pid,
                host=self.host,
                unable=[{**row, "age": now - row["since"]} for row in self.unable],
                model=self.settings.model,
                **says,
            )
        except redis.RedisError:
            self.store.connection.connection_pool.disconnect()
            return False
        self._said, self._refreshed_at = says, now + refreshed(self.settings)
        # The worker finds the verdict in the exit status: it rejoins, or stops.
        self._verdict = VERDICTS[pulse.status]
        if pulse.sweep_due:
            self._sweeper.ask()
        return True

    def _stale(self) -> str:
        """A file that was edited since the worker has loaded it; said in the log once for each state of the files."""
        stale = self.sources.stale()
        if stale and stale != self._told:
            what = f"{stale[0]} was edited after {self.worker} had loaded it"
            if self.settings.reload and not self._asked:
                self.log.warning("%s; it hands its requests back and leaves, to be started again", what)
                self._asked = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGTERM)
            elif not self.settings.reload:
                self.log.warning("%s, which goes on with the old code: restart it (perdure up --reload does)", what)
        self._told = stale
        return stale[0] if stale else ""

    def _look_at_end(self) -> None:
        """Read with what the worker has ended, as long as its parent has not asked for it."""
        if self._status is None and self._lookout.gone(MOMENT):
            self._status = exit_status(self.pid)

    def _evidence(self) -> tuple[FailureKind, str, str]:
        """Kind, reason and evidence of the worker's end."""
        death = Death(
            hung=self._lookout.found,
            dump=(self._dump + self._rest).decode(errors="replace"),
            oom_kills=self._oom.look(),
            stopped=self._lookout.stopped_lately,
            status=self._status,
        )
        return death.kind, f"{self._who()} {death.reason}", death.stacks

    def _spot(self) -> None:
        if self.token:
            self._kin.spot(self.pid)

    def _end_kin(self) -> None:
        """End what the worker's tasks have started: it is gone, and nobody else knows of them."""
        if self.token and self._lookout.gone(LAST):
            number = self._kin.end()
            if number:
                self.log.warning("%s has left %d process(es) behind; ended", self._who(), number)

    def _who(self) -> str:
        return f"worker {self.worker} (pid {self.pid} on {self.host})"

    def _reap(self) -> int:
        """Hand on what the worker held: it is gone, and did not say good-bye."""
        kind, reason, evidence = self._evidence()
        if evidence:
            self.log.error("%s\n%s", reason, evidence)
        deadline = time.monotonic() + LAST_EFFORT
        while time.monotonic() < deadline:
            try:
                while True:
                    sweep = self.store.reap(
                        incarnation=self.incarnation,
                        kind=kind,
                        reason=reason,
                        **POLICIES[kind].flags,
                        seen=not self._left,
                        evidence=evidence,
                    )
                    if not sweep.left:
                        break
            except redis.RedisError:
                self.store.connection.connection_pool.disconnect()
                time.sleep(PAUSE)
            else:
                requests = sum(1 for row in sweep.reaped if row.id)
                self.log.warning("worker %s (pid %d) is gone; %d request(s) handed on", self.worker, self.pid, requests)
                return 0
        self.log.error("worker %s is gone, and Redis does not answer", self.worker)
        return 3


def _message(line: bytes) -> dict[str, Any] | None:
    """One line of the worker's, or ``None`` for anything else: a crash may cut a line short and write over it."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def main() -> int:
    """Read the first line of standard input, then guard until its end."""
    # Ctrl-C and the terminal's hang-up are for the worker; its end is what ends the guardian.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return 0
        line += byte
    config: dict[str, Any] = json.loads(line)
    settings = Settings.from_environment()
    logs.configure(settings.log_format, worker=config["worker"], device=config["device"])
    # A beat that is on its way counts once a slow server comes to it: to give it up and connect again only costs time.
    timeout = max(1.0, settings.heartbeat_timeout)
    connection = rebuild(config.pop("connection"), timeout=timeout, acknowledged=timeout / 2)
    sources = Sources(config.pop("sources", {}))
    status = Guardian(store=Store(connection, settings), settings=settings, sources=sources, **config).run()
    if not flush():
        os._exit(status)  # nobody reads what it has printed
    return status


if __name__ == "__main__":
    sys.exit(main())
