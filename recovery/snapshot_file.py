"""One snapshot as a file: a header, plain values as msgpack, and tensors as safetensors.

::

    8s magic   u32 version   u32 0   u64 number   u64 n   u64 m   32s SHA-256 of all the rest
    n bytes    the value as msgpack; a tensor in it stands as an extension of (dtype, shape, name)
    m bytes    a section in the format of safetensors, without one if there is no tensor

Nothing here is unpickled on trust. A tensor is a buffer beside its dtype and shape; what only torch can hold
(a sparse or quantised tensor, a dtype, a device) goes through ``torch.save``, and comes back through ``torch.load``
with ``weights_only=True``, which is tried before it is written.

The section is written and read here, not by the library ``safetensors``: that needs all tensors at once, and a second
copy of them as bytes, before the first is written; and plain values and numpy arrays need no further package. A
file is read, not mapped: its digest has to be computed over all of it, and a mapped file that somebody cuts short
ends the process.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from ..protocol.codec import refusal
from ..protocol.errors import InvalidRequest
from ..protocol.tensors import NUMPY, TORCH, CannotRead, Tensor, found, rebuilt

MAGIC: Final = b"PERDSNAP"
VERSION: Final = 1
_FIELDS: Final = struct.Struct("<8sIIQQQ")
_DIGEST: Final = 32
HEADER: Final = _FIELDS.size + _DIGEST
"""Bytes."""

_BLOCK: Final = 1 << 20
_PICKLED: Final = 4
"""Type of the msgpack extension of what ``torch.save`` wrote; those below it are of :mod:`perdure.protocol.tensors`."""

_CODES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8",
    "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8", "|b1": "BOOL", "<c8": "C64",
}  # fmt: skip
"""dtype of torch or numpy -> that of safetensors; any other tensor stands there as bytes (U8)."""


class Damaged(ValueError):
    """The bytes are not what was written; the message says why."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value ready to be written. Its tensors are not copied yet: they must not change before that."""

    tree: bytes
    tensors: list[Tensor]
    index: bytes
    """Length and header of the section of the tensors; empty without any."""

    @property
    def section(self) -> int:
        """Bytes of the section."""
        return len(self.index) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER + len(self.tree) + self.section

    def write(self, handle: int, number: int) -> None:
        """Write the file; copies one tensor at a time. Raises ``OSError``, and what a tensor's device raises."""
        fields = _FIELDS.pack(MAGIC, VERSION, 0, number, len(self.tree), self.section)
        digest = hashlib.sha256(fields)
        os.lseek(handle, HEADER, os.SEEK_SET)
        for part in self._parts():
            view = memoryview(part)
            digest.update(view)
            while len(view):
                view = view[os.write(handle, view) :]
        header = memoryview(fields + digest.digest())
        if os.pwrite(handle, header, 0) != len(header):
            raise OSError("the header was not written completely")

    def _parts(self) -> Iterator[bytes | memoryview]:
        yield self.tree
        yield self.index
        for tensor in self.tensors:
            yield tensor.capture()


def encode(value: Any) -> Encoded:
    """Prepare a value: what msgpack holds, and tensors of torch and numpy in it. Tuples come back as lists.

    Raises :class:`~perdure.protocol.errors.InvalidRequest` for anything else, naming it.
    """
    tensors: list[Tensor] = []
    pickled = 0

    def take(item: Any) -> msgpack.ExtType:
        nonlocal pickled
        try:
            tensor = found(item)
        except InvalidRequest:  # a tensor of another kind than buffer, dtype and shape can hold
            tensor = None
        if tensor is None:
            data = _torch_saved(item)
            pickled += 1
            return msgpack.ExtType(_PICKLED, data)
        tensors.append(tensor)
        return msgpack.ExtType(tensor.kind, msgpack.packb([tensor.dtype, tensor.shape, str(len(tensors) - 1)]))

    try:
        tree: bytes = msgpack.packb(value, use_bin_type=True, default=take)
    except InvalidRequest:
        raise
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        if pickled:  # refusal() would name the first of these
            raise InvalidRequest(f"the snapshot cannot be stored: {error}", "snapshot") from None
        raise refusal(value, "snapshot", error, tensors=True) from None
    return Encoded(tree, tensors, _index(tensors))


def _torch_saved(item: Any) -> bytes:
    """The bytes of ``torch.save``, if ``weights_only=True`` reads them. ``TypeError`` for what is not torch's."""
    torch = sys.modules.get("torch")
    kind = type(item)
    if torch is None or not (isinstance(item, torch.Tensor) or kind.__module__.partition(".")[0] == "torch"):
        raise TypeError(f"it holds an object of the type {kind.__name__}")
    buffer = io.BytesIO()
    try:
        torch.save(item, buffer)
        _torch_loaded(buffer.getvalue())
    except Exception as error:  # pickle, and torch's reader, raise nearly anything
        raise InvalidRequest(
            f"the snapshot holds a {kind.__name__}, which torch.load(weights_only=True) does not read; "
            "store its state_dict(), or its tensors",
            "snapshot",
        ) from error
    return buffer.getvalue()


def _torch_loaded(data: bytes) -> Any:
    try:
        import torch
    except ImportError:
        raise CannotRead("the snapshot holds an object of torch, which is not installed here") from None
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _index(tensors: list[Tensor]) -> bytes:
    if not tensors:
        return b""
    rows: dict[str, Any] = {}
    start = 0
    for number, tensor in enumerate(tensors):
        code = _CODES.get(tensor.dtype)
        shape = list(tensor.shape) if code else [tensor.nbytes]
        rows[str(number)] = {"dtype": code or "U8", "shape": shape, "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the format asks
    return struct.pack("<Q", len(text)) + text


def verify(handle: int, number: int) -> None:
    """Raise :class:`Damaged` unless the file is the whole snapshot of this number. Reads it in small blocks."""
    tree, section, expected, digest = _header(handle, number)
    left = tree + section
    while left:
        block = os.read(handle, min(left, _BLOCK))
        if not block:
            raise Damaged(f"{left:,} bytes are missing")
        digest.update(block)
        left -= len(block)
    _compare(digest, expected)


def read(handle: int, number: int) -> Any:
    """The value in a file, its tensors on the CPU and on memory of their own.

    Raises :class:`Damaged`, and :class:`~perdure.protocol.tensors.CannotRead` if this process lacks a library that the
    value needs.
    """
    tree, section, expected, digest = _header(handle, number)
    data = bytearray(tree + section)
    view, at = memoryview(data), 0
    while at < len(data):
        count = os.readv(handle, [view[at:]])
        if not count:
            raise Damaged(f"{len(data) - at:,} bytes are missing")
        at += count
    digest.update(view)
    _compare(digest, expected)
    try:
        return _decoded(view[:tree], view[tree:])
    except (CannotRead, MemoryError):
        raise
    except Exception as error:  # whoever made the digest fit may have written anything
        raise Damaged(f"it holds no value: {error}") from None


def _header(handle: int, number: int) -> tuple[int, int, bytes, Any]:
    """Lengths of the two parts, digest as written, and a digest that has seen the header; at the first part."""
    size = os.fstat(handle).st_size
    os.lseek(handle, 0, os.SEEK_SET)
    header = os.read(handle, HEADER)
    if len(header) < HEADER:
        raise Damaged(f"it has {size:,} bytes, less than a header")
    magic, version, _, written, tree, section = _FIELDS.unpack(header[: _FIELDS.size])
    if magic != MAGIC:
        raise Damaged("it is no snapshot")
    if version != VERSION:
        raise Damaged(f"it has version {version}, but this release reads {VERSION}")
    if written != number:
        raise Damaged(f"it is the snapshot {written} under another name")
    if HEADER + tree + section != size:
        raise Damaged(f"it has {size:,} of {HEADER + tree + section:,} bytes")
    return tree, section, header[_FIELDS.size :], hashlib.sha256(header[: _FIELDS.size])


def _compare(digest: Any, expected: bytes) -> None:
    if digest.digest() != expected:
        raise Damaged("its content does not match its digest")


def _decoded(tree: memoryview, section: memoryview) -> Any:
    places: dict[str, Any] = {}
    buffers = section[:0]
    if len(section):
        (length,) = struct.unpack("<Q", section[:8])
        places = json.loads(bytes(section[8 : 8 + length]))
        buffers = section[8 + length :]

    def tensor(kind: int, row: bytes) -> Any:
        dtype, shape, name = msgpack.unpackb(row)
        start, end = places[name]["data_offsets"]
        if not 0 <= start <= end <= len(buffers):
            raise ValueError(f"the tensor {name} lies outside of the file")
        return rebuilt(kind, dtype, shape, buffers[start:end])

    def give(kind: int, row: bytes) -> Any:
        readers: dict[int, Callable[[], Any]] = {
            TORCH: lambda: tensor(kind, row),
            NUMPY: lambda: tensor(kind, row),
            _PICKLED: lambda: _torch_loaded(row),
        }
        return readers[kind]()

    return msgpack.unpackb(tree, raw=False, strict_map_key=False, ext_hook=give)
