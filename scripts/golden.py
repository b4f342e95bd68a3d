"""The answers that no crash has touched: each payload alone, in this process, without Redis.

``python -m perdure.scripts.golden < payloads.jsonl > answers.jsonl``, with the same ``PERDURE_*`` settings as
the workers. The demonstration runs it after the pool has stopped.
"""

from __future__ import annotations

import json
import sys

from ..protocol.settings import Settings
from ..workers.text.golden import answers


def main() -> int:
    """Read one payload a line, write one result a line."""
    payloads = [json.loads(line) for line in sys.stdin if line.strip()]
    numbered = [(f"golden-{number}", payload) for number, payload in enumerate(payloads)]
    for result in answers(numbered, Settings.from_environment()):
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
