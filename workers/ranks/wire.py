"""Whole messages between the processes of one group, over a pair of sockets.

This is the control plane: what the ranks are told never goes through a collective. What is pickled here was made
by a process of the same group, for the other end of a socket that nobody else has.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from typing import Any, Final

_LENGTH: Final = struct.Struct("!Q")


class Wire:
    """One end. One thread receives; any may send."""

    def __init__(self, end: socket.socket, timeout: float) -> None:
        """``timeout``: seconds that a send may stand still before it counts as broken."""
        self._end = end
        self._lock = threading.Lock()
        whole = int(timeout)
        end.setblocking(True)
        # Not settimeout, which would end the waiting for the next message too.
        end.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", whole, max(1, int((timeout - whole) * 1e6)))
        )

    def send(self, message: Any) -> None:
        """Raises ``OSError`` when the other end is gone, or has not read for the timeout."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._end.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Any:
        """The next message, waited for. Raises ``EOFError`` when the other end is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def close(self) -> None:
        """Let both ends know that there is nothing more to come."""
        try:
            self._end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was faster
        self._end.close()

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part = self._end.recv(min(length - len(data), 1 << 20))
            except OSError as error:
                raise EOFError from error
            if not part:
                raise EOFError
            data += part
        return bytes(data)
