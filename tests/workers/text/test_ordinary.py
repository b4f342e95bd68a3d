"""Requests that did without exactness: what they save, what they say, and that nobody else notices."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request
from perdure.workers.text import Generate
from perdure.workers.text.golden import run_alone
from perdure.workers.text.parameters import complete
from tests.kit.workers.text import batch_of

SETTINGS = Settings(model="tiny", device="cpu", threads=1)
EXACT: dict[str, Any] = {"prompt": "Some can do without. " * 8, "max_tokens": 12, "temperature": 1.0, "seed": 5}
ORDINARY = EXACT | {"exact": False}


@pytest.fixture(scope="module")
def task() -> Generate:
    task = Generate(SETTINGS)
    task.load()
    return task


@pytest.fixture
def rows(task, monkeypatch) -> list[int]:
    """How many rows each product with the head had: one for each sampled pass."""
    operators = batch_of(task)._llama.operators
    head = batch_of(task)._llama.weights()["head"]
    linear, found = operators.linear, []

    def counted(x, weight):
        if weight is head:
            found.append(len(x))
        return linear(x, weight)

    monkeypatch.setattr(operators, "linear", counted)
    return found


def test_only_occupied_rows_are_computed(task, rows):
    """One request: one row a pass. Two: two, while both run. An exact one: all rows, always."""
    run_alone(task, Request(id="a", payload=ORDINARY))
    assert rows == [1] * 12
    rows.clear()
    task.admit(Request(id="a", payload=ORDINARY))
    task.admit(Request(id="b", payload=ORDINARY))
    while len(task._engine):
        task.step()
    assert set(rows) == {1, 2}
    rows.clear()
    run_alone(task, Request(id="c", payload=EXACT))
    assert set(rows) == {8}


def test_it_says_so(task):
    """In what is stored and in the result; an exact request's show nothing new."""
    assert complete(ORDINARY)["exact"] is False
    assert complete(EXACT | {"exact": True})["exact"] is True
    assert "exact" not in complete(EXACT)
    assert run_alone(task, Request(id="a", payload=ORDINARY))[1]["exact"] is False
    several = run_alone(task, Request(id="b", payload=ORDINARY | {"n": 2}))[1]
    assert (several["exact"], len(several["choices"])) == (False, 2)
    assert "exact" not in run_alone(task, Request(id="c", payload=EXACT))[1]


def test_exact_requests_stay_exact_beside_the_others(task):
    """From every cut, with three that are not, which come and go."""
    outputs, result = run_alone(task, Request(id="a", payload=EXACT))
    for cut in range(len(outputs) + 1):
        for number in range(3):
            other = ORDINARY | {"seed": number, "max_tokens": 3 + 3 * number}
            task.admit(Request(id=f"o{number}", payload=other, outputs=outputs[:number]))
            task.step()
        task.admit(Request(id="a", payload=EXACT, outputs=outputs[:cut]))
        rest = []
        while len(task._engine):
            for step in task.step():
                assert step.error is None
                if step.request_id == "a":
                    rest += [] if step.output is NOTHING else [step.output]
                    found = step.result
        assert (rest, found) == (outputs[cut:], result)


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"logprobs": 2, "stop": ["\0\1"]}], ids=["plain", "n", "logprobs"])
def test_a_resume_goes_on_from_what_is_known(task, fields):
    """What a client has stays as it is; the rest has the right length. Equality is not promised, so not asked for."""
    payload = ORDINARY | fields
    outputs, result = run_alone(task, Request(id="a", payload=payload))
    for cut in (0, 1, 2, len(outputs) // 2, len(outputs) - 1, len(outputs)):
        rest, again = run_alone(task, Request(id=str(cut), payload=payload, outputs=outputs[:cut]))
        assert len(rest) == len(outputs) - cut
        assert again["usage"] == result["usage"]
        whole = [*outputs[:cut], *rest]
        for index, choice in enumerate(again.get("choices", [again])):
            own = [output for output in whole if output.get("index", 0) == index]
            assert [output["token"] for output in own] == choice["token_ids"]
            assert "".join(output["text"] for output in own) == choice["text"]


def test_known_tokens_are_put_back_in_one_pass(task):
    """Prompt and replay in long chunks: three passes for 168 + 40 tokens, one more for the next token."""
    payload = ORDINARY | {"max_tokens": 60}
    outputs, _ = run_alone(task, Request(id="a", payload=payload))
    task.admit(Request(id="b", payload=payload, outputs=outputs[:41]))
    passes = 0
    while not any(step.output is not NOTHING for step in task.step()):
        passes += 1
    assert passes == 3
    task.drop("b")
