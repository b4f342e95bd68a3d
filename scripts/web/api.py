"""What the server answers: the page, its files, and JSON.

=========================================  =============================================================================
``GET /``, ``/static/NAME``                the page
``GET /livez``                             this process alone
``GET /api/about``                         release, where Redis is, whether a token lets one change anything, and which
                                           kinds of failure no retry can mend
``GET /api/stream``                        server-sent events: ``history``, then a ``frame`` after each look
``GET /api/overview``                      one frame
``GET /api/requests``                      a page of requests: ``status queue worker kind task text within limit
                                           cursor``
``GET /api/requests/ID``                   one request; ``/api/requests/ID/timeline.svg`` is its drawing
``GET /api/dead-letters``                  failures by error
``GET /api/dead-letters/ERROR``            those of one: ``limit cursor``
``POST /api/token``                        204 if the token is right. It is asked for by all that follow
``POST /api/requests/ID/contents``         ``{"payload", "outputs", "first", "result"}``, as text
``POST /api/requests/ID/cancel``           ``{"reason"}`` → ``{"canceled"}``
``POST /api/requeue``                      ``{"items": [{"id", "queue"}]}`` → ``{"requeued", "left"}``
=========================================  =============================================================================

What is wrong is told as ``{"error": …}``: 400 a field, 401 and 403 the token, 404 nothing there, 503 Redis is away.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ... import __version__
from ...producer.reading.listing import Wanted
from ...protocol.errors import InvalidRequest, PerdureError, UnknownRequest, UsageError
from ...recovery.failures import POLICIES
from ..present.reading import Rates
from .access import Access, App, guarded
from .files import Files
from .looks import PAGE, NotAllowed, WebQueries
from .stream import Broadcast, EventStream

log = logging.getLogger("perdure.web")

THREADS: Final = 4
"""Reads at a time, beside the stream's."""

FRESH: Final = 1.0
"""Seconds for which an answer is given again: however many ask the same, Redis is asked once."""

REMEMBERED: Final = 64

BODY: Final = 64 * 1024
"""Bytes of a body; a hundred failures have a tenth of that."""

LIMIT: Final = 200
"""Items on a page at most."""


class Shared:
    """Runs blocking reads in a few threads, and equal ones once."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self._answers: dict[Any, tuple[float, asyncio.Task[Any]]] = {}

    async def read(self, name: Any, function: Callable[[], Any]) -> Any:
        """The answer of ``function``, or that of an equal question not longer ago than :data:`FRESH`."""
        loop = asyncio.get_running_loop()
        at, task = self._answers.get(name, (0.0, None))
        # An error is told to those who wait for it, and to nobody later.
        if task is None or (task.done() and (_failed(task) or loop.time() - at >= FRESH)):
            self._answers.pop(name, None)
            while len(self._answers) >= REMEMBERED:
                del self._answers[next(iter(self._answers))]
            task = loop.create_task(self.run(function))
            task.add_done_callback(_failed)  # it may have no reader any more
            self._answers[name] = loop.time(), task
        return await asyncio.shield(task)

    async def run(self, function: Callable[[], Any]) -> Any:
        """Run it now."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def forget(self) -> None:
        """Something has been changed."""
        self._answers.clear()


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def application(looks: WebQueries, watch: Broadcast, access: Access) -> App:
    """The ASGI application."""
    pages = _Pages(looks, watch, access)
    routes = [
        Route("/", pages.index),
        Route("/static/{name}", pages.file),
        Route("/livez", pages.livez),
        Route("/api/about", pages.about),
        Route("/api/stream", pages.stream),
        Route("/api/overview", pages.overview),
        Route("/api/requests", pages.requests),
        Route("/api/requests/{id}", pages.request),
        Route("/api/requests/{id}/timeline.svg", pages.drawing),
        Route("/api/requests/{id}/contents", pages.contents, methods=["POST"]),
        Route("/api/requests/{id}/cancel", pages.cancel, methods=["POST"]),
        Route("/api/dead-letters", pages.groups),
        Route("/api/dead-letters/{error}", pages.letters),
        Route("/api/token", pages.token, methods=["POST"]),
        Route("/api/requeue", pages.requeue, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error, PerdureError: _known_error, Exception: _unknown_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return guarded(app, access)


class _Pages:
    def __init__(self, looks: WebQueries, watch: Broadcast, access: Access) -> None:
        self._looks = looks
        self._watch = watch
        self._access = access
        self._files = Files()
        self._shared = Shared()
        self._rates = Rates()  # between two who ask; the stream has its own

    async def index(self, request: Request) -> Response:
        return self._files.answer("index.html", request)

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise HTTPException(404)
        return self._files.answer(name, request)

    async def livez(self, request: Request) -> Response:
        return Response("ok\n", media_type="text/plain", headers=_NEW)

    async def about(self, request: Request) -> Response:
        final = [str(kind) for kind, policy in POLICIES.items() if not policy.retry]
        about = {"version": __version__, "where": self._looks.where, "writable": self._access.writable}
        return _json(about | {"final": final})

    async def stream(self, request: Request) -> Any:
        if self._watch.full:
            return _json({"error": "as many watch as may; try again later"}, 503, **{"Retry-After": "10"})
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=_NEW)
        return EventStream(self._watch)

    async def overview(self, request: Request) -> Response:
        return _json(await self._shared.read("overview", lambda: self._looks.frame(self._rates)))

    async def requests(self, request: Request) -> Response:
        asked = request.query_params
        status, queue, cursor = (asked.get(name) or None for name in ("status", "queue", "cursor"))
        limit = _number(request, "limit", PAGE, 1, LIMIT)
        within = _number(request, "within", 0, 1, 10**9) or None
        texts = {name: asked.get(name) or None for name in ("worker", "kind", "task", "text")}
        wanted = Wanted(**texts, within=within)

        def look() -> dict[str, Any]:
            return self._looks.listing(limit, cursor, status=status, queue=queue, wanted=wanted)

        return _json(await self._shared.read(("requests", status, queue, wanted, limit, cursor), look))

    async def request(self, request: Request) -> Response:
        identifier = request.path_params["id"]
        return _json(await self._shared.read(("request", identifier), lambda: self._looks.request(identifier)))

    async def drawing(self, request: Request) -> Response:
        identifier = request.path_params["id"]
        text = await self._shared.read(("drawing", identifier), lambda: self._looks.drawing(identifier))
        # To be saved: opened here, its styles would be refused.
        headers = _NEW | {"Content-Disposition": f'attachment; filename="{identifier}.svg"'}
        return Response(text, media_type="image/svg+xml", headers=headers)

    async def groups(self, request: Request) -> Response:
        return _json(await self._shared.read("groups", self._looks.groups))

    async def letters(self, request: Request) -> Response:
        error = request.path_params["error"]
        limit, begin = _number(request, "limit", PAGE, 1, LIMIT), _number(request, "cursor", 0, 0, 10**9)
        name = ("letters", error, limit, begin)
        return _json(await self._shared.read(name, lambda: self._looks.letters(error, begin, limit)))

    async def token(self, request: Request) -> Response:
        return self._refused(request) or Response(status_code=204, headers=_NEW)

    async def contents(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        identifier = request.path_params["id"]
        return _json(await self._shared.run(lambda: self._looks.contents(identifier)))

    async def cancel(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        body = await _body(request)
        reason = body.get("reason", "") if isinstance(body, dict) else None
        if not isinstance(reason, str):
            raise InvalidRequest('the body is {"reason": …}, a text that may be left out', "reason")
        identifier = request.path_params["id"]
        canceled = await self._shared.run(lambda: self._looks.cancel(identifier, reason))
        self._shared.forget()
        log.info("%s canceled %s%s", _who(request), identifier, "" if canceled else ", which had ended")
        return _json({"canceled": canceled})

    async def requeue(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        body = await _body(request)
        items = body.get("items") if isinstance(body, dict) else None
        if not isinstance(items, list):
            raise InvalidRequest('the body is {"items": [{"id": …, "queue": …}]}', "items")
        answer = await self._shared.run(lambda: self._looks.requeue(items))
        self._shared.forget()
        done = answer["requeued"]
        log.info("%s requeued %d of %d: %s", _who(request), len(done), len(items), ", ".join(done))
        return _json(answer)

    def _refused(self, request: Request) -> Response | None:
        refusal = self._access.refusal(request.headers.get("authorization", ""))
        if refusal is None:
            return None
        status, text = refusal
        return _json({"error": text}, status, **({"WWW-Authenticate": "Bearer"} if status == 401 else {}))


_NEW: Final = {"Cache-Control": "no-store"}


def _json(value: Any, status: int = 200, **headers: str) -> Response:
    return JSONResponse(value, status, headers=_NEW | headers)


def _who(request: Request) -> str:
    return request.client.host if request.client else "?"


def _number(request: Request, name: str, otherwise: int, least: int, most: int) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return otherwise
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= most):
        raise InvalidRequest(f"{name} is a number from {least} to {most}, not {text[:40]!r}", name)
    return int(text)


async def _body(request: Request) -> Any:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > BODY:
            raise HTTPException(413, f"a body has at most {BODY} bytes")
    try:
        return json.loads(content)
    except ValueError:
        raise InvalidRequest("the body is no JSON", "body") from None


async def _http_error(request: Request, error: HTTPException) -> Response:
    texts = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not answered here"}
    return _json({"error": texts.get(error.status_code, error.detail)}, error.status_code, **(error.headers or {}))


async def _known_error(request: Request, error: PerdureError) -> Response:
    match error:
        case UnknownRequest():
            status = 404
        case UsageError():
            status = 400
        case NotAllowed():
            status = 403
        case _:
            return _json({"error": str(error)}, 503, **{"Retry-After": "2"})
    field = getattr(error, "field", "")
    return _json({"error": str(error)} | ({"field": field} if field else {}), status)


async def _unknown_error(request: Request, error: Exception) -> Response:
    # Starlette raises it again for uvicorn, which logs it with its traceback.
    return _json({"error": "an error that the log of perdure web describes"}, 500)
