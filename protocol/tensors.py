"""Tensors inside a state: torch tensors and numpy arrays as raw buffers beside their dtype and shape.

Neither library is imported for a value that holds none of its tensors: a tensor can only come from a
library that is loaded, and is only rebuilt where one is stored. A tensor is copied when it is captured, so
that the task may change it in place afterwards. It comes back on the CPU, contiguous, on memory of its own.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest, PerdureError

TORCH, NUMPY = 2, 3
"""Types of msgpack extensions. They are only met inside a state: see :mod:`.codec`."""


class CannotRead(PerdureError):
    """What is stored is sound, but this process lacks the library that it needs. Another process may have it."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor that was found, not copied yet: ``nbytes`` are those of its raw buffer."""

    kind: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    capture: Callable[[], memoryview]
    """Copies the buffer, in row-major order. Raises what the device raises."""

    @property
    def name(self) -> str:
        """For messages."""
        return "torch tensor" if self.kind == TORCH else "numpy array"


def found(value: Any) -> Tensor | None:
    """The tensor that ``value`` is, or ``None`` for any other object.

    Raises :class:`InvalidRequest` for one of a kind that cannot be stored, saying what to store instead; whoever
    knows the place puts it in front.
    """
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch(torch, value)
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _numpy(numpy, value)
    return None


def _torch(torch: Any, value: Any) -> Tensor:
    plain = value.detach()
    dtype = str(plain.dtype).removeprefix("torch.")
    for wrong, what, instead in (
        (plain.is_quantized, "a quantised tensor", "its int_repr(), q_scale() and q_zero_point()"),
        (plain.is_meta, "a tensor without data (device meta)", "one that was computed"),
        (plain.is_nested, "a nested tensor", "the list of its parts, tensor.unbind()"),
        (plain.layout != torch.strided, f"a tensor of layout {plain.layout}", "tensor.to_dense(), or its parts"),
        (type(plain) is not torch.Tensor, f"a {type(plain).__name__}", "a plain torch.Tensor"),
    ):
        if wrong:
            raise InvalidRequest(f"is {what}, which cannot be stored; store {instead}", "state")

    def capture() -> memoryview:
        # One copy from wherever and however it lies; it resolves strides, the device and a lazy conjugate.
        copy = torch.empty(plain.shape, dtype=plain.dtype, device="cpu")
        copy.copy_(plain)
        return _bytes_of(copy, copy.data_ptr(), copy.nbytes)

    return Tensor(TORCH, dtype, tuple(plain.shape), plain.numel() * plain.element_size(), capture)


def _numpy(numpy: Any, value: Any) -> Tensor:
    dtype = value.dtype.str
    plain, other = numpy.dtype(dtype) == value.dtype, type(value) is not numpy.ndarray
    for wrong, what, instead in (
        (value.dtype.hasobject, "a numpy array of Python objects", "value.tolist()"),
        (not plain, f"a numpy array of {value.dtype}", "an array per field, or value.view() of plain numbers"),
        (other, f"a {type(value).__name__}", "numpy.asarray(value), and what it loses beside it"),
    ):
        if wrong:
            raise InvalidRequest(f"is {what}, which cannot be stored; store {instead}", "state")
    return Tensor(NUMPY, dtype, value.shape, value.nbytes, lambda: memoryview(value.tobytes()))


def _bytes_of(owner: Any, address: int, nbytes: int) -> memoryview:
    if not nbytes:
        return memoryview(b"")
    array = (ctypes.c_char * nbytes).from_address(address)
    array.owner = owner  # type: ignore[attr-defined]  # a memoryview of the array keeps the array, and so its owner
    return memoryview(array).cast("B")


def rebuilt(kind: int, dtype: str, shape: Sequence[int], buffer: memoryview) -> Any:
    """The tensor that was stored, as a copy of ``buffer`` (writable).

    Raises :class:`CannotRead` without its library, and ``ValueError`` for a buffer that is none of such a tensor.
    """
    if kind == TORCH:
        try:
            import torch
        except ImportError:
            raise _lacking("a torch tensor", "torch", "perdure[torch]") from None
        element = getattr(torch, dtype, None)
        if not isinstance(element, torch.dtype):
            raise CannotRead(
                f"the state holds a torch tensor of {dtype}, which torch {torch.__version__} does not know"
            )
        if math.prod(shape) * element.itemsize != len(buffer):
            raise ValueError(f"{len(buffer)} bytes are no torch tensor of {dtype} and shape {shape}")
        tensor = torch.empty(shape, dtype=element)
        if len(buffer):
            tensor.reshape(-1).view(torch.uint8).copy_(torch.frombuffer(buffer, dtype=torch.uint8))
        return tensor
    if kind == NUMPY:
        try:
            import numpy
        except ImportError:
            raise _lacking("a numpy array", "numpy", "numpy") from None
        return numpy.ndarray(shape, numpy.dtype(dtype), buffer).copy()
    raise ValueError(f"unknown kind of tensor {kind}")


def _lacking(what: str, module: str, package: str) -> CannotRead:
    return CannotRead(f"the state holds {what}, but {module} is not installed here: pip install '{package}'")
