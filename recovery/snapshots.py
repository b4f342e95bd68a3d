"""Snapshots: long-lived state of a worker or a task on disk, such as a cache, an index, a running statistic.

What belongs to one request is its state, and goes to Redis. This is for what outlives requests and would take
long to make again. A snapshot is written beside the others, to the disk, and read back before it gets its name; so
whatever happens to the process or the machine, what was there before is there, and what has a name is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..protocol.errors import SnapshotError, UsageError
from .snapshot_file import Damaged, Encoded, encode, read, verify

log = logging.getLogger("perdure.snapshots")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_LAST: Final = 10**18 - 1
_OPEN: Final = os.O_CLOEXEC | os.O_NOFOLLOW
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What :meth:`Snapshots.load` found: the value, and the number under which it was saved."""

    id: int
    value: Any


class Snapshots:
    """The snapshots of one name in a folder; the newest ``keep`` stay.

    A value is what a state may be: None, booleans, 64-bit integers, floats, strings, bytes, lists and dicts, and
    tensors of torch and numpy in them. Tuples come back as lists, tensors on the CPU. Reading runs no code that the
    file brings along. Files are readable by their owner only.

    Any number of processes may save to the same name, one after the other, and load at any time. Their numbers grow;
    the clock, and the times of the files, play no part.

    Args:
        folder: is made if it is not there. One into which anybody may write is refused.
        name: letters, digits, ``_``, ``.`` and ``-``.
        keep: how many snapshots stay, at least 1.
        patience: seconds that ``save`` waits for another process that saves.

    Raises:
        UsageError: for a name or a number that cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, keep: int = 5, *, patience: float = 60.0) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"the name of snapshots has 1 to 100 letters, digits, '_', '.' or '-', and begins with one of the "
                f"first two; this one is {name!r}"
            )
        if keep < 1:
            raise UsageError(f"keep must be at least 1, not {keep}: the newest snapshot always stays")
        self.folder = Path(folder)
        self.name = name
        self.keep = keep
        self.patience = patience
        self._file = re.compile(rf"{re.escape(name)}-(\d{{12,18}})\.snapshot")
        self._unfinished = re.compile(rf"\.{re.escape(name)}-[0-9a-f]{{32}}\.saving")

    def path(self, id: int) -> Path:
        """Where the snapshot of this number lies."""
        return self.folder / self._named(id)

    def list(self) -> Sequence[int]:
        """The numbers of the snapshots that are there, oldest first. None of them is read."""
        with self._opened() as folder:
            return self._numbers(folder)

    def save(self, value: Any) -> int:
        """Save a value and return its number, once it is on disk and was read back; then the oldest are deleted.

        Nothing may change the value meanwhile. It takes as long as the disk does: call it between two steps, every
        few minutes.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` for a value that cannot be saved, and
        :class:`~perdure.protocol.errors.SnapshotError` with what went wrong and where (its ``__cause__`` has the
        ``errno``): no space, no permission, another process that saves for longer than ``patience``. What was
        saved before is then as it was.
        """
        encoded = encode(value)
        with self._opened() as folder, self._locked(folder):
            # Only who has the lock writes, so these are left over from processes that are gone.
            for name in _names(folder):
                if self._unfinished.fullmatch(name):
                    _delete(folder, name)
            number = max(self._numbers(folder), default=0) + 1
            if number > _LAST:
                raise SnapshotError(f"{self.path(_LAST)} has the highest possible number; move it away")
            try:
                self._write(folder, encoded, number)
            except (OSError, Damaged) as error:
                raise self._not_saved(encoded, number, error) from error
            for old in self._numbers(folder)[: -self.keep]:
                try:
                    _delete(folder, self._named(old))
                except OSError as error:
                    log.warning("%s is not needed any more, and cannot be deleted: %s", self.path(old), error)
        return number

    def load(self, id: int | None = None) -> Snapshot | None:
        """The newest snapshot that is whole, or that of a number; ``None`` if there is none at all.

        One that is torn, was tampered with or cannot be read is passed over, and the log says which and why.

        Raises :class:`~perdure.protocol.errors.SnapshotError` for a number that is not there or not whole, and
        ``CannotRead`` if this process lacks torch or numpy for what is saved.
        """
        if id is not None:
            try:
                return Snapshot(id, self._read(id))
            except (Damaged, OSError) as error:
                raise SnapshotError(f"the snapshot {self.path(id)} cannot be used: {_why(error)}") from error
        passed_over: list[int] = []
        # Listed again for each: while one is read, newer ones may come, and push older ones out.
        while left := sorted(set(self.list()).difference(passed_over)):
            number = left[-1]
            try:
                snapshot = Snapshot(number, self._read(number))
            except FileNotFoundError:
                pass  # deleted since it was listed: there are newer ones
            except (Damaged, OSError) as error:
                log.warning("the snapshot %s cannot be used: %s", self.path(number), _why(error))
            else:
                if passed_over:
                    log.warning("went on with the snapshot %s, the newest that is whole", self.path(number))
                return snapshot
            passed_over.append(number)
        if passed_over:
            log.error("none of the snapshots %s in %s can be used", self.name, self.folder)
        return None

    # --- files ---------------------------------------------------------------------------------------

    def _named(self, number: int) -> str:
        return f"{self.name}-{number:012d}.snapshot"

    def _numbers(self, folder: int) -> Sequence[int]:
        return sorted(int(match[1]) for name in _names(folder) if (match := self._file.fullmatch(name)))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The folder; all names are looked up in it, so that nobody can put another one in its place meanwhile."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotError(f"the folder {self.folder} of snapshots cannot be used: {_why(error)}") from error
        try:
            if os.fstat(folder).st_mode & stat.S_IWOTH:
                raise SnapshotError(
                    f"anybody can write into {self.folder}, and so put a snapshot there; use a folder of your own in it"
                )
            yield folder
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _locked(self, folder: int) -> Iterator[None]:
        """One process, and one thread of it, saves at a time. The lock goes with its process."""
        name = f".{self.name}.lock"
        deadline = time.monotonic() + self.patience
        while True:
            try:
                handle = os.open(name, os.O_RDWR | os.O_CREAT | _OPEN, 0o600, dir_fd=folder)
            except OSError as error:
                raise SnapshotError(f"the lock {self.folder / name} cannot be used: {_why(error)}") from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same(handle, folder, name):  # else somebody has deleted it since it was opened
                    break
            except BlockingIOError:
                pass
            except OSError as error:
                os.close(handle)
                raise SnapshotError(f"the lock {self.folder / name} cannot be used: {_why(error)}") from error
            os.close(handle)
            if time.monotonic() >= deadline:
                raise SnapshotError(
                    f"another process has been saving {self.name} in {self.folder} for {self.patience:g} s; "
                    f"it has {self.folder / name} open"
                )
            time.sleep(0.02)
        try:
            yield
        finally:
            # Not by closing alone: a child that was forked meanwhile has the same lock open.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _write(self, folder: int, encoded: Encoded, number: int) -> None:
        name = f".{self.name}-{uuid.uuid4().hex}.saving"
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600, dir_fd=folder)
        try:
            encoded.write(handle, number)
            os.fsync(handle)
            verify(handle, number)
            os.replace(name, self._named(number), src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        except BaseException:
            with contextlib.suppress(OSError):  # renamed already, or nothing more can be done
                _delete(folder, name)
            raise
        finally:
            os.close(handle)

    def _read(self, number: int) -> Any:
        with self._opened() as folder:
            # Without O_NONBLOCK, a FIFO of that name would hold us up.
            handle = os.open(self._named(number), os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Damaged("it is no regular file")
            return read(handle, number)
        finally:
            os.close(handle)

    def _not_saved(self, encoded: Encoded, number: int, error: Exception) -> SnapshotError:
        text = f"the snapshot {self.path(number)} was not saved: {_why(error)}"
        if isinstance(error, OSError) and error.errno in _FULL:
            room = ""
            with contextlib.suppress(OSError):
                found = os.statvfs(self.folder)
                room = f", {found.f_bavail * found.f_frsize:,} are free"
            text += f" (it has {encoded.size:,} bytes{room}); make room, or keep fewer than {self.keep}"
        return SnapshotError(f"{text}. Those saved before are as they were")


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _delete(folder: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _same(handle: int, folder: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a symbolic link"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
