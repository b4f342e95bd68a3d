"""A worker's kin: the processes that its tasks have started, and what those have started in turn.

An engine core of gigabytes that a task starts must not outlive its worker, and must never be looked for by its name.
Three things tell whose it is; each of them survives the death of the worker, after which its children have another
parent:

1. a mark in the environment, which every program inherits that is started below the worker;
2. the memory that the worker shares with its guardian: a child that was forked, and runs no other program, has it
   mapped;
3. being seen below the worker while it lived (:meth:`Kin.spot`), for a program that was started with an environment of
   its own.

A process that is marked as the worker's own (:data:`OWN`) is no kin, nor is what it has started.

A process is held by a descriptor before it is judged, so that a number which is used again never ends somebody else.
Linux only; elsewhere nothing is found.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MARK: Final = "_PERDURE_KIN"
"""In the environment of what a task starts."""

OWN: Final = "own"
"""The mark of the worker's guardian and of RQ's scheduler. Both notice that it is gone, finish their work and exit."""

MOST: Final = 512
"""Processes that are remembered from having been seen."""

ROUNDS: Final = 5
"""How often what is still there is looked for: a process may start another one in the moment of its end."""

LAST: Final = 2.0
"""Seconds after SIGKILL in which they end; one that sits in a driver's call may not, and is left."""

_PROC: Final = Path("/proc")


@dataclass(slots=True)
class Kin:
    """Of one worker. ``page``: a descriptor of the memory that it shares with its guardian, or -1."""

    token: str
    page: int = -1
    seen: dict[int, int] = field(default_factory=dict)
    """Process id -> descriptor, of those seen below the worker."""

    def spot(self, pid: int, but: Iterable[int] = ()) -> None:
        """Remember what runs below a process now; ``but``: process ids that are left out with all below them."""
        self._forget()
        for child in below(pid, but):
            if child not in self.seen and len(self.seen) < MOST and (handle := _hold(child)) >= 0:
                self.seen[child] = handle

    def end(self) -> int:
        """SIGKILL to all of them, and wait for their ends, bounded; returns how many there were."""
        spared = {os.getpid()}
        ended: dict[int, int] = {}
        for _ in range(ROUNDS):
            fresh = self._find(spared, ended)
            if not fresh:
                break
            for handle in fresh.values():
                _kill(handle)
            ended |= fresh
        deadline = time.monotonic() + LAST
        for handle in ended.values():
            _ended(handle, max(0.0, deadline - time.monotonic()))
            os.close(handle)
        return len(ended)

    def _find(self, spared: set[int], known: dict[int, int]) -> dict[int, int]:
        found: dict[int, int] = {}
        # One that was seen between its fork and its start had no mark yet.
        mine = {pid for pid in self.seen if not _ended(self.seen[pid]) and not _own(pid)}
        parents: dict[int, int] = {}
        for pid in _all():
            parents[pid] = _parent(pid)
            if pid in mine or pid in spared or pid in known:
                continue
            handle = _hold(pid)
            if handle < 0:
                continue
            if self._marked(pid) and not _own(pid):  # a guardian has the shared memory mapped too
                found[pid] = handle
            else:
                os.close(handle)
        for pid in mine - spared - known.keys():
            found[pid] = os.dup(self.seen[pid])
        for pid in parents:
            line, at = [pid], parents.get(pid, 0)
            while at and at not in line and at not in spared:
                line.append(at)
                at = parents.get(at, 0)
            if pid not in found and pid not in spared and pid not in known and not found.keys().isdisjoint(line):
                handle = _hold(pid)
                if handle >= 0 and _parent(pid) == parents[pid]:
                    found[pid] = handle
                elif handle >= 0:
                    os.close(handle)
        return found

    def _marked(self, pid: int) -> bool:
        if _has(pid, self.token):
            return True
        try:
            return self.page >= 0 and _maps(pid, os.fstat(self.page).st_ino)
        except OSError:
            return False  # another user's, or gone

    def _forget(self) -> None:
        for pid, handle in list(self.seen.items()):
            if _ended(handle):
                os.close(self.seen.pop(pid))


def environment() -> dict[str, str]:
    """The environment for a process that is the worker's own."""
    return {**os.environ, MARK: OWN}


def below(pid: int, but: Iterable[int] = ()) -> Iterator[int]:
    """Process ids below a process, those of its children's children too; not its own ones, nor those of ``but``."""
    todo, met = [pid], {pid, *but}
    while todo:
        at = todo.pop()
        try:
            threads = list((_PROC / str(at) / "task").iterdir())
        except OSError:
            continue
        for thread in threads:
            try:
                children = [int(word) for word in (thread / "children").read_bytes().split()]
            except (OSError, ValueError):
                continue
            for child in children:
                if child not in met and not _own(child):
                    met.add(child)
                    todo.append(child)
                    yield child


def _own(pid: int) -> bool:
    return _has(pid, OWN)


def _has(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False  # another user's, or gone


def _all() -> list[int]:
    try:
        return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
    except OSError:
        return []


def _maps(pid: int, inode: int) -> bool:
    """Whether a process has the shared memory mapped; only one that runs the same program can have inherited that."""
    if not (_PROC / str(pid) / "exe").samefile("/proc/self/exe"):
        return False
    for line in (_PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if len(words) > 5 and words[4] == str(inode) and words[5].startswith("/memfd:perdure"):
            return True
    return False


def _parent(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _hold(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def _ended(handle: int, timeout: float = 0.0) -> bool:
    look = select.poll()  # select() takes no descriptor beyond 1,023
    look.register(handle, select.POLLIN)
    return bool(look.poll(timeout * 1000))


def _kill(handle: int) -> None:
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        pass  # it has ended, or become another user's
