"""A real ``perdure web``, and how a program asks it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.kit.lab import LONG, Process, eventually

TOKEN = "the-token-of-the-tests"


@dataclass
class Answer:
    """Status, headers by their lower-case names, and the body as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        """Of JSON."""
        assert self.headers["content-type"] == "application/json", self
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """What the server says was wrong."""
        text: str = self.value["error"]
        return text


class Site:
    """A server that runs, at ``url``."""

    def __init__(self, url: str, process: Process) -> None:
        self.url = url
        self.process = process
        self.port = urlsplit(url).port or 0

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        """One request; ``Host`` and others as given. A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, body=data, headers=headers)
            reply = connection.getresponse()
            return Answer(reply.status, {name.lower(): text for name, text in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The value of an answer that is a success."""
        answer = self.ask(path)
        assert answer.status == 200, answer
        return answer.value

    def requeue(self, *items: dict[str, str], token: str = TOKEN) -> Answer:
        return self.ask("/api/requeue", "POST", {"items": list(items)}, Authorization=f"Bearer {token}")

    @contextmanager
    def watching(self) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of the stream, as they come: name and value."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        connection.request("GET", "/api/stream")
        reply = connection.getresponse()  # the socket is its own now: it has no length
        try:
            assert (reply.status, reply.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
            yield _events(reply)
        finally:
            reply.close()
            connection.close()


def _events(reply: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    name = ""
    while line := reply.readline():
        field, _, text = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = text
        elif field == "data":
            yield name, json.loads(text)


@contextmanager
def serving(url: str, folder: Path, *arguments: str, token: str = TOKEN) -> Iterator[Site]:
    """``perdure web`` of the Redis at ``url``."""
    output = folder / "web.log"
    environment = {**os.environ, **({"PERDURE_WEB_TOKEN": token} if token else {})}
    with output.open("wb") as file:
        command = [sys.executable, "-m", "perdure.scripts.main", "web", "--url", url, "--port", "0", *arguments]
        process = Process(subprocess.Popen(command, stdout=file, stderr=file, env=environment), output)
    try:
        eventually(lambda: "serving " in process.log or not process.running)
        found = re.search(r"serving (http://\S+) of ", process.log)
        assert found is not None, process.log
        yield Site(found[1], process)
    finally:
        if process.running:
            process.kill()
