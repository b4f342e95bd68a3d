"""A Redis of one's own: what ``perdure up``, the demonstration and the tests run on when no URL is given.

The server is a process in a session of its own, so that Ctrl-C in the terminal reaches the pool first and the
server last. It listens on 127.0.0.1 only, writes its append-only file every second, and refuses writes
rather than evict: what Perdure needs of any Redis.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from ...protocol.connection import RECORD, EmbeddedServer, connect, running_server, state_folders
from ...protocol.errors import RedisUnavailable, SettingsError
from .executable import HOST, command_line, find_binary

START_TIMEOUT = 20.0  # seconds; reading back a large append-only file is part of the start
STOP_TIMEOUT = 10.0  # seconds that a server may take to write the rest of its file
LOG = "server.log"

_PORTS_TO_TRY = 10
_POLL = 0.005  # seconds


class Server:
    """One server process, from its start to :meth:`stop`. Also a context manager.

    1. start: on a free port of 127.0.0.1, in ``folder`` or a temporary one; returns when it answers.
    2. ``kill`` and ``restart``: what a crash looks like. Same port, same folder, data read back from the file.
    3. stop: SIGTERM, so that the file is complete, then SIGKILL. A temporary folder is removed.

    Args:
        folder: where data and log lie; made if missing. Only one server can run in it. Without one, a temporary
            folder, which stays behind if this process is killed.
        port: a fixed port; 0 takes a free one.
        binary: the executable; see :func:`find_binary`.
        die_with_parent: the server gets SIGTERM when the *thread* that started it ends, in whatever way
            (Linux binds the signal to the thread). So start it from one that lives as long as the process.
        start_timeout: seconds until it must answer.

    Raises:
        SettingsError: no executable, or the folder cannot be used.
        RedisUnavailable: the server did not start; the message holds the end of its log.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        port: int = 0,
        binary: str | Path | None = None,
        die_with_parent: bool = False,
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        self.binary = find_binary(binary)
        self.port = port
        self._die_with_parent = die_with_parent
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary = folder is None
        if folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="perdure-server-"))
        else:
            self.folder = Path(folder).absolute()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(f"The server's folder {self.folder} cannot be made: {error.strerror}") from None
        try:
            self._start(ports=_PORTS_TO_TRY if port == 0 else 1)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process id of the running server, or of the last one."""
        assert self._process is not None  # __init__ raises otherwise
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self, lines: int = 20) -> str:
        """The end of what the server has written."""
        try:
            text = (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def kill(self) -> None:
        """SIGKILL, as a crash: what was not yet written to the file is lost, up to 2 s if its disk is slow."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        """Start again at the same port and on the same folder, after :meth:`kill` or :meth:`terminate`."""
        if self.running:
            self.terminate()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start(ports=1)

    def terminate(self) -> None:
        """End the process and keep the folder: SIGTERM, then SIGKILL after :data:`STOP_TIMEOUT`."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()

    def stop(self) -> None:
        """End the process and remove a temporary folder. Harmless when repeated."""
        self.terminate()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self, ports: int) -> None:
        """Try up to ``ports`` ports: between finding a free one and the server's bind, somebody may take it."""
        deadline = time.monotonic() + self._start_timeout
        lock = self._lock_folder(deadline)
        try:
            for attempt in range(1, ports + 1):
                port = self.port or _free_port()
                begin = self._log_size()
                self._process = self._launch(port, lock)
                if self._answers(port, deadline):
                    self.port = port
                    return
                stopped = self._process.poll() is not None
                self.kill()
                if not stopped:
                    raise RedisUnavailable(
                        f"{self.binary} did not answer within {self._start_timeout:g} s. "
                        f"The end of its log:\n{self.log()}"
                    )
                if attempt == ports or not self._port_was_taken(begin):
                    raise RedisUnavailable(
                        f"{self.binary} exited at its start (status {self._process.returncode}). "
                        f"The end of its log:\n{self.log()}"
                    )
        finally:
            # The server has inherited it: the folder is locked for as long as the process lives, not we.
            os.close(lock)

    def _launch(self, port: int, lock: int) -> subprocess.Popen[bytes]:
        command = command_line(self.binary, port, self.folder, die_with_parent=self._die_with_parent)
        with (self.folder / LOG).open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def _answers(self, port: int, deadline: float) -> bool:
        """Wait until this very process answers at the port; False if it ended or time is over."""
        process = self._process
        assert process is not None
        with connect(f"redis://{HOST}:{port}/0", timeout=1.0, name="perdure-server", check=False) as client:
            while process.poll() is None and time.monotonic() < deadline:
                # BusyLoadingError, while the file is read back, is a ConnectionError to redis-py.
                with contextlib.suppress(redis.RedisError, OSError):
                    client.ping()
                    if int(client.info("server")["process_id"]) == process.pid:
                        return True
                time.sleep(_POLL)
        return False

    def _lock_folder(self, deadline: float) -> int:
        """An open lock on the folder: two servers on one append-only file would ruin it.

        A server that was killed may leave a child behind that rewrites the file; it ends soon, so this waits.
        """
        try:
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(f"The server's folder {self.folder} cannot be written: {error.strerror}") from None
        limit = min(deadline, time.monotonic() + 2.0)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < limit:
                    time.sleep(_POLL)
                    continue
                os.close(lock)
                raise SettingsError(
                    f"Another server runs in {self.folder}. Stop it first, or set PERDURE_REDIS_URL to use it."
                ) from None
            return lock

    def _log_size(self) -> int:
        try:
            return (self.folder / LOG).stat().st_size
        except OSError:
            return 0

    def _port_was_taken(self, begin: int) -> bool:
        """Does what was logged from byte ``begin`` on say that the port was not free?"""
        with (self.folder / LOG).open("rb") as log:
            log.seek(begin)
            return b"in use" in log.read()


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def announce(server: Server) -> bool:
    """Write down where the server is, so that clients and workers on this machine find it.

    Does nothing and returns False while another embedded server is written down and runs. Raises
    :class:`SettingsError` if there is no folder to write into.
    """
    if running_server() is not None:
        return False
    text = EmbeddedServer(url=server.url, pid=server.pid, started=time.time()).to_json()
    problem = ""
    for folder in state_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                problem = f"{folder} belongs to somebody else"
                continue
            # Renamed into place, so that nobody reads half of it.
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, delete=False) as file:
                file.write(text)
            Path(file.name).replace(folder / RECORD)
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
            continue
        return True
    raise SettingsError(f"There is no folder to write the server's address into ({problem}). Set XDG_STATE_HOME.")


def withdraw(server: Server) -> None:
    """Remove what :func:`announce` wrote, if it still speaks of this server."""
    for folder in state_folders():
        path = folder / RECORD
        with contextlib.suppress(OSError, ValueError):
            if EmbeddedServer.from_json(path.read_text(encoding="utf-8")).pid == server.pid:
                path.unlink()
