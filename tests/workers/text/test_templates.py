"""Chat templates: what ``apply_chat_template`` of ``transformers`` writes is what is written here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from perdure.protocol.errors import InvalidRequest, SettingsError
from perdure.workers.text.templates import ChatTemplates
from perdure.workers.text.tokenizer import Tokenizer, Vocabulary
from tests.kit.workers.models import TOKENS, byte_level
from tests.kit.workers.peers import make_tokenizer

SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}
USER = {"role": "user", "content": '5 > 3, it\'s <b>é</b> & \u2028 "x"'}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": [2, None]}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "so", "name": None},
    {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<sum>", "parameters": {"z": 1, "y": {}}}}]

TEMPLATES = [
    "{{ messages | tojson }}",
    "{{ messages[1].content | tojson }}{{ tools | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}{{ messages | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.role }}{% continue %}!{% endfor %}",
    "{% if tools is not none %}T{% endif %}{% if documents is not none %}D{% endif %}{{ tools }}{{ documents }}",
    "{% if tools is defined and documents is defined %}both{% endif %}{{ documents | default('none') }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ unk_token is defined }}",
    "{{ add_generation_prompt }}{{ enable_thinking is defined and enable_thinking is false }}{{ effort }}",
    "{% for m in messages %}{{ 'content' in m }}{{ 'name' in m }}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "  {% set s = namespace(n=0) %}\n  {% for m in messages %}\n  {% set s.n = s.n + 1 %}\n{% endfor %}\n{{ s.n }}\n",
    "{%- macro one(m) -%}{{ m.role ~ bos_token }}{%- endmacro -%}{{ one(messages[0]) }}{{ messages[2].tool_calls[0] }}",
    "{{ messages[1].content.split(',')[0] | trim | upper }}{{ messages[::-1][0].role }}{{ missing }}",
    "{{ missing.x }}",
]
VARIABLES = [
    {},
    {"tools": TOOLS},
    {"documents": [{"title": "a", "text": "b"}], "template_kwargs": {"enable_thinking": False, "effort": "low"}},
    {"tools": [], "template_kwargs": {"bos_token": "other", "add_generation_prompt": False}},
]


def peer(template: Any) -> Any:
    return make_tokenizer(byte_level(), chat_template=template, **SPECIALS)


@pytest.mark.parametrize("variables", VARIABLES, ids=["plain", "tools", "documents", "overridden"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_writes_what_it_writes_there(template: str, variables: dict[str, Any]) -> None:
    given = {"add_generation_prompt": True} | variables
    extra = given.pop("template_kwargs", {})
    try:
        expected = peer(template).apply_chat_template(CONVERSATION, tokenize=False, **given | extra)
    except Exception:
        with pytest.raises(InvalidRequest):
            ChatTemplates({"default": template}, SPECIALS).render(CONVERSATION, **variables)
    else:
        assert ChatTemplates({"default": template}, SPECIALS).render(CONVERSATION, **variables) == expected


def test_a_conversation_has_the_ids_that_it_has_there() -> None:
    """The text's, with nothing added."""
    template = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    vocabulary = Vocabulary(definition=byte_level().to_str(), ends=(2,), post_process=True, template=template)
    expected = peer(template).apply_chat_template([USER], tokenize=True)["input_ids"]
    assert Tokenizer(vocabulary, len(TOKENS)).encode_chat([USER]) == expected


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("names", [("default",), ("default", "tool_use"), ("tool_use",), ("rag",), ("rag", "default")])
def test_of_several_templates_the_same_is_taken(names: tuple[str, ...], tools: Any) -> None:
    templates = {name: f"this is {name}" for name in names}
    try:
        expected = peer(templates).apply_chat_template([USER], tools=tools, tokenize=False)
    except ValueError:
        with pytest.raises(InvalidRequest, match=f"chat templates for {names[0]} and none by default"):
            ChatTemplates(templates, {}).render([USER], tools=tools)
    else:
        assert ChatTemplates(templates, {}).render([USER], tools=tools) == expected


def test_a_template_tells_the_date_of_the_request() -> None:
    """And the date of today if nobody gives one."""
    templates = ChatTemplates({"default": "{% macro m() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{{ m() }}"}, {})
    then = datetime(2024, 2, 29, 23, 59, tzinfo=UTC)
    assert templates.render([USER], now=then) == "29 February 2024"
    vocabulary = Vocabulary(definition=byte_level().to_str(), ends=(), template="{{ strftime_now('%Y') }}")
    tokenizer = Tokenizer(vocabulary, len(TOKENS))
    assert tokenizer.encode_chat([USER], now=then) == tokenizer.encode("2024")
    before = datetime.now().year
    assert tokenizer.encode_chat([USER]) in (tokenizer.encode(str(before)), tokenizer.encode(str(before + 1)))


@pytest.mark.parametrize(
    ("template", "messages", "variables", "field"),
    [
        ("{{ raise_exception('no') }}", [USER], {}, "messages"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", [USER], {}, "messages"),
        ("{{ messages[0].content + 1 }}", [USER], {}, "messages"),
        ("{{ messages[0].count / 0 }}", [{"role": "user", "count": 1}], {}, "messages"),
        ("{{ messages[0]['x']['y'] }}", [USER], {}, "messages"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", [USER], {}, "messages"),
        ("{{ messages }}", [], {}, "messages"),
        ("{{ messages }}", ["text"], {}, "messages"),
        ("{{ messages }}", [USER], {"messages": []}, "chat_template_kwargs"),
        ("{{ messages }}", [USER], {"tools": []}, "chat_template_kwargs"),
        ("", [USER], {}, "messages"),
    ],
)
def test_what_a_template_refuses_is_the_request_s_mistake(
    template: str, messages: Any, variables: dict[str, Any], field: str
) -> None:
    """The sandbox holds, and whatever a template raises is told as what it is."""
    vocabulary = Vocabulary(definition=byte_level().to_str(), ends=(), template=template)
    with pytest.raises(InvalidRequest) as refused:
        Tokenizer(vocabulary, len(TOKENS)).encode_chat(messages, template_kwargs=variables)
    assert refused.value.field == field


def test_a_template_that_is_none_is_the_model_s_mistake() -> None:
    with pytest.raises(SettingsError, match="chat template 'tool_use' cannot be read"):
        ChatTemplates({"tool_use": "{% if %}"}, {})
