"""scripts/bench: the pure parts by their laws, and each measurement in its smoke form: it works,
whatever the figures.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from perdure.scripts.benchmarks.drawing import Curve, bars, curves
from perdure.scripts.benchmarks.figures import Series, median, percentile
from perdure.scripts.benchmarks.measures.drains import judge
from perdure.scripts.benchmarks.measures.goodput import from_zero, resumed
from perdure.scripts.benchmarks.measures.latency import SlowRoad
from perdure.scripts.benchmarks.measures.queueing import ratios
from perdure.scripts.benchmarks.measures.switching import Pass, compare
from perdure.scripts.benchmarks.processes import BenchmarkFailed, Crew, wait_for
from perdure.scripts.benchmarks.stage import ServerSample
from perdure.scripts.benchmarks.tables import Table


def bench(folder: Path, *arguments: str, timeout: float = 280) -> dict[str, Any]:
    """Run the command as scripts/bench does; the figures that it has written."""
    figures = folder / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "perdure.scripts.benchmarks", *arguments),
            *("--json", str(figures), "--svg-dir", str(folder / "svg"), "--folder", str(folder / "peers")),
        ],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "GOMP_SPINCOUNT": "1000"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, text
    found: dict[str, Any] = json.loads(figures.read_text())
    for picture in (folder / "svg").glob("*.svg"):
        ElementTree.parse(picture)
    assert list(folder.glob("perdure-bench-*")) == [], "server and logs are gone"
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_queue_in_its_smoke_form(tmp_path: Path) -> None:
    """Ours, RQ and a bare loop: results compared, and every figure is there."""
    found = bench(tmp_path, "queue", "--smoke")
    part = found["parts"]["queue"]
    assert part["problems"] == {}
    assert set(part["medians"]) == {"perdure", "rq SimpleWorker", "bare loop (one by one)"}
    for figures in part["medians"].values():
        assert figures.pop("wrong") == 0
        assert all(value is not None and value > 0 for name, value in figures.items() if name != "round_trips"), figures
    assert found["ratios"]["drain_vs_rq_simpleworker"] > 0
    assert found["machine"]["settings"]["appendfsync"] == "everysec"
    assert (tmp_path / "svg" / "queue-drain-1.svg").exists()


def test_a_rate_is_that_after_the_first_quarter() -> None:
    """The start of the workers is in no figure, and neither is what the samples themselves ask."""
    samples = [
        ServerSample(0.0, 0, 1.0, 0),
        ServerSample(5.0, 25, 1.0, 10),
        ServerSample(6.0, 65, 1.1, 40),
        ServerSample(7.0, 100, 1.2, 164),
    ]
    drain = judge([*samples, ServerSample(9.0, 100, 1.2, 166)])
    assert (drain.done, drain.rate) == (100, 37.5)
    assert drain.cpu_us == pytest.approx(0.2 / 75 * 1e6)
    assert drain.round_trips == pytest.approx((154 - 4) / 75)


def test_a_drain_that_was_over_at_once_has_no_rate() -> None:
    """Better no figure than one of a single sample."""
    with pytest.raises(BenchmarkFailed, match="take more requests"):
        judge([ServerSample(0.0, 0, 0.0, 0), ServerSample(1.0, 100, 0.1, 9)])


def test_ratios_are_taken_within_a_round() -> None:
    """Round by round, and of the peers the best counts; what was not measured has no ratio."""
    series = Series()
    for own, peer, other in ((100.0, 1.0, 50.0), (300.0, 2.0, 20.0), (90.0, 3.0, 10.0)):
        series.add("perdure", {"drain_1": own})
        series.add("rq SimpleWorker", {"drain_1": peer})
        series.add("huey", {"drain_1": other})
    found = ratios(series)
    assert found["drain_vs_rq_simpleworker"] == 100
    assert found["drain_vs_best_python_peer"] == 9
    assert found["drain_vs_bullmq"] is None
    json.dumps(found, allow_nan=False)


def test_medians_and_percentiles_leave_out_what_is_missing() -> None:
    """A figure that one round lacks is that of the others."""
    assert median([3.0, None, 1.0, math.nan, 2.0]) == 2
    assert median([None]) is None
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2
    assert percentile([float(value) for value in range(1, 101)], 0.99) == 99
    assert math.isnan(percentile([], 0.5))


def test_tables_and_pictures_show_what_is_there() -> None:
    """A dash for what is not; every picture is well-formed, with logarithmic axes and without points too."""
    table = Table("T", ["system", "a"], [["x<y", 1234.5], ["z", None]], ["a note"])
    assert "1,234" in table.text()
    assert "| z | – |" in table.markdown()
    for picture in (
        bars("B & C", "1/s", [("perdure", 3.0), ("x<y", None)]),
        curves("C", "x", "y", [Curve("a", [(1, 2), (1000, 5)]), Curve("b", [(0, 1)], marks=True)], log_x=True),
        curves("none", "x", "y", [Curve("a", [])]),
    ):
        assert "svg" in ElementTree.fromstring(picture).tag


def test_leaving_ends_every_process_and_what_it_has_started(tmp_path: Path) -> None:
    """Also one that ignores SIGTERM, and a child of its own."""
    program = (
        "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "open(sys.argv[1], 'w').write(str(child.pid) + ' '); time.sleep(600)"
    )
    note = tmp_path / "pid"
    with contextlib.suppress(KeyboardInterrupt), Crew(tmp_path) as crew:
        child = crew.start([sys.executable, "-c", program, str(note)], "", "log")
        wait_for("its child", lambda: note.exists() and note.read_text().endswith(" "), 30, [child])
        raise KeyboardInterrupt
    assert not child.running
    grandchild = int(note.read_text())
    wait_for(
        "the end", lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie", 30
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_recovery_in_its_smoke_form(tmp_path: Path) -> None:
    """One worker is killed: the request goes on elsewhere, every step is taken, and the result is right."""
    found = bench(tmp_path, "recovery", "--smoke")
    (row,) = found["parts"]["recovery"]["medians"].values()
    assert found["parts"]["recovery"]["problems"] == {}
    assert row["kills"] == 1
    assert row["p50_ms"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_checkpoints_in_its_smoke_form(tmp_path: Path) -> None:
    """The tiny model without checkpoints, and with them far from Redis: a full batch, all tokens, and traffic."""
    pytest.importorskip("torch")
    found = bench(tmp_path, "checkpoints", "--smoke")["parts"]["checkpoints"]
    medians = found["medians"]
    assert set(medians) == {"off", "100 ms, far"}
    assert all(value > 0 for figures in medians.values() for value in figures.values())
    assert set(found["windows"]) == {"100 ms, far"}


def test_windows_are_compared_with_those_beside_them() -> None:
    """Of a machine that grows slower all the time, and a tenth slower with checkpoints: the tenth is found."""
    switches = [(2.0 * number, number % 2 == 1) for number in range(41)]
    passes, at, speed = [], 0.0, 20.0
    while at < 80:
        passes.append(Pass(at, full=not 30 < at < 32))
        speed *= 0.9995
        at += 1 / (speed * (0.9 if int(at // 2) % 2 else 1.0))
    found = compare(passes, switches)
    # Of 20 windows with, the last has none after it, and one was not full.
    assert found["windows"] == 18
    assert found["ratio"] == pytest.approx(0.9, abs=0.01)
    assert 0.88 < found["low"] <= found["ratio"] <= found["high"] < 0.92
    assert compare(passes, switches[:2]) == {"windows": 0, "ratio": None, "low": None, "high": None, "each": []}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_scale_in_its_smoke_form(tmp_path: Path) -> None:
    """Two sizes, filled by real calls; a sweep takes what has expired, and nothing else."""
    rows = bench(tmp_path, "scale", "--smoke")["parts"]["scale"]["rows"]
    assert [row["queued"] for row in rows] == [200, 400]
    assert (rows[-1]["retries"], rows[-1]["leases"], rows[-1]["workers"]) == (40, 20, 4)
    assert all(cost["redis_us"] > 0 for row in rows for cost in row["costs"].values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_saturation_in_its_smoke_form(tmp_path: Path) -> None:
    """Nobody is declared dead by the reaper; all that are by hand come back, and hold all again."""
    found = bench(tmp_path, "saturation", "--smoke")["parts"]["saturation"]
    assert (found["full"]["deaths"], found["back"]["deaths"]) == (0, 8)
    assert found["full"]["checkpoints_a_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_streams_in_its_smoke_form(tmp_path: Path) -> None:
    """Every output came once and in order, ours and the bare way's, and every figure is there."""
    found = bench(tmp_path, "streams", "--smoke")["parts"]["streams"]
    assert set(found["medians"]) == {"perdure, 2 streams", "XADD and XREAD, 2 streams"}
    for figures in found["medians"].values():
        assert all(value > 0 for value in figures.values()), figures
    assert [(row["outputs"], row["wrong"]) for row in found["many"]] == [(600, 0)]
    assert found["tokens"]["ratio"] > 0
    assert found["import"]["ratio"] > 0


def test_a_slow_road_is_late_and_not_narrow() -> None:
    """Pieces come later by the delay, all of them and in order; many at once take no longer than one."""
    with socket.create_server(("127.0.0.1", 0)) as server, SlowRoad("127.0.0.1", server.getsockname()[1], 0.2) as road:
        near = socket.create_connection(("127.0.0.1", road.port))
        far, _ = server.accept()
        with near, far:
            far.settimeout(30)
            began = time.monotonic()
            for number in range(100):
                near.sendall(bytes([number]))
            got = b""
            while len(got) < 100:
                got += far.recv(100)
            assert got == bytes(range(100))
            assert time.monotonic() - began >= 0.2
            far.sendall(b"back")
            assert near.recv(10) == b"back"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_engine_in_its_smoke_form(tmp_path: Path) -> None:
    """The tiny model, written down for transformers, puts out the same tokens there."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    part = bench(tmp_path, "engine", "--smoke")["parts"]["engine"]
    assert set(part["medians"]) == {"transformers, batch 2", "perdure exact, batch 2", "perdure not exact, batch 2"}
    assert all(value > 0.9 for value in part["equal_tokens"].values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_goodput_in_its_smoke_form(tmp_path: Path) -> None:
    """Requests end under kills, with checkpoints and without."""
    points = bench(tmp_path, "goodput", "--smoke")["parts"]["goodput"]["points"]
    assert [point["resume"] for point in points] == [True, False]
    assert all(0 <= point["goodput"] <= 1.5 and 0 < point["closed_form"] <= 1 for point in points)


def test_the_closed_form_is_that_of_the_literature() -> None:
    """At three failures expected in a request, beginning again costs 6.4 times the work, and resuming
    next to nothing.
    """
    assert from_zero(0.1, 30, 0) / 30 == pytest.approx(6.36, abs=0.01)
    assert resumed(0.1, 30, 0) / 30 == pytest.approx(1.005, abs=0.001)
    assert resumed(1e-9, 30, 0) == pytest.approx(30)
