"""What systemd has heard."""

from __future__ import annotations

import socket


def heard(listening: socket.socket) -> list[str]:
    """What has come so far."""
    listening.setblocking(False)
    messages = []
    try:
        while True:
            messages.append(listening.recv(4096).decode())
    except BlockingIOError:
        return messages
