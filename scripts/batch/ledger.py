"""The two files that a batch writes: answers, and the lines that failed.

They are the only memory of a batch. A line counts as done once its line here is on disk; each of these proves by its
``id`` which line of which input it answers. So nothing else has to be kept, and nothing that was killed has to be told.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ...protocol.errors import PerdureError, UsageError
from .lines import Checked, reason_of

PREFIX: Final = "batch_req_"
"""What stands before the request's id in a line's ``id``."""


def entry(identifier: str, custom_id: str | None, response: Any, error: Any) -> bytes:
    """One line. Raises ``ValueError`` for what JSON cannot hold."""
    value = {"id": PREFIX + identifier, "custom_id": custom_id, "response": response, "error": error}
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Ends of lines to many who read line by line, though not to JSON.
    for character in ("\x85", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A text from a pickle may hold half of a surrogate pair.
    return text.encode(errors="backslashreplace") + b"\n"


class Ledger:
    """Both files, locked for this process.

    1. ``Ledger(…)``: opens and locks them, or makes them.
    2. :meth:`resume`: reads what is there, cuts off what a crash has torn.
    3. :meth:`append`: returns once it is on disk.

    Raises :class:`UsageError` for paths that cannot be written, are the input's, or are in use.
    """

    def __init__(self, output: Path, errors: Path, source: os.stat_result) -> None:
        self.output, self.errors = File(output), File(errors)
        try:
            for file in (self.output, self.errors):
                if file.same(source):
                    raise UsageError(f"{file.path} is the input; give another file")
            if self.output.same(self.errors.stat()):
                raise UsageError(f"answers and errors cannot both go to {output}; give -e another file")
            for file in (self.output, self.errors):
                file.lock()
        except BaseException:
            self.close()
            raise

    def resume(self, checked: Checked) -> tuple[bytearray, int, int]:
        """Which lines are done (a 1 at the number of the line), how many of them well, and how many failed.

        Raises :class:`UsageError` if the files do not belong to this input.
        """
        done = bytearray(len(checked.sums) + 1)
        unnamed = {PREFIX + checked.bad_id(number): number for number, bad in checked.bad.items() if not bad.custom_id}
        return done, self.output.read(checked, done, unnamed), self.errors.read(checked, done, unnamed)

    def append(self, answers: Sequence[bytes], failures: Sequence[bytes]) -> None:
        """Write lines; returns once they are on disk. Raises :class:`PerdureError` if that is not to be had."""
        self.output.append(answers)
        self.errors.append(failures)

    def close(self) -> None:
        self.output.close()
        self.errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class File:
    """One of the two."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"cannot write to {path}: {reason_of(error)}") from None
        if not stat.S_ISREG(self.stat().st_mode):
            os.close(self._file)
            raise UsageError(f"cannot write to {path}: it is no ordinary file, so the run could not be resumed from it")

    def stat(self) -> os.stat_result:
        return os.fstat(self._file)

    def same(self, other: os.stat_result) -> bool:
        return os.path.samestat(self.stat(), other)

    def lock(self) -> None:
        """Nobody else may write while this process lives. The kernel gives the lock back, however it ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path} is being written by another batch run; wait for it, or give another file"
            ) from None
        # The name has to be on disk as well as what stands under it.
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, checked: Checked, done: bytearray, unnamed: Mapping[str, int]) -> int:
        """Mark the lines that are answered here; returns how many. A last line that is torn is cut off.

        ``unnamed``: the ``id`` → the line of those that have no ``custom_id`` of their own.
        """
        count = 0
        end = 0
        with os.fdopen(os.dup(self._file), "rb") as reader:
            reader.seek(0)
            for number, raw in enumerate(reader, 1):
                value = _parsed(raw)
                if value is None and not raw.strip():
                    end += len(raw)
                    continue
                if value is None:
                    if reader.read(1) or not _torn(raw):
                        raise UsageError(f"line {number} of {self.path} was not written by a batch run; {_ADVICE}")
                    break  # the request's answer is read again
                self._mark(checked, done, number, value, unnamed)
                count += 1
                end += len(raw)
                if not raw.endswith(b"\n"):
                    self._cut(end)
                    self._write(b"\n")
                    end += 1
        self._cut(end)
        return count

    def append(self, lines: Sequence[bytes]) -> None:
        if lines:
            self._write(b"".join(lines))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _mark(
        self, checked: Checked, done: bytearray, number: int, value: dict[str, Any], unnamed: Mapping[str, int]
    ) -> None:
        custom_id = value["custom_id"]
        line = unnamed.get(value["id"]) or (None if custom_id is None else checked.line_of(custom_id))
        if line is None:
            raise UsageError(
                f"line {number} of {self.path} answers {custom_id!r:.80}, which {checked.name} does not have: "
                f"it is the output of another input, or the input has changed; {_ADVICE}"
            )
        if value["id"] not in unnamed and value["id"] != PREFIX + checked.request_id(custom_id):
            raise UsageError(
                f"line {number} of {self.path} answers {custom_id!r:.80} of a file that was another: "
                f"{checked.name} has changed since, or --name has; put back what it was, or {_ADVICE}"
            )
        if done[line]:
            raise UsageError(f"line {number} of {self.path} answers {custom_id!r:.80} once more; delete one of both")
        done[line] = 1

    def _write(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError as error:
            self._undo()
            raise PerdureError(
                f"cannot write to {self.path}: {reason_of(error)}; what was written is kept; run the same "
                "command again to continue"
            ) from None
        self._size += len(data)

    def _undo(self) -> None:
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            pass  # then the next run cuts it off

    def _cut(self, end: int) -> None:
        """Let the file end here. What is there is on disk afterwards: it is about to count as done."""
        if self.stat().st_size > end:
            os.ftruncate(self._file, end)
        os.fsync(self._file)
        self._size = end


_ADVICE: Final = "give another -o and -e, or delete both"


_BEGINNING: Final = b'{"id": "' + PREFIX.encode()


def _torn(raw: bytes) -> bool:
    """Whether it is the beginning of a line of ours, or what a file system leaves where nothing was written.

    What is anybody else's is not cut off.
    """
    return raw[: len(_BEGINNING)] == _BEGINNING[: len(raw)] or not raw.strip(b"\0")


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line of ours, or ``None``."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if (
        isinstance(value, dict)
        and isinstance(value.get("custom_id", 0), str | None)
        and isinstance(value.get("id"), str)
    ):
        return value
    return None
