"""The protocol's model (docs/model/lease.pml), checked by SPIN in every order of its steps.

The model must also be *this* protocol's and must be able to fail: its moves are those of the table of states, each
broken variant gives a counterexample, and every line of it is reached.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from perdure.protocol import scripts
from perdure.protocol.states import TRANSITIONS
from tests.kit.places import DOCS

MODEL = DOCS / "model" / "lease.pml"

NOT_MODELLED = {
    "chunk": "writes parts of a state that only `progress`, which is modelled, makes the checkpoint's",
    "adopt": "a plain RQ job becomes a request: before the protocol that is modelled",
    "settle": "ends a plain RQ job, in RQ's own transaction",
    "stop": "a cancel with another word",
    "weigh": "counts workers; moves no request",
    "beat": "says less than `heartbeat`; moves no request",
    "measure": "adds to the counters; moves no request",
    "declare": "says that the pool is degraded; moves no request",
    "give_up": "ends requests whose task nobody can load; the model has one task, which all can",
    "readmit": "takes back what a stock worker of RQ's was killed with; the model has only ours",
}
"""Scripts that the model leaves out, with the reason."""

SHARED = {
    "cancel": ("cancel_running", "cancel"),
    "expire": ("restart",),
    "heartbeat": ("claim",),
    "reap": ("reap_incarnation", "reap_lease"),
}
"""Scripts whose inlines are not named after them alone: both sides of ``cancel``; what ``expire`` does to a waiting
request; the one answer of ``heartbeat`` that matters to a request, which ``claim`` gives too."""

NOT_MOVED = {
    # "stopped" is told apart from "canceled" by its word alone.
    ("started", "stopped", name)
    for name in ("cancel", "fail", "reap", "release")
} | {
    # A claim promotes first; then it moves what is queued.
    ("scheduled", "failed", "claim"),
    ("started", "queued", "readmit"),
    ("queued", "failed", "give_up"),
}

UNREACHED = {
    r"^(assert\(\(held\[\]!=k\)\)|\(\(last_e\[\]==k\)\))$": "only the execution that holds a request is told of a gap, "
    "and it hands the request back in the same step",
}
"""Statements that may be unreached, with the reason."""


@dataclass(frozen=True)
class Checked:
    """What one run of SPIN's verifier said, and the folder that it ran in."""

    text: str
    folder: Path

    def number(self, pattern: str) -> int:
        """The number in front of or behind some words of the report."""
        match = re.search(pattern, self.text)
        assert match is not None, self.text
        return int(float(match[1]))

    def whole(self) -> None:
        """Fails unless all states were looked at, and no promise was found broken."""
        assert self.number(r"errors: (\d+)") == 0, self.text
        for words in ("max search depth too small", "out of memory", "hash factor", "memory limit", "violated"):
            assert words not in self.text
        assert "Full statespace search" in self.text
        assert "interrupted" not in self.text.lower()


@pytest.fixture(scope="session")
def spin() -> str:
    """SPIN's executable; without it and a C compiler the test is skipped, but not in continuous integration."""
    found = shutil.which("spin")
    if found is None or shutil.which("gcc") is None:
        missing = "spin and gcc are needed to check the model: apt-get install spin gcc"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def check(spin: str, folder: Path, *names: str, cycles: bool = False, merged: bool = True) -> Checked:
    """Generate, compile and run the verifier for the model with some names defined."""

    def run(*command: str, seconds: float) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode in (0, 1), f"{command[0]} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    run(spin, "-a", *([] if merged else ["-o3"]), *(f"-D{name}" for name in names), str(MODEL), seconds=200)
    mode = "-DNP" if cycles else "-DSAFETY"
    # Not -DBITSTATE or -DHC: they may take two states for one. Partial order reduction finds nothing to leave out
    # where every step reads the store.
    # Nor optimised: that takes gcc longer than it saves.
    run(
        "gcc",
        "-O0",
        "-w",
        mode,
        "-DNOREDUCE",
        "-DVECTORSZ=2048",
        "-DMEMLIM=2900",
        "-o",
        "pan",
        "pan.c",
        seconds=300,
    )
    text = run("./pan", "-m100000", *(["-l"] if cycles else []), seconds=800)
    return Checked(text, folder)


# --- the promises ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_order_of_three_faults_breaks_a_promise(spin, tmp_path):
    """2 workers, 2 requests, 2 reapers: one writer, nothing lost, each ends once, and nothing is left behind."""
    checked = check(spin, tmp_path, "FAULTS=3")
    checked.whole()
    assert checked.number(r"(\S+) states, stored") > 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("names", [(), ("REUSE",)], ids=["", "REUSE"])
def test_no_run_goes_on_for_ever(spin, tmp_path, names):
    """No state comes back, so every run is finite, and its last state is one in which every request has ended."""
    checked = check(spin, tmp_path, "FAULTS=2", *names, cycles=True)
    checked.whole()
    assert "non-progress cycles \t+" in checked.text


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_store_that_forgets_its_last_second_keeps_what_it_had(spin, tmp_path):
    """Within each history of the store the same holds, whatever workers and calls remember of the lost one."""
    checked = check(spin, tmp_path, "FAULTS=1", "ROLLBACK")
    checked.whole()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_id_that_is_used_again_breaks_no_promise(spin, tmp_path):
    """Deleted, submitted again, enqueued again, at any time, with two more faults in every order."""
    checked = check(spin, tmp_path, "FAULTS=3", "REUSE")
    checked.whole()
    assert checked.number(r"(\S+) states, stored") > 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("names", "promise"),
    [
        # Neither writes twice: the writer must be the one that holds the request.
        (("BROKEN_PROGRESS",), r"assertion violated \(exec\[\d\]==mine\["),
        (("BROKEN_FINISH",), r"assertion violated \(exec\[\d\]==mine\["),
        # Nor takes from the living.
        (("BROKEN_REAP",), r"assertion violated \( ?!\(alive\[\(holder\["),
        (("BROKEN_PULSE",), r"assertion violated \( ?!\(alive\[\(\d/2\)\]\)"),
        # Nor leaves one that never ends.
        (("BROKEN_CLAIM",), r"assertion violated \(\(status\[n\]>=4\)&&\(ends\[n\]==1\)\)"),
        # Nor leaves a hole in the outputs.
        (("BROKEN_GAP", "ROLLBACK"), r"assertion violated \(have\[\d\]==at\["),
        # An id that is used again vanishes from its queue, is not run again, or is held without a lease.
        (("BROKEN_RUNS", "REUSE"), r"assertion violated .*\(status\[m\]!=1\)\|\|queue\[m\]"),
        (("BROKEN_AGAIN", "REUSE"), r"assertion violated  !\(owed\[n\]\)"),
        (("BROKEN_VOID", "REUSE"), r"assertion violated .*!\(\(exec\[\d\]!=0\)\)\|\|lease\[\d\]"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_check_of_the_scripts_is_needed(spin, tmp_path, names, promise):
    """Without it a promise is broken, and SPIN shows how."""
    checked = check(spin, tmp_path, "FAULTS=2" if "ROLLBACK" not in names else "FAULTS=1", *names)
    assert checked.number(r"errors: (\d+)") == 1, checked.text
    assert re.search(promise, checked.text), checked.text
    assert (tmp_path / "lease.pml.trail").exists()


# --- the model itself -----------------------------------------------------------------------------------


def statements(checked: Checked) -> tuple[set[tuple[int, str]], set[tuple[int, str]]]:
    """All statements of the model, and those that some process has reached: line and text, without its indices.

    An inline's statements occur in the processes once for each place that calls it; one that is reached in one of
    them is reached.
    """

    def plain(text: str) -> str:
        return re.sub(r"\[.*\]", "[]", text.strip())

    missed: set[tuple[str, int]] = set()
    process = ""
    for line in checked.text.splitlines():
        if match := re.match(r"unreached in (?:proctype )?(\w+)", line):
            process = match[1]
        elif match := re.match(r"\s+\S*:(\d+), state (\d+), \"(.*)\"", line):
            missed.add((process, int(match[2])))
    table = subprocess.run(
        ["./pan", "-d"], cwd=checked.folder, capture_output=True, text=True, timeout=200, check=False
    ).stdout
    every: set[tuple[int, str]] = set()
    reached: set[tuple[int, str]] = set()
    for line in table.splitlines():
        if match := re.match(r"(?:proctype )?(\w+)$", line):
            process = match[1]
        elif match := re.match(r"\s+state\s+(\d+) -\(tr.*\S+:(\d+) => (.*)", line):
            statement = (int(match[2]), plain(match[3]))
            every.add(statement)
            if (process, int(match[1])) not in missed:
                reached.add(statement)
    return every, reached


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_statement_of_the_model_is_reached(spin, tmp_path):
    """A promise that holds only because nothing happens would show here: each fault and each answer occurs."""
    every: set[tuple[int, str]] = set()
    reached: set[tuple[int, str]] = set()
    builds = {"whole": ("FAULTS=2",), "back": ("FAULTS=1", "ROLLBACK"), "reuse": ("FAULTS=2", "REUSE")}
    for folder, names in builds.items():
        (tmp_path / folder).mkdir()
        checked = check(spin, tmp_path / folder, *names, merged=False)
        checked.whole()
        some, met = statements(checked)
        every |= some
        reached |= met
    assert len(reached) > 100
    missed = every - reached
    left = {item for item in missed if not any(re.search(allowed, item[1]) for allowed in UNREACHED)}
    assert not left, sorted(left)
    for allowed in UNREACHED:
        assert any(re.search(allowed, text) for _, text in missed), f"it is reached after all: {allowed}"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_no_fault_leads_to_is_seen_as_unreached(spin, tmp_path):
    """The test above can fail: without faults, no reaper acts and nothing is canceled."""
    checked = check(spin, tmp_path, "FAULTS=0", merged=False)
    checked.whole()
    every, reached = statements(checked)
    left = {text for _, text in every - reached}
    assert "reaped[] = 1" in left
    assert "cancel_wish[] = 1" in left


def test_the_model_moves_requests_as_the_scripts_do():
    """The model's moves are those of protocol/states.py, script by script."""
    text = MODEL.read_text()
    moves = {
        (start.lower(), end.lower(), name)
        for names, start, end in re.findall(r'MOVE\("([\w ]+)", (\w+), (\w+)\)', text)
        for name in names.split()
    }
    table = {
        (str(start), str(end), name)
        for start, ends in TRANSITIONS.items()
        for end, names in ends.items()
        for name in names
        if name != "rq requeue"
    }
    assert moves == table - NOT_MOVED
    assert table >= NOT_MOVED


def test_each_script_is_in_the_model_or_left_out_for_a_reason():
    """A new script must be modelled, or named here."""
    text = MODEL.read_text()
    inlines = set(re.findall(r"^inline (\w+)\(", text, re.M))
    for name in scripts.names():
        if name in NOT_MODELLED:
            assert not re.search(rf"\b{name}\.lua", text)
            continue
        assert f"{name}.lua" in text, f"the model says nothing of {name}.lua"
        assert inlines >= set(SHARED.get(name, (name,))), f"no inline for {name}.lua"
    assert set(scripts.names()) >= NOT_MODELLED.keys() | SHARED.keys()
