"""A Redis that answers slowly: nobody who lives is declared dead for it, and whoever is dead is found all the same."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from perdure.protocol.connection import connect
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.recovery.reaper import Reaper
from perdure.scripts.pool.server import Server
from perdure.workers.guardian.companion import Guarded, portable, rebuild
from perdure.workers.guardian.process import Guardian

SETTINGS = Settings(heartbeat=0.4, heartbeat_timeout=2.0, reap_interval=0.2)
"""The defaults, 2.5 times as fast."""


class Slow:
    """In front of a server: each call waits for so many seconds before the server sees it."""

    def __init__(self, port: int) -> None:
        self.seconds = 0.0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for item in (self._listener, *self._sockets):
            close(item)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            far = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [near, far]
            for source, target, back in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=(source, target, back), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        try:
            while data := source.recv(1 << 20):
                if not back:
                    time.sleep(self.seconds)
                target.sendall(data)
        except OSError:
            pass  # the other direction has ended
        close(source)
        close(target)


def close(item: socket.socket) -> None:
    try:
        item.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was never connected, or is closed already
    item.close()


@contextmanager
def guarded(url: str, name: str) -> Iterator[list[Guarded]]:
    """A guardian that beats for this process until the end of the block; what it has to say stands in the list."""
    near, far = os.pipe()
    verdict: list[Guarded] = []
    where = rebuild(portable(connect(url, check=False)), timeout=2.0, acknowledged=1.0)
    guardian = Guardian(
        store=Store(where, SETTINGS),
        settings=SETTINGS,
        incarnation=uuid.uuid4().hex,
        worker=name,
        queues=["gpu"],
        pid=os.getpid(),
        host=name,
        device="",
        fingerprints=[],
        ready=True,
        pipe=near,
    )
    thread = threading.Thread(target=lambda: verdict.append(Guarded(guardian.run())), daemon=True)
    thread.start()
    try:
        yield verdict
    finally:
        os.write(far, b'{"bye": true}\n')
        os.close(far)
        thread.join(20)


def reaped(server: Server) -> list[str]:
    """Names of the workers that were declared dead."""
    with connect(server.url) as connection:
        records = [connection.hgetall(name) for name in connection.scan_iter(f"{key('incarnation')}*")]
    return sorted(record[b"worker"].decode() for record in records if b"reaped" in record)


@pytest.mark.slow
@pytest.mark.parametrize("reapers", [1, 0], ids=["a reaper", "guardians alone"])
@pytest.mark.parametrize("seconds", [0.32, 0.6], ids=["0.8 s a call", "1.5 s a call"])
def test_slow_calls_kill_nobody_and_save_no_dead(
    server_binary: Path, tmp_path: Path, seconds: float, reapers: int
) -> None:
    """Eight guardians that sweep and beat; a host is lost when the calls become slow."""
    with ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, binary=server_binary))
        slow = Slow(server.port)
        stack.callback(slow.close)
        verdicts = [stack.enter_context(guarded(slow.url, f"w{number}")) for number in range(8)]
        if reapers:
            stop = threading.Event()
            reaper = Reaper(Store(connect(slow.url), SETTINGS), SETTINGS)
            pool = stack.enter_context(ThreadPoolExecutor(1))
            pool.submit(reaper.run, stop)
            stack.callback(stop.set)
        with connect(server.url) as connection:
            deadline = time.monotonic() + 20
            while connection.zcard(key("beats")) < 8:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            connection.delete(key("pulse"))
            lost = {"incarnation": uuid.uuid4().hex, "worker": "lost", "queues": ["gpu"], "pid": 1, "host": "lost"}
            Store(connection, SETTINGS).heartbeat(**lost)  # type: ignore[arg-type]
        slow.seconds = seconds
        # What it takes when calls are quick, and as many sweeps of five slow calls, three times as long.
        time.sleep(3 * (SETTINGS.heartbeat_timeout + 5 * seconds))
        slow.seconds = 0
        assert verdicts == [[]] * 8
        assert reaped(server) == ["lost"]
