"""The answers that no crash has touched: each payload alone, in this process, without Redis.

``python -m perdure.scripts.demonstration.golden < payloads.jsonl > answers.jsonl``, with the same ``PERDURE_*``
settings as the workers. The demonstration runs it after the pool has stopped.
"""

from __future__ import annotations

import json
import sys

from ...protocol.settings import Settings
from ...workers.tasks.base import Request
from ...workers.text import Generate
from ...workers.text.golden import run_alone


def main() -> int:
    """Read one payload a line, write one ``{"outputs", "result"}`` a line."""
    task = Generate(Settings.from_environment())
    task.load()
    for number, line in enumerate(sys.stdin):
        outputs, result = run_alone(task, Request(id=f"golden-{number}", payload=json.loads(line)))
        print(json.dumps({"outputs": outputs, "result": result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
