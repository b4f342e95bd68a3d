"""Whether code was edited after a worker had loaded it: it runs what it loaded, and nobody would see why.

What is watched are the files of a user's own modules: not what is installed, and nothing of Perdure. The worker says
which it has loaded, with the digest of each; its guardian looks at the files from outside.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MOST: Final = 500
"""Files that are watched, the first loaded ones."""

_OWN: Final = str(Path(__file__).resolve().parents[2])
_INSTALLED: Final = tuple(
    {
        os.path.realpath(folder) + os.sep
        for folder in (
            *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
            *site.getsitepackages(),
            site.getusersitepackages(),
            _OWN,
        )
    }
)


@dataclass(slots=True)
class Loaded:
    """What a worker has loaded. A file has the digest of the first time: a module is not read again."""

    _files: dict[str, str] = field(default_factory=dict)
    _broken: dict[str, str] = field(default_factory=dict)

    def now(self) -> dict[str, str]:
        """The files of all that is loaded and may be edited, and of what could not be, with their digests."""
        places = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        self._files |= digests((place for place in places if isinstance(place, str)), self._files)
        return {**self._broken, **self._files}

    def failed(self, task: str, error: BaseException) -> dict[str, str]:
        """The same when a task could not be loaded: what its error came through may be mended in its file."""
        found = self.now()
        self._broken = {path: digest for path, digest in concerned(task, error).items() if path not in self._files}
        return {**self._broken, **found}

    def well(self) -> dict[str, str]:
        """The same when one was loaded."""
        self._broken = {}
        return self.now()


def concerned(task: str, error: BaseException) -> dict[str, str]:
    """The same for a task that could not be loaded: its module, and whatever files its error came through."""

    def files() -> Iterator[str]:
        try:
            found = importlib.util.find_spec(task.rpartition(".")[0])
        except (ImportError, ValueError, SyntaxError, AttributeError):
            found = None
        if found is not None and found.origin:
            yield found.origin
        link: BaseException | None = error
        for _ in range(10):
            if link is None:
                return
            if isinstance(link, SyntaxError) and link.filename:
                yield link.filename
            for frame, _ in traceback.walk_tb(link.__traceback__):
                yield frame.f_code.co_filename
            link = link.__cause__ or link.__context__

    return digests(files())


def digests(files: Iterable[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """File → SHA-256 of those that may be edited, but for the ``known`` ones; what cannot be read is left out."""
    result: dict[str, str] = {}
    for file in files:
        path = os.path.realpath(file)
        if len(result) >= MOST:
            break
        if path in result or path in (known or ()) or not path.endswith(".py") or path.startswith(_INSTALLED):
            continue
        if found := _digest(path):
            result[path] = found
    return result


def edited(path: str, digest: str) -> bool:
    """Whether a file holds something else now; one that cannot be read is being replaced, or gone with its folder."""
    found = _digest(path)
    return bool(found) and found != digest


@dataclass(slots=True)
class Sources:
    """The files of one worker, looked at often: read only where their date or size has changed."""

    files: Mapping[str, str] = field(default_factory=dict)
    _seen: dict[str, tuple[tuple[int, int], bool]] = field(default_factory=dict)

    def watch(self, files: Mapping[str, str]) -> None:
        """Watch these, and nothing else any more."""
        self.files = files
        self._seen.clear()

    def stale(self) -> list[str]:
        """Those that were edited since they were loaded."""
        return [path for path, digest in self.files.items() if self._changed(path, digest)]

    def _changed(self, path: str, digest: str) -> bool:
        try:
            status = Path(path).stat()
        except OSError:
            return False
        mark = status.st_mtime_ns, status.st_size
        if path not in self._seen or self._seen[path][0] != mark:
            self._seen[path] = mark, edited(path, digest)
        return self._seen[path][1]


def _digest(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
