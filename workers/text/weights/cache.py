"""Dequantised weights, kept between starts.

Undoing the quantisation of a small model takes five seconds, and a worker that replaces a dead one
should not spend them. The result is kept under ``$XDG_CACHE_HOME/perdure`` as a safetensors file
whose data begins on a page: it is mapped, not read, and all workers of a host share the pages.

A cache is never needed: a folder that cannot be written, or a file that is torn or old, only costs
the time. Two processes that write at once write two temporary files; the last rename wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import gguf
import numpy
import torch

from ..bundle import Bundle, Shape
from ..tokenizer import Vocabulary

_FORMAT: Final = "4"
_PAGE: Final = 4096
_ABANDONED: Final = 3600  # seconds after which nobody is still writing a file
_DTYPES: Final = {torch.float32: "F32", torch.bfloat16: "BF16"}


def cached(path: Path, dtype: torch.dtype, reader: Callable[[Path, torch.dtype], Bundle]) -> Bundle:
    """What ``reader(path, dtype)`` returns, from the cache if the file has not changed since."""
    place = _place(path, dtype)
    try:
        return _load(place, dtype)
    except (OSError, ValueError, KeyError, TypeError):
        bundle = reader(path, dtype)
    # A home that is missing, read-only or full is no reason to fail.
    with contextlib.suppress(OSError):
        _save(place, bundle, dtype)
    return bundle


def _place(path: Path, dtype: torch.dtype) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "perdure"
    real = path.resolve()
    status = real.stat()
    # What the reader made of the file depends on the package that undid the quantisation, too.
    version = getattr(gguf, "__version__", "")
    parts = (_FORMAT, version, str(real), status.st_size, status.st_mtime_ns, status.st_ino, str(dtype))
    return root / f"{path.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.safetensors"


def _save(place: Path, bundle: Bundle, dtype: torch.dtype) -> None:
    header: dict[str, object] = {
        "__metadata__": {
            "format": _FORMAT,
            "digest": bundle.digest,
            "shape": bundle.shape.to_json(),
            "vocabulary": bundle.vocabulary.to_json(),
        }
    }
    end = 0
    for name, tensor in bundle.tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    # Padded with blanks, which the format allows, so that the data begins on a page.
    text += b" " * (-(8 + len(text)) % _PAGE)
    place.parent.mkdir(parents=True, exist_ok=True)
    _tidy(place)
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115
        dir=place.parent, prefix=place.name, suffix=".part", delete=False
    )
    try:
        with file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in bundle.tensors.values():
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        Path(file.name).replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(file.name).unlink()
        raise


def _tidy(place: Path) -> None:
    """Remove what processes that were killed while writing left behind."""
    for part in place.parent.glob(f"{place.name}*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()


def _load(place: Path, dtype: torch.dtype) -> Bundle:
    with place.open("rb") as file:
        header, start = _header(file)
        size = os.fstat(file.fileno()).st_size
    metadata = header.pop("__metadata__")
    if metadata["format"] != _FORMAT or any(item["dtype"] != _DTYPES[dtype] for item in header.values()):
        raise ValueError(f"{place} is of another format")
    if size != start + max(item["data_offsets"][1] for item in header.values()):
        raise ValueError(f"{place} is torn")
    # A private mapping: nobody can write into the pages that the other workers read.
    data = torch.from_numpy(numpy.memmap(place, dtype=numpy.uint8, mode="c", offset=start))
    tensors = {}
    for name, item in header.items():
        first, last = item["data_offsets"]
        tensors[name] = data[first:last].view(dtype).view(item["shape"])
    return Bundle(
        shape=Shape.from_json(metadata["shape"]),
        tensors=tensors,
        vocabulary=Vocabulary.from_json(metadata["vocabulary"]),
        digest=metadata["digest"],
    )


def _header(file: BinaryIO) -> tuple[dict[str, dict[str, Any]], int]:
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= 2**28:
        raise ValueError("no safetensors header")
    header = json.loads(file.read(length))
    return header, 8 + length
