"""Models from a folder as hubs lay it out: config.json, tokenizer.json and safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from ....protocol.errors import SettingsError
from ..bundle import Bundle, named
from .folder_config import read_shape
from .folder_files import digest, read_json, weight_files
from .folder_tokenizer import FILES, TEMPLATES, read_vocabulary
from .layout import HUB, layers


def read_folder(folder: Path, dtype: torch.dtype) -> Bundle:
    """Read a model folder as ``transformers`` reads it.

    Raises :class:`SettingsError` when something is missing or not supported.
    """
    # An adapter has no config.json, and what it is should be said first.
    config = read_json(folder / "config.json", required=not (folder / "adapter_config.json").exists())
    files, read = weight_files(folder, config)
    shape = read_shape(config, folder)

    def take(name: str, expected: tuple[int, ...]) -> torch.Tensor:
        if name not in files:
            raise SettingsError(f"{folder} has no tensor {name}")
        with safe_open(files.pop(name), framework="pt", device="cpu") as opened:
            result: torch.Tensor = opened.get_tensor(name)
        if tuple(result.shape) != expected:
            raise SettingsError(
                f"{folder}: {name} should have the shape {expected} by config.json, but has {tuple(result.shape)}"
            )
        return result.to(dtype)

    size = (shape.vocabulary, shape.width)
    embedding, head = (f"{HUB[name]}.weight" for name in ("embedding", "head"))
    tied = bool(config.get("tie_word_embeddings", False))
    # Of two that are tied one is enough, whichever it is; where both are there and differ, they are not tied.
    tensors = {"embedding": take(embedding if embedding in files or not tied else head, size)}
    if not tied or head in files:
        tensors["head"] = take(head, size)
        if tied and torch.equal(tensors["head"], tensors["embedding"]):
            del tensors["head"]
    tensors["norm"] = take(f"{HUB['norm']}.weight", (shape.width,))
    tensors |= layers(shape, HUB, take)
    # Old exports store the rotary frequencies, which are computed.
    left = [name for name in files if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise SettingsError(f"{folder} has tensors that are not supported: {', '.join(sorted(left)[:5])}")
    beside = [*(folder / name for name in ("config.json", *FILES)), *sorted((folder / TEMPLATES).glob("*.jinja"))]
    vocabulary = read_vocabulary(folder, config)
    name = named(digest([*beside, *read]), shape, vocabulary)
    return Bundle(shape=shape, tensors=tensors, vocabulary=vocabulary, digest=name)
