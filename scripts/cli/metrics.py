"""``perdure metrics``: what the pool has counted and how it stands, for Prometheus."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Final
from urllib.parse import urlsplit

import click
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import choose_encoder

from ...protocol.connection import connect, resolve_url
from ...protocol.errors import UsageError
from ...protocol.queries.census import Surveyor
from ...protocol.settings import redact
from ...protocol.telemetry import logs
from ...workers.health.server import Answers, BoundedServer
from ..present.console import read_settings, url_option
from ..present.exposition import PoolCollector

log = logging.getLogger("perdure.metrics")

PORT: Final = 9727
"""One beside rq-exporter's."""

TIMEOUT: Final = 3.0
"""Seconds that Redis may take for one answer: a scrape is to end before Prometheus gives it up."""


class MetricsServer(BoundedServer):
    """Serves one registry. Raises ``OSError`` if it cannot listen."""

    def __init__(self, registry: CollectorRegistry, bind: str, port: int) -> None:
        self.registry = registry
        super().__init__(_MetricsHandler, bind, port)


class _MetricsHandler(Answers):
    server: MetricsServer

    def do_GET(self) -> None:
        match urlsplit(self.path).path:
            case "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))
                self.answer(200, encode(self.server.registry), kind)
            case "/livez":
                # This process alone: Redis being away is a sample, and no reason to restart what says so.
                self.answer(200, b"ok\n")
            case _:
                self.answer(404, b"there are /metrics and /livez\n")


@click.command(
    epilog="""\b
Examples:
  perdure metrics
  perdure metrics --bind 0.0.0.0 --port 9727
  perdure metrics --once | grep recovery

It has no password: let only Prometheus reach it. deploy/ has a scrape configuration, alert rules and a dashboard."""
)
@click.option("--bind", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--once", is_flag=True, help="Print the metrics once and exit.")
@click.option(
    "--max-queues",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Queues shown by name; the rest are only counted.",
)
@click.option(
    "--max-workers",
    default=500,
    show_default=True,
    type=click.IntRange(1),
    help="With more workers than this, none is shown by name.",
)
@url_option
def metrics(bind: str, port: int, *, once: bool, max_queues: int, max_workers: int, url: str | None) -> int:
    """Serve /metrics for Prometheus, and /livez. One process is enough for a pool.

    Everything is read from Redis at each scrape: this process may be restarted or moved at any time, and the counters
    survive the workers that counted. Redis may be away: perdure_redis_up is 0 then.
    """
    settings = read_settings(url)
    address = resolve_url(settings)
    # With --once, a person wants to know now; a server waits for Redis as all else does.
    connection = connect(address, timeout=TIMEOUT, name="perdure-metrics", check=once)
    registry = CollectorRegistry()
    registry.register(PoolCollector(Surveyor(connection, max_queues=max_queues, max_workers=max_workers)))
    if once:
        click.echo(generate_latest(registry), nl=False)
        return 0
    logs.configure(settings.log_format)
    try:
        server = MetricsServer(registry, bind, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {bind} port {port}: {reason}; choose another with --bind or --port"
        ) from None
    with server:
        log.info("serving %s/metrics of %s", server.url, redact(address))
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not here: shutdown() waits for the loop that this handler interrupts.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
        server.serve_forever()
    return 0
