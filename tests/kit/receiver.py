"""A web server that notes which of RQ's webhooks come to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rq import Webhook


@dataclass
class Receiver:
    """What has come, oldest first."""

    url: str = ""
    received: list[dict[str, Any]] = field(default_factory=list)

    def of(self, name: str) -> list[str]:
        """The statuses that were told of one job."""
        return [item["status"] for item in self.received if item["job_id"] == name]

    def hooks(self) -> list[Webhook]:
        """Webhooks for either end."""
        return [Webhook(self.url, "finished", method="POST"), Webhook(self.url, "failed", method="POST")]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for the length of a block."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.received.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Prints nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        receiver.url = f"http://127.0.0.1:{server.server_port}/"
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
