"""Interruptions in one process: an answer is cut at a random token and gone on with, once or twice, in company.

What a worker that dies leaves of a request are its outputs, as they are stored. An engine that is given them is where
another worker would be.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jsonschema

from ...protocol.errors import InvalidRequest
from ...workers.tasks.base import NOTHING, Request
from ...workers.text import Generate
from .ways import SCHEMA, WAYS, payload


@dataclass(slots=True, kw_only=True)
class TrialCounts:
    """What was found of one engine and one way.

    ``lost``: answers that did not end; ``doubled``: of which a token is there twice or out of order; ``changed``: whose
    outputs are not the result's; ``invalid_json``: ended, and not of their schema; ``different``: not the undisturbed
    run's tokens, texts and log-probabilities.
    """

    engine: str
    way: str
    exact: bool
    promise: str = ""
    interruptions: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    invalid_json: int = 0
    different: int = 0

    def to_json(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)


@dataclass(slots=True)
class Trial:
    """One answer that is interrupted: after so many outputs each time."""

    name: str
    payload: dict[str, Any]
    cuts: list[int]
    outputs: list[Any]
    result: Any = NOTHING


def trials(task: Generate, engine: str, number: int, seed: int) -> Iterator[TrialCounts]:
    """``number`` interruptions, spread over the ways that this engine has."""
    chance = random.Random(seed)
    promise = task._loaded().promise
    ways = [way for way in WAYS if _takes(task, way)]
    for way in ways:
        tally = TrialCounts(engine=engine, way=way, exact=promise.exact, promise=str(promise))
        place = 0
        while tally.interruptions * len(ways) < number:
            some = [task.prepare(payload(way, place + other)) for other in range(task.slots)]
            place += task.slots
            whole = _whole(task, some)
            items = [
                Trial(f"t{other}", one, sorted(chance.choices(range(len(outputs) + 1), k=1 + chance.randrange(2))), [])
                for other, (one, (outputs, _)) in enumerate(zip(some, whole, strict=True))
            ]
            _interrupted(task, items, chance)
            for item, undisturbed in zip(items, whole, strict=True):
                tally.interruptions += len(item.cuts)
                _judge(tally, item, undisturbed)
        yield tally


def _takes(task: Generate, way: str) -> bool:
    try:
        task.admit(Request(id="asked", payload=task.prepare(payload(way, 0))))
    except InvalidRequest:
        return False
    task.drop("asked")
    return True


def _whole(task: Generate, payloads: Sequence[dict[str, Any]]) -> list[tuple[list[Any], Any]]:
    """Each alone, as nothing interrupts it."""
    found = []
    for one in payloads:
        item = Trial("whole", one, [], [])
        _run(task, [item])
        found.append((item.outputs, item.result))
    return found


def _interrupted(task: Generate, items: list[Trial], chance: random.Random) -> None:
    """All of them side by side, in rounds: each runs to its next cut, and is then admitted anew with what it has."""
    rounds = max(len(item.cuts) for item in items)
    for number in range(rounds):
        chance.shuffle(items)
        _run(task, [item for item in items if number < len(item.cuts)], number)
    chance.shuffle(items)
    _run(task, items)
    items.sort(key=lambda item: int(item.name[1:]))


def _run(task: Generate, items: Sequence[Trial], number: int | None = None) -> None:
    """Until each is at its cut, or has ended."""
    by_name = {item.name: item for item in items if item.result is NOTHING and not _at_cut(item, number)}
    for item in by_name.values():
        task.admit(Request(id=item.name, payload=item.payload, outputs=list(item.outputs)))
    steps = 0
    while by_name and steps < 10_000:
        steps += 1
        for step in task.step():
            if step.request_id not in by_name:
                continue  # behind its cut: a dead worker's last steps are not stored
            item = by_name[step.request_id]
            if step.error is not None:
                raise step.error
            if step.output is not NOTHING:
                item.outputs.append(step.output)
            if step.result is not NOTHING:
                item.result = step.result
            if step.ends or _at_cut(item, number):
                task.drop(item.name)
                del by_name[item.name]
                if number is not None:
                    item.result = NOTHING  # it was not stored


def _at_cut(item: Trial, number: int | None) -> bool:
    return number is not None and len(item.outputs) >= item.cuts[number]


def _judge(tally: TrialCounts, item: Trial, undisturbed: tuple[list[Any], Any]) -> None:
    if item.result is NOTHING:
        tally.lost += 1
        return
    answers = item.result.get("choices") or [item.result]
    for index, answer in enumerate(answers):
        mine = [output for output in item.outputs if output.get("index", 0) == index]
        tokens = [output["token"] for output in mine]
        # A token that ends a text is an output only if text was held back until then.
        if tokens[: len(answer["token_ids"])] != answer["token_ids"] or len(tokens) > len(answer["token_ids"]) + 1:
            tally.doubled += 1
        if "".join(output["text"] for output in mine) != answer["text"]:
            tally.changed += 1
        if tally.way == "json" and answer["finish_reason"] == "stop" and not _valid(answer["text"]):
            tally.invalid_json += 1
    tally.different += (item.outputs, item.result) != undisturbed


def _valid(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True
