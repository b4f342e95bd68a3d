"""``perdure web``: serve the page."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import uvicorn

from ...protocol.connection import resolve_url
from ...protocol.errors import UsageError
from ...protocol.settings import redact
from ...protocol.telemetry import logs
from ..present.console import read_settings, url_option
from ..present.reading import Rates
from .access import Access, read_token
from .api import application
from .looks import WebQueries
from .stream import Broadcast

log = logging.getLogger("perdure.web")

PORT: Final = 9728
"""One beside that of the metrics."""

CONNECTIONS: Final = 256
"""Open at a time; a further request gets 503."""

GRACE: Final = 5
"""Seconds that answers which are under way may take when the server is told to end."""


@click.command(
    epilog="""\b
Examples:
  perdure web
  PERDURE_WEB_TOKEN="$(cat token)" perdure web --port 8080
  perdure web --host 0.0.0.0 --token-file /run/secrets/perdure-web
  perdure web --allow-host pool.example.org     # behind a reverse proxy on this host"""
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File with the token that allows requeues; else PERDURE_WEB_TOKEN. Without one, the page is read-only.",
)
@click.option(
    "--allow-host",
    "allowed",
    multiple=True,
    metavar="NAME",
    help="An additional host name that the page answers to; may be repeated.",
)
@click.option(
    "--every",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.2, 60),
    metavar="SECONDS",
    help="Seconds between two refreshes.",
)
@url_option
def web(host: str, port: int, token_file: Path | None, allowed: tuple[str, ...], every: float, url: str | None) -> int:
    """Serve a page with queues, workers, requests, failures and the load of Redis.

    Redis is read once per refresh however many viewers there are, and not at all without viewers. Redis may be away:
    the page says since when, and goes on. Anybody who can connect can read; a requeue needs the token.
    """
    token = read_token(os.environ, token_file)
    settings = read_settings(url)
    address = resolve_url(settings)
    try:
        listening = listen(host, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --host or --port"
        ) from None
    logs.configure(settings.log_format)
    with listening, WebQueries(settings, address) as looks:
        where = listening.getsockname()
        local = is_loopback(where[0])
        if not local:
            log.warning("everybody who can connect to %s can read the page; let a firewall or a proxy decide who", host)
        watch = Broadcast(partial(looks.frame, Rates()), every)
        app = application(looks, watch, Access(token, allowed, local=local))
        shown = f"[{where[0]}]" if ":" in where[0] else where[0]
        log.info(
            "serving http://%s:%d of %s, %s", shown, where[1], redact(address), "with a token" if token else "read-only"
        )
        serve(app, watch, listening)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ``OSError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError):
        listening.close()
        raise
    return listening


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def serve(app: Any, watch: Broadcast, listening: socket.socket) -> None:
    """Until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # uvicorn raises the signal again when it has ended; that this one ended as it was told to is no error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    asyncio.run(_Server(config, watch).serve([listening]))


class _Server(uvicorn.Server):
    """Ends the streams first, which would never end by themselves."""

    def __init__(self, config: uvicorn.Config, watch: Broadcast) -> None:
        super().__init__(config)
        self._watch = watch

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watch.close()
        await super().shutdown(sockets)
