"""The tokenizer of a GGUF file, as llama.cpp makes it of the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ....protocol.errors import SettingsError
from ..tokenizer import Vocabulary
from .gguf_metadata import Metadata

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_MARKS: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTED: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3: Final = _CONTRACTED + r"|\p{N}{1,3}" + _MARKS
_QWEN2: Final = _CONTRACTED + r"|\p{N}" + _MARKS
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITS: Final[Mapping[tuple[str, ...], tuple[str, ...]]] = {
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "exaone4", "trillion"): (_WORDS,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (r"\p{N}", _WORDS),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): (_LLAMA3,),
    ("dbrx", "smaug-bpe"): (_LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open"): (_QWEN2,),
    ("tekken",): (_TEKKEN,),
}
"""By the names that ``tokenizer.ggml.pre`` may have: what text is split by, one after the other, before its bytes are
merged."""

_WHOLE_WORDS: Final = (
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "tekken",
)
"""With these a word that is a token is that token, whether merges lead to it or not, and a prompt begins with BOS
unless the file says otherwise."""

_PADS: Final = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")
_REPOSITORIES: Final = ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")
_SEPARATORS: Final = ("<|file_sep|>",)

_ENDS: Final = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
"""Tokens that end an answer in llama.cpp wherever a vocabulary has them."""

_SPECIALS: Final = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "mask_token": "mask",
}
"""The names that templates know, and those of the metadata, as it spells them."""


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Raises :class:`SettingsError` for a tokenizer that is not supported or not whole."""
    kind = metadata.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise SettingsError(
            f"{metadata.path} has a tokenizer of kind {kind!r}; only byte-level BPE (gpt2) is supported; "
            "use the model's hub folder"
        )
    tokens = [token or f"[EMPTY_{place}]" for place, token in enumerate(metadata.texts("tokenizer.ggml.tokens"))]
    places = {token: place for place, token in enumerate(tokens)}
    if len(places) != len(tokens):
        twice = next(token for place, token in enumerate(tokens) if places[token] != place)
        raise SettingsError(f"{metadata.path} has the token {twice!r} twice in tokenizer.ggml.tokens")
    name = metadata.text("tokenizer.ggml.pre", "default") or "default"
    ends = _ends(metadata, places)
    begin = _named(metadata, "bos", len(tokens))
    begins = metadata.flag("tokenizer.ggml.add_bos_token", name in _WHOLE_WORDS)
    named = metadata.texts("tokenizer.chat_templates", [])
    specials = {ours: _named(metadata, theirs, len(tokens)) for ours, theirs in _SPECIALS.items()}
    return Vocabulary(
        definition=_definition(metadata, places, name),
        ends=tuple(sorted(ends)),
        prefix=(begin,) if begins and begin is not None else (),
        template=metadata.text("tokenizer.chat_template", ""),
        templates={item: metadata.text(f"tokenizer.chat_template.{item}") for item in named},
        specials={"bos_token": "", "eos_token": ""}
        | {ours: tokens[place] for ours, place in specials.items() if place is not None},
    )


def _definition(metadata: Metadata, places: Mapping[str, int], name: str) -> str:
    """The JSON of the ``tokenizers`` package."""
    merges = [merge.split(" ", 1) for merge in metadata.texts("tokenizer.ggml.merges")]
    if broken := [merge for merge in merges if len(merge) != 2]:
        raise SettingsError(f"{metadata.path}: {broken[0][0]!r:.60} in tokenizer.ggml.merges is no pair of tokens")
    try:
        model = models.BPE(
            vocab=dict(places),
            merges=[(left, right) for left, right in merges],
            ignore_merges=name in _WHOLE_WORDS,
        )
    except Exception as error:  # the package raises nothing narrower
        raise SettingsError(f"{metadata.path} has merges that do not belong to its tokens: {error}") from error
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = _pre_tokenizer(metadata, name)
    inner.decoder = decoders.ByteLevel()
    kinds = metadata.wholes("tokenizer.ggml.token_type", [1] * len(places))
    if len(kinds) < len(places):
        raise SettingsError(
            f"{metadata.path} has {len(places)} tokens, but tokenizer.ggml.token_type tells only {len(kinds)}"
        )
    # What looks like a control token is one, also where the converter did not say so.
    control = {*_ENDS, *_PADS, *_REPOSITORIES, *_SEPARATORS}
    special, added = [], []
    for (token, _), kind in zip(places.items(), kinds, strict=False):
        if kind in (_CONTROL, _UNKNOWN) or token in control:
            special.append(tokenizers.AddedToken(token, special=True))
        elif kind == _USER_DEFINED:
            added.append(tokenizers.AddedToken(token, special=False, normalized=False))
    inner.add_special_tokens(special)
    inner.add_tokens(added)
    return inner.to_str()


def _pre_tokenizer(metadata: Metadata, name: str) -> Any:
    splits: Sequence[str] | None = next((found for names, found in _SPLITS.items() if name in names), None)
    if splits is None:
        raise SettingsError(
            f"{metadata.path} names the pre-tokenizer {name!r}, which is not supported; use the model's hub folder"
        )
    parts = [pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated") for split in splits]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _ends(metadata: Metadata, places: Mapping[str, int]) -> set[int]:
    """What llama.cpp treats as the end of an answer: by the file's ids, and by how tokens are written."""
    ends = {name for name in _ENDS if name in places}
    for key, names in (("fim_pad", _PADS), ("fim_rep", _REPOSITORIES), ("fim_sep", _SEPARATORS)):
        if _named(metadata, key, len(places)) is None:
            ends |= set([name for name in names if name in places][:1])
    # In these vocabularies <|end|> ends a message, and others the answer.
    if ends & {"<|call|>", "<|calls|>"} and ends & {"<|return|>", "<|flush|>"}:
        ends.discard("<|end|>")
    if {"<|tool_response>", "</s>"} <= ends:
        ends.remove("</s>")
    keys = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    told = {_named(metadata, key, len(places)) for key in keys}
    return {places[name] for name in ends} | {place for place in told if place is not None}


def _named(metadata: Metadata, key: str, size: int) -> int | None:
    """The id of a special token; one that the vocabulary does not have is none."""
    place = metadata.whole(f"tokenizer.ggml.{key}_token_id", None)
    return place if place is not None and 0 <= place < size else None
