"""A tiny model whose weights are made at load, equal on every machine.

It writes nonsense. It is for tests and demonstrations without a download: the same architecture,
a step in milliseconds, and near-flat logits, on which a rounding error shows sooner than on those
of a trained model. No token ends its texts: they have ``max_tokens`` tokens unless a stop string comes.
"""

from __future__ import annotations

import hashlib

import numpy
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from ..bundle import Bundle, Shape
from ..noise import uniform
from ..tokenizer import Vocabulary, byte_alphabet

_SEED = 20260101
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPE = Shape(
    vocabulary=256 + len(_SPECIALS),
    width=128,
    hidden=256,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=32,
    context=1024,
    rope_base=10000.0,
    norm_epsilon=1e-5,
)


def tiny(dtype: torch.dtype) -> Bundle:
    """The tiny model, with its tensors in ``dtype``."""
    tensors = {}
    digest = hashlib.sha256()
    for number, (name, shape) in enumerate(SHAPE.tensors().items()):
        if "norm" in name:
            values = torch.ones(shape)
        else:
            # Keeps the size of what flows through the layers about constant; the embedding, which is
            # also the head, is small, so that the logits are nearly flat.
            scale = 0.05 if name == "embedding" else (3.0 / shape[-1]) ** 0.5
            count = int(numpy.prod(shape))
            noise = uniform(_SEED, number, numpy.arange(count)) * 2 - 1
            values = torch.from_numpy((noise * scale).astype(numpy.float32)).view(shape)
        tensors[name] = values.to(dtype)
        digest.update(name.encode() + b"\0" + values.numpy().tobytes())
    vocabulary = _vocabulary()
    digest.update(vocabulary.to_json().encode())
    return Bundle(shape=SHAPE, tensors=tensors, vocabulary=vocabulary, digest=digest.hexdigest())


def _vocabulary() -> Vocabulary:
    """One token for each byte, whose id is the byte, and the special ones."""
    vocab = byte_alphabet() | {name: 256 + place for place, name in enumerate(_SPECIALS)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in _SPECIALS])
    return Vocabulary(definition=inner.to_str(), ends=(), template=_TEMPLATE, specials={"eos_token": "<|im_end|>"})
