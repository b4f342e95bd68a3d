"""Models from GGUF files: Llama architecture, any quantisation the ``gguf`` package can undo."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from ....protocol.errors import SettingsError
from ..bundle import Bundle, Shape, halves
from ..tokenizer import END_NAMES, Vocabulary

_CONTROL, _USER_DEFINED = 3, 4

# How each pre-tokenizer that a file may name splits text before its bytes are merged.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf(path: Path, dtype: torch.dtype) -> Bundle:
    """Read and dequantise a file; this takes seconds, see :mod:`.cache`.

    Raises :class:`SettingsError` when it is no GGUF file or uses what is not supported.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise SettingsError(f"{path} cannot be read as a GGUF file: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama":
        raise SettingsError(f"{path} is a {metadata.get('general.architecture')} model; only llama is supported")
    raw = {tensor.name: tensor for tensor in reader.tensors}
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in raw:
        raise SettingsError(f"{path} scales its rotary positions ({scaling}), which is not supported")
    if metadata.get("llama.expert_count", 0):
        raise SettingsError(f"{path} is a mixture of experts, which is not supported")
    shape = _shape(metadata, path, vocabulary=len(metadata.get("tokenizer.ggml.tokens", ())))

    def tensor(name: str) -> torch.Tensor:
        try:
            item = raw.pop(name)
        except KeyError:
            raise SettingsError(f"{path} has no tensor {name}") from None
        try:
            values = gguf.quants.dequantize(item.data, item.tensor_type)
        except NotImplementedError:
            raise SettingsError(
                f"{path}: {name} is {item.tensor_type.name}, which the gguf package cannot read"
            ) from None
        return torch.from_numpy(values.copy()).to(dtype)

    tensors = {"embedding": tensor("token_embd.weight"), "norm": tensor("output_norm.weight")}
    if "output.weight" in raw:
        tensors["head"] = tensor("output.weight")
    for layer in range(shape.layers):
        ours, theirs = f"layers.{layer}", f"blk.{layer}"
        queries = halves(tensor(f"{theirs}.attn_q.weight"), shape.heads)
        keys = halves(tensor(f"{theirs}.attn_k.weight"), shape.kv_heads)
        tensors |= {
            f"{ours}.norm_in": tensor(f"{theirs}.attn_norm.weight"),
            f"{ours}.qkv": torch.cat((queries, keys, tensor(f"{theirs}.attn_v.weight"))),
            f"{ours}.out": tensor(f"{theirs}.attn_output.weight"),
            f"{ours}.norm_mid": tensor(f"{theirs}.ffn_norm.weight"),
            f"{ours}.gate_up": torch.cat((tensor(f"{theirs}.ffn_gate.weight"), tensor(f"{theirs}.ffn_up.weight"))),
            f"{ours}.down": tensor(f"{theirs}.ffn_down.weight"),
        }
    if raw:
        raise SettingsError(f"{path} has tensors that are not supported: {', '.join(sorted(raw)[:5])}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Bundle(shape=shape, tensors=tensors, vocabulary=_vocabulary(metadata, path), digest=digest)


def _shape(metadata: dict[str, Any], path: Path, vocabulary: int) -> Shape:
    try:
        heads = metadata["llama.attention.head_count"]
        width = metadata["llama.embedding_length"]
        head_width = metadata.get("llama.attention.key_length", width // heads)
        shape = Shape(
            vocabulary=vocabulary,
            width=width,
            hidden=metadata["llama.feed_forward_length"],
            layers=metadata["llama.block_count"],
            heads=heads,
            kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_width=head_width,
            context=metadata["llama.context_length"],
            rope_base=metadata.get("llama.rope.freq_base", 10000.0),
            norm_epsilon=metadata["llama.attention.layer_norm_rms_epsilon"],
        )
    except KeyError as error:
        raise SettingsError(f"{path} does not say its {error.args[0]}") from None
    if metadata.get("llama.rope.dimension_count", head_width) != head_width:
        raise SettingsError(f"{path} rotates only a part of each head, which is not supported")
    return shape


def _vocabulary(metadata: dict[str, Any], path: Path) -> Vocabulary:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise SettingsError(f"{path} has a tokenizer of kind {kind}; only byte-level BPE (gpt2) is supported")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges, ignore_merges=False)
    )
    inner.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"), path)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    inner.add_tokens(
        [
            tokenizers.AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    begin, end = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    controls = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL}
    ends = {tokens.index(name) for name in END_NAMES if name in controls}
    ends |= {
        metadata[f"tokenizer.ggml.{n}_token_id"] for n in ("eos", "eot") if f"tokenizer.ggml.{n}_token_id" in metadata
    }
    return Vocabulary(
        definition=inner.to_str(),
        ends=tuple(sorted(ends)),
        prefix=(begin,) if begin is not None and metadata.get("tokenizer.ggml.add_bos_token", False) else (),
        template=metadata.get("tokenizer.chat_template", ""),
        specials={"bos_token": "" if begin is None else tokens[begin], "eos_token": "" if end is None else tokens[end]},
    )


def _pre_tokenizer(name: str, path: Path) -> Any:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return plain
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if name in ("llama-bpe", "llama3", "llama-v3"):
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise SettingsError(f"{path} names the pre-tokenizer {name!r}, which is not supported; use the model's hub folder")
