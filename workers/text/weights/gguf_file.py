"""Models from GGUF files, of any quantisation the ``gguf`` package can undo."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, Final

import gguf
import torch

from ....protocol.errors import SettingsError
from ..bundle import Bundle, Shape, named
from .gguf_metadata import Metadata
from .gguf_tokenizer import read_vocabulary
from .layout import GGUF, layers

_ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
"""Mistral's files say that they are of the first."""

_FACTORS: Final = "rope_freqs.weight"
"""The tensor in which files keep what Llama 3 divides its rotary frequencies by."""


def read_gguf(path: Path, dtype: torch.dtype) -> Bundle:
    """Read and dequantise a file; this takes seconds, see :mod:`.cache`.

    Raises :class:`SettingsError` when it is no GGUF file or uses what is not supported.
    """
    raw, metadata = _open(path)

    def take(name: str, expected: tuple[int, ...], precision: torch.dtype = dtype) -> torch.Tensor:
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
        return torch.from_numpy(values.copy()).to(precision)

    kind = metadata.text("general.architecture")
    factors: tuple[float, ...] = ()
    if kind == "llama" and _FACTORS in raw:
        factors = tuple(take(_FACTORS, (int(raw[_FACTORS].n_elements),), torch.float32).tolist())
    shape = _shape(metadata, factors)
    size = (shape.vocabulary, shape.width)
    tensors = {
        "embedding": take(f"{GGUF['embedding']}.weight", size),
        "norm": take(f"{GGUF['norm']}.weight", (shape.width,)),
    }
    if f"{GGUF['head']}.weight" in raw:
        tensors["head"] = take(f"{GGUF['head']}.weight", size)
    tensors |= layers(shape, GGUF, take, pairs=kind == "llama")
    if raw:
        raise SettingsError(f"{path} has tensors that are not supported: {', '.join(sorted(raw)[:5])}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    vocabulary = read_vocabulary(metadata)
    return Bundle(shape=shape, tensors=tensors, vocabulary=vocabulary, digest=named(digest, shape, vocabulary))


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


def _shape(metadata: Metadata, factors: tuple[float, ...]) -> Shape:
    path = metadata.path
    kind = metadata.text("general.architecture")
    if kind not in _ARCHITECTURES:
        raise SettingsError(f"{path} is a {kind} model; supported are {', '.join(_ARCHITECTURES)}")
    _check_rotation(metadata, kind)
    if metadata.whole(f"{kind}.expert_count", 0):
        raise SettingsError(f"{path} is a mixture of experts, which is not supported")
    heads = metadata.whole(f"{kind}.attention.head_count")
    width = metadata.whole(f"{kind}.embedding_length")
    context = metadata.whole(f"{kind}.context_length")
    if heads <= 0:
        raise SettingsError(f"{path}: {kind}.attention.head_count must be more than 0, not {heads}")
    if 0 < (window := metadata.whole(f"{kind}.attention.sliding_window", 0)) < context:
        raise SettingsError(f"{path} has a sliding window of {window}, less than its context of {context} tokens")
    head_width = metadata.whole(f"{kind}.attention.key_length", width // heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if metadata.whole(f"{kind}.{name}", head_width) != head_width:
            raise SettingsError(
                f"{path}: {kind}.{name} is not the {head_width} of a whole head, which is not supported"
            )
    return Shape(
        vocabulary=len(metadata.texts("tokenizer.ggml.tokens")),
        width=width,
        hidden=metadata.whole(f"{kind}.feed_forward_length"),
        layers=metadata.whole(f"{kind}.block_count"),
        heads=heads,
        kv_heads=metadata.whole(f"{kind}.attention.head_count_kv", heads),
        head_width=head_width,
        context=context,
        rope_base=metadata.number(f"{kind}.rope.freq_base", 10000.0),
        norm_epsilon=metadata.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_factors=factors,
        qkv_bias=kind == "qwen2",
        head_norms=kind == "qwen3",
    )


def _check_rotation(metadata: Metadata, kind: str) -> None:
    """Without a type a factor is a linear one; without a factor, or with one of 1, a linear scaling is none."""
    scaling = metadata.text(f"{kind}.rope.scaling.type", "linear")
    factors = [metadata.number(f"{kind}.rope.{name}", 1.0) for name in ("scaling.factor", "scale_linear")]
    if scaling not in ("none", "linear") or (scaling == "linear" and set(factors) - {0.0, 1.0}):
        raise SettingsError(
            f"{metadata.path} scales its rotary positions ({scaling}, {max(factors):g}), which is not supported"
        )
