"""Chat templates, rendered as ``transformers`` renders them.

A template is written and tried with ``apply_chat_template``, so every tag, filter and variable that is there is here,
with the same meaning. It comes with a model, from anywhere: it runs in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...protocol.errors import InvalidRequest, SettingsError

DEFAULT: Final = "default"
TOOL_USE: Final = "tool_use"
"""The template that is taken where tools are given, if the model has one of this name."""

_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients pass a message's reasoning; templates read the first, some the second."""

_OWN: Final = ("messages", "tools", "documents")

# What a template raises about its messages: its own refusal, and what its expressions meet.
_REFUSALS: Final = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class ChatTemplates:
    """The templates of one model, by name."""

    def __init__(self, templates: Mapping[str, str], specials: Mapping[str, str]) -> None:
        """``specials``: the special tokens that templates know by a name, such as ``bos_token``.

        Raises :class:`SettingsError` for a template that is none.
        """
        environment = _environment()
        self._specials = dict(specials)
        self._templates = {name: _compile(environment, text, name) for name, text in templates.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The text of a conversation, up to where the assistant answers.

        ``messages``: whole, with whatever keys the template reads; ``template_kwargs``: further variables, before
        the special tokens; ``now``: what ``strftime_now`` tells, the time of this call if ``None``.

        Raises :class:`InvalidRequest` when there is no template, or it refuses what it is given.
        """
        template = self._choose(tools)
        given = dict(template_kwargs or {})
        if taken := [name for name in _OWN if name in given]:
            raise InvalidRequest(
                f"chat_template_kwargs may not have {taken[0]}, which the template has from the request itself",
                field="chat_template_kwargs",
            )
        if not messages:
            raise InvalidRequest("messages may not be empty", field="messages")
        variables = {"add_generation_prompt": True, "strftime_now": _clock(now)} | self._specials | given
        try:
            return template.render(
                messages=[_message(message) for message in messages],
                tools=None if tools is None else list(tools),
                documents=None if documents is None else list(documents),
                **variables,
            )
        except _REFUSALS as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error

    def _choose(self, tools: Any) -> Template:
        if not self._templates:
            raise InvalidRequest("this model has no chat template; use prompt instead of messages", field="messages")
        for name in (TOOL_USE, DEFAULT) if tools is not None else (DEFAULT,):
            if name in self._templates:
                return self._templates[name]
        raise InvalidRequest(
            f"this model has chat templates for {', '.join(sorted(self._templates))} and none by default; "
            "use prompt instead of messages",
            field="messages",
        )


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}`` marks what the assistant said, for training. Here it is its text.

    A block of its own, as in ``transformers``: what is set in it is not seen after it.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> Any:
        return caller()


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment


def _compile(environment: Environment, template: str, name: str) -> Template:
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise SettingsError(f"the model's chat template {name!r} cannot be read: {error}") from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Clients write null for what is not there, and templates ask whether a key is there."""
    result = {key: value for key, value in message.items() if value is not None}
    reasoning = next((result[name] for name in _REASONING if name in result), None)
    if reasoning is not None:
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    return result


def _clock(now: datetime | None) -> Any:
    return lambda form: (now or datetime.now()).strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own filter writes what HTML needs, which models have never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
