"""Where things stand: the checkout, and what the tests give to the processes that they start."""

from __future__ import annotations

from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
ROOT: Final = TESTS.parent
DOCS: Final = ROOT / "docs"
TASKS: Final = TESTS / "worker_tasks"
"""On PYTHONPATH of the workers, and of nobody else."""
