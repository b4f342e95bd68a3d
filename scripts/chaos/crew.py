"""The processes of a run: supervisors with their reapers and workers, producers, and guests that come and go.

Only what descends from this process is ever harmed. Orphans of a killed parent become children of this one, so that
none is lost sight of, and none is left at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from ...protocol.reading.reads import Reads
from ...protocol.settings import Settings
from ..pool.children import environment_for, launch
from .load import BROKEN, STEPS, TEXTS, WORDS

_SET_CHILD_SUBREAPER: Final = 36  # of prctl(2)

STOP_TIMEOUT: Final = 2.5
"""Seconds that processes may take to end at the end; they hold nothing by then."""


@dataclass(slots=True)
class ChaosProcess:
    """A place in the crew that is filled again when its process dies."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    @property
    def running(self) -> bool:
        return self.process.poll() is None


@dataclass(slots=True)
class Target:
    """A living worker of the crew: its record in Redis, its process, and its guardian's."""

    name: str
    incarnation: str
    process: psutil.Process
    guardians: list[psutil.Process]
    held: list[str]
    loaded: bool
    """It serves the model: another one takes seconds to come."""


@dataclass(slots=True)
class ChaosProcesses:
    """Everything that this run has started, but the server."""

    folder: Path
    settings: Settings
    url: str
    far_url: str
    """The same server, perhaps through the proxy."""
    seed: int
    text: bool
    """Whether some workers load the tiny model."""
    supervisors: list[ChaosProcess] = field(default_factory=list)
    producers: list[ChaosProcess] = field(default_factory=list)
    guests: list[ChaosProcess] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    """Children that somebody else waits for: the server, a process that makes the golden answers."""
    ending: bool = False
    broken: list[str] = field(default_factory=list)
    """Producers that ended by themselves, which none should."""

    def start(self) -> None:
        """Supervisors and producers: near ones, and far ones through the proxy; and one for the model."""
        _adopt_orphans()
        up = [sys.executable, "-P", "-m", "perdure.scripts.main", "up"]
        plain = self.settings
        self.supervisors.append(self._member("near", [*up, STEPS, "--workers", "2"], plain, self.url))
        self.supervisors.append(self._member("far", [*up, STEPS, "--workers", "1"], plain, self.far_url))
        if self.text:
            # Beside the others: loading the model takes longer than everything else here.
            loaded = plain.replace(tasks=(WORDS,))
            self.supervisors.append(self._member(TEXTS, [*up, TEXTS, "--workers", "1"], loaded, self.url))
        for name, url in (("p1", self.url), ("p2", self.far_url)):
            config = self.folder / f"{name}.json"
            values = {"name": name, "folder": str(self.folder), "seed": self.seed, "text": self.text}
            config.write_text(json.dumps(values))
            command = [sys.executable, "-P", "-m", "perdure.scripts.chaos.load", str(config)]
            self.producers.append(self._member(name, command, plain, url))

    def invite(self, name: str, command: list[str], more: dict[str, str] | None = None) -> ChaosProcess:
        """A process beside the others, which is not replaced; ``more`` goes to its environment."""
        member = self._member(name, command, self.settings, self.url, more)
        self.guests.append(member)
        return member

    def worker(self, name: str) -> list[str]:
        """The command of one more worker."""
        rq = [sys.executable, "-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker"]
        return [*rq, "--name", name, STEPS]

    def tend(self) -> None:
        """Replace supervisors and producers that have died; forget what has ended otherwise."""
        for member in [*self.supervisors, *self.producers]:
            if member.process.poll() == BROKEN:
                self.broken.append(f"{member.name} ended by itself; see {member.name}.log")
            if not member.running and not self.ending:
                member.process = launch(member.command, member.environment, self.folder / f"{member.name}.log")
        self.guests = [guest for guest in self.guests if guest.running]
        self._bury_orphans()

    # --- who is there --------------------------------------------------------------------------------

    def all(self) -> dict[int, psutil.Process]:
        """Every living process that descends from this one."""
        found = psutil.Process().children(recursive=True)
        return {process.pid: process for process in found if _living(process)}

    def targets(self, reads: Reads) -> list[Target]:
        """Workers that claim now, those that hold most first. Raises what redis-py raises."""
        mine = self.all()
        found = []
        for item in reads.workers():
            process = mine.get(item["pid"])
            if process is None or not item["ready"] or item["dead_in"] <= 0 or not _is(process, "rq.cli", "worker"):
                continue
            with contextlib.suppress(psutil.Error):
                guardians = [child for child in process.children() if _is(child, "perdure.workers.guardian.process")]
                loaded = TEXTS in item["queues"]
                found.append(Target(item["worker"], item["incarnation"], process, guardians, item["held"], loaded))
        return sorted(found, key=lambda target: -len(target.held))

    def reapers(self) -> list[psutil.Process]:
        return [process for process in self.all().values() if _is(process, "perdure.recovery")]

    # --- the end -------------------------------------------------------------------------------------

    def stop_producing(self) -> None:
        """Producers submit nothing more, and end with their last stream."""
        self.ending = True
        for member in self.producers:
            _signal(member.process, signal.SIGTERM)

    @property
    def producing(self) -> bool:
        return any(member.running for member in self.producers)

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """SIGTERM, then SIGKILL to whatever is left of this run. Harmless when repeated."""
        self.ending = True
        for process in self.all().values():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        for member in [*self.producers, *self.supervisors, *self.guests]:
            _signal(member.process, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while self._ours() and time.monotonic() < deadline:
            time.sleep(0.02)  # the end of processes: there is nothing to wait on but time
        while rest := self._ours():
            for process in rest:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.01)

    def _ours(self) -> list[psutil.Process]:
        """What of this run still lives; the server is no member of the crew."""
        for member in [*self.supervisors, *self.producers, *self.guests]:
            member.process.poll()
        self._bury_orphans()
        mine = self.all().values()
        return [item for item in mine if item.pid not in self.kept and _is(item, "perdure.", "rq.cli")]

    def _member(
        self, name: str, command: list[str], settings: Settings, url: str, more: dict[str, str] | None = None
    ) -> ChaosProcess:
        environment = environment_for(url, settings) | {"GOMP_SPINCOUNT": "1000"} | (more or {})
        return ChaosProcess(name, command, environment, launch(command, environment, self.folder / f"{name}.log"))

    def _bury_orphans(self) -> None:
        """Take the exit status of processes that became ours when their parent died."""
        started = {member.process.pid for member in [*self.supervisors, *self.producers, *self.guests]} | self.kept
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ChildProcessError):
                if child.pid not in started and child.status() == psutil.STATUS_ZOMBIE and child.ppid() == os.getpid():
                    os.waitpid(child.pid, os.WNOHANG)


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _living(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is(process: psutil.Process, *words: str) -> bool:
    """Whether its command line holds one of the words."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return any(word in part for part in line for word in words)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
