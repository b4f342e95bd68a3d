"""Several answers to one request: which ones, in which order, beside whom, and again after a cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request, Step
from perdure.workers.text import Generate
from perdure.workers.text.golden import run_alone
from perdure.workers.text.parameters import Parameters, complete
from perdure.workers.text.sampler import choose

SETTINGS = Settings(model="tiny", device="cpu", threads=1)
SINGLE: dict[str, Any] = {"prompt": "Who shares a prompt of 50 tokens shares its keys.", "max_tokens": 5, "seed": 7}
SINGLE |= {"temperature": 1.0}
TRIPLE = SINGLE | {"n": 3}


@pytest.fixture(scope="module")
def task() -> Generate:
    task = Generate(SETTINGS)
    task.load()
    return task


def run_together(task: Generate, requests: list[Request]) -> dict[str, tuple[list[Any], Any]]:
    """Admit them all; the outputs and the result of each."""
    for request in requests:
        task.admit(request)
    found: dict[str, tuple[list[Any], Any]] = {request.id: ([], NOTHING) for request in requests}
    while any(result is NOTHING for _, result in found.values()):
        for step in task.step():
            assert step.error is None
            outputs, result = found[step.request_id]
            assert result is NOTHING
            if step.output is not NOTHING:
                outputs.append(step.output)
            found[step.request_id] = outputs, step.result
    return found


def of(outputs: list[Any], index: int) -> list[Any]:
    """The outputs of one answer, as those of a request with one answer."""
    return [{k: v for k, v in output.items() if k != "index"} for output in outputs if output["index"] == index]


def test_each_answer_is_that_of_its_seed_alone(task):
    """The first is the request's with one answer; the others differ from it and from each other."""
    outputs, result = run_alone(task, Request(id="a", payload=TRIPLE))
    parameters = Parameters.of(TRIPLE, "a")
    assert set(result) == {"choices", "usage"}
    assert result["usage"] == {"prompt_tokens": len(SINGLE["prompt"]), "completion_tokens": 15}
    for index, choice in enumerate(result["choices"]):
        alone = SINGLE | {"seed": parameters.sibling(index).seed}
        expected, whole = run_alone(task, Request(id=str(index), payload=alone))
        whole.pop("usage")
        assert choice == {"index": index, **whole}
        assert of(outputs, index) == expected
    assert parameters.sibling(0).seed == 7
    assert len({tuple(choice["token_ids"]) for choice in result["choices"]}) == 3


def test_one_answer_has_the_shape_it_always_had(task):
    """And is stored as it always was: an older worker still takes it."""
    outputs, result = run_alone(task, Request(id="a", payload=SINGLE | {"n": 1}))
    assert set(outputs[0]) == {"token", "text"}
    assert set(result) == {"text", "token_ids", "finish_reason", "usage"}
    assert "n" not in complete(SINGLE | {"n": 1})
    assert complete(TRIPLE)["n"] == 3


def test_outputs_come_in_one_order_whoever_else_is_there(task):
    """Token by token, in it answer by answer, also when there are more answers than rows."""
    for n in (3, 11):
        payload = TRIPLE | {"n": n, "max_tokens": 4}
        outputs, _ = run_alone(task, Request(id="alone", payload=payload))
        assert [output["index"] for output in outputs] == list(range(n)) * 4
        beside = [Request(id=str(number), payload=SINGLE | {"seed": number}) for number in range(3)]
        others = [Request(id="other", payload=TRIPLE | {"n": 16, "seed": 1})]
        assert run_together(task, [*beside, Request(id="x", payload=payload), *others])["x"][0] == outputs


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1, "stop": ["@@"], "presence_penalty": 1.0}], ids=["plain", "all"])
def test_resumed_equals_uninterrupted_at_every_output(task, fields):
    """Alone; each answer goes on from its own tokens."""
    payload = TRIPLE | fields
    outputs, result = run_alone(task, Request(id="a", payload=payload))
    for cut in range(len(outputs) + 1):
        rest = run_alone(task, Request(id=str(cut), payload=payload, outputs=outputs[:cut]))
        assert rest == (outputs[cut:], result)


def test_resumed_equals_uninterrupted_among_neighbours(task):
    """All cuts again, five at a time, with more answers than rows."""
    payload = TRIPLE | {"n": 4, "max_tokens": 9}
    outputs, result = run_alone(task, Request(id="a", payload=payload))
    for cuts in (range(start, min(start + 5, len(outputs) + 1)) for start in range(0, len(outputs) + 1, 5)):
        found = run_together(task, [Request(id=str(cut), payload=payload, outputs=list(outputs[:cut])) for cut in cuts])
        for cut in cuts:
            assert found[str(cut)] == (outputs[cut:], result)


@pytest.mark.parametrize("kind", ["stop", "end"])
def test_answers_end_each_in_its_own_way(task, monkeypatch, kind):
    """One at a stop string or at the end of its text, the others later; the same from every cut."""
    payload = TRIPLE | {"max_tokens": 8}
    _, whole = run_alone(task, Request(id="a", payload=payload))
    second = whole["choices"][1]
    if kind == "stop":
        payload |= {"stop": [second["text"][2:4]]}
    else:
        monkeypatch.setattr(task._engine.tokenizer, "ends", frozenset({second["token_ids"][3]}))
    outputs, result = run_alone(task, Request(id="b", payload=payload))
    assert result["choices"][1]["finish_reason"] == "stop"
    assert len({len(choice["token_ids"]) for choice in result["choices"]}) > 1
    assert result["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in result["choices"])
    for choice in result["choices"]:
        assert "".join(output["text"] for output in of(outputs, choice["index"])) == choice["text"]
    for cut in range(len(outputs) + 1):
        rest = run_alone(task, Request(id=str(cut), payload=payload, outputs=outputs[:cut]))
        assert rest == (outputs[cut:], result)


def test_many_answers_leave_every_other_request_its_row(task):
    """Seven beside one with sixteen answers: in each decode pass each of the eight moves."""
    many = Request(id="many", payload={"prompt": "a", "n": 16, "max_tokens": 30, "temperature": 1.0})
    task.admit(many)
    for number in range(7):
        task.admit(Request(id=str(number), payload={"prompt": "b", "max_tokens": 12}))
    passes: list[set[str]] = []
    done: list[Step] = []
    while sum(step.result is not NOTHING for step in done) < 7:
        steps = task.step()
        done += steps
        passes.append({step.request_id for step in steps})
    assert sum(len(names) == 8 for names in passes) >= 5
    task.drop("many")
    assert task.step() == []


def test_the_prompt_is_computed_once(tmp_path):
    """And every sampled token once: the rows of the trace say so, each with its own index."""
    task = Generate(SETTINGS.replace(trace=str(tmp_path)))
    task.load()
    run_alone(task, Request(id="a", payload=TRIPLE))
    rows = [
        row for file in tmp_path.iterdir() for line in file.read_text().splitlines() for row in json.loads(line)["rows"]
    ]
    assert sorted(row[2] for row in rows if row[3] == "prefill") == list(range(len(SINGLE["prompt"])))
    assert sorted(row[2] for row in rows if row[3] == "decode") == list(range(15))


def test_a_failing_answer_ends_its_request_and_no_other(task, monkeypatch):
    """With one error, once."""
    wrong = Parameters.of(TRIPLE, "a").sibling(1).seed
    expected = run_alone(task, Request(id="b", payload=SINGLE | {"seed": 3}))[1]

    def sometimes(logits, rows):
        bad = [row.parameters.seed == wrong and len(row.output) == 2 for row in rows]
        return [-1 if one else token for one, token in zip(bad, choose(logits, rows), strict=True)]

    monkeypatch.setattr("perdure.workers.text.engines.builtin.batch.choose", sometimes)
    task.admit(Request(id="a", payload=TRIPLE))
    task.admit(Request(id="b", payload=SINGLE | {"seed": 3}))
    steps: list[Step] = []
    while not any(step.request_id == "b" and step.ends for step in steps):
        steps += task.step()
    ends = [step for step in steps if step.ends]
    assert [(step.request_id, step.error is None) for step in ends] == [("a", False), ("b", True)]
    assert ends[1].result == expected


def test_outputs_without_their_answer_are_refused(task):
    """A checkpoint of a request with one answer is none of one with three."""
    for index in ({}, {"index": 3}, {"index": True}, {"index": -1}):
        with pytest.raises(ValueError, match="output 0"):
            task.admit(Request(id="a", payload=TRIPLE, outputs=[{**index, "token": 1, "text": ""}]))
    assert task.step() == []
