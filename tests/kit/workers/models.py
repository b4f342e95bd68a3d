"""Tiny models of text, written as files by a plain implementation of each format."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from perdure.workers.text.tokenizer import byte_alphabet

WIDTH, HIDDEN, LAYERS, HEADS, GROUPS, D, BASE, EPSILON = 64, 96, 2, 4, 2, 16, 500.0, 1e-5
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIALS, *byte_alphabet(), "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def weights(tied: bool) -> dict[str, torch.Tensor]:
    """Random weights under the names that hubs use."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (len(TOKENS), WIDTH)} | ({} if tied else {"lm_head": (len(TOKENS), WIDTH)})
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj": (HEADS * D, WIDTH),
            f"{name}.self_attn.k_proj": (GROUPS * D, WIDTH),
            f"{name}.self_attn.v_proj": (GROUPS * D, WIDTH),
            f"{name}.self_attn.o_proj": (WIDTH, HEADS * D),
            f"{name}.mlp.gate_proj": (HIDDEN, WIDTH),
            f"{name}.mlp.up_proj": (HIDDEN, WIDTH),
            f"{name}.mlp.down_proj": (WIDTH, HIDDEN),
        }
    result = {f"{name}.weight": torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}
    for name in [
        "model.norm",
        *(f"model.layers.{n}.{k}_layernorm" for n in range(LAYERS) for k in ("input", "post_attention")),
    ]:
        result[f"{name}.weight"] = 1 + torch.randn(WIDTH, generator=generator) / 10
    return result


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 256,
        "rope_theta": BASE,
        "rms_norm_eps": EPSILON,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | changes


def write_folder(folder: Path, w: dict[str, torch.Tensor], **changes: Any) -> Path:
    """A model folder as hubs have it."""
    folder.mkdir()
    half = len(w) // 2
    parts = {"model-1.safetensors": list(w)[:half], "model-2.safetensors": list(w)[half:]}
    for file, names in parts.items():
        save_file({name: w[name] for name in names}, folder / file)
    places = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    (folder / "tokenizer.json").write_text(byte_level().to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": {"content": "<|im_end|>"}})
    )
    return folder


def byte_level(tokens: Sequence[str] = TOKENS, specials: Sequence[str] = SPECIALS) -> tokenizers.Tokenizer:
    """A tokenizer of bytes and a few merges."""
    merges = [(merge.split()[0], merge.split()[1]) for merge in MERGES]
    inner = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(specials))
    return inner


def write_gguf(
    path: Path,
    w: dict[str, torch.Tensor],
    kind: str = "F32",
    tokens: Sequence[str] = TOKENS,
    edit: Callable[[Any], None] | None = None,
    architecture: str = "llama",
    head: int = D,
    **metadata: str,
) -> dict[str, torch.Tensor]:
    """A GGUF file with products in ``kind``; returns the weights as they come back from it.

    ``edit`` gets the writer before it writes. Queries and keys of other architectures are rotated in halves there too.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if "scaling" in metadata:
        writer.add_string("llama.rope.scaling.type", metadata["scaling"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"model.layers.{n}.{ours}": f"blk.{n}.{theirs}" for n in range(LAYERS) for ours, theirs in parts.items()}
    quantisation = gguf.GGMLQuantizationType[kind]
    found = {}
    for name, tensor in w.items():
        values = tensor.numpy()
        stem, _, suffix = name.rpartition(".")
        if tensor.dim() == 1:
            writer.add_tensor(f"{names[stem]}.{suffix}", values)
            found[name] = tensor
            continue
        rows = numpy.arange(len(values))
        if architecture == "llama" and (
            ".q_proj" in name or ".k_proj" in name
        ):  # as the converter does: halves to pairs, within each head
            rows = rows.reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)
        packed = gguf.quants.quantize(numpy.ascontiguousarray(values[rows]), quantisation)
        writer.add_tensor(f"{names[stem]}.{suffix}", packed, raw_dtype=quantisation)
        back = numpy.empty_like(values)
        back[rows] = gguf.quants.dequantize(packed, quantisation)
        found[name] = torch.from_numpy(back)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
