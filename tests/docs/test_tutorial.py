"""docs/tutorial.md does what it says, for somebody who has nothing but a wheel and an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.docs.tutorial import newcomer


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_newcomer_can_follow_the_tutorial(tmp_path: Path) -> None:
    """Each block of tutorial.md in its order; the kill is a real one, and nothing of the checkout can be imported."""
    with newcomer(tmp_path) as someone:
        someone.follow_all()
        assert (someone.folder / "long.svg").read_text(encoding="utf-8").startswith("<svg")
