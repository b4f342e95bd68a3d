"""Readiness and signs of life for systemd (``Type=notify``), over the socket that it names in ``NOTIFY_SOCKET``."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""They are for the process that systemd started, and for none of its children."""


@dataclass(slots=True)
class Notifier:
    """Tells systemd how it stands with this process; without ``NOTIFY_SOCKET`` nobody hears it."""

    address: str = ""
    interval: float = 0.0
    """Seconds between two signs of life: half of what systemd waits for. 0: it waits for none."""
    _told: str = ""
    _beat: float = float("-inf")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """From the variables that systemd sets; what cannot be read counts as not set."""
        environment = os.environ if environment is None else environment
        address = environment.get("NOTIFY_SOCKET", "")
        if address[:1] not in ("/", "@"):
            return cls()  # "vsock:…" is for virtual machines
        micros, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        meant = pid in ("", str(os.getpid()))
        return cls(address, int(micros) / 2e6 if meant and micros.isdecimal() else 0.0)

    def ready(self) -> None:
        """The service has started."""
        self._send("READY=1")

    def stopping(self) -> None:
        """It ends."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; sent when it has changed."""
        if text != self._told:
            self._told = text
            self._send(f"STATUS={' '.join(text.split())}")

    def beat(self, now: float) -> None:
        """Call it in every round of the loop that is to be watched; ``now`` in seconds, monotonic."""
        if self.interval and now - self._beat >= self.interval:
            self._beat = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self.address:
            return
        # "@" stands for the zero byte of a name that lies in no folder.
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as telling:
                telling.setblocking(False)
                telling.sendto(message.encode(), address)
        except OSError:
            pass  # systemd is being restarted, or its queue is full: the next sign of life tells it the same
