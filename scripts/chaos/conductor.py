"""The conductor: starts everything, has the faults happen when they are due, ends everything, gathers what is left.

1. start: a server unless a URL was given, the proxy, the crew.
2. faults: from :data:`~.schedule.START` on, each at its time, or as soon after it as there is somebody to harm.
3. quiet: nothing new; what is open may end, for at most :data:`QUIET` seconds.
4. end: all processes stop, and what producers and Redis know is gathered.

Every phase is bounded, and the whole is over 15 s after the given duration, or a twentieth of it: what happened to
tens of thousands of requests takes longer to read.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import psutil
import redis

from ...producer import Client
from ...protocol.connection import connect
from ...protocol.keys import key
from ...protocol.settings import Settings
from ...protocol.store import Store
from ..pool.children import environment_for
from ..pool.server import Server
from .crew import ChaosProcesses
from .evidence import QUEUES, Evidence, delete_all, read_journals, read_requests, read_samples, strangers_and_leaks
from .faults import CLASSES
from .journal import Journal
from .load import words
from .outages import RedisKill, RedisStop, with_a_clock, write_through
from .proxy import Proxy
from .schedule import NAMES, Planned
from .stage import Fault, FaultTargets

TICK: Final = 0.05
TEND: Final = 0.2
SAMPLE: Final = 0.25
"""Seconds between two looks at what is due, at the processes, and at checkpoints."""

SAMPLED: Final = 8
"""Checkpoints that are read at once."""

QUIET: Final = 8.0
"""Seconds that open requests may take to end after the last submit."""

CALM: Final = 2.0
"""Seconds before the last submit in which nothing new befalls the pool, not even what is late."""

LATE: Final = 20.0
"""Seconds before the last submit from which on those that have loaded a model are spared."""

BACKSTOP: Final = 14.5
"""Seconds after the duration when the process ends whatever it is doing; after a long run :data:`GATHERING` of it."""

GATHERING: Final = 1 / 20


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """One run. ``url`` is empty for a server of our own."""

    seed: int
    seconds: float
    settings: Settings
    planned: Sequence[Planned]
    kinds: Sequence[str]
    folder: Path
    url: str = ""
    text: bool = True


@dataclass(slots=True)
class Conductor:
    """Runs once. ``say`` gets a line for people at every turn."""

    options: ChaosOptions
    say: Callable[[str], None]
    interrupted: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    _waiting: list[Fault] = field(default_factory=list)
    _active: list[Fault] = field(default_factory=list)
    _began: float = 0.0
    _tended: float = 0.0
    _sampled: float = 0.0

    def run(self) -> Evidence:
        """Carry it through. Raises ``PerdureError`` if it cannot be begun."""
        options = self.options
        self._began = self.evidence.began = time.monotonic()
        self.evidence.enabled = list(options.kinds)
        self._waiting = [CLASSES[item.kind](item, number) for number, item in enumerate(options.planned)]
        with contextlib.ExitStack() as stack:
            server = None
            if not options.url:
                binary = with_a_clock(options.folder) if "clock_step" in options.kinds else None
                server = stack.enter_context(Server(options.folder / "redis", binary=binary, die_with_parent=True))
            url = server.url if server is not None else options.url
            connection = stack.enter_context(connect(url, timeout=2.0, name="perdure-chaos"))
            proxy, far_url = _proxied(url)
            crew = ChaosProcesses(options.folder, options.settings, url, far_url, options.seed, options.text)
            client = stack.enter_context(Client(url, settings=options.settings, patience=1.0))
            journal = Journal(options.folder / "traps.0.jsonl")
            stage = FaultTargets(
                crew,
                Store(connection, options.settings),
                client,
                journal,
                server,
                proxy,
                options.settings,
                options.folder,
            )
            if server is not None:
                write_through(server)
                crew.kept.add(server.pid)
            golden = self._start_golden(crew)
            rest = max(BACKSTOP, GATHERING * options.seconds)
            timer = threading.Timer(options.seconds + rest, _give_up, (crew,))
            timer.daemon = True
            timer.start()
            try:
                try:
                    crew.start()
                    self._perform(stage)
                    self._quiet(stage)
                except KeyboardInterrupt:
                    self.interrupted = True
                    self.evidence.enabled = []  # nobody knows what would still have happened
                    self.say("stopping: what was counted until now follows; requests that were under way count as lost")
                    self._undo(stage)
                crew.stop()
                self._gather(stage, golden)
            finally:
                crew.stop(0.5)
                timer.cancel()
                if golden is not None and golden.poll() is None:
                    golden.kill()
                if proxy is not None:
                    proxy.stop()
        return self.evidence

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    # --- faults --------------------------------------------------------------------------------------

    def _perform(self, stage: FaultTargets) -> None:
        # What a long run leaves behind takes longer to read.
        end = self.options.seconds - max(1.0, 0.02 * self.options.seconds)
        while self.elapsed < end:
            stage.late = self.elapsed > end - LATE
            self._turn(stage, calm=self.elapsed > end - CALM)
            time.sleep(TICK)  # the schedule is made of times

    def _turn(self, stage: FaultTargets, *, calm: bool = False) -> None:
        """One look at everything. ``calm``: nothing new, not even what is late."""
        for fault in list(self._active):
            assert fault.fired is not None
            # While Redis is away, nothing else is asked of it: each question would take its whole timeout.
            waits = self._away() and not isinstance(fault, RedisKill | RedisStop)
            if not waits and time.monotonic() >= fault.fired.at + fault.planned.lasts:
                self._heal(stage, fault)
        due = [] if calm else [fault for fault in self._waiting if fault.planned.at <= self.elapsed]
        for fault in due:
            if not self._away() and not (NAMES[fault.planned.kind].alone and self._alone()):
                self._fire(stage, fault)
        now = time.monotonic()
        if now - self._tended >= TEND:
            self._tended = now
            stage.crew.tend()
        if now - self._sampled >= SAMPLE and not self._away():
            self._sampled = now
            with contextlib.suppress(redis.RedisError):
                self.evidence.samples += read_samples(stage.store.connection, SAMPLED)

    def _away(self) -> bool:
        """Whether Redis cannot be asked now."""
        return any(isinstance(fault, RedisKill | RedisStop) for fault in self._active)

    def _alone(self) -> bool:
        return any(NAMES[fault.planned.kind].alone for fault in self._active)

    def _fire(self, stage: FaultTargets, fault: Fault) -> None:
        try:
            if not fault.fire(stage):
                return
        except (redis.RedisError, psutil.Error):
            return  # nobody to harm in this moment
        assert fault.fired is not None
        self._waiting.remove(fault)
        self._active.append(fault)
        held = f", holding {len(fault.fired.held)}" if fault.fired.held else ""
        self.say(f"{self.elapsed:7.1f} s  {fault.planned.kind:15} {fault.fired.note}{held}")

    def _heal(self, stage: FaultTargets, fault: Fault) -> None:
        assert fault.fired is not None
        try:
            if not fault.heal(stage):
                return
        except redis.RedisError:
            return
        self._active.remove(fault)
        if fault.happened:
            fault.fired.healed = time.monotonic()
            self.evidence.fired.append(fault.fired)

    def _undo(self, stage: FaultTargets) -> None:
        """Whatever is still wrong is put right."""
        for fault in self._active:
            with contextlib.suppress(redis.RedisError, psutil.Error):
                fault.undo(stage)
        self._active.clear()

    # --- the end -------------------------------------------------------------------------------------

    def _quiet(self, stage: FaultTargets) -> None:
        """No fault, no submit: everything may end."""
        for fault in list(self._active):
            self._heal(stage, fault)
        self._undo(stage)
        self._waiting.clear()
        stage.crew.stop_producing()
        self.say(f"{self.elapsed:7.1f} s  no more faults, no more requests")
        deadline = self.options.seconds + QUIET
        while self.elapsed < deadline and (stage.crew.producing or not self._ended(stage)):
            self._turn(stage)
            time.sleep(TICK)

    def _ended(self, stage: FaultTargets) -> bool:
        """Whether nothing waits or runs, and nothing of it is left, as Redis has it."""
        connection = stage.store.connection
        with contextlib.suppress(redis.RedisError):
            with connection.pipeline(transaction=True) as pipe:
                for queue in QUEUES:
                    pipe.llen(key("queue", queue))
                    for name in ("leases", "retries", "suspects"):
                        pipe.zcard(key(name, queue))
                if any(pipe.execute()):
                    return False  # cheaply: what follows looks at every key
            _, leaks = strangers_and_leaks(connection, ())
            return not any("TTL" not in leak for leak in leaks)
        return False

    def _gather(self, stage: FaultTargets, golden: subprocess.Popen[bytes] | None) -> None:
        evidence, connection = self.evidence, stage.store.connection
        evidence.ended = time.monotonic()
        evidence.broken = list(dict.fromkeys(stage.crew.broken))
        evidence.seen = read_journals(sorted(self.options.folder.glob("*.*.jsonl")))
        evidence.stored = read_requests(connection, list(evidence.seen))
        evidence.strangers, evidence.leaks = strangers_and_leaks(connection, evidence.seen)
        if golden is not None and golden.stdout is not None:
            answers = [json.loads(line) for line in golden.stdout.read().splitlines()]
            evidence.words = list(zip(words(self.options.seed), answers, strict=False))
        if self.options.url:
            delete_all(connection)

    def _start_golden(self, crew: ChaosProcesses) -> subprocess.Popen[bytes] | None:
        """The answers of text generation that nothing disturbs: made beside everything else, without Redis."""
        if not self.options.text:
            return None
        with (self.options.folder / "golden.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "perdure.workers.text.golden"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment_for("", self.options.settings),
            )
        assert process.stdin is not None
        process.stdin.write("\n".join(map(json.dumps, words(self.options.seed))).encode())
        process.stdin.close()
        crew.kept.add(process.pid)
        return process


def _proxied(url: str) -> tuple[Proxy | None, str]:
    """A proxy in front of the server, and the URL through it; none where bytes cannot be passed on (TLS, sockets)."""
    parts = urlsplit(url)
    if parts.scheme != "redis":
        return None, url
    proxy = Proxy(parts.hostname or "localhost", parts.port or 6379)
    proxy.start()
    user, at, _ = parts.netloc.rpartition("@")
    return proxy, urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}"))


def _give_up(crew: ChaosProcesses) -> None:
    """The last resort: nothing stays behind, whatever the main thread is doing."""
    sys.stderr.write("perdure chaos: the run did not end in time; killed\n")
    for process in crew.all().values():
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(1)


def needs(kinds: Sequence[str], *, server: bool, proxy: bool, faketime: bool) -> dict[str, str]:
    """Which of these kinds cannot be had here, and why."""
    missing: dict[str, str] = {}
    for name in kinds:
        need: Any = NAMES[name].needs
        if need in ("server", "clock") and not server:
            missing[name] = "the server is not ours"
        elif need == "proxy" and not proxy:
            missing[name] = "the URL is not of the kind redis://"
        elif need in ("faketime", "clock") and not faketime:
            missing[name] = 'the command "faketime" is missing (Debian: apt install faketime)'
    return missing
