"""The input of a batch: what a line may be, what is told about a bad one, and what becomes of OpenAI's bodies."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from perdure.protocol.codec import unpack
from perdure.protocol.errors import InvalidRequest, UsageError
from perdure.protocol.settings import Settings
from perdure.scripts.batch import bodies
from perdure.scripts.batch.lines import LONGEST, SHOWN, Checked, Source, check, made, parse, refuse_bad, request_id

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def line(custom_id: Any = "a", body: Any = None, url: Any = COMPLETIONS, **more: Any) -> dict[str, Any]:
    value = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": "x"} if body is None else body}
    return {name: item for name, item in {**value, **more}.items() if item is not ...}


def raw(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def checked(tmp_path: Path, content: bytes, **options: Any) -> Checked:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with Source(str(path), tmp_path) as source:
        return check(source, Settings(), {}, **options)


def told(tmp_path: Path, content: bytes) -> tuple[str, list[str]]:
    """What is said of a file with bad lines."""
    with pytest.raises(UsageError) as caught:
        refuse_bad(checked(tmp_path, content))
    return str(caught.value), list(getattr(caught.value, "__notes__", ()))


# --- the file --------------------------------------------------------------------------------------------


def test_a_file_may_have_a_bom_blank_lines_and_crlf(tmp_path: Path) -> None:
    """What editors and Windows make of a file changes none of its lines."""
    content = (
        b"\xef\xbb\xbf" + raw(line("ä")) + b"\r\n  \n" + raw(line("b")).replace(b"\n", b"\r\n") + raw(line("c"))[:-1]
    )
    found = checked(tmp_path, content)
    assert (found.count, len(found.sums)) == (3, 5)
    assert [found.line_of(name) for name in ("ä", "b", "c", "d")] == [1, 4, 5, None]


def test_every_bad_line_is_told_with_its_number(tmp_path: Path) -> None:
    """Before anything is started, and all of them."""
    content = (
        raw(line("a"), line("b", url="/v1/embeddings"), line("a"))
        + b"{\n"
        + b'{"custom_id": "\xff"}\n'
        + raw(line("c", {"prompt": "x", "max_tokens": 0}), line("d"))
    )
    message, notes = told(tmp_path, content)
    assert message.startswith("5 bad lines in ")
    assert message.endswith("; nothing was started")
    assert notes == [
        "line 2: url '/v1/embeddings' is not served; there are /v1/completions, /v1/chat/completions and dotted paths"
        " of tasks",
        "line 3: custom_id 'a' is already that of line 1",
        "line 4: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "line 5: not UTF-8: byte 0xff after 15 bytes",
        "line 6: body: max_tokens must be between 1 and 2147483647, but is 0",
    ]


def test_the_first_bad_lines_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    message, notes = told(tmp_path, b"x\n" * (SHOWN + 3))
    assert message.startswith(f"{SHOWN + 3} bad lines")
    assert (len(notes), notes[-1]) == (SHOWN + 1, "… and 3 more")


def test_bad_lines_leave_the_others_as_they_are(tmp_path: Path) -> None:
    """What is good is run; what is bad keeps its own name, unless it has none or another line has it."""
    content = (
        b"{\n"
        + raw(line("a"), line("b", url="/v1/embeddings"), line("a"), line(7), line("b"))
        + raw(line("c", {"prompt": "x", "model": "other"}))
    )
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with Source(str(path), tmp_path) as source:
        found = check(source, Settings(), {}, models=frozenset({"tiny"}))
        assert {number: bad.custom_id for number, bad in found.bad.items()} == {
            1: "",
            3: "b",
            4: "",
            5: "",
            6: "",
            7: "c",
        }
        assert found.count == 7
        assert all(bad.reason.startswith(f"line {number}: ") for number, bad in found.bad.items())
        assert "body.model: 'other' is not served; the workers have tiny" in found.bad[7].reason
        assert list(found.request_ids(source)) == [found.request_id("a")]
    ids = [found.bad_id(number) for number in found.bad]
    assert len({*ids, found.request_id("a")}) == 7
    assert found.bad_id(3) == found.request_id("b")


def test_a_line_that_is_too_long_is_one_bad_line(tmp_path: Path) -> None:
    """What comes after it is read from its own beginning; its end is not kept in memory."""
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(raw(line("a")) + b'{"custom_id": "')
        file.truncate(LONGEST + 3 * 2**20)
        file.seek(0, 2)
        file.write(b"\n" + raw(line("b")))
    with Source(str(path), tmp_path) as source:
        found = check(source, Settings(), {})
        assert (found.count, list(found.bad), found.line_of("b")) == (3, [2], 3)
        assert "more than" in found.bad[2].reason
        offsets = [offset for offset, _ in source.raw()]
        assert parse(source.at(offsets[2]), 3).custom_id == "b"


@pytest.mark.parametrize(("content", "word"), [(b"", "it is empty"), (b"\n \r\n", "its lines are blank")])
def test_a_file_without_a_request_is_a_mistake(tmp_path: Path, content: bytes, word: str) -> None:
    assert word in told(tmp_path, content)[0]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([1], "must be an object"),
        (line(...), "custom_id must be a text"),
        (line(""), "custom_id must be a text"),
        (line("x" * 513), "custom_id must be a text"),
        (line(7), "custom_id must be a text"),
        (line("\ud800"), "surrogate"),
        (line(method="GET"), "method must be POST"),
        (line(method=...), "method must be POST"),
        (line(url=...), "url must be a text"),
        (line(url="nothing"), "or the dotted path of a task"),
        (line(body=...), "there is no body"),
        (line(body=[]), "body must be an object"),
        (line(custom_ids="a"), "did you mean custom_id?"),
        (line(body={"prompt": "x", "model": 7}), "body.model must be a text"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_refused(value: Any, word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(raw(value), 1)
    assert word in str(caught.value)


def test_what_json_does_not_have_is_refused() -> None:
    for text in (b'{"a": NaN}', b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"):
        with pytest.raises(InvalidRequest):
            parse(text, 1)


def test_identity_is_the_whole_file_and_its_name(tmp_path: Path) -> None:
    """The same bytes find their requests again; any other bytes, and another name, make others."""
    one = checked(tmp_path, raw(line("a"), line("b")))
    assert checked(tmp_path, raw(line("a"), line("b"))).identity == one.identity
    others = [
        checked(tmp_path, raw(line("a"), line("b")) + b"\n"),
        checked(tmp_path, raw(line("b"), line("a"))),
        checked(tmp_path, raw(line("a"), line("b")), name="second"),
    ]
    ids = {found.request_id("a") for found in [one, *others]}
    assert len(ids) == 4


def test_stdin_is_read_twice_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "piped"
    path.write_bytes(raw(line("a"), line("b")))
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        with Source("-", tmp_path) as source:
            assert source.name == "stdin"
            assert check(source, Settings(), {}).count == 2
            assert [content for _, content in source.raw()] == path.read_bytes().splitlines(keepends=True)
    assert list(tmp_path.iterdir()) == [path], "the copy has no name"


@pytest.mark.parametrize("name", ["", "missing"])
def test_an_input_that_cannot_be_read_is_a_mistake(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        Source(str(tmp_path / name), tmp_path)


# --- bodies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "body", "payload"),
    [
        (COMPLETIONS, {"prompt": "x", "model": "m", "user": "u", "n": 2}, {"prompt": "x", "n": 2}),
        (COMPLETIONS, {"prompt": ["x"], "echo": False, "suffix": "", "best_of": 1}, {"prompt": "x"}),
        (COMPLETIONS, {"prompt": [5, 6], "logprobs": 3, "seed": None}, {"token_ids": [5, 6], "logprobs": 3}),
        (COMPLETIONS, {"prompt": [[5, 6]], "best_of": 2, "n": 2}, {"token_ids": [5, 6], "n": 2}),
        (COMPLETIONS, {"token_ids": [5], "top_k": 4, "exact": False}, {"token_ids": [5], "top_k": 4, "exact": False}),
        (CHAT, {"messages": [{"role": "developer", "content": "x", "name": None}], "stream": False},
         {"messages": [{"role": "system", "content": "x"}]}),
        (CHAT, {"messages": [{"role": "user",
         "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
         {"messages": [{"role": "user", "content": "ab"}]}),
        (CHAT, {"messages": [], "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2},
         {"messages": [], "max_tokens": 9, "logprobs": 2}),
        (CHAT, {"messages": [], "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
         {"messages": []}),
    ],
)  # fmt: skip
def test_bodies_become_payloads(url: str, body: Any, payload: Any) -> None:
    assert bodies.asked(url, body) == (bodies.GENERATE, payload)


@pytest.mark.parametrize(
    ("url", "body", "field"),
    [
        (COMPLETIONS, {"prompt": "x", "stream": True}, "stream"),
        (COMPLETIONS, {"prompt": "x", "stream": 0}, "stream"),
        (COMPLETIONS, {"prompt": "x", "echo": True}, "echo"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": ["x", "y"]}, "prompt"),
        (COMPLETIONS, {"prompt": [5], "token_ids": [5]}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "messages": []}, "messages"),
        (CHAT, {"messages": [], "prompt": "x"}, "prompt"),
        (CHAT, {"messages": [], "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"messages": [], "response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"messages": [], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (CHAT, {"messages": [], "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": [], "temprature": 1}, "temprature"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_and_cannot_is_refused(url: str, body: Any, field: str) -> None:
    """Nothing is dropped in silence."""
    with pytest.raises(InvalidRequest) as caught:
        bodies.asked(url, body)
    assert caught.value.field == field


def test_a_url_may_be_the_path_of_any_task() -> None:
    assert bodies.asked("app.tasks.count", {"n": 3}) == ("app.tasks.count", {"n": 3})


def test_a_line_has_the_same_seed_in_every_run() -> None:
    """So a request that vanished, and is made again, gives the same answer; its own seed is left alone."""

    def seeds(identity: str, **more: Any) -> list[Any]:
        read = parse(raw(line(body={"prompt": "x", **more})), 1)
        requests = [made(read, identity, Settings(), {}) for _ in range(2)]
        assert requests[0].id == request_id(identity, "a") == requests[1].id
        assert requests[0].digest == requests[1].digest != ""
        return [unpack(request.payload)["seed"] for request in requests]

    first, again = seeds("one", temperature=1)
    assert first == again
    assert seeds("two", temperature=1)[0] != first
    assert seeds("one", seed=7) == [7, 7]


# --- answers ---------------------------------------------------------------------------------------------

RESULT = {
    "text": "hi",
    "token_ids": [4, 5],
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


def test_a_result_becomes_a_completion() -> None:
    assert bodies.answer(COMPLETIONS, "i1", "m", 7, RESULT) == {
        "id": "cmpl-i1",
        "object": "text_completion",
        "created": 7,
        "model": "m",
        "choices": [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_several_answers_become_choices_of_a_chat() -> None:
    choices = [{"index": i, "text": f"t{i}", "token_ids": [i], "finish_reason": "length"} for i in range(2)]
    body = bodies.answer(CHAT, "i1", "", 7, {"choices": choices, "usage": RESULT["usage"]})
    assert (body["object"], body["id"], body["model"]) == ("chat.completion", "chatcmpl-i1", bodies.GENERATE)
    assert body["choices"][1] == {
        "index": 1,
        "message": {"role": "assistant", "content": "t1", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_logprobs_name_tokens_by_number() -> None:
    """In the two shapes of the two urls; minus infinity is the number that OpenAI has for it."""
    scores = [{"logprob": -0.5, "top_logprobs": [[4, -0.5], [9, -2.0]]}, {"logprob": float("-inf"), "top_logprobs": []}]
    result = {**RESULT, "logprobs": scores}
    (choice,) = bodies.answer(COMPLETIONS, "i1", "m", 7, result)["choices"]
    assert choice["logprobs"] == {
        "text_offset": None,
        "tokens": ["token_id:4", "token_id:5"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"token_id:4": -0.5, "token_id:9": -2.0}, {}],
    }
    (choice,) = bodies.answer(CHAT, "i1", "m", 7, result)["choices"]
    first, second = choice["logprobs"]["content"]
    assert first["top_logprobs"][1] == {"token": "token_id:9", "logprob": -2.0, "bytes": None}
    assert (second["token"], second["logprob"]) == ("token_id:5", -9999.0)


def test_what_is_no_result_of_text_generation_is_told() -> None:
    values: list[Any] = [None, {}, {"usage": {}}, {"text": "x"}, [1]]
    for value in values:
        with pytest.raises(ValueError, match="not a result"):
            bodies.answer(CHAT, "i1", "m", 7, value)


def test_the_result_of_another_task_is_the_body() -> None:
    assert bodies.answer("app.tasks.t", "i1", "", 7, {"a": b"x", "b": [float("nan")]}) == {
        "a": {"base64": "eA=="},
        "b": [None],
    }
