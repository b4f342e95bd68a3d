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
from ..console import plain

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
GENERATE: Final = "perdure.workers.text.generate"

NOTED: Final = frozenset({
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
})  # fmt: skip
"""Fields that say nothing about the answer: of a pool that runs one model, and keeps what it keeps."""

IDLE: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    COMPLETIONS: {"stream": (False,), "echo": (False,), "suffix": ("",)},
    CHAT: {
        "stream": (False,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},), "modalities": (["text"],),
    },
}  # fmt: skip
"""Fields of features that are not there, with the values that do not ask for them."""

REASONS: Final = {
    "stream": "a line of a batch is answered as a whole; leave it out",
    "best_of": "only as many as n are made; leave it out",
}

# What every line may have beside its prompt or messages: the fields of text generation, the prompts' own ones left out.
_PASSED = frozenset(FIELDS) - frozenset(SOURCES)


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
                raise InvalidRequest(f"body.prompt holds {len(prompt)} prompts; give each a line of its own", "prompt")
            prompt = prompt[0]
        if isinstance(prompt, list):
            if "token_ids" in payload:
                raise InvalidRequest("body.prompt and body.token_ids exclude each other; give one of them", "prompt")
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
    if top is not None:
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
            message = {name: value for name, value in message.items() if value is not None}
            if message.get("role") == "developer":
                message["role"] = "system"
            if isinstance(message.get("content"), list):
                message["content"] = _joined(message["content"], f"body.messages[{place}].content")
        result.append(message)
    return result


def _joined(parts: list[Any], name: str) -> str:
    texts = []
    for place, part in enumerate(parts):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise InvalidRequest(f"{name}[{place}] is no text; only texts can be read", "messages")
        texts.append(part["text"])
    return "".join(texts)


def _passed(given: Mapping[str, Any], url: str, more: tuple[str, ...]) -> dict[str, Any]:
    """What goes on to the task. Raises for what would change the answer, and cannot."""
    idle = IDLE[url]
    payload = {}
    for name, value in given.items():
        if name in _PASSED or name in more:
            payload[name] = value
        elif name in idle:
            if not any(value == harmless and type(value) is type(harmless) for harmless in idle[name]):
                raise _refusal(name)
        elif name == ("messages" if url == COMPLETIONS else "prompt"):
            raise InvalidRequest(f"body.{name} belongs to {CHAT if url == COMPLETIONS else COMPLETIONS}", name)
        elif name not in NOTED:
            raise _refusal(name)
    return payload


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
    logprobs = scores and {
        "tokens": [_token(token) for token in choice["token_ids"]],
        "token_logprobs": [finite(score["logprob"]) for score in scores],
        "top_logprobs": [{_token(token): finite(value) for token, value in score.get("top_logprobs", ())} for score in scores],
    }  # fmt: skip
    return {
        "index": choice["index"],
        "text": choice["text"],
        "logprobs": logprobs,
        "finish_reason": choice["finish_reason"],
    }


def _message(choice: Mapping[str, Any]) -> dict[str, Any]:
    scores = choice.get("logprobs")
    content = scores and [
        {
            **_scored(token, score["logprob"]),
            "top_logprobs": [_scored(other, value) for other, value in score.get("top_logprobs", ())],
        }
        for token, score in zip(choice["token_ids"], scores, strict=True)
    ]
    return {
        "index": choice["index"],
        "message": {"role": "assistant", "content": choice["text"]},
        "logprobs": content and {"content": content},
        "finish_reason": choice["finish_reason"],
    }


def _scored(token: int, logprob: float) -> dict[str, Any]:
    return {"token": _token(token), "logprob": finite(logprob), "bytes": None}


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
