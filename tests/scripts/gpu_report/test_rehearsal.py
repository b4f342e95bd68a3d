"""The whole report on the CPU, in small: what a device will run has run before."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from perdure.scripts.gpu_report import place
from perdure.scripts.gpu_report.plan import STEPS
from tests.kit.places import ROOT

ABSENT = {"machine", "tests", "memory", "driver", "spin", "fault", "ranks"}
"""Steps of which a part needs CUDA."""


def figures_of(row: dict[str, Any]) -> dict[str, float]:
    """All numbers of a step, those of its tables among them."""
    rows = [row["figures"], *(value for value in row["figures"].values() if isinstance(value, dict))]
    return {name: value for item in rows for name, value in item.items() if isinstance(value, int | float)}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_step_runs_on_the_cpu(tmp_path: Path) -> None:
    """Each has a line and is ok, with figures of the right kind; what needs CUDA says so, and is listed in the page."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts" / "gpu_report" / "place.py"), "--rehearse", str(out)],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = {row["step"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert list(rows) == [step.name for step in STEPS]
    assert {name: (row["state"], row["problems"]) for name, row in rows.items()} == dict.fromkeys(rows, ("ok", [])), (
        done.stdout
    )
    assert {name for name, row in rows.items() if row["missing"]} == ABSENT
    assert all(what.startswith("needs CUDA: ") for row in rows.values() for what in row["missing"])
    found = {name: figures_of(row) for name, row in rows.items()}
    assert all(value >= 0 for figures in found.values() for value in figures.values())
    assert found["machine"]["import_torch_s"] > 0
    assert found["tests"]["tests"] == found["tests"]["skipped"] >= 10
    assert {row["equal_alone"] for row in rows["resume"]["figures"].values() if isinstance(row, dict)} == {3}
    for row in (rows["kill"]["figures"][name] for name in ("beside a warm spare", "beside none")):
        assert (row["interrupted"], row["lost"], row["changed"]) == (4, 0, 0)
        assert row["next_token_ms"] > 0
    for row in (rows["speed"]["figures"][name] for name in ("2 at once", "4 at once")):
        assert row["tokens_per_s"] > 0
        assert 0 < row["share_of_copy_bandwidth"] < 10
    assert (found["memory"]["finished"], found["memory"]["replaced"]) == (3, 0)
    assert found["spin"]["next_output_s"] > found["spin"]["step_timeout_s"]
    assert rows["spin"]["figures"]["probe_afterwards"] == "ok"
    assert found["fault"]["finished"] == 3
    assert found["ranks"]["sums"] == 64
    text = (out / "gpu.md").read_text()
    assert all(f"- {row['title']}: {what}" in text for row in rows.values() for what in row["missing"])
    with tarfile.open(out / "logs.tar") as logs:
        assert logs.getnames() == [f"{name}.log" for name in rows]


def test_the_environment_has_the_checkout_and_all_behind_it(tmp_path: Path) -> None:
    """The package from the checkout's folders, everything else from the Python that made it."""
    python = place.make(tmp_path / "environment")
    code = (
        "import perdure.protocol, rq, sys; print(perdure.__file__, perdure.protocol.__file__, rq.__file__, sys.prefix)"
    )
    done = subprocess.run([python, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    package, protocol, rq, prefix = done.stdout.split()
    site = next((tmp_path / "environment").glob("lib/python*/site-packages"))
    assert (package, protocol) == (str(site / "perdure/__init__.py"), str(site / "perdure/protocol/__init__.py"))
    assert Path(protocol).resolve() == ROOT / "protocol" / "__init__.py"
    assert rq.startswith(sys.prefix)
    assert prefix == str(tmp_path / "environment")


def test_without_wheels_nothing_is_made(tmp_path: Path) -> None:
    """A folder that has none is a mistake, not an empty pack."""
    command = [
        sys.executable,
        "-P",
        str(ROOT / "scripts" / "gpu_report" / "place.py"),
        "--wheels",
        str(tmp_path),
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has no wheels; scripts/gpu-report --pack" in done.stderr
    assert list(tmp_path.iterdir()) == []
