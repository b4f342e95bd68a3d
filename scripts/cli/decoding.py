"""What stands in a key, made readable: msgpack as values, histories and dates as text, tracebacks unpacked.

Nothing here unpickles: of a pickle only its constants are shown, as ``pickletools`` reads them. Values of other
programs come out as text where they are text, else as their first bytes.
"""

from __future__ import annotations

import base64
import pickletools
import struct
import zlib
from typing import Any, Final

import msgpack
import redis

from ...protocol.codec import unpack_entry, unpack_exception
from ...protocol.keys import kind_of_key
from ...protocol.records import Event
from ..present.reading import clock

READ_MOST: Final = 1024 * 1024
"""Bytes of one value above which only its size is told."""

SHOWN: Final = 64
"""Bytes shown of what nobody can read, and constants of a pickle."""

_MSGPACK: Final = {("job", "payload"), ("job", "payload_aside")}
_PICKLES: Final = {("job", "data"), ("job", "meta")}


def read_key(connection: redis.Redis, name: str, limit: int) -> dict[str, Any] | None:
    """One key and at most ``limit`` of its elements, decoded; ``None`` if it is not there.

    ``expires_in`` is in seconds, ``None`` for never; ``memory`` in bytes, where this user may ask; ``number`` counts
    all elements, or the bytes of a string.
    """
    kind: Any = connection.type(name)
    if kind == b"none":
        return None
    known = kind_of_key(name)
    ttl: Any = connection.pttl(name)
    number, content = _CONTENT.get(kind.decode(), _unknown)(connection, name, known[0] if known else "", limit)
    return {
        "key": name,
        "what": known[0] if known else None,
        "id": known[1] if known else None,
        "type": kind.decode(),
        "expires_in": None if ttl < 0 else ttl / 1000,
        "memory": _memory(connection, name),
        "number": number,
        "content": content,
    }


def _memory(connection: redis.Redis, name: str) -> int | None:
    try:
        used: Any = connection.memory_usage(name, samples=5)
    except redis.ResponseError:
        return None
    return None if used is None else int(used)


# --- by type -------------------------------------------------------------------------------------


def _hash(connection: redis.Redis, name: str, what: str, limit: int) -> tuple[int, Any]:
    number: Any = connection.hlen(name)
    # A hash of a few fields is shown whole; of a larger one, a part.
    raw: Any = connection.hkeys(name) if number <= 200 else list(connection.hscan(name, count=limit)[1])[:limit]
    names = sorted(raw)
    with connection.pipeline(transaction=False) as pipe:
        for field in names:
            pipe.hstrlen(name, field)
        sizes = pipe.execute() if names else []
        small = [field for field, size in zip(names, sizes, strict=True) if size <= READ_MOST]
        values: dict[bytes, Any] = dict(zip(small, connection.hmget(name, small), strict=True)) if small else {}
    content = {}
    for field, size in zip(names, sizes, strict=True):
        word = field.decode(errors="replace")
        content[word] = decode(what, word, values[field]) if values.get(field) is not None else {"bytes": size}
    return number, content


def _list(connection: redis.Redis, name: str, what: str, limit: int) -> tuple[int, Any]:
    number: Any = connection.llen(name)
    values: Any = connection.lrange(name, 0, limit - 1)
    return number, [decode(what, "", value) for value in values]


def _sorted(connection: redis.Redis, name: str, what: str, limit: int) -> tuple[int, Any]:
    number: Any = connection.zcard(name)
    rows: Any = connection.zrange(name, 0, limit - 1, withscores=True)
    return number, [
        {"member": decode(what, "", member), "score": score, "date": _date(score)} for member, score in rows
    ]


def _set(connection: redis.Redis, name: str, what: str, limit: int) -> tuple[int, Any]:
    number: Any = connection.scard(name)
    page: Any = connection.sscan(name, count=limit)[1]
    return number, sorted((decode(what, "", member) for member in list(page)[:limit]), key=str)


def _stream(connection: redis.Redis, name: str, what: str, limit: int) -> tuple[int, Any]:
    number: Any = connection.xlen(name)
    entries: Any = connection.xrevrange(name, count=limit)
    return number, [
        {"entry": entry.decode()}
        | {
            field.decode(errors="replace"): decode(what, field.decode(errors="replace"), value)
            for field, value in fields.items()
        }
        for entry, fields in entries
    ]


def _string(connection: redis.Redis, name: str, what: str, limit: int) -> tuple[int, Any]:
    number: Any = connection.strlen(name)
    if number > READ_MOST:
        return number, {"bytes": number}
    value: Any = connection.get(name)
    return number, decode(what, "", value or b"")


def _unknown(connection: redis.Redis, name: str, what: str, limit: int) -> tuple[int, Any]:
    return 0, None


_CONTENT: Final = {
    "hash": _hash, "list": _list, "zset": _sorted, "set": _set, "stream": _stream, "string": _string,
}  # fmt: skip


# --- by meaning ----------------------------------------------------------------------------------


def decode(what: str, field: str, value: bytes) -> Any:
    """One value: ``what`` is the kind of its key, ``field`` its place in a hash or a stream."""
    if (what, field) in _MSGPACK:
        return _values(value)
    if (what, field) == ("output", ""):
        return _entry(value)
    if (what, field) in _PICKLES:
        return constants(value)
    if (what, field) == ("checkpoint", "state"):
        return _state(value)
    if what == "history":
        try:
            return Event.parse(value).as_dict()
        except ValueError:
            pass
    if what == "results" and field == "exc_string":
        try:
            return unpack_exception(value).splitlines()
        except ValueError:
            pass
    if what == "results" and field == "return_value":
        try:
            return constants(base64.b64decode(value, validate=True))
        except ValueError:
            pass
    return _text(value)


def _text(value: bytes) -> Any:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return {"bytes": len(value), "begin": value[:SHOWN].hex()}
    return text


def _entry(value: bytes) -> Any:
    """An entry of an output log, without its token."""
    try:
        return list(unpack_entry(value))
    except (ValueError, TypeError):
        return _values(value)


def _values(value: bytes) -> Any:
    """What msgpack says; a tensor is its description."""

    def extension(code: int, data: bytes) -> Any:
        try:
            dtype, shape, *_, length = msgpack.unpackb(data)
        except (ValueError, TypeError, msgpack.UnpackException):
            return {"extension": code, "bytes": len(data)}
        return {"tensor": dtype, "shape": shape, "bytes": length}

    try:
        return msgpack.unpackb(value, strict_map_key=False, ext_hook=extension)
    except (ValueError, TypeError, msgpack.UnpackException):
        return _text(value)


def _state(value: bytes) -> Any:
    """A stored state without rebuilding its tensors (packed_state.py has the forms)."""
    if value[:2] == b"\xc1Z" and len(value) >= 10:
        return {"compressed": len(value), "bytes": struct.unpack("<Q", value[2:10])[0]}
    if value[:2] == b"\xc1T" and len(value) >= 6:
        (length,) = struct.unpack("<I", value[2:6])
        return _values(value[6 : 6 + length])
    return _values(value)


def constants(value: bytes) -> Any:
    """The constants in a pickle, zlib-compressed as RQ stores it or not, without running any of it."""
    try:
        inflated = zlib.decompressobj().decompress(value, READ_MOST)
    except zlib.error:
        inflated = value
    found: list[Any] = []
    try:
        for code, argument, _ in pickletools.genops(inflated):
            if argument is not None and code.name not in (
                "PROTO",
                "FRAME",
                "MEMOIZE",
                "BINGET",
                "BINPUT",
                "LONG_BINGET",
            ):
                found.append(argument if isinstance(argument, str | int | float) else _text(argument))
            elif code.name in ("NONE", "NEWTRUE", "NEWFALSE"):
                found.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code.name])
            if len(found) >= SHOWN:
                break
    except Exception:  # a damaged pickle may raise nearly anything
        return _text(value)
    return {"pickle of": found}


def _date(score: float) -> str | None:
    """A score as a date, where it is one: seconds or milliseconds since 1970 between 2001 and 2128."""
    for unit in (1, 1000):
        if 1e9 * unit <= score < 5e9 * unit:
            return clock(score / unit)
    return None
