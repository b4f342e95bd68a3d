"""docs/protocol.md says what the scripts do, and what stands in Redis."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rq.job import Job

from perdure.protocol import limits, scripts
from perdure.protocol.keys import NAMES, key
from perdure.protocol.settings import Settings
from perdure.protocol.states import TRANSITIONS
from perdure.protocol.telemetry.measures import COUNTS
from tests.kit.docs.pages import blocks, commands, matches, names, rows, run, section
from tests.kit.lab import LONG, Lab, eventually
from tests.kit.places import ROOT
from tests.kit.protocol import lua_source

PAGE = ROOT / "docs" / "protocol.md"
TTLS = {
    "none": None, "3 s": 3, "20 s": 20, "60 s": 60, "300 s": 300, "600 s": 600, "2 hours": 2 * 3600, "1 day": 86_400,
    "7 days": 7 * 86_400,
}  # fmt: skip
RQS_OWN = ("rq:clean_", "rq:scheduler", ":dependents")
"""Keys that RQ makes for itself."""


def table(heading: str) -> dict[str, list[str]]:
    """The rows under a heading by each of the names in their first cell."""
    return {name: row for row in rows(section(PAGE, heading)) for name in names(row[0])}


def key_rows() -> dict[str, list[str]]:
    return table("Ours") | table("RQ's")


def test_the_states_are_those_of_the_code() -> None:
    """Each move, and the scripts that make it."""
    shown = {
        (names(start)[0], names(end)[0]): tuple(names(scripts_))
        for start, end, scripts_, _ in rows(section(PAGE, "States"))
    }
    assert shown == {(start, end): by for start, ends in TRANSITIONS.items() for end, by in ends.items()}


def test_the_keys_are_those_of_the_code() -> None:
    """No key without a row, no row without a key."""
    stems = {name: re.sub(r"<.*", "", name) for name in key_rows()}
    assert len(set(NAMES.values())) == len(NAMES)
    more = {"rq:worker:<name>:executions", "rq:perdure:replies:<id>:outputs", "rq:perdure:replies:<worker>"}
    assert sorted(stem for name, stem in stems.items() if name not in more) == sorted(NAMES.values())
    for name, row in key_rows().items():
        assert (row[1] == "channel") == (row[3] == ""), name
        assert row[3] in TTLS or row[1] == "channel", name
        assert row[4] in ("", "gone", "kept", "stays if it failed"), name


@pytest.mark.parametrize(
    ("heading", "hashes"),
    [
        ("`rq:job:<id>`", ["job"]),
        ("`rq:perdure:checkpoint:<id>`", ["checkpoint"]),
        ("`rq:perdure:incarnation:<incarnation>`", ["incarnation"]),
        ("`rq:perdure:pulse`, `rq:perdure:mode`", ["pulse", "mode"]),
    ],
)
def test_the_fields_are_those_that_the_scripts_write(heading: str, hashes: list[str]) -> None:
    """By name, in both directions."""
    written = {field for name, field in lua_source.written() if name in hashes}
    assert len(written) > 10
    assert set(table(heading)) == written


def test_what_is_counted_and_told_is_on_the_page() -> None:
    """Events of the counters and of a history."""
    counted = lua_source.counted() | set(COUNTS) | {"bucket", "sum"}
    assert {name for name in table("`rq:perdure:counters`") if ":" not in name} == counted
    assert set(table("Events of a history")) == lua_source.told()


def test_a_field_or_an_event_that_is_new_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading of the scripts, on which the tests above rest, sees what is added anywhere."""
    before = (set(lua_source.written()), lua_source.counted(), lua_source.told())
    whole = lua_source.sources()
    more = {
        "finish": "redis.call('HSET', name, 'status', 'finished', 'colour', id)",
        "claim": "redis.call('HSETNX', KEY.incarnation .. incarnation, 'shoes', 7)",
        "fail": "count('sung', queue)\nhistory(id, 'danced', worker)",
    }
    monkeypatch.setattr(
        lua_source, "sources", lambda: {name: f"{text}\n{more.get(name, '')}" for name, text in whole.items()}
    )
    assert set(lua_source.written()) - before[0] == {("job", "colour"), ("incarnation", "shoes")}
    assert lua_source.counted() - before[1] == {"sung"}
    assert lua_source.told() - before[2] == {"danced"}


def test_every_script_is_on_the_page_with_its_purpose() -> None:
    """What its header begins with; and who calls it does."""
    shown = {names(row[0])[0]: row for row in rows(section(PAGE, "Scripts"))}
    assert sorted(shown) == scripts.names()
    folders: dict[str, list[Path]] = {
        "producer": [*(ROOT / "producer").rglob("*.py")],
        "worker": [path for path in (ROOT / "workers").rglob("*.py") if path.name not in ("process.py", "testing.py")],
        "guardian": [
            ROOT / "workers" / "guardian" / "process.py",
            ROOT / "recovery" / "reaper.py",
            ROOT / "recovery" / "degradation.py",
            ROOT / "recovery" / "strays.py",
        ],
        "reaper": [ROOT / "recovery" / name for name in ("reaper.py", "degradation.py", "strays.py")],
        "perdure doctor --fix": [ROOT / "recovery" / "strays.py"],
    }
    texts = {who: "\n".join(path.read_text(encoding="utf-8") for path in paths) for who, paths in folders.items()}
    modules = ("store.py", "transitions/heartbeats.py", "transitions/sweeps.py")
    store = "\n".join((ROOT / "protocol" / name).read_text(encoding="utf-8") for name in modules)
    for name, (link, who, says) in shown.items():
        assert f"/blob/main/protocol/lua/{name}.lua)" in link
        assert scripts.load(name).body.startswith(f"-- {says}\n"), name
        methods = re.findall(rf"\n    def (\w+)\((?:(?!\n    def ).)*?(?:_call|load)\(\"{name}\"", store, re.DOTALL)
        assert methods, name
        through = re.findall(
            rf"\n    def (\w+)\((?:(?!\n    def ).)*?self\.(?:{'|'.join(methods)})\(", store, re.DOTALL
        )
        methods += through
        for caller, text in texts.items():
            calls = bool(re.search(rf"\b[Ss]tore\.({'|'.join(methods)})\b", text))
            assert calls == (caller in who.replace("`", "").split(", ")), (name, caller)


def test_limits_are_those_of_the_code() -> None:
    """The numbers in the prose."""
    text = PAGE.read_text(encoding="utf-8")
    assert f"at most {limits.MAX_REQUESTS} requests and {limits.MAX_BYTES >> 20} MiB" in text
    assert f"at {Settings().max_executions} it is a dead letter" in text
    refused = re.search(r"Redis refuses (.*), which store something new", text)
    assert refused
    assert set(re.findall(r"`(\w+)`", refused[1])) == set(scripts.GIVE_WAY)
    assert Settings().checkpoint_ttl == 3600
    assert Settings().checkpoint_interval == 0.1


def test_what_rq_cancels_stays_until_it_is_canceled_here_too(lab: Lab) -> None:
    """RQ gives it no TTL; the page says what does."""
    name = lab.submit("count", {"n": 1})
    Job.fetch(name, connection=lab.connection).cancel()
    assert (lab.waiting(), lab.record(name).status) == ([], "canceled")
    assert lab.connection.ttl(key("job", name)) == -1
    assert lab.store.cancel([(name, "")], reason="") == ["canceled"]
    assert 0 < int(str(lab.connection.ttl(key("job", name)))) <= 600


# --- a server on which things happen -------------------------------------------------------------------------


def found(lab: Lab) -> Iterator[tuple[str, list[str]]]:
    """Each key on the server, and the row that describes it."""
    patterns = {re.compile(re.sub(r"<\w+>", "[^:]+", name)): row for name, row in key_rows().items()}
    for raw in lab.connection.scan_iter(count=1000):
        name = raw.decode()
        if name.startswith(RQS_OWN) or name.endswith(RQS_OWN):
            continue
        fitting = [row for pattern, row in patterns.items() if pattern.fullmatch(name)]
        assert len(fitting) == 1, f"{name} is described by {len(fitting)} rows"
        yield name, fitting[0]


def check_keys(lab: Lab, ended: tuple[str, ...] = (), failed: tuple[str, ...] = ()) -> set[str]:
    """Every key is of the type, and lives as long, as the page says. Returns the rows that were met."""
    met = set()
    for name, (pattern, kind, _, ttl, after) in found(lab):
        real: Any = lab.connection.type(name)
        left: Any = lab.connection.ttl(name)
        if left == -2:
            continue  # it has gone meanwhile
        assert real.decode() == kind, name
        met.add(names(pattern)[0])
        if after == "stays if it failed":
            assert not any(identifier in name for identifier in ended if identifier not in failed), name
            assert TTLS[ttl] is None or 0 < left <= (TTLS[ttl] or 0), name
        elif after and any(identifier in name for identifier in ended):
            assert after == "kept", f"{name} is there after the end"
            assert 0 < left <= 600, name
        elif TTLS[ttl] is None:
            assert left == -1, name
        else:
            assert 0 < left <= (TTLS[ttl] or 0), name
    return met


@pytest.mark.slow
def test_every_key_of_a_pool_at_work_is_as_the_page_says(lab: Lab) -> None:
    """Type and TTL, while requests wait, run, are large, have failed, been lost and finished."""
    lab.reaper()
    lab.worker(queues=("gpu",))
    worker = lab.worker(queues=("other",))
    late = lab.submit("count", {"n": 1}, delay=600.0, deadline=700.0)
    failed = lab.submit("boom", {}, max_retries=0)
    goes = lab.folder / "goes"
    payload = {"n": 60, "sleep": 0.05, "bytes": 3 << 20, "goes": str(goes)}
    large = lab.submit("laden", payload, queue="other")
    lab.moved(large, 3)
    eventually(lambda: lab.connection.exists(*[key("chunk", f"{large}:{n}:1") for n in range(1, 60)]))
    lab.ended(failed)
    runs = lab.submit("count", {"n": 100_000, "sleep": 0.02})
    lab.moved(runs)
    waits = lab.submit("count", {"n": 1})
    met = check_keys(lab, (failed,), (failed,))
    worker.kill()
    eventually(lambda: ("redelivered", "WORKER_LOST") in lab.events(large))
    goes.touch()
    lab.worker(queues=("other",))
    lab.ended(large)
    lab.store.cancel([(late, ""), (waits, "")], reason="")
    met |= check_keys(lab, (failed, large, late, waits), (failed,))
    assert len(met) >= 30, sorted(met)
    fields = set()
    for identifier in (late, failed, large, runs, waits):
        stored: Any = lab.connection.hkeys(key("job", identifier))
        fields |= {name.decode() for name in stored}
    assert fields <= set(table("`rq:job:<id>`"))


@pytest.mark.slow
def test_the_life_of_a_request_is_as_the_page_shows_it(lab: Lab, tmp_path: Path) -> None:
    """Its commands, at the four moments that it names, print what it shows."""
    if not shutil.which("redis-cli"):
        pytest.skip("needs redis-cli: apt-get install redis-tools")
    listed = blocks(PAGE)
    assert [(block.language, block.kind) for block in listed] == [
        ("python", "tasks"),
        ("console", "waiting"),
        ("console", "running"),
        ("console", "resumed"),
        ("console", "ended"),
    ]
    (tmp_path / "app").mkdir()
    # However slow the commands are, it has not ended before it is told to.
    goes = tmp_path / "goes"
    wait = f"while i == 90 and not os.path.exists({str(goes)!r}):\n            time.sleep(0.01)"
    code = (
        listed[0]
        .text.replace("import time\n", "import os, time\n")
        .replace("time.sleep(0.05)", f"time.sleep(0.05)\n        {wait}")
    )
    (tmp_path / "app" / "tasks.py").write_text(code, encoding="utf-8")
    lab.settings |= {"heartbeat_timeout": LONG, "step_timeout": LONG}
    environment = {"PYTHONPATH": str(tmp_path)}
    submit = re.search(r"^`(perdure submit .+?)` prints its id", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert submit
    urls = {**os.environ, "PERDURE_REDIS_URL": lab.url}
    name = run(submit[1], folder=tmp_path, environment=urls).stdout.strip()

    def show(kind: str) -> None:
        (block,) = [block for block in listed if block.kind == kind]
        for command, shown in commands(block):
            done = run(
                command.replace("REQUEST", name).replace("redis-cli", f"redis-cli -u {lab.url}"),
                folder=tmp_path,
                environment=urls,
            )
            assert done.returncode == 0, done.stderr
            several = "inspect-key" in command
            assert several or matches(shown.replace("REQUEST", name), done.stdout), f"{command}\n{done.stdout}"
            assert not several or f"rq:perdure:output:{name}" in done.stdout

    show("waiting")
    workers = [lab.worker(environment=environment) for _ in range(2)]
    lab.moved(name, 3)
    (holder,) = [worker for worker in workers if worker.name == lab.record(name).worker]
    show("running")
    holder.kill()
    eventually(lambda: ("redelivered", "WORKER_LOST") in lab.events(name) and lab.record(name).execution)
    show("resumed")
    goes.touch()
    lab.ended(name)
    show("ended")
