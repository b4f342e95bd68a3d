"""The tokenizer of a model folder, as ``transformers`` makes it of tokenizer.json and the files around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import tokenizers

from ....protocol.errors import SettingsError
from ..templates import DEFAULT
from ..tokenizer import Vocabulary
from .folder_files import read_json, read_text

TEMPLATES: Final = "additional_chat_templates"

FILES: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What is read here, beside config.json and the ``TEMPLATES``."""

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")

_DEFAULT_ENDS: Final = {"llama": 2, "mistral": 2}
"""What a configuration class has for ``eos_token_id`` where neither file says anything."""

_LLAMA2: Final = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_CLASS_TOKENS: Final = {
    "LlamaTokenizer": _LLAMA2,
    "CodeLlamaTokenizer": _LLAMA2
    | {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>"}
    | {"eot_token": "▁<EOT>", "fill_token": "<FILL_ME>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}
"""The classes that split text in their own way, and the special tokens that each has where the files name none."""

_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """``config``: what config.json holds. Raises :class:`SettingsError` for what is missing or cannot be read."""
    if not (folder / "tokenizer.json").exists():
        raise SettingsError(f"{folder} holds no tokenizer.json")
    try:
        return _read(folder, config)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise SettingsError(
            f"the tokenizer in {folder} (tokenizer.json and its *_config.json) is none that transformers saves: "
            f"{type(error).__name__}: {error}"
        ) from error


def _read(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    definition = read_json(folder / "tokenizer.json")
    extra = read_json(folder / "tokenizer_config.json", required=False)
    if "added_tokens_decoder" not in extra:  # the older of two forms, which then has the last word
        extra = extra | read_json(folder / "special_tokens_map.json", required=False)
    kind = _class(definition, extra, config)
    specials = _specials(extra, kind)
    _rebuild(definition, extra, kind)
    text = json.dumps(definition, ensure_ascii=False)
    if missing := _missing(definition, extra, specials):
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise SettingsError(f"{folder}/tokenizer.json cannot be read: {error}") from error
        inner.add_tokens(missing)
        text = inner.to_str()
        definition = json.loads(text)
    templates = _templates(folder, extra)
    # This class puts a BOS in front whatever the files say; all others do as tokenizer.json says.
    begin = _place(definition, specials.get("bos_token")) if kind == "CodeLlamaTokenizer" else None
    return Vocabulary(
        definition=text,
        ends=_ends(folder, config, _place(definition, specials.get("eos_token"))),
        prefix=() if begin is None else (begin,),
        post_process=begin is None,
        template=templates.pop(DEFAULT, ""),
        templates=templates,
        specials=specials,
    )


def _class(definition: Mapping[str, Any], extra: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class that ``AutoTokenizer`` takes, as far as one differs from another here."""
    name = extra.get("tokenizer_class") or config.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else ""
    model = config.get("model_type")
    if model == "mistral":
        return ""
    if model == "qwen2" or (model == "qwen3" and not name):
        return "Qwen2Tokenizer"
    # Llama 3 names the class of Llama 2, which cannot split its text.
    return "" if name == "LlamaTokenizer" and _byte_level(definition) else name


def _byte_level(definition: Mapping[str, Any]) -> bool:
    parts = [definition.get("pre_tokenizer") or {}, definition.get("decoder") or {}]
    inner = [part for outer in parts for name in ("pretokenizers", "decoders") for part in outer.get(name, ())]
    return any(part.get("type") == "ByteLevel" for part in (*parts, *inner))


def _rebuild(definition: dict[str, Any], extra: Mapping[str, Any], kind: str) -> None:
    """Some classes take vocabulary, merges and post-processor from tokenizer.json, and all else from themselves."""
    model = definition.get("model") or {}
    if kind not in _CLASS_TOKENS or model.get("type") != "BPE":
        return
    space = extra.get("add_prefix_space")
    if kind == "Qwen2Tokenizer":
        model |= {"unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
        model |= {"fuse_unk": False, "byte_fallback": False}
        definition["normalizer"] = {"type": "NFC"}
        level = {"type": "ByteLevel", "add_prefix_space": bool(space), "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        definition["decoder"] = level
    else:
        own = kind == "CodeLlamaTokenizer"
        model |= {"unk_token": "<unk>" if own else None, "fuse_unk": True, "byte_fallback": True}
        model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
        definition["normalizer"] = None
        before = "never" if space is False else "always" if extra.get("legacy") and not own else "first"
        definition["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": before,
            "split": False,
        }
        steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
        definition["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    model |= {"dropout": None, "ignore_merges": False}
    if "added_tokens_decoder" in extra:  # then no other token is an added one
        kept = set(map(str, extra["added_tokens_decoder"]))
        definition["added_tokens"] = [token for token in definition.get("added_tokens", ()) if str(token["id"]) in kept]


def _specials(extra: Mapping[str, Any], kind: str) -> dict[str, str]:
    """The special tokens that have a name, by it."""
    found = _CLASS_TOKENS.get(kind, {}) | {
        name: _content(value) for name, value in extra.items() if name in _NAMED or name.endswith("_token")
    }
    if isinstance(named := extra.get("extra_special_tokens"), dict):
        found |= {name: _content(value) for name, value in named.items()}
    return {name: text for name, text in found.items() if text is not None}


def _missing(
    definition: Mapping[str, Any], extra: Mapping[str, Any], specials: Mapping[str, str]
) -> list[tokenizers.AddedToken]:
    """Tokens that the other files add to tokenizer.json, or describe otherwise."""
    known = {token["content"]: token for token in definition.get("added_tokens", ())}
    result: dict[str, tokenizers.AddedToken] = {}
    declared = extra.get("added_tokens_decoder") or {}
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        flags = {name: bool(token.get(name, name == "normalized" and not token.get("special"))) for name in _FLAGS}
        if {name: known.get(token["content"], {}).get(name) for name in _FLAGS} != flags:
            result[token["content"]] = tokenizers.AddedToken(token["content"], **flags)
    more = extra.get("extra_special_tokens") or extra.get("additional_special_tokens") or ()
    for text in (*specials.values(), *([] if isinstance(more, dict) else map(_content, more))):
        if text is not None and text not in known and text not in result:
            result[text] = tokenizers.AddedToken(text, special=True)
    return list(result.values())


def _content(token: Any) -> str | None:
    """A token as the files write it: its text, or a mapping with that and its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _place(definition: Mapping[str, Any], text: str | None) -> int | None:
    """The id of a token, if there is one."""
    for token in definition.get("added_tokens", ()):
        if token["content"] == text:
            return int(token["id"])
    vocabulary = (definition.get("model") or {}).get("vocab") or {}
    if not isinstance(vocabulary, dict):
        vocabulary = {token[0]: place for place, token in enumerate(vocabulary)}
    found = vocabulary.get(text)
    return None if found is None else int(found)


def _ends(folder: Path, config: Mapping[str, Any], tokenizer_end: int | None) -> tuple[int, ...]:
    """Where ``generate()`` stops, and vLLM too, which adds the tokenizer's own.

    The generation config where there is one, whatever it says; else config.json.
    """
    path = folder / "generation_config.json"
    if path.exists():
        found = read_json(path).get("eos_token_id")
    else:
        found = config.get("eos_token_id", _DEFAULT_ENDS.get(str(config.get("model_type"))))
    ends = [] if found is None else found if isinstance(found, list) else [found]
    # What is no number is told by the tokenizer, which looks at all of them.
    return tuple(dict.fromkeys([*ends, *([] if tokenizer_end is None else [tokenizer_end])]))


def _templates(folder: Path, extra: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: those in files of their own, if there is any, else those of tokenizer_config.json."""
    found = {path.stem: read_text(path) for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        found = {DEFAULT: read_text(folder / "chat_template.jinja")} | found
    if found:
        return found
    value = extra.get("chat_template") or {}
    if isinstance(value, str):
        value = {DEFAULT: value}
    elif isinstance(value, list):
        value = {item["name"]: item["template"] for item in value}
    if not all(isinstance(text, str) for text in value.values()):
        raise TypeError("a chat_template that is no text")
    return dict(value)
