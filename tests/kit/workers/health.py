"""Asking for health over HTTP."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing
from typing import Any


def ask(url: str, path: str = "/readyz", method: str = "GET") -> tuple[int, Any, http.client.HTTPResponse]:
    """Status, body (JSON, if there is one) and the response, of one request."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with closing(http.client.HTTPConnection(host.strip("[]"), int(port), timeout=30)) as client:
        client.request(method, path)
        response = client.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body else None, response


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port: int = finder.getsockname()[1]
    return port


def status(url: str, path: str = "/readyz") -> int:
    """The status of an answer; 0 for none."""
    try:
        return ask(url, path)[0]
    except (OSError, http.client.HTTPException):
        return 0
