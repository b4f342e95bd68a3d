"""Ends a process at a named place: on PYTHONPATH of processes that tests start, and of nobody else.

``CRASH_POINT`` is ``<role> <effect> <number> <when>``: in the process of that role, right before or after the
effect of that name happens for the n-th time, the process kills itself as ``kill -9`` would. Production code knows
nothing of it: what is wrapped here are its ordinary functions, each of which does one thing that others can see.
"""

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

ROLES = {
    "guardian": "perdure.workers.guardian.process",
    "reaper": "perdure.recovery",
    "worker": "worker",
    "producer": "-c",
}

PLACES = {
    "bell": ("perdure.workers.redis_io.bells", "Bells", "_release"),
    "birth": ("rq.worker", "SimpleWorker", "register_birth"),
    "commands": ("perdure.workers.rq.commands", "CommandedWorker", "subscribe"),
    "death": ("rq.worker", "SimpleWorker", "register_death"),
    "guardian": ("perdure.workers.guardian.companion", "Companion", "_launch"),
    "ready": ("perdure.workers.guardian.companion", "Companion", "tell"),
    "goodbye": ("perdure.workers.guardian.companion", "Companion", "dismiss"),
    "outputs": ("perdure.protocol.store", "Store", "all_outputs"),
    "state": ("perdure.protocol.store", "Store", "packed_state"),
    "listen": ("redis.client", "PubSub", "subscribe"),
    "poll": ("perdure.protocol.store", "Store", "fetch_many"),
}
"""Effects that are no script: module, class, method. Every other name is that of a script."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    while True:  # the signal is on its way to this very thread
        signal.pause()


def wrap(owner: Any, name: str, matches: Callable[[Any], bool], number: int, when: str) -> None:
    """Have the n-th matching call of a method kill the process, before or after it."""
    real = getattr(owner, name)
    calls = 0

    @functools.wraps(real)
    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        mine = matches(self)
        calls += mine
        if mine and calls == number and when == "before":
            die()
        answer = real(self, *args, **kwargs)
        if mine and calls == number and when == "after":
            die()
        return answer

    setattr(owner, name, dying)


def install() -> None:
    role, effect, number, when = os.environ["CRASH_POINT"].split()
    if ROLES[role] not in sys.orig_argv:
        return
    if effect in PLACES:
        module, owner, name = PLACES[effect]
        wrap(getattr(importlib.import_module(module), owner), name, lambda _: True, int(number), when)
    else:
        script = importlib.import_module("perdure.protocol.scripts").Script
        wrap(script, "__call__", lambda self: self.name == effect, int(number), when)


if "CRASH_POINT" in os.environ:
    install()
