"""What a person is told about errors of redis-py's: where, why, and the next command. No message holds a password."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

import redis

from ..errors import RedisUnavailable
from ..settings import redact
from .refusals import PASSING, code_of, forbidden


def url_of(connection: redis.Redis) -> str:
    """Where a connection leads, for messages; without its password."""
    known = connection.connection_pool.connection_kwargs
    if known.get("path"):
        return f"unix://{known['path']}?db={known.get('db') or 0}"
    return f"redis://{known.get('host', 'localhost')}:{known.get('port', 6379)}/{known.get('db') or 0}"


def explain(error: BaseException, url: str) -> RedisUnavailable:
    """What to tell a person about an error of redis-py's: where, why, and the next command. ``url`` may be empty."""
    server = f"Redis at {redact(url)}" if url else "Redis"
    causes = list(_causes(error))
    code = next(filter(None, map(code_of, causes)), "")
    if code in PASSING:
        return RedisUnavailable(f"{server} takes no calls now ({PASSING[code]}). Try again when that is over.")
    text = _first_line(error, url)
    if isinstance(error, redis.ResponseError) and not forbidden(error):
        if "DB index is out of range" in text:
            return RedisUnavailable(
                f"{server} has no database of this number. Name another one in PERDURE_REDIS_URL: "
                "most servers have 16, from 0 to 15, and a cluster has 0 only."
            )
        return RedisUnavailable(f'{server} refused a call ({text}). "perdure doctor" says what is wrong with a server.')
    reason = _reason(error, url)
    if any(map(forbidden, causes)):
        advice = "Check the user and the password in PERDURE_REDIS_URL."
    elif any(isinstance(cause, ssl.SSLError) for cause in causes):
        advice = "Check the scheme (redis:// without TLS, rediss:// with it) and the certificates."
    else:
        advice = 'Start one with "perdure up QUEUE" or set PERDURE_REDIS_URL.'
    return RedisUnavailable(f"Cannot reach {server} ({reason}). {advice}")


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Within the block, what redis-py raises becomes :class:`RedisUnavailable`. For whoever does not wait."""
    try:
        yield
    except redis.RedisError as error:
        # Not "from error": its text and its locals may hold the password, and a log would print them.
        raise explain(error, url) from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, at most a few: chains can be circular."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


def _reason(error: BaseException, url: str) -> str:
    for cause in _causes(error):
        match cause:
            case redis.AuthenticationError() | redis.exceptions.NoPermissionError():
                return "the user or the password is wrong or missing"
            case ssl.SSLError():
                return f"TLS failed: {scrub(cause.reason or str(cause), url)}"
            case socket.gaierror():
                return "the name of the host is unknown"
            case ConnectionRefusedError():
                return "connection refused"
            case FileNotFoundError():
                return "no such socket"
            case PermissionError():
                return "permission denied"
            case TimeoutError() | redis.TimeoutError():
                return "no answer in time"
            case OSError(errno=errno.EHOSTUNREACH | errno.ENETUNREACH):
                return "no route to the host"
            case ConnectionError():
                return "the connection was closed"
    return _first_line(error, url)


def _first_line(error: BaseException, url: str) -> str:
    lines = str(error).strip().splitlines()
    return scrub(lines[0] if lines else type(error).__name__, url)


def scrub(text: str, url: str) -> str:
    """The text without anything that is a password in the URL."""
    parts = urlsplit(url)
    secrets = [parts.password or "", unquote(parts.password or ""), *parse_qs(parts.query).get("password", [])]
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text
