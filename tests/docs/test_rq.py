"""The table for users of RQ names its proofs; they must exist."""

from __future__ import annotations

import re

from tests.kit.places import ROOT, TESTS


def test_every_row_names_tests_that_exist() -> None:
    """A row without a test, or with the name of one that is gone, is a promise that nothing keeps."""
    tests = {
        name
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    text = (ROOT / "docs" / "rq.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| RQ |")]
    assert len(rows) > 20
    for row in rows:
        comment = re.search(r"<!-- (.*) -->", row)
        assert comment, f"no test is named: {row}"
        missing = set(comment[1].split()) - tests
        assert not missing, f"no such test: {missing}"
