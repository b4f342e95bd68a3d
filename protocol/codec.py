"""Bytes in, values out: msgpack for what is ours, and RQ's envelope without unpickling anything.

Values are what msgpack holds by itself: None, booleans, 64-bit integers, floats, strings, bytes,
lists and maps. Tuples come back as lists. Anything else is refused when it is packed, with the
place where it was found. A state may hold tensors as well: see :mod:`.packed_state`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
import secrets
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgpack

from .errors import InvalidRequest, PayloadTooLarge
from .tensors import found as find_tensor

MAX_DEPTH = 64
"""Levels of nesting that :func:`pack` accepts; msgpack's own unpacker stops at 511."""

_EPOCH_BITS = 52
"""What a float holds of an epoch and its token together."""


def pack(value: Any, *, limit: int, what: str) -> bytes:
    """Pack ``value``; ``what`` ("payload", "state", "output", "result") is for the message.

    Raises :class:`InvalidRequest` for a value that msgpack cannot hold, naming the place, and
    :class:`PayloadTooLarge` above ``limit`` bytes.
    """
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True, strict_types=False)
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        raise refusal(value, what, error) from None
    if len(packed) > limit:
        raise too_large(len(packed), limit, what)
    return packed


def pack_entry(epoch: int, offset: int, outputs: Sequence[Any]) -> bytes:
    """One entry of an output log: the msgpack of ``(epoch, offset, outputs)``, each output of which has been checked.

    The epoch is written as a number with a fraction, which is the entry's random token: it is made once, and the same
    when the entry is sent again. Older releases cut the fraction off, and what they write has none.
    """
    bits = _EPOCH_BITS - max(1, epoch.bit_length())
    token = secrets.randbits(bits) | 1
    return pack([epoch + token / 2**bits, offset, outputs], limit=2**31, what="output")


def unpack_entry(raw: bytes) -> tuple[int, int, list[Any]]:
    """``(epoch, offset, outputs)``. Raises ``ValueError`` or ``TypeError`` for what is no entry."""
    epoch, offset, outputs = unpack(raw)
    return int(epoch), int(offset), list(outputs)


def article(word: str) -> str:
    """A noun, or the name of a type, with its article."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def refusal(value: Any, what: str, error: Exception, *, tensors: bool = False) -> InvalidRequest:
    """Why ``value`` cannot be packed: the place of the first part that msgpack cannot hold."""
    place = _culprit(value, what, 0, tensors=tensors) or f"{what}: {error}"
    kinds = "None, bool, 64-bit int, float, str, bytes, list and dict"
    return InvalidRequest(f"{place}; {article(what)} holds {kinds}{', and tensors' if tensors else ''}", what)


def too_large(size: int, limit: int, what: str) -> PayloadTooLarge:
    """The error of a value with more bytes than its limit."""
    setting = "PERDURE_MAX_STATE" if what == "state" else "PERDURE_MAX_PAYLOAD"
    named = f"limit of {limit:,}" if what == "meta" else f"limit of {limit:,} ({setting})"
    return PayloadTooLarge(
        f"the {what} has {size:,} bytes, more than the {named}; "
        "store it elsewhere and put a reference into the request, or raise the limit"
    )


def digest_of(task: str, payload: Any, *, limit: int) -> str:
    """What makes two bodies the same: task and payload, whatever the order of a dict's keys. Raises as :func:`pack`."""
    pack(payload, limit=limit, what="payload")
    body = msgpack.packb([task, _sorted(payload)], use_bin_type=True)
    return hashlib.sha256(body).hexdigest()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        rows = [(msgpack.packb(name, use_bin_type=True), _sorted(item)) for name, item in value.items()]
        # Not as a dict again, and marked: a list of pairs is another body.
        return msgpack.ExtType(1, msgpack.packb(sorted(rows, key=lambda row: row[0]), use_bin_type=True))
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value


def unpack(data: bytes) -> Any:
    """Unpack what :func:`pack` wrote. Raises ``ValueError`` for bytes that are no msgpack."""
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, use_list=True)
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise ValueError(f"not a msgpack value: {error}") from None


def _culprit(value: Any, place: str, depth: int, *, tensors: bool = False) -> str | None:
    """Where the first value stands that msgpack cannot hold, and that is no tensor where those are allowed."""
    if depth > MAX_DEPTH:
        return f"{place[:80]}… is nested more than {MAX_DEPTH} levels deep"
    if isinstance(value, bool | float | bytes | None):
        return None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**64 else f"{place} is the integer {value!r}, which has more than 64 bits"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{place} is text with a lone surrogate, which UTF-8 cannot hold"
        return None
    if isinstance(value, list | tuple):
        found = (_culprit(item, f"{place}[{index}]", depth + 1, tensors=tensors) for index, item in enumerate(value))
        return next(filter(None, found), None)
    if isinstance(value, dict):
        for name, item in value.items():
            # A tensor is no key: it is equal to nothing but itself, so nobody could look it up again.
            result = _culprit(name, f"a key of {place}", depth + 1)
            result = result or _culprit(item, f"{place}[{name!r}]", depth + 1, tensors=tensors)
            if result:
                return result
        return None
    return _of_another_kind(value, place, tensors)


def _of_another_kind(value: Any, place: str, tensors: bool) -> str | None:
    try:
        tensor = find_tensor(value)
    except InvalidRequest as error:
        return f"{place} {error}"
    if tensor is None:
        return f"{place} is {article(type(value).__name__)}"
    if tensors:
        return None
    # Who reads an output or a result may have neither library, and a payload is stored once, read by anybody.
    return f"{place} is a {tensor.name}, which only a state may hold: send its tolist(), or its bytes, dtype and shape"


class _Refusing(pickle.Unpickler):
    """Reads a pickle of plain values; any name in it, such as a class or function, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to import {module}.{name} for a pickle from Redis")


class RestrictedPickle:
    """An RQ serializer: writes ordinary pickles, which every viewer of RQ reads, and reads only plain values.

    Pass it to RQ where a job's data or result is read: a hostile pickle raises instead of running.
    """

    @staticmethod
    def dumps(value: Any) -> bytes:
        return pickle.dumps(value, protocol=4)

    @staticmethod
    def loads(data: bytes) -> Any:
        return _Refusing(io.BytesIO(data)).load()


@lru_cache(maxsize=1024)
def envelope(function: str, task: str) -> bytes:
    """RQ's ``data`` field: a call of ``function(task)``, as RQ itself would store it."""
    return zlib.compress(RestrictedPickle.dumps((function, None, (task,), {})))


def pack_result(value: Any, *, limit: int) -> str:
    """A result as RQ's result stream holds it; empty for ``None``, for which RQ stores nothing."""
    pack(value, limit=limit, what="result")
    return "" if value is None else base64.b64encode(RestrictedPickle.dumps(value)).decode()


def unpack_result(data: bytes) -> Any:
    """Read what :func:`pack_result` wrote. Raises ``ValueError`` for anything but plain values."""
    try:
        return RestrictedPickle.loads(base64.b64decode(data))
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise ValueError(f"not a result of plain values: {error}") from None


def shortened(text: str, limit: int) -> str:
    """A text without its middle, if it has more than ``limit`` characters: where it begins and ends says most."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def pack_exception(text: str) -> str:
    """A traceback as RQ's result stream holds it."""
    return base64.b64encode(zlib.compress(text.encode(errors="replace"))).decode()


def unpack_exception(data: bytes) -> str:
    """Read what :func:`pack_exception` wrote."""
    try:
        return zlib.decompress(base64.b64decode(data)).decode(errors="replace")
    except (ValueError, zlib.error) as error:
        raise ValueError(f"not a stored traceback: {error}") from None
