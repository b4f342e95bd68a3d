"""A proxy in front of Redis that loses replies."""

from __future__ import annotations

import hashlib
import socket
import threading

from perdure.protocol.scripts import load


class Proxy:
    """Between a worker and Redis: loses the first ``drops`` replies to one script, after it was applied."""

    def __init__(self, port: int, script: str, drops: int) -> None:
        self.sha = hashlib.sha1(load(script).source.encode()).hexdigest().encode()
        self.drops = drops
        self.lost = 0
        self._port = port
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for item in [self._listener, *self._sockets]:
            try:
                item.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it was never connected, or is closed already
            item.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            far = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [near, far]
            hit = threading.Event()
            for source, target, back in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=(source, target, hit, back), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, hit: threading.Event, back: bool) -> None:
        rest = b""
        try:
            while data := source.recv(65536):
                if not back:
                    if self.sha in rest + data:
                        hit.set()
                    rest = data[-60:] if self.sha not in rest + data else b""
                elif hit.is_set():
                    hit.clear()
                    # NOSCRIPT: it was not applied, and is sent again with its source.
                    if not data.startswith(b"-NOSCRIPT") and self._take():
                        break
                target.sendall(data)
        except OSError:
            pass  # the other direction has ended
        for item in (source, target):
            try:
                item.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ended by its peer

    def _take(self) -> bool:
        with self._lock:
            if self.lost >= self.drops:
                return False
            self.lost += 1
            return True
