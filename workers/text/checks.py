"""The fields of a generation's payload, and what each of them may be.

Checked without a model and without torch: a producer does it before it stores a request. What only
the model can tell (its context, its vocabulary) the worker checks at admission.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from ...protocol.errors import InvalidRequest
from .conversation import checked_form, checked_mappings, checked_messages, checked_variables

FIELDS: Final = (
    "prompt",
    "messages",
    "token_ids",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "min_tokens",
    "n",
    "exact",
    "kv",
    "skip_special_tokens",
    "tools",
    "documents",
    "chat_template_kwargs",
    "structured_outputs",
)
SOURCES: Final = ("prompt", "messages", "token_ids")

MAX_TOKENS: Final = 128
"""Tokens generated when the payload does not say how many."""

_MOST: Final = 2**31 - 1
_BIASES: Final = 1024
_LOGPROBS: Final = 20
_TOKEN: Final = re.compile("0|[1-9][0-9]{0,9}")
_STOPS: Final = 16
# Each has its own keys and values, from the prompt on.
MAX_ANSWERS: Final = 16
# What may be the beginning of a stop string is held back from the stream, and compared at every token.
_STOP_LENGTH: Final = 256


def checked(payload: Any) -> dict[str, Any]:
    """Every field by name, with its default where the payload does not have it; a seed has none.

    Raises :class:`InvalidRequest` naming the field.
    """
    if not isinstance(payload, Mapping):
        raise InvalidRequest(
            f"the payload must be a mapping with a prompt, messages or token_ids, not {_kind(payload)}"
        )
    for name in payload:
        if name not in FIELDS:
            raise InvalidRequest(f"unknown field {name!r}{_nearest(name, FIELDS)}", field=str(name))
    given = {name: value for name, value in payload.items() if value is not None}
    sources = [name for name in SOURCES if name in given]
    if len(sources) > 1:
        raise InvalidRequest(f"{' and '.join(sources)} cannot be combined; give one of them", field=sources[0])
    if not sources:
        raise InvalidRequest(
            "a prompt (a string), messages (a list) or token_ids (a list) must be given", field="prompt"
        )
    for name in ("tools", "documents", "chat_template_kwargs"):
        if given.get(name) and "messages" not in given:
            raise InvalidRequest(f"{name} goes with messages: it is for the model's chat template", field=name)
    max_tokens = _integer(given, "max_tokens", MAX_TOKENS, 1, _MOST)
    return {
        "prompt": _prompt(given["prompt"]) if "prompt" in given else None,
        "messages": checked_messages(given["messages"]) if "messages" in given else None,
        "token_ids": _token_ids(given["token_ids"]) if "token_ids" in given else None,
        "max_tokens": max_tokens,
        "temperature": _temperature(given),
        "top_p": _top_p(given),
        "top_k": _integer(given, "top_k", 0, 0, _MOST),
        "min_p": _min_p(given),
        "seed": _integer(given, "seed", 0, 0, 2**63 - 1) if "seed" in given else None,
        "stop": _stop(given.get("stop", ())),
        "repetition_penalty": _repetition_penalty(given),
        "presence_penalty": _penalty(given, "presence_penalty"),
        "frequency_penalty": _penalty(given, "frequency_penalty"),
        "logit_bias": _logit_bias(given.get("logit_bias", {})),
        "logprobs": _logprobs(given),
        "min_tokens": _min_tokens(given, max_tokens),
        "n": _integer(given, "n", 1, 1, MAX_ANSWERS),
        "exact": _flag(given, "exact", False) if "exact" in given else None,
        "kv": _flag(given, "kv", False),
        "skip_special_tokens": _flag(given, "skip_special_tokens", True),
        "tools": checked_mappings(given.get("tools", ()), "tools"),
        "documents": checked_mappings(given.get("documents", ()), "documents"),
        "chat_template_kwargs": checked_variables(given.get("chat_template_kwargs", {}), "chat_template_kwargs"),
        "structured_outputs": _form(given),
    }


def _form(given: Mapping[str, Any]) -> dict[str, Any] | None:
    if "structured_outputs" not in given:
        return None
    for name in ("min_tokens", "stop"):
        if given.get(name):
            raise InvalidRequest(f"{name} cannot be combined with structured_outputs, whose form ends by itself", name)
    return checked_form(given["structured_outputs"], "structured_outputs")


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"prompt must be a string, not {_kind(value)}", field="prompt")
    if not value:
        raise InvalidRequest("prompt must not be empty", field="prompt")
    return _encodable(value, "prompt", "prompt")


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"token_ids must be a list of whole numbers, not {_kind(value)}", field="token_ids")
    if not value:
        raise InvalidRequest("token_ids must not be empty", field="token_ids")
    for place, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= _MOST:
            raise InvalidRequest(
                f"token_ids[{place}] must be a whole number between 0 and {_MOST}, not {_kind(token)}",
                field="token_ids",
            )
    return list(value)


def _temperature(given: Mapping[str, Any]) -> float:
    value = _number(given, "temperature", 0.0)
    if value < 0:
        raise InvalidRequest(f"temperature must not be negative, but is {value}", field="temperature")
    return value


def _top_p(given: Mapping[str, Any]) -> float:
    value = _number(given, "top_p", 1.0)
    if not 0 < value <= 1:
        raise InvalidRequest(f"top_p must be more than 0 and at most 1, but is {value}", field="top_p")
    return value


def _min_p(given: Mapping[str, Any]) -> float:
    value = _number(given, "min_p", 0.0)
    if not 0 <= value <= 1:
        raise InvalidRequest(f"min_p must be between 0 and 1, but is {value}", field="min_p")
    return value


def _stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple):
        raise InvalidRequest(f"stop must be a string or a list of strings, not {_kind(value)}", field="stop")
    if len(stops) > _STOPS:
        raise InvalidRequest(f"stop may hold at most {_STOPS} strings, but holds {len(stops)}", field="stop")
    for stop in stops:
        if not isinstance(stop, str):
            raise InvalidRequest(f"stop must hold strings only, not {_kind(stop)}", field="stop")
        if not stop:
            raise InvalidRequest("a stop string must not be empty", field="stop")
        if len(stop) > _STOP_LENGTH:
            raise InvalidRequest(
                f"a stop string may have at most {_STOP_LENGTH} characters, but has {len(stop)}", field="stop"
            )
        _encodable(stop, "stop", "stop")
    return list(stops)


def _repetition_penalty(given: Mapping[str, Any]) -> float:
    value = _number(given, "repetition_penalty", 1.0)
    if value <= 0:
        raise InvalidRequest(
            f"repetition_penalty must be more than 0 (1 means no penalty), but is {value}", field="repetition_penalty"
        )
    return value


def _penalty(given: Mapping[str, Any], name: str) -> float:
    value = _number(given, name, 0.0)
    if not -2 <= value <= 2:
        raise InvalidRequest(f"{name} must be between -2 and 2, but is {value}", field=name)
    return value


def _logit_bias(value: Any) -> dict[str, float]:
    """By token, as decimal strings: what a payload says is the same in msgpack and in JSON."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, not be {_kind(value)}", field="logit_bias")
    if len(value) > _BIASES:
        raise InvalidRequest(f"logit_bias may have at most {_BIASES} entries, but has {len(value)}", field="logit_bias")
    result: dict[int, float] = {}
    for name, bias in value.items():
        if isinstance(name, str) and _TOKEN.fullmatch(name):
            token = int(name)
        elif isinstance(name, int) and not isinstance(name, bool):
            token = name
        else:
            raise InvalidRequest(
                f"logit_bias must be keyed by token ids, as numbers or decimal strings, not {_kind(name)}",
                field="logit_bias",
            )
        if not 0 <= token <= _MOST:
            raise InvalidRequest(
                f"a token id in logit_bias must be between 0 and {_MOST}, but is {token}", field="logit_bias"
            )
        if token in result:
            raise InvalidRequest(f"logit_bias names the token {token} twice", field="logit_bias")
        if not isinstance(bias, int | float) or isinstance(bias, bool):
            raise InvalidRequest(f"logit_bias[{token}] must be a number, not {_kind(bias)}", field="logit_bias")
        if not -100 <= bias <= 100:
            raise InvalidRequest(f"logit_bias[{token}] must be between -100 and 100, not {bias}", field="logit_bias")
        result[token] = float(bias)
    return {str(token): result[token] for token in sorted(result)}


def _min_tokens(given: Mapping[str, Any], max_tokens: int) -> int:
    value = _integer(given, "min_tokens", 0, 0, _MOST)
    if value > max_tokens:
        raise InvalidRequest(f"min_tokens is {value}, but max_tokens is {max_tokens}", field="min_tokens")
    return value


def _logprobs(given: Mapping[str, Any]) -> int | None:
    """``True`` is 0, the chosen token's alone; ``False`` is none at all."""
    value = given.get("logprobs", False)
    if isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, int):
        raise InvalidRequest(f"logprobs must be true, false or a whole number, not {_kind(value)}", field="logprobs")
    return _integer(given, "logprobs", 0, 0, _LOGPROBS)


def _flag(given: Mapping[str, Any], name: str, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {_kind(value)}", field=name)
    return value


def _integer(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a whole number, not {_kind(value)}", field=name)
    if not least <= value <= most:
        raise InvalidRequest(f"{name} must be between {least} and {most}, but is {value}", field=name)
    return value


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a number, not {_kind(value)}", field=name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} must be a finite number, not {number}", field=name)
    return number


def _encodable(value: str, name: str, field: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} holds half of a surrogate pair, which is not text", field=field) from None
    return value


def _nearest(name: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
