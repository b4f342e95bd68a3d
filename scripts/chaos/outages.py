"""Faults of Redis and of the way to it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from ...protocol.connection import connect
from ...protocol.errors import PerdureError
from ..pool.executable import find_binary
from ..pool.server import Server
from .stage import Fault, FaultTargets


def write_through(server: Server) -> None:
    """Have the server answer only what is on the disk.

    With its usual ``appendfsync everysec`` it may put off the write itself while an fsync runs, and answer all the
    same: a SIGKILL then loses what was accepted in that moment. That is Redis' promise, not ours; ours is judged
    without it.
    """
    with connect(server.url) as connection:
        connection.config_set("appendfsync", "always")


class RedisKill(Fault):
    def fire(self, stage: FaultTargets) -> bool:
        assert stage.server is not None
        stage.server.kill()
        return self._fired()

    def heal(self, stage: FaultTargets) -> bool:
        self.undo(stage)
        return super().heal(stage)

    def undo(self, stage: FaultTargets) -> None:
        assert stage.server is not None
        if not stage.server.running:
            stage.crew.kept.discard(stage.server.pid)
            stage.server.restart()
            write_through(stage.server)
            stage.crew.kept.add(stage.server.pid)


class RedisStop(Fault):
    def fire(self, stage: FaultTargets) -> bool:
        assert stage.server is not None
        os.kill(stage.server.pid, signal.SIGSTOP)
        return self._fired()

    def heal(self, stage: FaultTargets) -> bool:
        self.undo(stage)
        return super().heal(stage)

    def undo(self, stage: FaultTargets) -> None:
        assert stage.server is not None
        os.kill(stage.server.pid, signal.SIGCONT)


class Refusal(Fault):
    """Redis refuses something, until it has done so and the time is over."""

    word = ""
    """With what its answers begin."""

    def fire(self, stage: FaultTargets) -> bool:
        self._before = self._refusals(stage)
        self._begin(stage)
        return self._fired()

    def heal(self, stage: FaultTargets) -> bool:
        number = self._refusals(stage) - self._before
        if number == 0:
            self._again(stage)
            return False
        self.undo(stage)
        assert self.fired is not None
        self.fired.note = f"{number} calls refused"
        return super().heal(stage)

    def _begin(self, stage: FaultTargets) -> None:
        raise NotImplementedError

    def _again(self, stage: FaultTargets) -> None:
        """Nothing has been refused yet."""

    def _refusals(self, stage: FaultTargets) -> int:
        errors: Any = stage.store.connection.info("errorstats")
        return int(errors.get(f"errorstat_{self.word}", {"count": 0})["count"])


class Full(Refusal):
    """Redis at maxmemory."""

    word = "OOM"

    def _begin(self, stage: FaultTargets) -> None:
        used: Any = stage.store.connection.info("memory")
        stage.store.connection.config_set("maxmemory", int(used["used_memory"] * 0.9))

    def undo(self, stage: FaultTargets) -> None:
        stage.store.connection.config_set("maxmemory", 0)


class NoReplicas(Refusal):
    """Redis takes no write, since it has no replica."""

    word = "NOREPLICAS"

    def _begin(self, stage: FaultTargets) -> None:
        stage.store.connection.config_set("min-replicas-to-write", 1)

    def undo(self, stage: FaultTargets) -> None:
        stage.store.connection.config_set("min-replicas-to-write", 0)


class Busy(Refusal):
    """Somebody's script runs for longer than Redis' time limit: everybody else is refused until its end."""

    word = "BUSY"
    LIMIT_MS: Final = 20
    SCRIPT: Final = "local over = os.clock() + tonumber(ARGV[1]) while os.clock() < over do end return 1"

    def _begin(self, stage: FaultTargets) -> None:
        stage.store.connection.config_set("lua-time-limit", self.LIMIT_MS)
        self._again(stage)

    def _again(self, stage: FaultTargets) -> None:
        """Sent over a connection of its own, whose answer nobody waits for."""
        assert stage.server is not None
        self._connection = connect(stage.server.url, name="perdure-chaos-busy").connection_pool.get_connection()
        seconds = f"{self.planned.lasts:.2f}"
        self._connection.send_command("EVAL", self.SCRIPT, 0, seconds)  # type: ignore[no-untyped-call]

    def undo(self, stage: FaultTargets) -> None:
        """Once the script has ended: before, even this is refused."""
        stage.store.connection.config_set("lua-time-limit", 5000)
        self._connection.disconnect()  # type: ignore[no-untyped-call]


TRIES: Final = 20
"""Times that faketime is started."""

CLOCK: Final = "clock"
"""File in the folder of a run: by how much the clock of its Redis is off, as faketime reads it."""


def _preload() -> str:
    """What makes a process' clock faketime's. Raises :class:`PerdureError`.

    faketime names a semaphore by its process, and one that was killed leaves it: another process of that number cannot
    run then, the next one can.
    """
    for _ in range(TRIES):
        done = subprocess.run(
            ["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode == 0:
            return done.stdout.strip()
    raise PerdureError(f"faketime does not run here: {done.stderr.strip().splitlines()[0]}; see ls /dev/shm/*faketime*")


def with_a_clock(folder: Path) -> Path:
    """An executable that runs the usual server under faketime. A step is seen within a second."""
    preload = _preload()
    (folder / CLOCK).write_text("+0")
    names = {
        "LD_PRELOAD": preload, "FAKETIME_TIMESTAMP_FILE": str(folder / CLOCK), "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in names.items())
    script = folder / "server-with-a-clock"
    script.write_text(f'#!/bin/sh\nexport {words}\nexec {shlex.quote(str(find_binary()))} "$@"\n')
    script.chmod(0o700)
    return script


class ClockStep(Fault):
    """It has happened once the server has said so."""

    def fire(self, stage: FaultTargets) -> bool:
        step = "+3600" if self.planned.choice < 0.5 else "-3600"
        (stage.folder / CLOCK).write_text(step)
        return self._fired(note=f"{step} s")

    def heal(self, stage: FaultTargets) -> bool:
        seconds, _ = stage.store.connection.time()
        if abs(seconds - time.time()) < 1800:
            return False
        self.undo(stage)
        return super().heal(stage)

    def undo(self, stage: FaultTargets) -> None:
        (stage.folder / CLOCK).write_text("+0")


class ScriptFlush(Fault):
    def fire(self, stage: FaultTargets) -> bool:
        stage.store.connection.script_flush()
        return self._fired()


class ClientKill(Fault):
    """Every connection but this one: ordinary ones, and those that are subscribed."""

    def fire(self, stage: FaultTargets) -> bool:
        number = 0
        for kind in ("normal", "pubsub"):
            number += stage.store.connection.client_kill_filter(_type=kind, skipme=True)
        return self._fired(note=f"{number} connections") if number else False


class Network(Fault):
    """Something goes wrong on the proxy, until it has happened and the time is over."""

    def fire(self, stage: FaultTargets) -> bool:
        assert stage.proxy is not None
        proxy, kind = stage.proxy, self.planned.kind
        self._before = proxy.happened[kind]
        if kind == "cut":
            proxy.cuts = 1 + int(self.planned.choice * 8)
        elif kind == "hidden_reply":
            proxy.hides = 1 + int(self.planned.choice * 8)
        elif kind == "black_hole":
            proxy.silent = True
        else:
            proxy.delay = 0.02 + 0.03 * self.planned.choice
        return self._fired()

    def heal(self, stage: FaultTargets) -> bool:
        assert stage.proxy is not None
        proxy, kind = stage.proxy, self.planned.kind
        number = proxy.happened[kind] - self._before
        if number == 0:
            return False
        self.undo(stage)
        assert self.fired is not None
        self.fired.note = f"{number} times"
        return super().heal(stage)

    def undo(self, stage: FaultTargets) -> None:
        assert stage.proxy is not None
        proxy, kind = stage.proxy, self.planned.kind
        if kind == "cut":
            proxy.cuts = 0
        elif kind == "hidden_reply":
            proxy.hides = 0
        elif kind == "black_hole":
            proxy.silent = False
        else:
            proxy.delay = 0.0
