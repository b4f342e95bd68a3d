"""What the processes of a pool print, each line with the name of who printed it: ``perdure up``'s own ``| sed``.

A process of its own, so that a pool that is killed breaks no pipe under workers that drain: it ends when everybody who
could print has ended. Run as a script, with one end of a socket at descriptor 0 over which the pool sends names and
pipes. It imports the standard library only.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass

LONGEST = 64 * 1024
"""Bytes of a line that are held until its end comes."""


@dataclass(slots=True)
class Pipe:
    """One pipe, and the beginning of a line whose end has not come."""

    name: bytes
    target: int
    """Descriptor to print to: 1 or 2."""
    rest: bytes = b""

    def lines(self, data: bytes) -> bytes:
        """What can be printed now that this has come; all that is left at the end, which is no data."""
        *whole, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) > LONGEST):
            whole.append(self.rest)
            self.rest = b""
        return b"".join(self.name + b" | " + line + b"\n" for line in whole)


def main() -> int:
    """Relay until the pool and all sources are gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever is told to end has last words
    pool = socket.socket(fileno=os.dup(0))
    selector = selectors.DefaultSelector()
    selector.register(pool, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            if key.data is None:
                name, descriptors, _, _ = socket.recv_fds(pool, 1024, 2)
                for target, descriptor in enumerate(descriptors, 1):
                    selector.register(descriptor, selectors.EVENT_READ, Pipe(name, target))
                if not name:
                    selector.unregister(pool)
                continue
            data = os.read(key.fd, 65536)
            if text := key.data.lines(data):
                _print(key.data.target, text)
            if not data:
                selector.unregister(key.fd)
                os.close(key.fd)
    return 0


def _print(target: int, text: bytes) -> None:
    view = memoryview(text)
    try:
        while view:
            view = view[os.write(target, view) :]
    except OSError:
        pass  # nobody looks any more; who prints must not wait for that


if __name__ == "__main__":
    sys.exit(main())
