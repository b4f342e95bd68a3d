"""What ``scripts/exactness`` counts (docs/exactness.md): nothing where nothing is wrong, and planted faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from perdure.protocol.settings import Settings
from perdure.scripts.interruptions.__main__ import summary, table
from perdure.scripts.interruptions.trials import TrialCounts, trials
from perdure.workers.tasks.base import NOTHING, Request, Step
from perdure.workers.text import Generate

SETTINGS = Settings(model="tiny", device="cpu", threads=1, slots=4)


class Faulty(Generate):
    """Spoils what is gone on with."""

    def __init__(self, spoil: Callable[[Step], list[Step]]) -> None:
        super().__init__(SETTINGS)
        self.spoil = spoil
        self.resumed: set[str] = set()

    def admit(self, request: Request) -> None:
        (self.resumed.add if request.outputs else self.resumed.discard)(request.id)
        super().admit(request)

    def step(self) -> list[Step]:
        return [
            other
            for step in super().step()
            for other in (
                self.spoil(step) if step.request_id in self.resumed and step.output is not NOTHING else [step]
            )
        ]


def run(task: Generate, number: int = 20) -> dict[str, TrialCounts]:
    task.load()
    return {tally.way: tally for tally in trials(task, "builtin", number, seed=1)}


def counts(found: dict[str, TrialCounts]) -> dict[str, int]:
    return {name: sum(getattr(item, name) for item in found.values()) for name in ("doubled", "changed", "different")}


def test_an_exact_engine_has_nothing_to_find() -> None:
    """Every way that it takes, with as many interruptions as were asked for."""
    found = run(Generate(SETTINGS))
    assert {"greedy", "sampled", "penalties", "three", "stop", "logprobs"} <= set(found)
    assert sum(item.interruptions for item in found.values()) >= 20
    assert all(item.exact and not item.lost for item in found.values())
    assert counts(found) == {"doubled": 0, "changed": 0, "different": 0}


def twice(step: Step) -> list[Step]:
    return [dataclasses.replace(step, result=NOTHING), step]


def other_text(step: Step) -> list[Step]:
    return [dataclasses.replace(step, output={**step.output, "text": "?"})]


def other_score(step: Step) -> list[Step]:
    spoiled = {**step.output, "logprob": 0.0} if "logprob" in step.output else step.output
    return [dataclasses.replace(step, output=spoiled)]


@pytest.mark.parametrize(
    ("spoil", "kinds"),
    [
        (twice, {"doubled", "changed", "different"}),
        (other_text, {"changed", "different"}),
        (other_score, {"different"}),
    ],
)
def test_what_is_wrong_is_found(spoil: Any, kinds: set[str]) -> None:
    found = counts(run(Faulty(spoil)))
    assert {name for name, number in found.items() if number} == kinds


def test_different_counts_where_exact_is_said() -> None:
    rows = [
        TrialCounts(engine=engine, way="greedy", exact=exact, interruptions=5, different=different).to_json()
        for engine, exact, different in [("a", True, 0), ("b", False, 2)]
    ]
    found = summary(rows)
    assert (found["interruptions"], found["engines"], found["different"], found["different_continued"]) == (10, 2, 0, 2)
    assert "| b | greedy | continued | 5 | 0 | 0 | 0 | 0 | 2 |" in table(rows)
