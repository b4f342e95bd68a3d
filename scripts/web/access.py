"""Who may ask: the names of the server, the token, and what every answer tells a browser to refuse."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...protocol.errors import SettingsError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

TOKEN: Final = "PERDURE_WEB_TOKEN"

SHORTEST: Final = 16
"""Characters of a token: nothing here counts wrong guesses."""

HEADERS: Final[Mapping[str, str]] = {
    # No script and no style but our own files, nothing from elsewhere, in no frame; text can become text only.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""On every answer."""

LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def read_token(environment: Mapping[str, str], file: Path | None) -> str:
    """The token from a file, else from the environment; empty if there is none. Raises :class:`SettingsError`."""
    where, text = TOKEN, environment.get(TOKEN, "")
    if file is not None:
        where = f"--token-file {file}"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read {where}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    token = text.strip()
    if (token or file is not None) and (len(token) < SHORTEST or not token.isascii() or not token.isprintable()):
        raise SettingsError(
            f"the token of {where} must have {SHORTEST} characters or more, of ASCII; "
            'make one with "openssl rand -hex 16"'
        )
    return token


class Access:
    """Decides about requests. ``local``: the server listens on a loopback address, ``allowed``: further names of it."""

    def __init__(self, token: str, allowed: Sequence[str], *, local: bool) -> None:
        self._token = token.encode()
        self._names = frozenset(name.lower().rstrip(".") for name in allowed)
        self._local = local

    @property
    def writable(self) -> bool:
        """Whether anybody may change anything."""
        return bool(self._token)

    def knows(self, host: str) -> bool:
        """Whether the page is asked for by a name of ours.

        A page of somebody else's whose name is made to lead here (DNS rebinding) is of our origin for the browser: only
        the name tells. On an address that is not this machine's alone, any name may be ours, unless some are given.
        """
        if not self._local and not self._names:
            return True
        name = name_of(host)
        return name in self._names or name in LOCAL

    def refusal(self, authorization: str) -> tuple[int, str] | None:
        """Why this request may not change anything: the status and a sentence; ``None`` if it may."""
        if not self._token:
            return 403, f"this page is read-only; start perdure web with {TOKEN} or --token-file"
        scheme, _, given = authorization.partition(" ")
        # In a header that only a script of this origin can set: neither a form nor a link of somebody else's does.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            return 401, "the token is wrong or missing"
        return None


def name_of(host: str) -> str:
    """The host of a ``Host`` header, without its port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def guarded(app: App, access: Access) -> App:
    """Put :data:`HEADERS` on every answer, and refuse what is asked for by the name of another."""
    extra = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) == 1 and access.knows(hosts[0]):
            await app(scope, receive, marked)
            return
        text = "this server does not go by that name; ask for localhost, or start perdure web with --allow-host NAME"
        body = json.dumps({"error": text}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await marked({"type": "http.response.start", "status": 403, "headers": headers})
        await marked({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return answer
