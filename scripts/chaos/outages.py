"""Faults of Redis and of the way to it."""

from __future__ import annotations

import os
import signal
from typing import Any

from ...protocol.connection import connect
from ..server import Server
from .stage import Fault, Stage


def write_through(server: Server) -> None:
    """Have the server answer only what is on the disk.

    With its usual ``appendfsync everysec`` it may put off the write itself while an fsync runs, and answer all the same:
    a SIGKILL then loses what was accepted in that moment. That is Redis' promise, not ours; ours is judged without it.
    """
    with connect(server.url) as connection:
        connection.config_set("appendfsync", "always")


class RedisKill(Fault):
    def fire(self, stage: Stage) -> bool:
        assert stage.server is not None
        stage.server.kill()
        return self._fired()

    def heal(self, stage: Stage) -> bool:
        self.undo(stage)
        return super().heal(stage)

    def undo(self, stage: Stage) -> None:
        assert stage.server is not None
        if not stage.server.running:
            stage.crew.kept.discard(stage.server.pid)
            stage.server.restart()
            write_through(stage.server)
            stage.crew.kept.add(stage.server.pid)


class RedisStop(Fault):
    def fire(self, stage: Stage) -> bool:
        assert stage.server is not None
        os.kill(stage.server.pid, signal.SIGSTOP)
        return self._fired()

    def heal(self, stage: Stage) -> bool:
        self.undo(stage)
        return super().heal(stage)

    def undo(self, stage: Stage) -> None:
        assert stage.server is not None
        os.kill(stage.server.pid, signal.SIGCONT)


class Full(Fault):
    """Redis at maxmemory. It has happened when Redis has refused something."""

    def fire(self, stage: Stage) -> bool:
        self._before = _refusals(stage)
        used: Any = stage.store.connection.info("memory")
        stage.store.connection.config_set("maxmemory", int(used["used_memory"] * 0.9))
        return self._fired()

    def heal(self, stage: Stage) -> bool:
        number = _refusals(stage) - self._before
        if number == 0:
            return False
        self.undo(stage)
        assert self.fired is not None
        self.fired.note = f"{number} calls refused"
        return super().heal(stage)

    def undo(self, stage: Stage) -> None:
        stage.store.connection.config_set("maxmemory", 0)


def _refusals(stage: Stage) -> int:
    errors: Any = stage.store.connection.info("errorstats")
    return int(errors.get("errorstat_OOM", {"count": 0})["count"])


class ScriptFlush(Fault):
    def fire(self, stage: Stage) -> bool:
        stage.store.connection.script_flush()
        return self._fired()


class ClientKill(Fault):
    """Every connection but this one: ordinary ones, and those that are subscribed."""

    def fire(self, stage: Stage) -> bool:
        number = 0
        for kind in ("normal", "pubsub"):
            number += stage.store.connection.client_kill_filter(_type=kind, skipme=True)
        return self._fired(note=f"{number} connections") if number else False


class Network(Fault):
    """Something goes wrong on the proxy, until it has happened and the time is over."""

    def fire(self, stage: Stage) -> bool:
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

    def heal(self, stage: Stage) -> bool:
        assert stage.proxy is not None
        proxy, kind = stage.proxy, self.planned.kind
        number = proxy.happened[kind] - self._before
        if number == 0:
            return False
        self.undo(stage)
        assert self.fired is not None
        self.fired.note = f"{number} times"
        return super().heal(stage)

    def undo(self, stage: Stage) -> None:
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
