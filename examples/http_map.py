"""Call an HTTP API for each item of a list, and let it apply each item once, whatever dies meanwhile.

In one terminal, from this folder:

    $ perdure up examples

and in another one, from this folder too:

    $ python http_map.py

That starts a small API on this machine, sends it twelve orders, and prints what it has applied. Kill a worker while it
runs (``kill -9``): the API may be called twice for one item, and applies it once. With a Redis of your own, one or
more of these do instead of the pool:

    $ rq worker -w perdure.workers.Worker --url redis://localhost:6379 examples

Two things make it so. Each call has a key made of the request's id and the item's number, which the API remembers; and
the answer to one item is stored before the next is called, so that at most the last one is ever called again.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from perdure.producer import Client
from perdure.workers import InvalidRequest, Request, Step, task

TIMEOUT = 10.0
"""Seconds for one call; less than the step timeout (20 by default), or a slow API would count as a hung step."""

TEMPORARY = frozenset({408, 409, 425, 429})
"""Statuses below 500 that say "not now". 409 is how many APIs answer while the first call of a key still runs."""


@task
def call_each(request: Request) -> Generator[Step, None, Any]:
    """POST each item to an API.

    Payload: ``url``; ``items``, a list; ``timeout``, seconds for one call. One output for each item, in order:
    ``{"index", "answer"}``, or ``{"index", "error"}`` for one that the API refused. The result counts both.
    """
    url, items, timeout = checked(request.payload)
    # The outputs are the checkpoint: there are as many as items were answered. No state is needed.
    refused = sum("error" in output for output in request.outputs)
    for index in range(len(request.outputs), len(items)):
        try:
            output = {"index": index, "answer": post(url, items[index], f"{request.id}-{index}", timeout)}
        except urllib.error.HTTPError as error:
            output = {"index": index, "error": refusal(error)}
            refused += 1
        # Durable: the loop goes on, to the next side effect, only when this answer is in Redis.
        yield Step(output=output, durable=True)
    return {"answered": len(items) - refused, "refused": refused}


def post(url: str, item: Any, key: str, timeout: float) -> Any:
    """One call; returns the answer's JSON.

    Errors that may pass are simply raised: the request fails for now, and is tried again from its last output after
    its own backoff (``max_retries``, ``PERDURE_RETRY_BASE``). The same call then has the same key.
    """
    call = urllib.request.Request(
        url,
        data=json.dumps(item).encode(),
        headers={"Content-Type": "application/json", "Idempotency-Key": key},
        method="POST",
    )
    with urllib.request.urlopen(call, timeout=timeout) as reply:
        return json.load(reply)


def refusal(error: urllib.error.HTTPError) -> str:
    """What to write down for an item that the API does not take. Raises for what is not the item's fault."""
    with error:
        if error.code >= 500 or error.code in TEMPORARY:
            raise ConnectionError(f"the API answered {error.code} {error.reason}") from error
        if error.code in (401, 403, 404):
            # The next item would be told the same.
            raise InvalidRequest(f"the API answered {error.code} {error.reason}: mend the url", "url") from error
        return f"{error.code} {error.reason}"


def checked(payload: Any) -> tuple[str, list[Any], float]:
    """The fields of a payload. What is wrong with one is told by name, and is never retried."""
    if not isinstance(payload, dict) or not str(payload.get("url", "")).startswith(("http://", "https://")):
        raise InvalidRequest("url begins with http:// or https://", "url")
    if not isinstance(payload.get("items"), list):
        raise InvalidRequest("items is a list", "items")
    timeout = payload.get("timeout", TIMEOUT)
    if not isinstance(timeout, int | float) or not 0 < timeout <= TIMEOUT:
        raise InvalidRequest(f"timeout is in seconds, more than 0 and at most {TIMEOUT:g}", "timeout")
    return payload["url"], payload["items"], timeout


# --- the producer, and an API to try it with ---------------------------------------------------------------


class Orders(ThreadingHTTPServer):
    """An API that applies each idempotency key once, and answers a repeated call as it did the first one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OneCall)
        self.lock = threading.Lock()
        self.answers: dict[str, Any] = {}
        self.calls = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/orders"

    def apply(self, key: str, order: Any) -> Any:
        with self.lock:
            self.calls += 1
            if key not in self.answers:
                self.answers[key] = {"order": order, "number": len(self.answers) + 1}
            return self.answers[key]


class OneCall(BaseHTTPRequestHandler):
    """One call of the API."""

    server: Orders

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.05)
        reply = json.dumps(self.server.apply(self.headers["Idempotency-Key"], body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the outputs say what happens."""


def main() -> None:
    """Send twelve orders, and show the answers as they come."""
    with Orders() as api, Client() as client:
        items = [{"article": number, "pieces": 1 + number % 3} for number in range(12)]
        # By its dotted path: in this process the task's module is __main__, which no worker could import.
        handle = client.submit("http_map.call_each", {"url": api.url, "items": items}, queue="examples")
        print(f"request {handle.id}")
        for output in handle.stream():
            print(f"  {output}", flush=True)
        print(handle.result())
        print(f"{len(api.answers)} orders applied in {api.calls} calls")


if __name__ == "__main__":
    main()
