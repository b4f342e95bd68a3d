"""Where Redis is, and how every part of Perdure connects to it.

redis-py's own retries are off: a call that was sent may have been executed, and only the caller
knows whether it may be sent again. Every wait is bounded. No message holds a password.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .errors import RedisUnavailable, SettingsError
from .settings import Settings, redact
from .transport.explaining import explain, scrub
from .transport.patience import when_it_may

TIMEOUT = 5.0  # seconds; longer than any command here blocks (1 s), shorter than a person waits

RECORD = "server.json"

_SCHEMES = ("redis", "rediss", "unix")

# They would change what every caller relies on: bytes as replies, and no retry behind its back.
_REFUSED_OPTIONS = ("decode_responses", "encoding", "health_check_interval", "retry_on_error", "retry_on_timeout")

# In the path or the query of a URL these mean that a password ended too early.
_UNESCAPED = 'has a "#", "/", "?" or "@" that is not escaped; in a password write %23, %2F, %3F or %40'


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedServer:
    """The record of a server that ``perdure up`` or ``perdure demo`` started on this machine."""

    url: str
    pid: int
    started: float  # seconds since the epoch

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises :class:`ValueError` if the text is not such a record."""
        record = json.loads(text)
        match record:
            case {"url": str(url), "pid": int(pid), "started": int() | float() as started}:
                return cls(url=url, pid=pid, started=float(started))
            case _:
                raise ValueError("not the record of a server")

    def is_running(self) -> bool:
        """Does this very process answer at this URL? Waits at most a second.

        Asks the server for its process id: the recorded port may be another server's by now.
        """
        try:
            with connect(self.url, timeout=1.0, check=False) as client:
                return int(client.info("server")["process_id"]) == self.pid
        except (redis.RedisError, OSError, SettingsError, KeyError, ValueError):
            return False


def state_folders(environment: Mapping[str, str] | None = None) -> list[Path]:
    """Where the record of a running server may lie, best first: the last one needs no home folder."""
    environment = os.environ if environment is None else environment
    folders = []
    if environment.get("XDG_STATE_HOME"):
        folders.append(Path(environment["XDG_STATE_HOME"], "perdure"))
    elif environment.get("HOME"):
        folders.append(Path(environment["HOME"], ".local", "state", "perdure"))
    folders.append(Path(tempfile.gettempdir(), f"perdure-{os.getuid()}"))
    return [folder for folder in folders if folder.is_absolute()]


def running_server(environment: Mapping[str, str] | None = None) -> EmbeddedServer | None:
    """The embedded server that runs on this machine for this user, if one does."""
    for folder in state_folders(environment):
        try:
            path = folder / RECORD
            found = path.stat()
            # Anybody can make a folder in the temporary one, and put the address of their own server into it.
            if found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
                continue
            server = EmbeddedServer.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if server.is_running():
            return server
    return None


def resolve_url(settings: Settings, environment: Mapping[str, str] | None = None) -> str:
    """The URL from the settings, else that of the running embedded server.

    ``environment`` says where its record may lie. Raises :class:`RedisUnavailable` if there is neither.
    """
    if settings.redis_url:
        return settings.redis_url
    server = running_server(environment)
    if server is None:
        raise RedisUnavailable(
            "No Redis is configured, and no embedded server is running. "
            'Set PERDURE_REDIS_URL, or start one with "perdure up QUEUE".'
        )
    return server.url


def connect(
    url: str,
    *,
    timeout: float = TIMEOUT,
    connect_timeout: float | None = None,
    name: str = "perdure",
    check: bool = True,
    wait: Callable[[str], object] | None = None,
) -> redis.Redis:
    """A client for ``redis://``, ``rediss://`` or ``unix://``; replies are bytes, nothing is retried.

    Args:
        url: may carry redis-py's options, such as ``?socket_timeout=2`` or ``?ssl_ca_certs=FILE``.
        timeout: seconds that one read or write may take.
        connect_timeout: seconds that connecting may take; ``timeout`` if not given.
        name: what ``CLIENT LIST`` shows.
        check: ask the server once now; without, the first command finds out.
        wait: with ``check``, wait for a server that answers and refuses for a reason that passes, as while it loads;
            it is called with a text for people then.

    Raises:
        SettingsError: the URL cannot be used.
        RedisUnavailable: the server does not answer (with ``check``). Takes at most about
            ``connect_timeout + timeout``.
    """
    _check_url(url)
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout if connect_timeout is None else connect_timeout,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            decode_responses=False,
            client_name=name,
        )
    except (ValueError, TypeError) as error:
        raise SettingsError(f"Cannot use {redact(url)} as the URL of Redis: {scrub(str(error), url)}") from None
    if check:
        try:
            if wait is None:
                client.ping()
            else:
                when_it_may(client.ping, url, wait)
        except RedisUnavailable:
            client.close()
            raise
        except (redis.RedisError, OSError, TypeError) as error:
            client.close()
            if isinstance(error, TypeError):  # redis-py hands unknown options on until a socket is made
                raise SettingsError(f"Cannot use {redact(url)} as the URL of Redis: {scrub(str(error), url)}") from None
            # Not "from error": its text and its locals may hold the password, and a log would print them.
            raise explain(error, url) from None
    return client


def keep_alive(connection: redis.Redis) -> None:
    """Have TCP notice within about 10 s that the other end of a connection is gone, even while nobody sends.

    For a connection whose timeout is minutes, such as RQ's own: after a cut during which the server, or a firewall
    between, forgot the connection, a subscriber would wait for ever. Connections that are open are closed.
    """
    pool = connection.connection_pool
    if not issubclass(pool.connection_class, redis.UnixDomainSocketConnection):
        options = {socket.TCP_KEEPIDLE: 4, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
        pool.connection_kwargs |= {"socket_keepalive": True, "socket_keepalive_options": options}
        pool.disconnect()


def _check_url(url: str) -> None:
    """Refuse what redis-py would misread in silence. A URL that cannot be read is not shown: it may be a password."""
    problem = ""
    try:
        parts = urlsplit(url)
        scheme, path, host = parts.scheme, parts.path, parts.hostname
        port = parts.port
    except ValueError:
        raise SettingsError(
            f"PERDURE_REDIS_URL cannot be read: it {_UNESCAPED}, or its port is no number. "
            "It looks like redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]"
        ) from None
    if scheme not in _SCHEMES or not url.startswith(f"{scheme}://"):
        problem = "must begin with redis://, rediss:// or unix://"
    elif parts.fragment or (scheme != "unix" and ("@" in path or "@" in parts.query)):
        problem = _UNESCAPED
    elif scheme == "unix":
        if not path.strip("/"):
            problem = "names no socket; it looks like unix:///run/redis.sock?db=0"
    elif not host:
        problem = "names no host; it looks like redis://127.0.0.1:6379/0"
    elif port == 0:
        problem = "has the port 0, at which nothing can be reached"
    elif path.strip("/") and not path.strip("/").isdecimal():
        problem = "does not end in the number of a database, as in redis://127.0.0.1:6379/0"
    if problem:
        raise SettingsError(f"PERDURE_REDIS_URL {problem}")
    refused = [option for option in parse_qs(parts.query, keep_blank_values=True) if option in _REFUSED_OPTIONS]
    if refused:
        raise SettingsError(f"PERDURE_REDIS_URL has the option {refused[0]}, which Perdure sets itself; remove it")
