"""The schedule is a function of its seed, the judge finds what is planted, and every fault happens to a real pool."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.protocol.errors import UsageError
from perdure.protocol.records import Event
from perdure.scripts.chaos import journal
from perdure.scripts.chaos.command import scaled
from perdure.scripts.chaos.evidence import Evidence, Sample, Seen, StoredRequest, read_journals
from perdure.scripts.chaos.faults import CLASSES
from perdure.scripts.chaos.judge import judge, recoveries
from perdure.scripts.chaos.load import BLEND, WALK, WORDS, left_over
from perdure.scripts.chaos.picture import picture
from perdure.scripts.chaos.schedule import KINDS, NAMES, SETTLE, START, Timing, least, plan
from perdure.scripts.chaos.stage import Fired
from perdure.scripts.chaos.tasks import FIRST, golden

TIMING = Timing(20.0, scaled(20.0))

# --- the schedule ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), extra=st.floats(0, 300))
def test_every_kind_happens_and_none_after_the_end(seed: int, extra: float) -> None:
    """Also in the shortest run that is allowed, and what takes Redis away from everybody never overlaps."""
    seconds = least(KINDS, TIMING) + extra
    planned = plan(seed, seconds, KINDS, TIMING)
    assert {item.kind for item in planned} == set(NAMES)
    assert all(item.at >= START and item.at + item.lasts <= seconds - SETTLE + 0.01 for item in planned)
    assert [item.at for item in planned] == sorted(item.at for item in planned)
    alone = [item for item in planned if NAMES[item.kind].alone]
    assert all(one.at + one.lasts <= other.at for one, other in itertools.pairwise(alone))


def test_a_seed_makes_the_same_schedule_again() -> None:
    assert plan(7, 120, KINDS, TIMING) == plan(7, 120, KINDS, TIMING) != plan(8, 120, KINDS, TIMING)


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="need at least --seconds"):
        plan(1, 10, KINDS, TIMING)


def test_half_an_hour_holds_500_kills() -> None:
    planned = plan(1, 1800, KINDS, TIMING)
    assert sum(NAMES[item.kind].kills for item in planned) >= 500


def test_every_kind_has_its_fault() -> None:
    assert set(CLASSES) == set(NAMES)


# --- journals --------------------------------------------------------------------------------------------


def test_what_a_killed_producer_leaves_half_written_is_not_read(tmp_path: Path) -> None:
    """Its next process goes on behind the last output that counts."""
    path = tmp_path / "p1.1.jsonl"
    log = journal.Journal(path)
    for name in ("one", "two", "three"):
        log.write(journal.INTENT, name, task=WALK, payload={})
    for name in ("one", "two"):
        log.write(journal.ACCEPTED, name, durable=True)
    log.write(journal.OUTPUT, "one", index=0, output=[0, "v", "e"])
    log.write(journal.END, "two", status="finished", result=None)
    log.close()
    with path.open("ab") as file:
        file.write(b'{"at": 1.0, "what": "output", "id": "one", "ind')
    assert left_over([path]) == [("one", 1)]
    seen = read_journals([path])
    assert [seen[name].accepted for name in ("one", "two", "three")] == [True, True, False]
    assert len(seen["one"].outputs) == 1


def test_a_producer_s_tenth_life_comes_after_its_ninth(tmp_path: Path) -> None:
    """It reads on what the ninth has submitted, and names sort otherwise."""
    for life, what in ((9, journal.INTENT), (10, journal.OUTPUT)):
        log = journal.Journal(tmp_path / f"p1.{life}.jsonl")
        details: dict[str, Any] = {"task": WALK, "payload": {}} if what == journal.INTENT else {"index": 0, "output": 1}
        log.write(what, "one", **details)
        log.close()
    assert len(read_journals(sorted(tmp_path.iterdir()))["one"].outputs) == 1


def test_a_request_under_a_used_id_is_judged_alone(tmp_path: Path) -> None:
    """What was deleted is promised to nobody; what was submitted after it is, with its own payload."""
    log = journal.Journal(tmp_path / "traps.0.jsonl")
    for name in ("again", "never again"):
        log.write(journal.INTENT, name, task=WALK, payload={"seed": 1})
        log.write(journal.ACCEPTED, name, durable=True)
        log.write(journal.WITHDRAWN, name, durable=True)
    log.write(journal.INTENT, "again", task=WALK, payload={"seed": 2})
    log.write(journal.ACCEPTED, "again", durable=True)
    log.close()
    seen = read_journals([tmp_path / "traps.0.jsonl"])
    assert [(item.accepted, item.payload["seed"]) for item in seen.values()] == [(True, 2), (False, 1)]


# --- the judge -------------------------------------------------------------------------------------------

NUMBER = 8


def event(what: str, execution: str, offset: int, kind: str = "WORKER_LOST") -> Event:
    return Event(at=0.0, event=what, worker="w", execution=execution, offset=offset, kind=kind, reason="")


def request(evidence: Evidence, name: str, task: str) -> None:
    """One request of three executions: lost at 3 outputs, released at 5."""
    model = FIRST if task == BLEND else ""
    values = golden(5, NUMBER, model)
    outputs = [[i, value, "e1" if i < 3 else "e2" if i < 5 else "e3"] for i, value in enumerate(values)]
    result = {"n": NUMBER, "last": values[-1]} | ({"model": FIRST} if task == BLEND else {})
    seen = Seen(name, task, {"seed": 5, "n": NUMBER, "sleep": 0.001}, accepted=True)
    seen.outputs = [(float(i if i < 3 else i + 1), i, list(output)) for i, output in enumerate(outputs)]
    seen.ends = [{"at": 20.0, "what": "end", "id": name, "status": "finished", "result": dict(result)}]
    evidence.seen[name] = seen
    evidence.stored[name] = StoredRequest(
        status="finished",
        execution="",
        attempt=0,
        last="e3:finished",
        kind="",
        reason="",
        entries=["1"],
        registries=["finished"],
        outputs=outputs,
        result=result,
        history=[event("redelivered", "e1", 3), event("released", "e2", 5, "")],
    )


@pytest.fixture
def evidence() -> Evidence:
    """A run as it should be."""
    good = Evidence(enabled=["kill_worker"], fired=[Fired("kill_worker", 2.5, 2.6, {"r0": "e1", "r1": "e1"}, 1)])
    request(good, "r0", WALK)
    request(good, "r1", WALK)
    request(good, "r2", BLEND)
    words = {"prompt": "Once", "seed": 1}
    answer = {"outputs": [{"token": 1, "text": "a"}, {"token": 2, "text": "b"}], "result": {"text": "ab"}}
    good.words = [(words, answer)]
    request(good, "text", WORDS)
    good.seen["text"].payload = words
    good.seen["text"].outputs = [(1.0, 0, {"token": 1, "text": "a"}), (2.0, 1, {"token": 2, "text": "b"})]
    good.seen["text"].ends[0]["result"] = {"text": "ab"}
    good.stored["text"].outputs, good.stored["text"].result = list(answer["outputs"]), {"text": "ab"}
    request(good, "refused", WALK)
    good.seen["refused"].payload["refuse"] = True
    good.stored["refused"].status, good.stored["refused"].kind = "failed", "INVALID_REQUEST"
    request(good, "unknown", WALK)
    good.seen["unknown"].accepted = False
    good.seen["unknown"].outputs, good.seen["unknown"].ends = [], []
    good.seen["never"] = Seen("never", WALK, {"seed": 1, "n": 3})
    values = golden(5, NUMBER)
    good.samples = [
        Sample("r1", 0, 1, 2, {"i": 2, "v": values[1], "sprung": False}),
        Sample("r1", 0, 3, 6, {"i": 6, "v": values[5], "sprung": False}),
        Sample("r2", 0, 1, 4, None),
        # Of an earlier request under this id.
        Sample("r1", 0, 9, 2, {"i": 2, "v": 0, "sprung": False}, at=4.0),
    ]
    good.seen["r1"].at = 5.0
    return good


def test_a_good_run_has_no_problem(evidence: Evidence) -> None:
    verdict = judge(evidence)
    assert verdict.problems == []
    assert (verdict.attempted, verdict.accepted, verdict.recovered, verdict.refused) == (7, 5, 1, 1)
    assert (verdict.finished, verdict.resumed, verdict.checkpoints_read) == (5, 5, 3)
    assert recoveries(evidence) == {"kill_worker": [1.5]}, "the first output of another execution came at 4.0"


def lose(e: Evidence) -> None:
    del e.stored["r1"]


def never_end(e: Evidence) -> None:
    e.stored["r1"].status = "started"


def fail(e: Evidence) -> None:
    e.stored["r1"].status, e.stored["r1"].kind = "failed", "ERROR"


def end_without_entry(e: Evidence) -> None:
    e.stored["r1"].entries = []


def lose_recovered(e: Evidence) -> None:
    e.stored["unknown"].status = "queued"


def end_twice(e: Evidence) -> None:
    e.stored["r1"].entries = ["1", "1"]


def stand_in_two_registries(e: Evidence) -> None:
    e.stored["r1"].registries.append("failed")


def be_told_twice(e: Evidence) -> None:
    e.seen["r1"].ends *= 2


def repeat_in_log(e: Evidence) -> None:
    e.stored["r1"].outputs.insert(4, e.stored["r1"].outputs[3])


def repeat_in_stream(e: Evidence) -> None:
    e.seen["r1"].outputs.insert(4, e.seen["r1"].outputs[3])


def repeat_text(e: Evidence) -> None:
    e.stored["text"].outputs.append({"token": 2, "text": "b"})


def appear(e: Evidence) -> None:
    e.strangers.append("nobody")


def write_late(e: Evidence) -> None:
    """The first execution wrote one more output after it had been declared lost at 3."""
    e.stored["r1"].outputs[3] = [*e.stored["r1"].outputs[3][:2], "e1"]


def write_from_nowhere(e: Evidence) -> None:
    e.stored["r2"].outputs[7] = [*e.stored["r2"].outputs[7][:2], "e9"]


def change_log(e: Evidence) -> None:
    e.stored["r1"].outputs[4][1] = "something else"


def change_stream(e: Evidence) -> None:
    e.seen["r1"].outputs[4][2][1] = "something else"


def change_result(e: Evidence) -> None:
    e.stored["r1"].result["last"] = e.seen["r1"].ends[0]["result"]["last"] = "something else"


def tell_other_result(e: Evidence) -> None:
    e.seen["r1"].ends[0]["result"] = {"n": 0}


def change_text(e: Evidence) -> None:
    e.stored["text"].outputs[1] = {"token": 3, "text": "c"}


def mix_models(e: Evidence) -> None:
    for place, value in enumerate(golden(5, NUMBER, "other")[4:], 4):
        e.stored["r2"].outputs[place][1] = value


def skip_in_stream(e: Evidence) -> None:
    del e.seen["r1"].outputs[4]


def end_stream_early(e: Evidence) -> None:
    del e.seen["r1"].outputs[6:]


def skip_in_log(e: Evidence) -> None:
    del e.stored["r1"].outputs[4]


def accept_a_refusal(e: Evidence) -> None:
    e.stored["refused"].status = "finished"


def finish_a_poison(e: Evidence) -> None:
    e.seen["r1"].payload["poison"] = {"kind": "raises", "mark": "mark"}


def bury_a_poison_for_another_reason(e: Evidence) -> None:
    e.seen["r1"].payload["poison"] = {"kind": "exits", "mark": "mark"}
    e.stored["r1"].status, e.stored["r1"].kind = "failed", "ERROR"


def damage_checkpoint(e: Evidence) -> None:
    e.samples[1].state["v"] = "something else"


def turn_checkpoint_back(e: Evidence) -> None:
    e.samples.reverse()


def charge(e: Evidence) -> None:
    e.stored["r1"].attempt = 1


def leak(e: Evidence) -> None:
    e.leaks.append("rq:perdure:leases:steps")


def fire_nothing(e: Evidence) -> None:
    e.fired.clear()


def break_producer(e: Evidence) -> None:
    e.broken.append("p1 ended by itself")


def accept_nothing(e: Evidence) -> None:
    e.seen.clear()


@pytest.mark.parametrize(
    ("plant", "count"),
    [
        *((plant, "lost") for plant in (lose, never_end, fail, end_without_entry, lose_recovered)),
        *((plant, "duplicated") for plant in (
            end_twice, stand_in_two_registries, be_told_twice, repeat_in_log, repeat_in_stream, repeat_text,
        )),
        (appear, "unexpected"),
        *((plant, "stale_writes") for plant in (write_late, write_from_nowhere)),
        *((plant, "wrong_outputs") for plant in (
            change_log, change_stream, change_result, tell_other_result, change_text, mix_models, skip_in_stream,
            end_stream_early, skip_in_log, accept_a_refusal, finish_a_poison, bury_a_poison_for_another_reason,
            damage_checkpoint, turn_checkpoint_back,
        )),
        (charge, "charged"),
        (leak, "leaked_keys"),
        *((plant, "") for plant in (fire_nothing, break_producer, accept_nothing)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_planted_fault_is_found(evidence: Evidence, plant: Any, count: str) -> None:
    """Each single one is named, counted where there is a count, and makes the run fail."""
    harmed = copy.deepcopy(evidence)
    plant(harmed)
    verdict = judge(harmed)
    assert verdict.problems
    if count:
        assert getattr(verdict, count) >= 1, verdict.problems


def test_a_restarted_request_is_judged_by_what_came_after(evidence: Evidence) -> None:
    """Its stream may show the other model's outputs first; without the restart in its history it may not."""
    other = golden(5, NUMBER, "other")
    stored, seen = evidence.stored["r2"], evidence.seen["r2"]
    stored.history = [event("released", "e0", 2, ""), event("restart", "e0", 2), *stored.history]
    seen.outputs = [(0.1, 0, [0, other[0], "e0"]), (0.2, 1, [1, other[1], "e0"]), *seen.outputs]
    assert judge(evidence).problems == []
    del stored.history[1]
    assert judge(evidence).problems != []


def test_the_picture_marks_every_fault(evidence: Evidence) -> None:
    evidence.ended = 20.0
    drawn = picture(evidence, "a <title>")
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert drawn.count('id="fault-') == len(evidence.fired)
    assert "a &lt;title&gt;" in drawn


# --- real runs -------------------------------------------------------------------------------------------

SHORT = 60


def left_behind(folder: Path) -> list[psutil.Process]:
    """Processes whose command line or environment names a folder of this test."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) or str(folder) in process.environ().get("TMPDIR", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def chaos(folder: Path, *arguments: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "perdure.scripts.main", "chaos", *arguments],
        cwd=folder, env={**os.environ, "TMPDIR": str(folder)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_kind_of_fault_and_nothing_is_lost(tmp_path: Path) -> None:
    """The short form: each fault at least once, on real processes, within its time."""
    pytest.importorskip("torch")
    if os.environ.get("CI"):
        assert shutil.which("faketime"), "CI installs it"
    report, drawing = tmp_path / "report.json", tmp_path / "report.svg"
    done = chaos(tmp_path, "--seed", "1", "--seconds", str(SHORT), "--json", str(report), "--svg", str(drawing))
    text = done.stdout + done.stderr
    assert report.exists(), text
    figures = json.loads(report.read_text())
    assert done.returncode == 0, text
    assert figures["passed"], figures["problems"]
    kinds = {
        name for name, kind in NAMES.items() if kind.needs not in ("faketime", "clock") or shutil.which("faketime")
    }
    assert {name for name, detail in figures["fault_details"].items() if detail["fired"]} == kinds
    names = ("lost", "duplicated", "unexpected", "stale_writes", "wrong_outputs", "charged", "leaked_keys")
    assert [figures[name] for name in names] == [0] * len(names)
    assert figures["accepted"] > 50
    assert figures["resumed"] > 0
    assert figures["kills"] >= 7
    assert ElementTree.fromstring(drawing.read_text()).tag.endswith("svg")
    assert list(tmp_path.glob("perdure-chaos-*")) == [], "the logs of a good run are removed"
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_another_server_is_left_as_it_was(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    """What would harm it does not happen, nothing of a run stays on it, and nothing else is touched."""
    connection.set("mine", "1")
    before = (connection.info("server")["run_id"], connection.config_get("*"))
    only = "kill_worker,cut,redis_kill,full"
    done = chaos(tmp_path, "--url", redis_url, "--seed", "3", "--seconds", "15", "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("redis_kill", "full"):
        assert f"without {kind}: the server is not ours" in done.stderr
    assert connection.keys("*") == [b"mine"]
    assert (connection.info("server")["run_id"], connection.config_get("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--only", "earthquake"), "earthquake is no kind of fault"), (("--seconds", "10"), "need at least --seconds")],
)
def test_a_mistake_in_the_call_is_told_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = chaos(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
