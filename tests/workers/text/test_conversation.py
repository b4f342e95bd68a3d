"""What a payload says beside its text: whole messages, tools, special tokens, the day of its submit."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from perdure.protocol.errors import InvalidRequest
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import Request
from perdure.workers.text import Generate, generate
from perdure.workers.text.golden import run_alone
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.workers.models import SPECIALS, TOKENS
from tests.kit.workers.peers import load_tokenizer, save_model, save_tokenizer

TEMPLATE = "{{ strftime_now('%d %b %Y') }}{{ messages | tojson }}{{ tools | tojson }}{{ documents }}{{ thinking }}"
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": [1, None], "b": 2.5}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}], "name": "ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "1"},
]
CHAT = {"messages": MESSAGES, "tools": [TOOL], "documents": [{"text": "d"}], "chat_template_kwargs": {"thinking": "no"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat") / "model"
    save_model(place, max_position_embeddings=2048)
    save_tokenizer(place, chat_template=TEMPLATE)
    return place


@pytest.fixture(scope="module")
def task(folder: Path) -> Generate:
    task = Generate(Settings(model=str(folder), device="cpu", threads=1))
    task.load()
    return task


def prompt_of(task: Generate, payload: dict[str, Any], submitted: float = 0.0) -> list[int]:
    return task._read(Request(id="a", payload=payload, submitted=submitted))[1]


def test_all_that_is_said_reaches_the_template(task: Generate, folder: Path) -> None:
    """As ``transformers`` writes it: every key of a message, tools, documents, further variables."""
    peer = load_tokenizer(folder)
    text = peer.apply_chat_template(
        MESSAGES, tools=[TOOL], documents=[{"text": "d"}], thinking="no", tokenize=False, add_generation_prompt=True
    )
    assert prompt_of(task, generate.prepare(CHAT)) == peer(text, add_special_tokens=False)["input_ids"]


def test_the_date_is_that_of_the_submit(task: Generate) -> None:
    """A resume on another day has the same prompt; also where its memory was asked for first."""
    day = datetime(2024, 2, 29, 23, 59, tzinfo=UTC).timestamp()
    payload = generate.prepare(CHAT)
    prompt = prompt_of(task, payload, day)
    assert [TOKENS[token] for token in prompt[:6]] == [*"29", "Ġ", *"Feb"]
    assert prompt != prompt_of(task, payload)
    task.memory_needed(payload)
    assert prompt_of(task, payload, day) == prompt


def test_a_claim_says_when_its_request_was_submitted(connection: redis.Redis, pool: Pool) -> None:
    """The same in each execution."""
    before = connection.time()[0]
    pool.submit("a")
    hand = Hand(pool)
    first = hand.take("a")
    assert before <= first.created <= before + 60
    pool.reap(hand.incarnation, FailureKind.WORKER_LOST)
    assert Hand(pool, "other").take("a").created == first.created


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "more": {1: 2}}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "more": [b"x"]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "more": {"x": float("nan")}}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "more": ["\ud800"]}]}, "messages"),
        ({"messages": MESSAGES, "tools": "add"}, "tools"),
        ({"messages": MESSAGES, "tools": ["add"]}, "tools"),
        ({"messages": MESSAGES, "documents": {}}, "documents"),
        ({"messages": MESSAGES, "chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"prompt": "a", "skip_special_tokens": 0}, "skip_special_tokens"),
    ],
)
def test_what_no_template_could_take_is_told_at_submit(payload: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generate.prepare(payload)
    assert refused.value.field == field


def test_depth_is_bounded() -> None:
    """Before anything recurses without end."""
    nested: Any = "x"
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequest, match="nested more than 64 levels"):
        generate.prepare({"messages": [{"role": "user", "content": "a", "more": nested}]})


def test_a_special_token_can_be_a_stop_text(task: Generate) -> None:
    """Its text is not in the answer's; the token ends it, not before ``min_tokens``, and a resume ends there, too."""
    token = SPECIALS.index("<|im_start|>")
    payload = {"prompt": "hello", "max_tokens": 9, "stop": ["<|im_start|>"], "logit_bias": {str(token): 100}}
    result = run_alone(task, Request(id="a", payload=payload))[1]
    assert (result["finish_reason"], result["token_ids"], result["text"]) == ("stop", [], "")
    outputs, result = run_alone(task, Request(id="a", payload=payload | {"min_tokens": 3}))
    assert (result["finish_reason"], result["token_ids"]) == ("stop", [token] * 3)
    for cut in range(len(outputs) + 1):
        request = Request(id="b", payload=payload | {"min_tokens": 3}, outputs=outputs[:cut])
        assert run_alone(task, request) == (outputs[cut:], result)


def test_special_tokens_can_be_shown(task: Generate) -> None:
    """Where they are asked for; then a stop text is found in the answer's own."""
    token = SPECIALS.index("<|im_start|>")
    payload = {"prompt": "hello", "max_tokens": 2, "logit_bias": {str(token): 100}}
    assert run_alone(task, Request(id="a", payload=payload))[1]["text"] == ""
    shown = run_alone(task, Request(id="a", payload=payload | {"skip_special_tokens": False}))[1]
    assert shown["text"] == "<|im_start|>" * 2
    stopped = payload | {"skip_special_tokens": False, "stop": ["start|><|"]}
    result = run_alone(task, Request(id="a", payload=stopped))[1]
    assert (result["text"], result["finish_reason"]) == ("<|im_", "stop")
