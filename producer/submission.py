"""What is checked before a request is stored: everything the producer can know.

A mistake is told here, in the caller's own stack, and nothing has been written by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..protocol.codec import article, digest_of, pack
from ..protocol.errors import IdempotencyConflict, InvalidRequest
from ..protocol.identities import new_id, new_nonce
from ..protocol.keys import check_id, check_task, id_of_key
from ..protocol.limits import MAX_BYTES, MAX_REQUESTS
from ..protocol.records import NewRequest
from ..protocol.settings import Settings
from ..protocol.tasks import path_of, prepared, resolve
from .options import Options

_OWN = __package__.partition(".")[0] + "."
_ROW = 1024  # bytes of a request beside its payload, generously


def build(task: object, payload: Any, settings: Settings, options: Options) -> NewRequest:
    """Check one request and put it into the form in which it is sent.

    Raises :class:`InvalidRequest` with the name of the field, ``UnknownTask`` or ``PayloadTooLarge``.
    """
    path, found = _named(task)
    identifier, digest = _identity(path, payload, options, settings)
    return NewRequest(
        id=identifier,
        nonce=new_nonce(),
        task=path,
        payload=pack(prepared(found, payload), limit=settings.max_payload, what="payload"),
        description=path,
        digest=digest,
        degraded_payload=_degraded(found, payload, options.degraded, settings),
        **options.stored(settings),
    )


def build_many(items: Iterable[Any], settings: Settings, common: Options) -> list[NewRequest]:
    """Check all of ``(task, payload)`` or ``{"task": …, "payload": …, option: …}``; ``common`` options apply to all.

    Raises as :func:`build` does, with the position of the item in the message.
    """
    requests: list[NewRequest] = []
    seen: dict[str, int] = {}
    alike: dict[object, _Like] = {}
    for index, item in enumerate(items):
        try:
            task, payload, options = _item(item)
            known = None if options else alike.get(task if isinstance(task, str) else id(task))
            if known is not None:
                request = known(payload)
            else:
                request = build(task, payload, settings, common.changed(options) if options else common)
                if not options and common.degraded is None:
                    alike[task if isinstance(task, str) else id(task)] = _Like(task, request, settings)
            twin = seen.get(request.id)
            if twin is not None and not request.digest:
                raise InvalidRequest(f"item {twin} has the id {request.id} as well", "id")
            if twin is not None and requests[twin].digest != request.digest:
                raise IdempotencyConflict(f"item {twin} has the same idempotency_key, but another task or payload")
        except ValueError as error:  # UsageError is one
            error.add_note(f"in item {index} (counted from 0) of submit_many; nothing was submitted")
            raise
        seen.setdefault(request.id, index)
        requests.append(request)
    return requests


class _Like:
    """Makes requests of one task whose options have been checked; only the payload is another one."""

    def __init__(self, task: object, request: NewRequest, settings: Settings) -> None:
        self._found = _named(task)[1]
        self._limit = settings.max_payload
        self._fields = {item.name: getattr(request, item.name) for item in fields(NewRequest)}

    def __call__(self, payload: Any) -> NewRequest:
        values = self._fields
        values["payload"] = pack(prepared(self._found, payload), limit=self._limit, what="payload")
        values["id"], values["nonce"] = new_id(), new_nonce()
        return NewRequest(**values)


def chunks(requests: Sequence[NewRequest]) -> Iterator[list[NewRequest]]:
    """Cut into calls that keep no other client of Redis waiting. A request larger than that goes alone."""
    chunk: list[NewRequest] = []
    size = 0
    for request in requests:
        weight = len(request.payload) + len(request.degraded_payload) + len(request.meta) + _ROW
        if chunk and (len(chunk) == MAX_REQUESTS or size + weight > MAX_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(request)
        size += weight
    if chunk:
        yield chunk


def _identity(path: str, payload: Any, options: Options, settings: Settings) -> tuple[str, str]:
    """Id and digest. The body is the one that the user wrote: a seed that is drawn later makes no other request."""
    if options.idempotency_key is None:
        return (new_id() if options.id is None else check_id(options.id)), ""
    if options.id is not None:
        raise InvalidRequest("give either an id or an idempotency_key (the id is made from it)", "idempotency_key")
    return id_of_key(options.idempotency_key), digest_of(path, payload, limit=settings.max_payload)


def _degraded(found: object, payload: Any, overrides: object, settings: Settings) -> bytes:
    """The payload for a pool that is degraded, checked as the payload itself is."""
    if overrides is None:
        return b""
    if not isinstance(overrides, Mapping) or not all(isinstance(name, str) for name in overrides):
        raise InvalidRequest(
            f"degraded must be a dict of fields that replace those of the payload, not {overrides!r:.60}", "degraded"
        )
    if not overrides:
        return b""
    if not isinstance(payload, Mapping):
        raise InvalidRequest(
            f"degraded replaces fields of the payload, which must be a dict, but is {article(type(payload).__name__)}",
            "degraded",
        )
    try:
        merged = prepared(found, {**payload, **overrides})
    except InvalidRequest as error:
        error.add_note("this is the payload with the overrides of degraded; without them it was accepted")
        raise
    return pack(merged, limit=settings.max_payload, what="degraded payload")


def _named(task: object) -> tuple[str, object]:
    """The task's path, and the task where it is at hand.

    A dotted path of a user's is not imported: the producer need not have the code, and importing it may load
    a model. What ships with Perdure is light.
    """
    if not isinstance(task, str):
        return path_of(task), task
    path = check_task(task)
    return path, resolve(path) if path.startswith(_OWN) else None


def _item(item: Any) -> tuple[Any, Any, dict[str, Any]]:
    if isinstance(item, Mapping):
        options = dict(item)
        try:
            task, payload = options.pop("task"), options.pop("payload")
        except KeyError as error:
            raise InvalidRequest(f"the item has no {error.args[0]!r}", str(error.args[0])) from None
        return task, payload, options
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1], {}
    raise InvalidRequest(f"an item is (task, payload) or a dict with both, not {type(item).__name__}")
