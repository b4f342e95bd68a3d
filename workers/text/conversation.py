"""What a payload says to the model's chat template: messages, tools, documents and further variables.

Checked for what any template needs; the rest is the template's own, which refuses what it cannot write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ...protocol.errors import InvalidRequest

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

FORMS: Final = ("json", "json_object", "regex", "choice", "grammar")
"""What an answer's form can be said with."""

MAX_DEPTH: Final = 64
"""Mappings and lists in one another: a schema of a tool has fewer."""


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Messages, whole. Each has a role, and a content that is a text or a list of parts, unless it has ``tool_calls``.

    Raises :class:`InvalidRequest`.
    """
    result = []
    for place, message in enumerate(_list(value, "messages", empty=False)):
        name = f"messages[{place}]"
        if not isinstance(message, Mapping):
            raise _refusal("messages", f"{name} must have a role and a content, but is {_kind(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _refusal("messages", f"{name}.role must be one of {', '.join(ROLES)}, not {_kind(role)}")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise _refusal("messages", f"{name}.content must be a text or a list of parts, not {_kind(content)}")
        result.append(_plain(message, name, "messages"))
    return result


def checked_mappings(value: Any, field: str) -> list[dict[str, Any]]:
    """``tools`` or ``documents``: a list of mappings. Raises :class:`InvalidRequest`."""
    items = _list(value, field)
    for place, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise _refusal(field, f"{field}[{place}] must be a mapping, not {_kind(item)}")
    return [_plain(item, f"{field}[{place}]", field) for place, item in enumerate(items)]


def checked_variables(value: Any, field: str) -> dict[str, Any]:
    """``chat_template_kwargs``: variables by name. Raises :class:`InvalidRequest`."""
    if not isinstance(value, Mapping):
        raise _refusal(field, f"{field} must be a mapping, not {_kind(value)}")
    return dict(_plain(value, field, field))


def checked_form(value: Any, field: str) -> dict[str, Any]:
    """``structured_outputs``, with the names of vLLM's: exactly one of ``json`` (a schema), ``json_object`` (true),
    ``regex``, ``choice`` (texts) and ``grammar`` (EBNF). Raises :class:`InvalidRequest`.
    """
    form = {name: item for name, item in checked_variables(value, field).items() if item is not None}
    if len(form) != 1 or not set(form) <= set(FORMS):
        raise _refusal(
            field, f"{field} must have exactly one of {', '.join(FORMS)}, not {', '.join(form) or 'nothing'}"
        )
    ((kind, item),) = form.items()
    fits = {
        "json": isinstance(item, str | dict),
        "json_object": item is True,
        "choice": isinstance(item, list) and bool(item) and all(isinstance(text, str) and text for text in item),
    }
    if not fits.get(kind, isinstance(item, str) and bool(item)):
        raise _refusal(field, f"{field}.{kind} cannot be {_kind(item)}")
    return form


def _plain(value: Any, name: str, field: str, depth: int = 0) -> Any:
    """The value in lists and dicts of its own. Only what JSON has is taken: a template writes it as JSON."""
    if depth > MAX_DEPTH:
        raise _refusal(field, f"{name[:80]}… is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _refusal(field, f"{name} holds half of a surrogate pair, which is not text") from None
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{place}]", field, depth + 1) for place, item in enumerate(value)]
    if isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, str)]:
            raise _refusal(field, f"a key of {name} must be a text, not {_kind(other[0])}")
        return {
            _plain(key, f"a key of {name}", field): _plain(item, f"{name}.{key}", field, depth + 1)
            for key, item in value.items()
        }
    raise _refusal(field, f"{name} must be what JSON can hold, not {_kind(value)}")


def _list(value: Any, field: str, *, empty: bool = True) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _refusal(field, f"{field} must be a list of mappings, not {_kind(value)}")
    if not value and not empty:
        raise _refusal(field, f"{field} must not be empty")
    return list(value)


def _refusal(field: str, text: str) -> InvalidRequest:
    return InvalidRequest(text, field=field)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
