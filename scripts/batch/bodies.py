"""OpenAI's bodies, and ours: what a line asks for as a task and its payload, and a result as the body of a response.

Nothing is dropped in silence: a field is passed on, is known to change no answer, or is refused by name. What is not
given has the default of text generation here (greedy, 128 tokens), not that of OpenAI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ...protocol.errors import InvalidRequest
from ...protocol.keys import check_task
from ...workers.text.checks import FIELDS, SOURCES
from ..present.console import plain

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
GENERATE: Final = "perdure.workers.text.generate"

NOTED: Final = frozenset({
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "request_id", "cache_salt",
})  # fmt: skip
"""Fields that say nothing about the answer: of a pool that runs one model, and keeps what it keeps."""

SERVERS: Final[dict[str, tuple[Any, ...]]] = {
    "stream": (False,), "ignore_eos": (False,),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,), "stop_token_ids": ([],),
    "bad_words": ([],), "length_penalty": (1,), "use_beam_search": (False,), "early_stopping": (False,),
    "detokenize": (True,), "echo": (False,), "priority": (0,), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (True,), "prompt_logprobs": (0,), "no_repeat_ngram_size": (0,), "typical_p": (1,),
    "extra_body": ({},), "extra_headers": ({},), "extra_query": ({},),
}  # fmt: skip
"""What clients of vLLM, SGLang and the like write as well, with the values that ask for nothing."""

IDLE: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    COMPLETIONS: {**SERVERS, "suffix": ("",), "add_special_tokens": (True,)},
    CHAT: {
        **SERVERS, "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
        "reasoning_effort": ("none",), "verbosity": ("medium",), "add_generation_prompt": (True,),
        "continue_final_message": (False,), "add_special_tokens": (False,),
        "include_reasoning": (True,),
    },
}  # fmt: skip
"""Fields of features that are not there, with the values that do not ask for them."""

SAID: Final[dict[str, tuple[Any, ...]]] = {
    "tool_calls": ([],), "annotations": ([],), "refusal": ("",), "audio": (), "function_call": (),
    "reasoning_content": ("",), "reasoning": ("",),
}  # fmt: skip
"""What an answer has beside its text when a client gives it back as history, with the values that say nothing."""

LEAST: Final = -9999.0
"""What OpenAI's answers have for a log-probability of nothing: their schema wants a number."""

REASONS: Final = {
    "stream": "a line of a batch is answered as a whole; leave it out",
    "best_of": "only as many as n are made; leave it out",
}

# What every line may have beside its prompt or messages: the fields of text generation, the prompts' own ones left out.
# Tools as well: their calls would stand in the answer's text, where no client looks for them.
_PASSED = frozenset(FIELDS) - frozenset({*SOURCES, "tools"})


def asked(url: str, body: Any) -> tuple[str, Any]:
    """The task and its payload; the payload is not checked yet. Raises :class:`InvalidRequest` naming the field.

    ``url`` is one of OpenAI's two, or the dotted path of any task, whose payload the body is.
    """
    if url in (COMPLETIONS, CHAT):
        if not isinstance(body, Mapping):
            raise InvalidRequest(f"body must be an object, not {kind(body)}", "body")
        given = {name: value for name, value in body.items() if value is not None}
        model = given.get("model", "")
        if not isinstance(model, str):
            raise InvalidRequest(f"body.model must be a text, not {kind(model)}", "model")
        return GENERATE, _completion(given) if url == COMPLETIONS else _chat(given)
    if url.startswith("/"):
        raise InvalidRequest(
            f"url {url!r:.80} is not served; there are {COMPLETIONS}, {CHAT} and dotted paths of tasks", "url"
        )
    try:
        return check_task(url), body
    except ValueError:
        raise InvalidRequest(
            f"url must be {COMPLETIONS}, {CHAT} or the dotted path of a task, not {url!r:.80}", "url"
        ) from None


def _completion(given: dict[str, Any]) -> dict[str, Any]:
    prompt = given.pop("prompt", None)
    payload = _passed(given, COMPLETIONS, ("token_ids", "best_of"))
    if payload.pop("best_of", payload.get("n", 1)) != payload.get("n", 1):
        raise _refusal("best_of")
    if isinstance(prompt, list):
        if prompt and all(isinstance(item, str | list) for item in prompt):
            if len(prompt) > 1:
                raise InvalidRequest(
                    f"body.prompt holds {len(prompt)} prompts; put each on a line of its own", "prompt"
                )
            prompt = prompt[0]
        if isinstance(prompt, list):
            if "token_ids" in payload:
                raise InvalidRequest("body.prompt and body.token_ids cannot be combined; give one of them", "prompt")
            return {"token_ids": prompt, **payload}
    return payload if prompt is None else {"prompt": prompt, **payload}


def _chat(given: dict[str, Any]) -> dict[str, Any]:
    messages = given.pop("messages", None)
    payload = _passed(given, CHAT, ("max_completion_tokens", "top_logprobs"))
    most = payload.pop("max_completion_tokens", None)
    if most is not None:
        if payload.get("max_tokens", most) != most:
            raise InvalidRequest("body has max_tokens and another max_completion_tokens; give one", "max_tokens")
        payload["max_tokens"] = most
    # There, true or false, and how many others beside it; here, one field for both.
    top = payload.pop("top_logprobs", None)
    if top is not None and not (_same(top, 0) and payload.get("logprobs") in (None, False)):
        if payload.get("logprobs") is not True:
            raise InvalidRequest("body.top_logprobs goes with logprobs: true", "top_logprobs")
        payload["logprobs"] = top
    return payload if messages is None else {"messages": _messages(messages), **payload}


def _messages(messages: Any) -> Any:
    """Contents in parts become one text, and a developer a system; anything else is left to the task's own check."""
    if not isinstance(messages, list):
        return messages
    result = []
    for place, message in enumerate(messages):
        if isinstance(message, dict):
            message = _message_said(message, f"body.messages[{place}]")
            if message.get("role") == "developer":
                message["role"] = "system"
            if isinstance(message.get("content"), list):
                message["content"] = _joined(message["content"], f"body.messages[{place}].content")
        result.append(message)
    return result


def _message_said(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A message without what says nothing: fields that clients give back with an answer, and the name of who speaks,
    which no template of a model is given.
    """
    result = {}
    for field, value in message.items():
        if value is None or (field == "name" and isinstance(value, str)):
            continue
        if field in SAID:
            if any(_same(value, empty) for empty in SAID[field]):
                continue
            if field == "refusal" and message.get("content") is None and isinstance(value, str):
                result["content"] = value  # what it said instead
                continue
            raise InvalidRequest(f"{name}.{field} cannot be read; only texts can", "messages")
        result[field] = value
    return result


def _joined(parts: list[Any], name: str) -> str:
    texts = []
    for place, part in enumerate(parts):
        said = part.get("type") if isinstance(part, dict) else None
        if said not in ("text", "refusal") or not isinstance(part.get(said), str):
            raise InvalidRequest(f"{name}[{place}] is not a text; only texts can be read", "messages")
        texts.append(part[said])
    return "".join(texts)


def _passed(given: Mapping[str, Any], url: str, more: tuple[str, ...]) -> dict[str, Any]:
    """What goes on to the task. Raises for what would change the answer, and cannot."""
    idle = IDLE[url]
    payload = {}
    for name, value in given.items():
        if name in _PASSED or name in more:
            payload[name] = value
        elif name in idle:
            if not any(_same(value, harmless) for harmless in idle[name]):
                raise _refusal(name)
        elif name == ("messages" if url == COMPLETIONS else "prompt"):
            raise InvalidRequest(f"body.{name} belongs to {CHAT if url == COMPLETIONS else COMPLETIONS}", name)
        elif name not in NOTED:
            raise _refusal(name)
    return _translated(payload)


def _translated(payload: dict[str, Any]) -> dict[str, Any]:
    """Values that others take and text generation writes in another way."""
    if _same(payload.get("top_k"), -1):
        del payload["top_k"]  # all, elsewhere
    if _same(payload.get("top_p"), 0):
        # The smallest set that has any probability: the likeliest token alone.
        payload = {name: value for name, value in payload.items() if name != "top_p"} | {"top_k": 1}
    seed = payload.get("seed")
    if isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 0:
        payload["seed"] = seed % 2**63
    return payload


def _same(value: Any, other: Any) -> bool:
    """Equal in JSON, where 1 and 1.0 are one number, and true is none."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _refusal(name: str) -> InvalidRequest:
    known = ", ".join(sorted(_PASSED))
    return InvalidRequest(f"body.{name} is not supported: {REASONS.get(name, f'there are {known}')}", name)


def kind(value: Any) -> str:
    """A wrong value, for messages."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"


# --- answers ---------------------------------------------------------------------------------------------


def answer(url: str, identifier: str, model: str, created: int, result: Any) -> Any:
    """A result as the body of a response, of what JSON can hold. Raises ``ValueError`` if it is none of such a request.

    ``created`` is in seconds since 1970; ``model`` is what the line said, if it did.
    """
    if url not in (COMPLETIONS, CHAT):
        return finite(plain(result))
    try:
        usage = result["usage"]
        choices = result.get("choices") or [{"index": 0, **result}]
        make = _choice if url == COMPLETIONS else _message
        return {
            "id": ("cmpl-" if url == COMPLETIONS else "chatcmpl-") + identifier,
            "object": "text_completion" if url == COMPLETIONS else "chat.completion",
            "created": created,
            "model": model or GENERATE,
            "choices": [make(choice) for choice in choices],
            "usage": {**usage, "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"]},
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a result of text generation: {error!r:.80}") from None


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    scores = choice.get("logprobs")
    logprobs = None if scores is None else {
        "text_offset": None,
        "tokens": [_token(token) for token in choice["token_ids"]],
        "token_logprobs": [_number(score["logprob"]) for score in scores],
        "top_logprobs": [
            {_token(token): _number(value) for token, value in score.get("top_logprobs", ())} for score in scores
        ],
    }  # fmt: skip
    return {
        "index": choice["index"],
        "text": choice["text"],
        "logprobs": logprobs,
        "finish_reason": choice["finish_reason"],
    }


def _message(choice: Mapping[str, Any]) -> dict[str, Any]:
    scores = choice.get("logprobs")
    content = [
        {
            **_scored(token, score["logprob"]),
            "top_logprobs": [_scored(other, value) for other, value in score.get("top_logprobs", ())],
        }
        for token, score in zip(choice["token_ids"], scores or (), strict=scores is not None)
    ]
    return {
        "index": choice["index"],
        "message": {"role": "assistant", "content": choice["text"], "refusal": None},
        "logprobs": None if scores is None else {"content": content, "refusal": None},
        "finish_reason": choice["finish_reason"],
    }


def _scored(token: int, logprob: float) -> dict[str, Any]:
    return {"token": _token(token), "logprob": _number(logprob), "bytes": None}


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


def _token(token: int) -> str:
    """A token's name. Its number: part of a character is no text, and no model is at hand here."""
    return f"token_id:{token}"


def finite(value: Any) -> Any:
    """With ``None`` for what is no finite number, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


STATUS: Final = {"INVALID_REQUEST": 400, "DEADLINE": 504, "CANCELED": 409, "STOPPED": 409, "ID_TAKEN": 409}
"""The status of a response for a kind of failure; 500 for every other."""


def refusal(identifier: str, code: str, message: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``response`` and ``error`` of a line that failed. Both say it: readers look into one or the other."""
    status = STATUS.get(code, 500)
    described = {
        "message": message,
        "type": "invalid_request_error" if status == 400 else "server_error",
        "param": None,
        "code": code,
    }
    response = {"status_code": status, "request_id": identifier, "body": {"error": described}}
    return response, {"code": code, "message": message}
