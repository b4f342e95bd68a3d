"""The checks of what every worker needs: memory of its host, a disk to write to, and a Redis that answers.

Each looks once and returns, or raises, or hangs: :class:`.state.Check` copes with all three. None of them talks to
another worker.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis

from .state import CheckState, Reading, worst

GIB: Final = 2**30

# --- memory ----------------------------------------------------------------------------------------------

SCARCE, GONE = 0.90, 0.97
"""Shares of the memory in use from which it is degraded, and fails: the kernel is about to kill somebody."""

STALLED, STUCK = 10.0, 50.0
"""Per cent of the last 10 s in which all processes waited for memory (PSI, "full"): degraded, fails."""

OOM_MEMORY: Final = 600.0
"""Seconds for which a kill by the kernel is told."""


class Memory:
    """Host memory as the kernel grants it to a process: its cgroups' limits (version 2), or the whole host's.

    Of what a cgroup uses, file pages that the kernel can drop at once are not counted.
    """

    def __init__(self, pid: int, *, cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        self._folders = list(_cgroups(cgroups, proc / str(pid) / "cgroup"))
        self._proc = proc
        self._kills = self._count_kills()
        self._killed = -OOM_MEMORY

    def look(self) -> Reading:
        readings = [self._room(), *self._pressure(), *self._killing()]
        return worst(readings)

    def _room(self) -> Reading:
        found = [room for folder in self._folders if (room := _room(folder))] or [self._host()]
        used, limit, whose = max(found, key=lambda item: item[0] / item[1])
        share = used / limit
        text = f"{share:.0%} of {limit / GIB:.1f} GiB in use ({whose})"
        return Reading(
            CheckState.FAIL if share >= GONE else CheckState.DEGRADED if share >= SCARCE else CheckState.OK, text
        )

    def _host(self) -> tuple[int, int, str]:
        facts = {}
        for line in (self._proc / "meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            facts[name] = int(rest.split()[0]) * 1024
        return facts["MemTotal"] - facts["MemAvailable"], facts["MemTotal"], "of the host; no cgroup limits it"

    def _pressure(self) -> Iterator[Reading]:
        """Waiting for memory, of its cgroup or else of the host; nothing where the kernel does not count it."""
        files = [folder / "memory.pressure" for folder in self._folders[:1]] + [self._proc / "pressure" / "memory"]
        for file in files:
            try:
                lines = file.read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                word, *pairs = line.split()
                values = dict(pair.split("=") for pair in pairs)
                percent = float(values["avg10"])
                if word == "full" and percent >= STALLED:
                    state = CheckState.FAIL if percent >= STUCK else CheckState.DEGRADED
                    yield Reading(state, f"everybody waited for memory in {percent:.0f} % of the last 10 s")
            return

    def _killing(self) -> Iterator[Reading]:
        kills, now = self._count_kills(), time.monotonic()
        if kills > self._kills:
            self._killed = now
        self._kills = kills
        if now - self._killed < OOM_MEMORY:
            ago = now - self._killed
            yield Reading(
                CheckState.DEGRADED, f"{ago:.0f} s ago the kernel killed a process of this cgroup for its memory"
            )

    def _count_kills(self) -> int:
        for folder in self._folders[:1]:
            with contextlib.suppress(OSError, ValueError):
                for line in (folder / "memory.events").read_text().splitlines():
                    name, _, number = line.partition(" ")
                    if name == "oom_kill":
                        return int(number)
        return 0


def _cgroups(root: Path, file: Path) -> Iterator[Path]:
    """The folders of a process' cgroup and of all above it, innermost first; none without version 2."""
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    folder = root / line.removeprefix("0::").lstrip("/")
    if ".." in folder.parts or not folder.is_dir():
        folder = root  # named as another namespace sees it: what is mounted here is the container's own
    while True:
        if (folder / "cgroup.controllers").exists():
            yield folder
        if folder == root:
            return
        folder = folder.parent


def _room(folder: Path) -> tuple[int, int, str] | None:
    """Used and granted bytes of one cgroup; ``None`` if it has no limit."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max" or int(limit) <= 0:
            return None
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except FileNotFoundError:
        return None  # the root of all has no such files
    return max(0, used - int(stat.get("inactive_file", 0))), int(limit), "limit of its cgroup"


# --- disk ------------------------------------------------------------------------------------------------

LOW: Final = 0.05
"""Share of space, or of inodes, below which a file system is degraded."""

FLOOR: Final = 16 * 2**20
"""Bytes below which it fails."""

PROBE: Final = b"perdure" * 512


def disk(folder: Path) -> Reading:
    """The file system of a folder: room for data and for files, and whether a write reaches it.

    The write is a small file that nobody sees: it is unlinked before it is written, so that whatever happens to this
    process nothing stays behind.
    """
    try:
        facts = os.statvfs(folder)
        began = time.monotonic()
        _write(folder)
    except OSError as error:
        why = {errno.ENOSPC: "no space or no inode is left", errno.EROFS: "it is mounted read-only",
               errno.EDQUOT: "the quota is used up", errno.ENOENT: "it is not there"}  # fmt: skip
        text = why.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
        return Reading(CheckState.FAIL, f"cannot write to {folder}: {text}")
    took = time.monotonic() - began
    free, total = facts.f_bavail * facts.f_frsize, max(1, facts.f_blocks * facts.f_frsize)
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free in {folder}; a synced write took {took * 1000:.0f} ms"
    if free < min(FLOOR, total / 2):
        return Reading(CheckState.FAIL, text)
    if free / total < LOW:
        return Reading(CheckState.DEGRADED, text)
    # Some file systems make inodes as they need them, and say 0.
    if facts.f_files and facts.f_favail / facts.f_files < LOW:
        return Reading(CheckState.DEGRADED, f"{facts.f_favail:,} of {facts.f_files:,} inodes free in {folder}")
    return Reading(CheckState.OK, text)


def _write(folder: Path) -> None:
    name = folder / f".perdure-{os.getpid()}-{time.monotonic_ns():x}"
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        name.unlink()
        left = memoryview(PROBE)
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)


# --- network ---------------------------------------------------------------------------------------------

APART: Final = 1.0
"""Seconds between this clock and the server's that are told."""


@dataclass(slots=True)
class RedisCheck:
    """Redis: whether it answers, how fast, and how far its clock is from ours.

    The connection is this check's own. ``slow``: seconds of a round trip from which it is degraded.
    """

    connection: redis.Redis
    slow: float

    def look(self) -> Reading:
        try:
            self.connection.ping()  # it may have to connect first, which is no round trip
            before, began = time.time(), time.monotonic()
            seconds, micros = self.connection.time()
            took = time.monotonic() - began
        except redis.RedisError as error:
            self.connection.connection_pool.disconnect()
            return Reading(CheckState.FAIL, f"Redis does not answer: {type(error).__name__}: {error}")
        offset = seconds + micros / 1e6 - (before + took / 2)
        text = f"a round trip took {took * 1000:.1f} ms"
        if took >= self.slow:
            return Reading(CheckState.DEGRADED, text)
        if abs(offset) - took / 2 > APART:
            side = "behind" if offset > 0 else "ahead of"
            # Nothing is decided by it: all deadlines are the server's.
            return Reading(CheckState.DEGRADED, f"this host's clock is {abs(offset):.1f} s {side} the server's")
        return Reading(CheckState.OK, text)
