"""Models from GGUF files: Llama architecture, any quantisation the ``gguf`` package can undo."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import gguf
import torch

from ....protocol.errors import SettingsError
from ..bundle import Bundle, Shape
from .gguf_metadata import Metadata
from .gguf_tokenizer import read_vocabulary
from .layout import GGUF, layers


def read_gguf(path: Path, dtype: torch.dtype) -> Bundle:
    """Read and dequantise a file; this takes seconds, see :mod:`.cache`.

    Raises :class:`SettingsError` when it is no GGUF file or uses what is not supported.
    """
    raw, metadata = _open(path)
    shape = _shape(metadata, raw)

    def take(name: str, expected: tuple[int, ...]) -> torch.Tensor:
        if name not in raw:
            raise SettingsError(f"{path} has no tensor {name}")
        item = raw.pop(name)
        found = tuple(int(size) for size in reversed(item.shape))
        if found != expected:
            raise SettingsError(f"{path}: {name} should have the shape {expected} by the metadata, but has {found}")
        try:
            values = gguf.quants.dequantize(item.data, item.tensor_type)
        except NotImplementedError:
            raise SettingsError(
                f"{path}: {name} is {item.tensor_type.name}, which the gguf package cannot read"
            ) from None
        return torch.from_numpy(values.copy()).to(dtype)

    size = (shape.vocabulary, shape.width)
    tensors = {
        "embedding": take(f"{GGUF['embedding']}.weight", size),
        "norm": take(f"{GGUF['norm']}.weight", (shape.width,)),
    }
    if f"{GGUF['head']}.weight" in raw:
        tensors["head"] = take(f"{GGUF['head']}.weight", size)
    tensors |= layers(shape, GGUF, take, pairs=True)
    if raw:
        raise SettingsError(f"{path} has tensors that are not supported: {', '.join(sorted(raw)[:5])}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Bundle(shape=shape, tensors=tensors, vocabulary=read_vocabulary(metadata), digest=digest)


def _open(path: Path) -> tuple[dict[str, Any], Metadata]:
    """The tensors of a file by name, not yet read, and what it says about itself."""
    with path.open("rb") as file:
        start = file.read(8)
    version = int.from_bytes(start[4:], sys.byteorder)
    if start[:4] == b"GGUF" and version and not version & 0xFFFF:
        raise SettingsError(
            f"{path} is in the byte order of other machines; convert it with gguf-convert-endian, which the package "
            f"gguf installs: gguf-convert-endian {path} {sys.byteorder}"
        )
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, LookupError, TypeError, OverflowError) as error:
        raise SettingsError(f"{path} cannot be read as a GGUF file: {error}") from error
    return {tensor.name: tensor for tensor in reader.tensors}, Metadata(path, fields)


def _shape(metadata: Metadata, raw: dict[str, Any]) -> Shape:
    path = metadata.path
    kind = metadata.text("general.architecture")
    if kind != "llama":
        raise SettingsError(f"{path} is a {kind} model; only llama is supported")
    _check_rotation(metadata, kind)
    if "rope_freqs.weight" in raw:
        raise SettingsError(f"{path} scales its rotary positions (rope_freqs.weight), which is not supported")
    if metadata.whole("llama.expert_count", 0):
        raise SettingsError(f"{path} is a mixture of experts, which is not supported")
    heads = metadata.whole("llama.attention.head_count")
    width = metadata.whole("llama.embedding_length")
    if heads <= 0:
        raise SettingsError(f"{path}: llama.attention.head_count must be more than 0, not {heads}")
    head_width = metadata.whole("llama.attention.key_length", width // heads)
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if metadata.whole(name, head_width) != head_width:
            raise SettingsError(f"{path}: {name} is not the {head_width} of a whole head, which is not supported")
    return Shape(
        vocabulary=len(metadata.texts("tokenizer.ggml.tokens")),
        width=width,
        hidden=metadata.whole("llama.feed_forward_length"),
        layers=metadata.whole("llama.block_count"),
        heads=heads,
        kv_heads=metadata.whole("llama.attention.head_count_kv", heads),
        head_width=head_width,
        context=metadata.whole("llama.context_length"),
        rope_base=metadata.number("llama.rope.freq_base", 10000.0),
        norm_epsilon=metadata.number("llama.attention.layer_norm_rms_epsilon"),
    )


def _check_rotation(metadata: Metadata, kind: str) -> None:
    """Without a type a factor is a linear one; without a factor, or with one of 1, a linear scaling is none."""
    scaling = metadata.text(f"{kind}.rope.scaling.type", "linear")
    factors = [metadata.number(f"{kind}.rope.{name}", 1.0) for name in ("scaling.factor", "scale_linear")]
    if scaling not in ("none", "linear") or (scaling == "linear" and set(factors) - {0.0, 1.0}):
        raise SettingsError(
            f"{metadata.path} scales its rotary positions ({scaling}, {max(factors):g}), which is not supported"
        )
