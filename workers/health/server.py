"""Health over HTTP, for load balancers and Kubernetes: served by the guardian, in threads of its own.

====================  ==========================================================================================
``/livez``            200 ``{"live": true, "reason": ""}``, else 503. Restart the worker on 503
``/readyz``           200 or 503 ``{"healthy", "checks": {name: {"state", "reason", "at"}}, "timestamp"}``
``/quarantine``       200 ``{"quarantined", "reason"}``: whether its device may be used
====================  ==========================================================================================
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from .state import Health

PATIENCE: Final = 5.0
"""Seconds that a client may take to send its request, or to take the answer."""

MOST: Final = 32
"""Clients at a time; a further one is turned away at once, and those that say nothing leave after :data:`PATIENCE`."""

PORTS: Final = 64
"""So many ports from the one that was set are tried, for the workers of one host."""


class BoundedServer(socketserver.ThreadingTCPServer):
    """Answers with ``handler``, for a few clients at a time. Raises ``OSError`` if it cannot listen."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True  # a guardian that is replaced leaves connections behind for a minute
    request_queue_size = MOST

    def __init__(self, handler: type[Answers], bind: str, port: int) -> None:
        if ":" in bind:
            self.address_family = socket.AF_INET6
        self._places = threading.BoundedSemaphore(MOST)
        super().__init__((bind, port), handler)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        name = host if isinstance(host, str) else host.decode()
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def start(self) -> None:
        """Serve for as long as this process lives."""
        threading.Thread(target=self.serve_forever, name="health", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had: nothing will give the place back
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is nobody's fault."""


class HealthServer(BoundedServer):
    """Answers about one worker. Raises ``OSError`` if it cannot listen."""

    def __init__(self, health: Health, bind: str, port: int) -> None:
        self.health = health
        super().__init__(_Handler, bind, port)


class Answers(BaseHTTPRequestHandler):
    """What pages for machines have in common: nothing is kept, and only GET and HEAD are taken."""

    timeout = PATIENCE
    server_version = "perdure"
    sys_version = ""

    def do_GET(self) -> None:
        raise NotImplementedError

    def do_HEAD(self) -> None:
        self.do_GET()

    def _refuse(self) -> None:
        self.answer(405, b"only GET and HEAD\n", Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8", **headers: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a probe every second would fill the log."""


class _Handler(Answers):
    server: HealthServer
    paths: ClassVar[tuple[str, ...]] = ("/livez", "/readyz", "/quarantine")

    def do_GET(self) -> None:
        health = self.server.health
        match urlsplit(self.path).path:
            case "/livez":
                why = health.live()
                self._answer(503 if why else 200, {"live": not why, "reason": why})
            case "/readyz":
                report = health.report()
                self._answer(200 if report["healthy"] else 503, report)
            case "/quarantine":
                self._answer(200, {"quarantined": bool(health.unfit), "reason": health.unfit})
            case path:
                self._answer(404, {"error": f"there is no {path[:100]}; there are {', '.join(self.paths)}"})

    def _refuse(self) -> None:
        self._answer(405, {"error": "only GET and HEAD"}, Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _answer(self, status: int, value: dict[str, Any], **headers: str) -> None:
        self.answer(status, json.dumps(value).encode() + b"\n", "application/json", **headers)


def serve(health: Health, bind: str, port: int, log: logging.Logger) -> str:
    """Serve on the first free port from ``port`` on; returns the URL, or an empty text if none could be had.

    A guardian without its port is a guardian all the same.
    """
    for number in range(port, min(port + PORTS, 65536)):
        try:
            server = HealthServer(health, bind, number)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            log.error("cannot serve health on %s port %d: %s", bind, number, error.strerror or error)
            return ""
        server.start()
        log.info("health of worker process %d: %s/readyz", health.pid, server.url)
        return server.url
    log.error("cannot serve health: all ports from %d to %d are taken on %s", port, number, bind)
    return ""
