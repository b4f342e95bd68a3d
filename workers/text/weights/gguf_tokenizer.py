"""The tokenizer of a GGUF file, as llama.cpp makes it of the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ....protocol.errors import SettingsError
from ..tokenizer import Vocabulary
from .gguf_metadata import Metadata

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_PIECES: Final = "llama"
_PIECES_IDS: Final = {"unknown": 0, "bos": 1, "eos": 2}
"""The special tokens of such a vocabulary where a file does not say them."""

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
    tokens = [token or f"[EMPTY_{place}]" for place, token in enumerate(metadata.texts("tokenizer.ggml.tokens"))]
    places = {token: place for place, token in enumerate(tokens)}
    if len(places) != len(tokens):
        twice = next(token for place, token in enumerate(tokens) if places[token] != place)
        raise SettingsError(f"{metadata.path} has the token {twice!r} twice in tokenizer.ggml.tokens")
    kind = metadata.text("tokenizer.ggml.model")
    name = metadata.text("tokenizer.ggml.pre", "default") or "default"
    kinds = metadata.wholes("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(kinds) < len(tokens):
        raise SettingsError(
            f"{metadata.path} has {len(tokens)} tokens, but tokenizer.ggml.token_type tells only {len(kinds)}"
        )
    try:
        inner = _pieces(metadata, places, kinds) if kind == _PIECES else _bytes(metadata, places, kind, name)
    except SettingsError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise SettingsError(f"{metadata.path} has merges that do not belong to its tokens: {error}") from error
    _add(inner, tokens, kinds)
    begin = _named(metadata, "bos", tokens, kind)
    begins = metadata.flag("tokenizer.ggml.add_bos_token", kind == _PIECES or name in _WHOLE_WORDS)
    named = metadata.texts("tokenizer.chat_templates", [])
    specials = {ours: _named(metadata, theirs, tokens, kind) for ours, theirs in _SPECIALS.items()}
    return Vocabulary(
        definition=inner.to_str(),
        ends=tuple(sorted(_ends(metadata, places, kind))),
        prefix=(begin,) if begins and begin is not None else (),
        template=metadata.text("tokenizer.chat_template", ""),
        templates={item: metadata.text(f"tokenizer.chat_template.{item}") for item in named},
        specials={"bos_token": "", "eos_token": ""}
        | {ours: tokens[place] for ours, place in specials.items() if place is not None},
    )


def _bytes(metadata: Metadata, places: Mapping[str, int], kind: str, name: str) -> tokenizers.Tokenizer:
    """A vocabulary of bytes, which merges join within a word."""
    if kind != "gpt2":
        raise SettingsError(
            f"{metadata.path} has a tokenizer of kind {kind!r}, which is not supported; use the model's hub folder"
        )
    merges = [merge.split(" ", 1) for merge in metadata.texts("tokenizer.ggml.merges")]
    if broken := [merge for merge in merges if len(merge) != 2]:
        raise SettingsError(f"{metadata.path}: {broken[0][0]!r:.60} in tokenizer.ggml.merges is no pair of tokens")
    pairs = [(left, right) for left, right in merges]
    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(places), merges=pairs, ignore_merges=name in _WHOLE_WORDS))
    inner.pre_tokenizer = _pre_tokenizer(metadata, name)
    inner.decoder = decoders.ByteLevel()
    return inner


def _pieces(metadata: Metadata, places: Mapping[str, int], kinds: Sequence[int]) -> tokenizers.Tokenizer:
    """A vocabulary of SentencePiece, as of Llama 2 and Mistral: of two neighbours that are a token together, those are
    joined first whose token has the highest score. What is no token is written in bytes.
    """
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) < len(places):
        raise SettingsError(f"{metadata.path} has {len(places)} tokens, but tokenizer.ggml.scores has {len(scores)}")
    ranked = [
        (score, cut, token)
        for (token, _), kind, score in zip(places.items(), kinds, scores, strict=False)
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
        for cut in range(1, len(token))
        if token[:cut] in places and token[cut:] in places
    ]
    ranked.sort(key=lambda item: item[:2], reverse=True)
    unknown = _named(metadata, "unknown", list(places), _PIECES)
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(places),
            merges=[(token[:cut], token[cut:]) for _, cut, token in ranked],
            unk_token=None if unknown is None else list(places)[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = normalizers.Replace(" ", "▁")
    before = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if before else blank
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner


def _add(inner: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Let whole tokens be found in a text: what looks like a control token is one, whatever the converter wrote."""
    control = {*_ENDS, *_PADS, *_REPOSITORIES, *_SEPARATORS}
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _UNKNOWN)]
    special += [token for token in tokens if token in control]
    inner.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in dict.fromkeys(special)])
    added = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    inner.add_tokens(
        [tokenizers.AddedToken(token, special=False, normalized=False) for token in added if token not in control]
    )


def _pre_tokenizer(metadata: Metadata, name: str) -> Any:
    splits: Sequence[str] | None = next((found for names, found in _SPLITS.items() if name in names), None)
    if splits is None:
        raise SettingsError(
            f"{metadata.path} names the pre-tokenizer {name!r}, which is not supported; use the model's hub folder"
        )
    parts = [pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated") for split in splits]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _ends(metadata: Metadata, places: Mapping[str, int], kind: str) -> set[int]:
    """What llama.cpp treats as the end of an answer: by the file's ids, and by how tokens are written."""
    tokens = list(places)
    ends = {name for name in _ENDS if name in places}
    for key, names in (("fim_pad", _PADS), ("fim_rep", _REPOSITORIES), ("fim_sep", _SEPARATORS)):
        if _named(metadata, key, tokens, kind) is None:
            ends |= set([name for name in names if name in places][:1])
    # In these vocabularies <|end|> ends a message, and others the answer.
    if ends & {"<|call|>", "<|calls|>"} and ends & {"<|return|>", "<|flush|>"}:
        ends.discard("<|end|>")
    if {"<|tool_response>", "</s>"} <= ends:
        ends.remove("</s>")
    keys = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    told = {_named(metadata, key, tokens, kind) for key in keys}
    return {places[name] for name in ends} | {place for place in told if place is not None}


def _named(metadata: Metadata, key: str, tokens: Sequence[str], kind: str) -> int | None:
    """The id of a special token; one that the vocabulary does not have is none."""
    default = _PIECES_IDS.get(key) if kind == _PIECES else None
    place = metadata.whole(f"tokenizer.ggml.{key}_token_id", default)
    return place if place is not None and 0 <= place < len(tokens) else None
