"""A state as it is stored: what msgpack holds, with the raw buffers of its tensors behind it.

Packing copies, and nothing else: the engine's thread does it at each step that carries a state. What costs
more (compression, CRC, cutting into chunks) is done when the state is sent, by the courier's thread.

A state without tensors is plain msgpack. Any other begins with a byte that no msgpack value has, so that a
release which does not know the form calls the checkpoint unreadable instead of giving its task a wrong value::

    C1 'T'  u32 n  msgpack (n bytes)  buffers     with tensors: each stands in the msgpack as an extension
                                                  of (dtype, shape, start, bytes) among the buffers
    C1 'Z'  u64 n  zstandard frame                one of the other forms (n bytes), compressed
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack

from .codec import refusal, too_large, unpack
from .errors import InvalidRequest
from .tensors import NUMPY, TORCH, CannotRead, Tensor, found, rebuilt

CHUNK = 1024 * 1024
"""Bytes of a stored state above which it is written in chunks of this size."""

_TENSORS, _COMPRESSED = b"\xc1T", b"\xc1Z"

Buffer = bytes | memoryview


class PackedState:
    """One captured state. ``size`` is in bytes, before any compression."""

    def __init__(self, parts: Sequence[Buffer], *, compression: str = "none") -> None:
        self.parts = list(parts)
        self.size = sum(map(len, self.parts))
        self.compression = compression

    @cached_property
    def stored(self) -> Stored:
        """The state in the form in which it is sent; made once, so that a second sending is verbatim."""
        parts: Sequence[Buffer] = self.parts
        if self.compression == "zstd":
            smaller = _compressed(parts, self.size)
            # What does not get smaller is kept as it is: whoever resumes it needs no library.
            parts = smaller if sum(map(len, smaller)) < self.size else parts
        self.parts = []  # not kept twice
        return Stored.of(parts)


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of a state in ``pieces`` of :data:`CHUNK` bytes; ``length`` and ``crc`` (CRC-32) are those of all."""

    pieces: list[bytes]
    length: int
    crc: int

    @classmethod
    def of(cls, parts: Iterable[Buffer]) -> Stored:
        """Cut the bytes of all parts, as if they were one, into pieces."""
        pieces = list(_cut(parts)) or [b""]
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
        return cls(pieces, sum(map(len, pieces)), crc)

    @property
    def chunks(self) -> int:
        """How many chunks are written; 0 for a state that is stored in one write."""
        return len(self.pieces) if len(self.pieces) > 1 else 0


def stored(state: PackedState | bytes | None) -> Stored:
    """A state as it is sent."""
    if isinstance(state, PackedState):
        return state.stored
    return Stored.of([state]) if state else _NOTHING


def pack_state(value: Any, *, limit: int, compression: str = "none") -> PackedState:
    """Capture a state: later changes of its tensors, lists and dicts do not reach what is stored.

    Raises :class:`InvalidRequest` for what cannot be stored, naming the place, and :class:`PayloadTooLarge` above
    ``limit`` bytes (uncompressed), before a tensor is copied. Copying raises what the tensor's device raises.
    """
    tensors: list[Tensor] = []
    start = 0

    def take(item: Any) -> msgpack.ExtType:
        nonlocal start
        tensor = found(item)
        if tensor is None:
            raise TypeError
        tensors.append(tensor)
        row = msgpack.packb([tensor.dtype, tensor.shape, start, tensor.nbytes])
        start += tensor.nbytes
        return msgpack.ExtType(tensor.kind, row)

    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True, default=take)
        if tensors and _tensor_as_key(value):
            raise TypeError
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        raise refusal(value, "state", error, tensors=True) from None
    if len(packed) + start > limit:
        raise too_large(len(packed) + start, limit, "state")
    if not tensors:
        return PackedState([packed], compression=compression)
    head = _TENSORS + struct.pack("<I", len(packed))
    buffers = [tensor.capture() for tensor in tensors]
    return PackedState([head, packed, *buffers], compression=compression)


def unpack_state(data: bytes) -> Any:
    """The state that was stored as these bytes; each tensor on memory of its own.

    Raises ``ValueError`` for bytes that are no state, and :class:`CannotRead` if this process lacks what it needs
    to read them.
    """
    if data[:2] == _COMPRESSED:
        data = _decompressed(data)
    if data[:2] != _TENSORS:
        return unpack(data)
    try:
        whole = memoryview(bytearray(data))  # writable: torch warns of a buffer that is not
        (length,) = struct.unpack("<I", whole[2:6])
        buffers = whole[6 + length :]

        def give(kind: int, row: bytes) -> Any:
            if kind not in (TORCH, NUMPY):
                raise ValueError(f"an extension of type {kind}")
            dtype, shape, start, nbytes = msgpack.unpackb(row)
            return rebuilt(kind, dtype, shape, buffers[start : start + nbytes])

        return msgpack.unpackb(whole[6 : 6 + length], raw=False, strict_map_key=False, ext_hook=give)
    except (msgpack.UnpackException, struct.error, ValueError, TypeError) as error:
        raise ValueError(f"not a state with tensors: {error}") from None


def check_compression(name: str) -> None:
    """Raise :class:`CannotRead` if this process lacks the library of a compression."""
    if name == "zstd":
        _zstandard()


def _tensor_as_key(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_tensor(name) for name in value) or any(map(_tensor_as_key, value.values()))
    return isinstance(value, list | tuple) and any(map(_tensor_as_key, value))


def _tensor(value: Any) -> bool:
    try:
        return not isinstance(value, str | int) and found(value) is not None
    except InvalidRequest:
        return True


def _cut(parts: Iterable[Buffer]) -> Iterator[bytes]:
    """Pieces of :data:`CHUNK` bytes, the last one of what is left. No copy is longer than a piece."""
    rest = bytearray()
    for part in parts:
        view = memoryview(part)
        while len(view):
            taken = view[: CHUNK - len(rest)]
            view = view[len(taken) :]
            if not rest and len(taken) == CHUNK:
                yield bytes(taken)
                continue
            rest += taken
            if len(rest) == CHUNK:
                yield bytes(rest)
                rest = bytearray()
    if rest:
        yield bytes(rest)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise CannotRead(
            "states are compressed with zstandard, which is not installed here: pip install 'perdure[zstd]'"
        ) from None
    return zstandard


def _compressed(parts: Sequence[Buffer], size: int) -> list[bytes]:
    compressor = _zstandard().ZstdCompressor().compressobj(size=size)
    return [
        _COMPRESSED + struct.pack("<Q", size),
        *(compressor.compress(part) for part in parts),
        compressor.flush(),
    ]


def _decompressed(data: bytes) -> bytes:
    zstandard = _zstandard()
    try:
        (size,) = struct.unpack("<Q", data[2:10])
        result: bytes = zstandard.ZstdDecompressor().decompress(memoryview(data)[10:], max_output_size=size)
    except (zstandard.ZstdError, struct.error) as error:
        raise ValueError(f"not a compressed state: {error}") from None
    if len(result) != size:
        raise ValueError(f"a compressed state of {size} bytes has {len(result)}")
    return result


_NOTHING = Stored.of([b""])
"""Made once: most checkpoints bring outputs and no state."""
