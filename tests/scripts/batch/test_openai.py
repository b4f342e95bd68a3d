"""Batch files and the ``openai`` package: its client writes the lines, its models read the answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion

from perdure.protocol.errors import InvalidRequest
from perdure.protocol.settings import Settings
from perdure.scripts.batch import bodies
from perdure.scripts.batch.lines import made, parse
from perdure.workers.tasks.base import Request
from perdure.workers.text import Generate
from perdure.workers.text.golden import run_alone
from perdure.workers.text.parameters import complete

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tiny() -> Generate:
    task = Generate(Settings(model="tiny", device="cpu", threads=1))
    task.load()
    return task


def answered(task: Generate, url: str, body: dict[str, Any], number: int = 1) -> dict[str, Any]:
    """The body of a response, by way of JSON, to what a line asks for."""
    _, payload = bodies.asked(url, body)
    result = run_alone(task, Request(id=f"r{number}", payload=complete(payload)))[1]
    return dict(json.loads(json.dumps(bodies.answer(url, f"r{number}", "tiny", 7, result), allow_nan=False)))


class Served:
    """A server that answers as a batch would; ``taken`` is what the client has written."""

    def __init__(self, task: Generate) -> None:
        self.taken: list[tuple[str, dict[str, Any]]] = []
        lock = threading.Lock()
        this = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    this.taken.append((self.path, body))
                    try:
                        status, value = 200, answered(task, self.path, body, len(this.taken))
                    except InvalidRequest as error:
                        response, _ = bodies.refusal("r", "INVALID_REQUEST", str(error))
                        status, value = response["status_code"], response["body"]
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture(scope="module")
def served(tiny: Generate) -> Iterator[Served]:
    found = Served(tiny)
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


ASKED: list[dict[str, Any]] = [
    {},
    {"n": 2, "temperature": 1, "seed": 3},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 3, "n": 2},
    {"logprobs": True, "top_logprobs": 2, "logit_bias": {"65": 100}, "stop": "A"},
    {"stop": ["a", "b"], "presence_penalty": 0.5},
]


def asked(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    if url == CHAT:
        return {"model": "tiny", "messages": HI, "max_tokens": 6, **fields}
    logprobs = {"logprobs": fields.get("top_logprobs", 0)} if fields.get("logprobs") else {}
    plain = {name: value for name, value in fields.items() if name not in ("logprobs", "top_logprobs")}
    return {"model": "tiny", "prompt": "hi", "max_tokens": 6, **plain, **logprobs}


@pytest.mark.parametrize("fields", ASKED, ids=str)
@pytest.mark.parametrize(("url", "model"), [(CHAT, ChatCompletion), (COMPLETIONS, Completion)])
def test_answers_are_what_the_package_s_models_say(
    tiny: Generate, url: str, model: Any, fields: dict[str, Any]
) -> None:
    """Strictly: a number is none that has to be read from a text, and nothing is null that must not be."""
    body = answered(tiny, url, asked(url, fields))
    found = model.model_validate(body, strict=False)
    assert model.model_validate_json(json.dumps(body), strict=True) == found
    assert len(found.choices) == fields.get("n", 1)
    for choice in found.choices:
        assert (choice.logprobs is not None) == bool(fields.get("logprobs"))


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("logprobs", [None, [], [float("-inf")]])
def test_empty_answers_and_zero_probabilities_are_valid(url: str, logprobs: list[float] | None) -> None:
    """No list in the place of an object, no null in that of a number."""
    scores = None if logprobs is None else [{"logprob": it, "top_logprobs": [[5, it]]} for it in logprobs]
    tokens = [] if not logprobs else [5]
    result: dict[str, Any] = {
        "text": "",
        "token_ids": tokens,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 0},
    }
    if scores is not None:
        result["logprobs"] = scores
    text = json.dumps(bodies.answer(url, "i", "m", 1, result), allow_nan=False)
    model: Any = ChatCompletion if url == CHAT else Completion
    (choice,) = model.model_validate_json(text, strict=True).choices
    assert (choice.logprobs is None) == (logprobs is None)


@pytest.mark.parametrize("code", ["INVALID_REQUEST", "ERROR", "DEADLINE", "CANCELED"])
def test_a_failure_is_the_package_s_error(code: str) -> None:
    response, error = bodies.refusal("r", code, "why")
    found = ErrorObject.model_validate_json(json.dumps(response["body"]["error"]), strict=True)
    assert (found.code, found.message) == (code, "why") == (error["code"], error["message"])


def test_a_conversation_goes_on_with_what_the_client_was_given(client: openai.OpenAI, served: Served) -> None:
    """In each of the forms in which it can give an answer back."""
    first = client.chat.completions.create(model="tiny", messages=HI, max_tokens=4)
    said = first.choices[0].message
    forms = [
        said,
        said.model_dump(),
        said.to_dict(),
        said.model_dump(exclude_none=True),
        json.loads(said.model_dump_json()),
    ]
    texts = set()
    for form in forms:
        messages: Any = [*HI, form, {"role": "user", "name": "bob", "content": [{"type": "text", "text": "go on"}]}]
        again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
        texts.add(again.choices[0].message.content)
    assert len(texts) == 1
    written = served.taken[-len(forms) :]
    payloads = [bodies.asked(url, body)[1]["messages"] for url, body in written]
    assert payloads == [payloads[0]] * len(forms)
    assert payloads[0][1] == {"role": "assistant", "content": said.content}


FREE: list[dict[str, Any]] = [
    {"top_p": 0, "temperature": 1}, {"seed": -1}, {"seed": -(2**63)}, {"logprobs": False, "top_logprobs": 0},
    {"tools": [], "tool_choice": "none"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]},
    {"audio": None}, {"reasoning_effort": "none"}, {"verbosity": "medium"}, {"stream": False, "stream_options": None},
    {"n": 1, "stop": None},
    {"store": True, "metadata": {"a": "b"}, "user": "u", "service_tier": "auto", "safety_identifier": "s"},
    {"extra_body": {
        "ignore_eos": False, "skip_special_tokens": True, "top_k": -1, "min_p": 0.0, "length_penalty": 1.0,
    }},
    {"extra_body": {"spaces_between_special_tokens": True, "include_stop_str_in_output": False, "stop_token_ids": []}},
    {"extra_body": {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}}},
]  # fmt: skip


@pytest.mark.parametrize("fields", FREE, ids=str)
def test_what_asks_for_nothing_is_taken_from_the_client(
    client: openai.OpenAI, served: Served, fields: dict[str, Any]
) -> None:
    """As a line too; the answer is that of a request without it."""
    plain = {name: value for name, value in fields.items() if name in ("temperature",)}
    fields = {"seed": 4, **fields} if "temperature" in fields else fields
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, **fields)
    url, body = served.taken[-1]
    line = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
    made(parse(line, 1), "", Settings(), {})
    bare = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5)
    assert plain.keys() <= {"temperature"}
    assert answer.choices[0].message == bare.choices[0].message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"response_format": {"type": "json_object"}},
        {"top_logprobs": 2}, {"reasoning_effort": "high"}, {"extra_body": {"ignore_eos": True}},
        {"extra_body": {"stop_token_ids": [5]}},
        {"extra_body": {"min_p": False}},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_change_the_answer_is_refused(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=HI, **fields)
    assert (refused.value.code, refused.value.type) == ("INVALID_REQUEST", "invalid_request_error")


@pytest.mark.parametrize(
    "extra",
    [{"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"audio": {"id": "a"}}],
    ids=str,
)  # fmt: skip
def test_what_an_answer_of_another_kind_carries_is_refused(extra: dict[str, Any]) -> None:
    """A call of a tool, or sound, says something: dropping it would change the conversation."""
    with pytest.raises(InvalidRequest, match=r"body.messages\[1\]"):
        bodies.asked(CHAT, {"messages": [*HI, {"role": "assistant", "content": "x", **extra}]})


def test_a_refusal_is_what_was_said() -> None:
    """In the two places where an answer of others has it."""
    parts = [{"type": "refusal", "refusal": "no"}]
    for message in ({"content": None, "refusal": "no"}, {"content": parts}):
        _, payload = bodies.asked(CHAT, {"messages": [*HI, {"role": "assistant", **message}]})
        assert payload["messages"][1] == {"role": "assistant", "content": "no"}
