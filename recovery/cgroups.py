"""What the kernel has counted of a process's control group: how many it has killed for lack of memory.

Neither the process that is killed nor its parent is told why it got SIGKILL; the count is the only evidence. It is of
the whole group, so it says something about one process only if it has risen in the moment of that process's end.
"""

from __future__ import annotations

from pathlib import Path


class OomKills:
    """The count of one group, and how much of it is new. Nothing is counted where there is none (other systems)."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known = self._read()

    @classmethod
    def of(cls, pid: int, *, root: Path = Path("/")) -> OomKills:
        """The count of the group in which a process is. ``root`` is that of the file system."""
        return cls(find(pid, root))

    def look(self) -> int:
        """How many were killed since the last look; 0 if nobody can tell."""
        count = self._read()
        risen = 0 if count is None or self._known is None else max(0, count - self._known)
        self._known = count
        return risen

    def _read(self) -> int | None:
        return None if self._file is None else count_in(self._file)


def count_in(file: Path) -> int | None:
    """The count in ``memory.events`` (version 2) or ``memory.oom_control`` (version 1); ``None`` if it is not there."""
    try:
        text = file.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdigit():
            return int(value)
    return None


def find(pid: int, root: Path) -> Path | None:
    """The file that holds the count of the group of a process, if there is one."""
    try:
        groups = (root / f"proc/{pid}/cgroup").read_text(errors="replace")
    except OSError:
        return None
    for line in groups.splitlines():
        _, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if controllers == "":
            mounts, name = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], "memory.events"
        elif "memory" in controllers.split(","):
            mounts, name = ["sys/fs/cgroup/memory"], "memory.oom_control"
        else:
            continue
        for mount in mounts:
            # In a container the path may be the host's, of which only the container's own part is mounted, at the top.
            for place in (root / mount / path.lstrip("/"), root / mount):
                if count_in(place / name) is not None:
                    return place / name
    return None
