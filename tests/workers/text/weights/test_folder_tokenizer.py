"""The tokenizer of a folder: ids, templates and ends are those that ``transformers`` has from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from perdure.protocol.errors import InvalidRequest, SettingsError
from perdure.workers.text.tokenizer import Tokenizer
from perdure.workers.text.weights.folder_tokenizer import read_vocabulary
from tests.kit.workers.models import TOKENS, byte_level
from tests.kit.workers.peers import load_model, load_tokenizer, save_model, save_tokenizer

TEXTS = [
    "the thermos",
    "<|im_end|>the<tool> other",
    " 12 345  n\n\nnaïve é don't WE'LL",
    "e\u0301 [PAD]x",
    "<s>hi</s> a ▁b",
]
SIZE = len(TOKENS) + 40


def begun(token: str = "<|im_start|>", place: int = 1) -> str:
    """tokenizer.json whose post-processor puts a BOS in front."""
    inner = byte_level()
    inner.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, place)])
    return inner.to_str()


def metaspace(normalised: bool = False) -> str:
    """tokenizer.json as of Llama 2, whose blanks are ▁: split as it is now, or normalised as it was."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁theomrs12345",
        "th",
        "the",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocab = {token: place for place, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    if normalised:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner.to_str()


def assert_same_ids(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    ours, peer = Tokenizer(read_vocabulary(folder, config), SIZE), load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == peer(text)["input_ids"], text


ADDED = {
    "content": "<tool>",
    "lstrip": False,
    "normalized": False,
    "rstrip": True,
    "single_word": False,
    "special": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bos": {"bos_token": "<|im_start|>", "add_bos_token": True},
    "no bos": {"bos_token": "<|im_start|>", "add_bos_token": False},
    "added": {"added_tokens_decoder": {str(len(TOKENS)): ADDED, "2": ADDED | {"content": "<|im_end|>"}}},
    "named": {"pad_token": "[PAD]", "image_token": "<tool>", "additional_special_tokens": ["naïve", "<|im_start|>"]},
    "extra": {"extra_special_tokens": {"tool_token": "<tool>"}, "add_prefix_space": True},
}
CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", None]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("post_processor", [True, False], ids=["processed", "raw"])
def test_a_tokenizer_of_bytes_has_the_same_ids(
    tmp_path: Path, post_processor: bool, model: str, kind: str | None, config: str
) -> None:
    save_tokenizer(tmp_path, begun() if post_processor else "", **{"tokenizer_class": kind} | CONFIGS[config])
    assert_same_ids(tmp_path, {"model_type": model})


@pytest.mark.parametrize(
    "config", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}, {"add_bos_token": False}]
)
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "CodeLlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_tokenizer_of_llama_2_has_the_same_ids(
    tmp_path: Path, kind: str, config: dict[str, Any], normalised: bool
) -> None:
    save_tokenizer(tmp_path, metaspace(normalised), **{"tokenizer_class": kind, "eos_token": "</s>"} | config)
    assert_same_ids(tmp_path, {"model_type": "llama"})


def test_an_older_folder_has_its_special_tokens_in_a_file(tmp_path: Path) -> None:
    """special_tokens_map.json, which counts where tokenizer_config.json has no added_tokens_decoder."""
    save_tokenizer(tmp_path, bos_token="wrong")
    named = {"bos_token": {"content": "<tool>", "lstrip": False}, "additional_special_tokens": ["[PAD]"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    assert_same_ids(tmp_path, {"model_type": "llama"})
    assert read_vocabulary(tmp_path, {"model_type": "llama"}).specials == load_tokenizer(tmp_path).special_tokens_map


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_templates_know_the_same_special_tokens(tmp_path: Path, kind: str) -> None:
    """All that have a name, those of the class among them."""
    config = CONFIGS["named"] | {"tokenizer_class": kind, "unk_token": None}
    save_tokenizer(tmp_path, metaspace() if kind == "LlamaTokenizer" else "", **config)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    expected = load_tokenizer(tmp_path).special_tokens_map
    assert read_vocabulary(tmp_path, {"model_type": "llama"}).specials == expected


ONE, TWO = "{{ messages[0].content }}", "{{ tools }}{{ eos_token }}"
STORED: dict[str, tuple[Any, dict[str, str]]] = {
    "none": (None, {}),
    "text": (ONE, {}),
    "list": ([{"name": "default", "template": ONE}, {"name": "tool_use", "template": TWO}], {}),
    "list without a default": ([{"name": "tool_use", "template": TWO}], {}),
    "file": ("not this", {"chat_template.jinja": ONE}),
    "file instead of a list": ([{"name": "tool_use", "template": "not this"}], {"chat_template.jinja": ONE}),
    "files": (None, {"chat_template.jinja": ONE, "additional_chat_templates/tool_use.jinja": TWO}),
    "files without a default": (ONE, {"additional_chat_templates/tool_use.jinja": TWO}),
}


@pytest.mark.parametrize("tools", [None, [{"type": "function"}]])
@pytest.mark.parametrize("stored", STORED)
def test_the_same_chat_template_is_taken(tmp_path: Path, stored: str, tools: Any) -> None:
    """Wherever it lies, and of several the one for tools where there are tools."""
    value, files = STORED[stored]
    save_tokenizer(tmp_path, **({} if value is None else {"chat_template": value}))
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours = Tokenizer(read_vocabulary(tmp_path, {"model_type": "llama"}), SIZE)
    messages = [{"role": "user", "content": "hello"}]
    try:
        expected = load_tokenizer(tmp_path).apply_chat_template(messages, tools=tools)["input_ids"]
    except ValueError:
        with pytest.raises(InvalidRequest):
            ours.encode_chat(messages, tools=tools)
    else:
        assert ours.encode_chat(messages, tools=tools) == expected


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": 5}, {"eos_token_id": [5, 7]}])
@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}, {"eos_token_id": 3}, {"eos_token_id": [3, 4]}])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_an_answer_ends_where_generate_ends_it(tmp_path: Path, kind: str, config: Any, generation: Any) -> None:
    """And at the tokenizer's own end, as in vLLM. No name of a token says that it is one."""
    save_model(tmp_path, kind)
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("eos_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(values | config))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    expected = load_model(tmp_path).generation_config.eos_token_id
    ends = {2} | set(expected if isinstance(expected, list) else [] if expected is None else [expected])
    assert set(read_vocabulary(tmp_path, values | config).ends) == ends


def test_a_special_token_ends_nothing_by_its_name(tmp_path: Path) -> None:
    """Neither <|endoftext|> nor <|im_end|>, where neither the model nor its tokenizer says so."""
    save_tokenizer(tmp_path, eos_token=None)
    assert read_vocabulary(tmp_path, {"model_type": "llama", "eos_token_id": 9}).ends == (9,)
    assert read_vocabulary(tmp_path, {"model_type": "llama", "eos_token_id": None}).ends == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer.json", {"added_tokens": [1]}),
        ("tokenizer.json", {"model": {"type": "none"}, "added_tokens": []}),
        ("tokenizer.json", {"model": {}, "added_tokens": [{"content": "<|im_end|>", "id": 2}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("tokenizer_config.json", {"chat_template": 1}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
        ("tokenizer_config.json", [1]),
    ],
)
def test_a_tokenizer_that_is_none_is_refused_in_words(tmp_path: Path, name: str, value: Any) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(SettingsError, match="tokenizer"):
        Tokenizer(read_vocabulary(tmp_path, {"model_type": "llama"}), SIZE)
