"""The answer that a request must have, which no crash has touched: generated alone, in this process, without Redis.

``python -m perdure.workers.text.golden < payloads.jsonl > answers.jsonl``, with the same ``PERDURE_*`` settings as the
workers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from ...protocol.settings import Settings
from ..tasks.base import NOTHING, Request
from . import Generate


def answer(payload: Any, settings: Settings | None = None, request_id: str = "golden") -> dict[str, Any]:
    """The result of one payload; see :func:`answers`."""
    return answers([(request_id, payload)], settings)[0]


def answers(requests: Iterable[tuple[str, Any]], settings: Settings | None = None) -> list[dict[str, Any]]:
    """The results of (id, payload) pairs, each generated with no neighbour, in order.

    Give payloads as they are stored: one without a seed takes it from the id, as a worker would.
    Raises :class:`~perdure.protocol.errors.InvalidRequest` for one that a worker would refuse.
    """
    task = Generate(settings)
    task.load()
    return [run_alone(task, Request(id=request_id, payload=payload))[1] for request_id, payload in requests]


def run_alone(task: Generate, request: Request) -> tuple[list[Any], dict[str, Any]]:
    """Run one request on a loaded task with nothing else in it; its new outputs, and its result."""
    task.admit(request)
    outputs = []
    while True:
        for step in task.step():
            if step.output is not NOTHING:
                outputs.append(step.output)
            if step.error is not None:
                raise step.error
            if step.result is not NOTHING:
                return outputs, step.result


def main() -> int:
    """Read one payload a line, write one ``{"outputs", "result"}`` a line."""
    task = Generate(Settings.from_environment())
    task.load()
    for number, line in enumerate(sys.stdin):
        outputs, result = run_alone(task, Request(id=f"golden-{number}", payload=json.loads(line)))
        sys.stdout.write(json.dumps({"outputs": outputs, "result": result}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
