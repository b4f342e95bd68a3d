"""GGUF files: read as llama.cpp reads them, and refused in words where something is odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.text.bundle import Bundle
from perdure.workers.text.tokenizer import Tokenizer
from perdure.workers.text.weights.models import read
from tests.kit.workers.models import MERGES, TOKENS, weights, write_gguf

Value = gguf.GGUFValueType


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(path: Path, **options: Any) -> Bundle:
    """A file whose writer has got the fields of ``fields`` over its own, without those that are None."""
    fields = options.pop("fields", {})
    edit = options.pop("edit", lambda writer: None)
    names = options.get("tokens", TOKENS)

    def both(writer: Any) -> None:
        for name, field in fields.items():
            writer.kv_data[0].pop(name, None)
            if field is not None:
                writer.add_key_value(name, *field)
        edit(writer)

    w = weights(tied=True)
    more = len(names) - len(TOKENS)
    if more:
        embedding = w["model.embed_tokens.weight"]
        w["model.embed_tokens.weight"] = embedding.new_zeros(len(names), embedding.shape[1])
    write_gguf(path / "model.gguf", w, edit=both, **options)
    return read(Settings(model=str(path / "model.gguf")))


def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer(bundle.vocabulary, bundle.shape.vocabulary)


WORD = "ĠVi" + "".join(tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str("ệt")[0][0])


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_a_word_that_no_merge_leads_to(tmp_path: Path, pre: str, whole: bool) -> None:
    """One token where llama.cpp, and the tokenizer.json of such models (ignore_merges), make it one."""
    tokens = [*TOKENS, WORD]
    ours = tokenizer(
        load(tmp_path, tokens=tokens, pre=pre, fields={"tokenizer.ggml.add_bos_token": (False, Value.BOOL)})
    )
    merges = [(merge.split()[0], merge.split()[1]) for merge in MERGES]
    vocab = {token: place for place, token in enumerate(tokens)}
    peer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ours.encode(" Việt the") == peer.encode(" Việt the").ids
    assert (ours.encode(" Việt") == [len(TOKENS)]) == whole


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "qwen2", "smollm", "default"])
@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("begin", [None, 1, 10**6])
def test_a_prompt_begins_as_in_llama_cpp(tmp_path: Path, pre: str, said: bool | None, begin: int | None) -> None:
    """As the file says, and where it says nothing, by its pre-tokenizer. A BOS that is no token is none."""
    fields: dict[str, Any] = {} if begin is None else {"tokenizer.ggml.bos_token_id": (begin, Value.UINT32)}
    if said is not None:
        fields["tokenizer.ggml.add_bos_token"] = (said, Value.BOOL)
    expected = said if said is not None else pre in ("llama-bpe", "tekken")
    begun = [1] if expected and begin == 1 else []
    assert tokenizer(load(tmp_path, pre=pre, fields=fields)).encode("the") == [*begun, TOKENS.index("the")]


TEXT = "I'LL pay 12345 $+HelloWorld's x\n\n  y/"
SPLIT = {
    "gpt-2": "I ' LL Ġpay Ġ12345 Ġ$+ HelloWorld 's Ġx ĊĊĠ Ġy /",
    "default": "I ' LL Ġpay Ġ 123 45 Ġ $+ HelloWorld ' s Ġx ĊĊĠ Ġy /",
    "smollm": "I ' LL Ġpay Ġ 1 2 3 4 5 Ġ$+ HelloWorld 's Ġx ĊĊĠ Ġy /",
    "llama-bpe": "I 'LL Ġpay Ġ 123 45 Ġ$+ HelloWorld 's Ġx ĊĊ Ġ Ġy /",
    "qwen2": "I 'LL Ġpay Ġ 1 2 3 4 5 Ġ$+ HelloWorld 's Ġx ĊĊ Ġ Ġy /",
    "tekken": "I 'LL Ġpay Ġ 1 2 3 4 5 Ġ$+ Hello World 's Ġx ĊĊ Ġ Ġy /",
}


@pytest.mark.parametrize("pre", [*SPLIT, None])
def test_text_is_split_as_the_file_names_it(tmp_path: Path, pre: str | None) -> None:
    """A file that names nothing is one that names ``default``."""
    fields = {"tokenizer.ggml.pre": None} if pre is None else {}
    bundle = load(tmp_path, pre=pre or "gpt-2", fields=fields)
    inner = tokenizers.Tokenizer.from_str(bundle.vocabulary.definition)
    words = [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert words == SPLIT[pre or "default"].split(" ")


ENDED: list[tuple[list[str], dict[str, int], set[str]]] = [
    ([], {}, {"<|im_end|>", "<|endoftext|>"}),
    (["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>", "<eos>", "<end_of_turn>"], {}, set()),
    (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "[PAD]"], {}, {"<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}),
    (["<|fim_pad|>", "fin"], {"fim_pad": len(TOKENS) + 1, "eot": 10**6}, {"fin"}),
    (["<|end|>", "<|return|>", "<|call|>"], {}, {"<|return|>", "<|call|>"}),
    (["<|end|>", "<|flush|>", "<|calls|>"], {}, {"<|flush|>", "<|calls|>"}),
    (["<|end|>", "<|flush|>"], {}, {"<|end|>", "<|flush|>"}),
    (["</s>", "<|tool_response>"], {}, {"<|tool_response>"}),
    (["unused", "<s>", "<|user|>"], {"eom": len(TOKENS)}, {"unused"}),
]


@pytest.mark.parametrize(("tokens", "ids", "expected"), ENDED)
def test_an_answer_ends_where_llama_cpp_ends_it(
    tmp_path: Path, tokens: list[str], ids: dict[str, int], expected: set[str]
) -> None:
    """By the ids of the file and by names. What looks like a control token is one, whatever its type."""
    names = [*TOKENS, *tokens]
    fields = {f"tokenizer.ggml.{key}_token_id": (place, Value.UINT32) for key, place in ids.items()}
    ours = tokenizer(load(tmp_path, tokens=names, fields=fields))
    found = {names[place] for place in ours.ends}
    assert found == (expected or set(tokens)) | {"<|im_end|>", "<|endoftext|>"}
    for token in expected - {"fin", "unused"}:
        assert ours.encode(f"a{token}") == [*ours.encode("a"), names.index(token)]
        assert ours.pieces[names.index(token)] == b""


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
JOINED = ["th", "he", "▁t", "the", "▁the", "hem", "rm", "▁▁"]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *reversed(JOINED), *"▁themrosa", "<tool>"]
SCORES = [-float(JOINED.index(piece)) if piece in JOINED else -1e6 for piece in PIECES]


def pieces(**changes: Any) -> dict[str, Any]:
    """Fields of a vocabulary of SentencePiece, as of Llama 2 and Mistral."""
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 260) + [4]
    return {
        "tokenizer.ggml.model": ("llama", Value.STRING),
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.eos_token_id": None,
        "tokenizer.ggml.scores": (SCORES, Value.ARRAY),
        "tokenizer.ggml.token_type": (kinds, Value.ARRAY),
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize("before", [True, False])
def test_a_vocabulary_of_sentence_pieces_has_the_same_ids(tmp_path: Path, before: bool) -> None:
    """As tokenizer.json of such a model, whose merges stand in the order of the scores; with BOS by default."""
    fields = pieces() if before else pieces(add_space_prefix=(False, Value.BOOL), add_bos_token=(False, Value.BOOL))
    ours = tokenizer(load(tmp_path, tokens=PIECES, fields=fields))
    pairs = [(t[:cut], t[cut:]) for t in JOINED for cut in (2, 1) if t[:cut] in PIECES and t[cut:] in PIECES]
    vocab = {token: place for place, token in enumerate(PIECES)}
    model = models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    peer = tokenizers.Tokenizer(model)
    blank = normalizers.Replace(" ", "▁")
    peer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if before else blank
    peer.add_special_tokens(["<unk>", "<s>", "</s>"])
    peer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    for text in ("the them thermos", "  a\n\nnaïve 日本", "<s>the</s> the<tool> a", "", " "):
        expected = peer.encode(text).ids
        assert ours.encode(text) == ([1, *expected] if before else expected)
        if "<" not in text:  # what is special has no bytes
            assert b"".join(ours.pieces[token] for token in expected).decode().removeprefix(" " * before) == text
    assert ours.ends == {2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scores": None}, "does not say its tokenizer.ggml.scores"),
        ({"scores": ([1.0], Value.ARRAY)}, "tokenizer.ggml.scores has 1"),
        ({"scores": ([float("nan")] * len(PIECES), Value.ARRAY)}, "scores should be a list of numbers"),
        ({"scores": (["a"], Value.ARRAY)}, "scores should be a list of numbers"),
        ({"add_space_prefix": (1, Value.UINT32)}, "add_space_prefix should be true or false"),
    ],
)
def test_odd_sentence_pieces_are_refused_in_words(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load(tmp_path, tokens=PIECES, fields=pieces(**changes))


def test_templates_have_names_there_too(tmp_path: Path) -> None:
    """And know the special tokens that have an id."""

    def edit(writer: Any) -> None:
        del writer.kv_data[0]["tokenizer.chat_template"]
        writer.add_chat_template([{"name": "default", "template": "the"}, {"name": "tool_use", "template": "other"}])

    fields = {"tokenizer.ggml.padding_token_id": (0, Value.UINT32)}
    bundle = load(tmp_path, fields=fields, edit=edit)
    ours, messages = tokenizer(bundle), [{"role": "user", "content": "a"}]
    assert ours.encode_chat(messages) == ours.encode("the")
    assert ours.encode_chat(messages, tools=[{}]) == ours.encode("other")
    assert bundle.vocabulary.specials == {"bos_token": "", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"llama.block_count": None}, "does not say its llama.block_count"),
        ({"llama.block_count": ("2", Value.STRING)}, "llama.block_count should be a whole number, but is '2'"),
        ({"llama.block_count": (2.0, Value.FLOAT32)}, "llama.block_count should be a whole number, but is 2.0"),
        ({"llama.block_count": (True, Value.BOOL)}, "llama.block_count should be a whole number, but is True"),
        ({"llama.block_count": (0, Value.UINT32)}, "layers must be more than 0"),
        ({"llama.block_count": (10**9, Value.UINT32)}, "no tensor blk.2"),
        ({"llama.embedding_length": (128, Value.UINT32)}, r"token_embd.weight should have the shape \(262, 128\)"),
        ({"llama.feed_forward_length": ([96, 96], Value.ARRAY)}, "should be a whole number, but is a list of 2"),
        ({"llama.attention.head_count": ([4, 4], Value.ARRAY)}, "should be a whole number, but is a list of 2"),
        ({"llama.attention.head_count": (0, Value.UINT32)}, "head_count must be more than 0"),
        ({"llama.attention.head_count": (3, Value.UINT32)}, "not a Llama model"),
        ({"llama.attention.head_count_kv": (4, Value.UINT32)}, r"attn_k.weight should have the shape \(64, 64\)"),
        ({"llama.attention.value_length": (8, Value.UINT32)}, "value_length is not the 16"),
        ({"llama.rope.dimension_count": (8, Value.UINT32)}, "dimension_count is not the 16"),
        ({"llama.rope.freq_base": ("x", Value.STRING)}, "freq_base should be a number"),
        ({"llama.rope.freq_base": (float("nan"), Value.FLOAT32)}, "freq_base should be a finite number"),
        ({"llama.rope.scaling.factor": (4.0, Value.FLOAT32)}, "scales its rotary positions"),
        ({"llama.rope.scale_linear": (4.0, Value.FLOAT32)}, "scales its rotary positions"),
        ({"llama.expert_count": (8, Value.UINT32)}, "mixture of experts"),
        ({"general.architecture": ("falcon", Value.STRING)}, "is a falcon model"),
        ({"general.architecture": (1, Value.UINT32)}, "architecture should be a text, but is 1"),
        ({"tokenizer.ggml.model": None}, "does not say its tokenizer.ggml.model"),
        ({"tokenizer.ggml.model": ("t5", Value.STRING)}, "tokenizer of kind 't5'"),
        ({"tokenizer.ggml.pre": ("kimi-k2", Value.STRING)}, "pre-tokenizer 'kimi-k2'"),
        ({"tokenizer.ggml.tokens": None}, "does not say its tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ([1, 2], Value.ARRAY)}, "tokens should be a list of texts"),
        ({"tokenizer.ggml.tokens": ("a", Value.STRING)}, "tokens should be a list of texts"),
        ({"tokenizer.ggml.tokens": (["the", *TOKENS[1:]], Value.ARRAY)}, "the token 'the' twice"),
        ({"tokenizer.ggml.token_type": ([3], Value.ARRAY)}, "tells only 1"),
        ({"tokenizer.ggml.token_type": (3, Value.UINT32)}, "token_type should be a list of whole numbers"),
        ({"tokenizer.ggml.merges": None}, "does not say its tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": (["th"], Value.ARRAY)}, "'th' in tokenizer.ggml.merges is no pair"),
        ({"tokenizer.ggml.merges": (["none such"], Value.ARRAY)}, "merges that do not belong to its tokens"),
        ({"tokenizer.ggml.eos_token_id": ("2", Value.STRING)}, "eos_token_id should be a whole number, but is '2'"),
        ({"tokenizer.ggml.add_bos_token": (1, Value.UINT32)}, "add_bos_token should be true or false, but is 1"),
        ({"tokenizer.chat_template": ("{% if %}", Value.STRING)}, "chat template 'default' cannot be read"),
        ({"tokenizer.chat_template": (1, Value.UINT32)}, "chat_template should be a text"),
    ],
)
def test_odd_metadata_is_refused_in_words(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    """With the field, what it should be and what it is."""
    with pytest.raises(SettingsError, match=named):
        tokenizer(load(tmp_path, fields=fields))


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("blk.1.attn_q.weight", numpy.zeros((64, 63), "f4"), r"should have the shape \(64, 64\) .* but has \(64, 63\)"),
        ("blk.0.attn_norm.weight", numpy.zeros((1, 64), "f4"), r"should have the shape \(64,\) .* but has \(1, 64\)"),
        ("blk.0.ffn_up.weight", numpy.zeros((96, 64), "i4"), "is I32, which the gguf package cannot read"),
        ("blk.0.ffn_up.weight", None, "no tensor blk.0.ffn_up.weight"),
        ("blk.2.ffn_up.weight", numpy.zeros((96, 64), "f4"), "tensors that are not supported: blk.2.ffn_up.weight"),
        ("output.weight", numpy.zeros((9, 64), "f4"), "output.weight should have the shape"),
    ],
)
def test_odd_tensors_are_refused_in_words(tmp_path: Path, name: str, values: Any, named: str) -> None:
    def edit(writer: Any) -> None:
        writer.tensors[0].pop(name, None)
        if values is not None:
            writer.add_tensor(name, values)

    with pytest.raises(SettingsError, match=named):
        load(tmp_path, edit=edit)


def test_a_file_of_the_other_byte_order_says_what_to_do(tmp_path: Path) -> None:
    """Its quantised weights would be read as other numbers."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_context_length(256)
    writer.add_tensor("token_embd.weight", numpy.zeros((4, 4), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SettingsError, match=r"gguf-convert-endian .*model.gguf little"):
        read(Settings(model=str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("kept", [0, 4, 7, 20, 300, 20_000, 60_000])
def test_a_torn_file_is_refused_in_words(tmp_path: Path, kept: int) -> None:
    """Wherever the download has stopped."""
    load(tmp_path)
    path = tmp_path / "model.gguf"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SettingsError, match="cannot be read as a GGUF file"):
        read(Settings(model=str(path)))
