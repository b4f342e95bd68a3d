"""The ``perdure`` command as a person calls it: the installed script, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from perdure.producer import Client
from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.scripts.main import COMMANDS
from tests.kit.hands import Hands
from tests.kit.scripts.commands import LONG, PATH, PERDURE, Run, call

# --- the frame -----------------------------------------------------------------------------------


def test_help_shows_all_commands_and_loads_none() -> None:
    code = (
        "import sys\nfrom perdure.scripts.main import main\nstatus = main(['--help'])\n"
        "print([name for name in ('redis', 'rq', 'rich', 'torch') if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in ("submit", "show", "list", "worker"))


def test_the_version_is_shown() -> None:
    assert re.fullmatch(r"perdure, version \d+\.\d+\.\d+\S*\n", call("--version").stdout)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("demo", "up", "reaper")])
def test_each_command_has_help_with_an_example(quick: Run, name: str) -> None:
    done = quick(name, "--help")
    assert done.returncode == 0
    assert f"perdure {name}" in done.stdout.partition("Examples:")[2]


def test_an_unknown_command_is_a_usage_error() -> None:
    done = call("sumbit")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sumbit" in done.stderr


def test_an_unknown_setting_is_named_with_the_nearest(perdure: Run) -> None:
    done = perdure("list", PERDURE_HEARTBEAT_TIMOUT="3")
    assert done.returncode == 2
    assert "did you mean PERDURE_HEARTBEAT_TIMEOUT?" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("submit", PATH, "{}"), marks=pytest.mark.slow),
        ("show", "a"),
        ("list",),
        ("result", "a"),
        ("cancel", "a"),
        ("requeue", "a"),
        ("worker", "gpu"),
        pytest.param(("reaper",), marks=pytest.mark.slow),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_redis_that_is_away_is_told_without_its_password(quick: Run, arguments: tuple[str, ...]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://me:s3cret@127.0.0.1:{probe.getsockname()[1]}/0"
    run = call if arguments[0] in ("submit", "reaper") else quick
    for done in (run(*arguments, PERDURE_REDIS_URL=url), run(*arguments, "--url", url), run(*arguments)):
        assert (done.returncode, done.stdout) == (3, "")
        assert "perdure up" in done.stderr
        assert "s3cret" not in done.stderr


# --- submit --------------------------------------------------------------------------------------


def test_submit_prints_the_id(perdure: Run, client: Client) -> None:
    identifier = perdure("submit", PATH, '{"n": 3}', "--queue", "gpu").stdout.strip()
    assert client.get(identifier).record().queue == "gpu"
    done = perdure("submit", PATH, "-", "--id", "mine", "--json", stdin="[1, 2]")
    assert json.loads(done.stdout) == {"id": "mine", "queue": "default"}
    options = (
        "--priority",
        "high",
        "--delay",
        "60",
        "--idempotency-key",
        "k",
        "--meta",
        '{"a": 1}',
        "--step-timeout",
        "2.5",
        "--degraded",
        '{"n": 1}',
        "--json",
    )
    done = perdure("submit", PATH, '{"n": 2}', *options)
    assert json.loads(done.stdout)["queue"] == "default-high"
    assert perdure("submit", PATH, '{"n": 2}', *options).stdout == done.stdout
    assert client.get(json.loads(done.stdout)["id"]).status() == "scheduled"


@pytest.mark.parametrize(
    ("arguments", "stdin", "text"),
    [
        (("submit", PATH, '{"n": 3,}'), "", "at line 1, column 9"),
        (("submit", PATH, "-"), '{"a": 1,\n "b": nope}', "at line 2, column 7"),
        (("submit", PATH, ""), "", "not JSON"),
        (("submit", PATH, "NaN"), "", "NaN is no JSON number"),
        (("submit", PATH, "[" * 100_000), "", "nested too deeply"),
        (("submit", PATH, "1" + "0" * 30), "", "64 bits"),
        (("submit", PATH, "1" * 5000), "", "not JSON"),
        (("submit", PATH, '"\\ud800"'), "", "surrogate"),
        (("submit", "count", "1"), "", "dotted path"),
        (("submit", "perdure.nothing.here", "1"), "", "cannot import"),
        (("submit", PATH, "1", "--queue", "x" * 501), "", "queue name"),
        (("submit", PATH, "1", "--id", "a/b"), "", "request id"),
        (("submit", PATH, "1", "--id", "a", "--idempotency-key", "b"), "", "either an id or"),
        (("submit", PATH, "1", "--priority", "urgent"), "", "'high', 'normal' or 'low'"),
        (("submit", PATH, "1", "--meta", "{"), "", "--meta is not JSON"),
        (("submit", PATH, "1", "--meta", "[]"), "", "meta must be a dict"),
        (("submit", PATH, "1", "--delay", "-1"), "", "delay must be a number of seconds"),
        (("submit", PATH, "1", "--deadline", "0"), "", "deadline must be a number of seconds"),
        (("submit", PATH, "1", "--queue-timeout", "0"), "", "queue_timeout must be a number of seconds"),
        (("submit", PATH, "1", "--step-timeout", "-1"), "", "step_timeout must be a number of seconds"),
        (("submit", PATH, "{}", "--degraded", "{"), "", "--degraded is not JSON"),
        (("submit", PATH, "1", "--degraded", '{"n": 1}'), "", "must be a dict, but is an int"),
        (("submit", PATH, "1", "--max-retries", "-2"), "", "max_retries"),
        (("submit", PATH, "1", "--timeout", "3"), "", "--wait or --stream"),
        (("list", "--status", "bogus"), "", "status is one of"),
        (("list", "--cursor", "junk"), "", "cursor"),
        (("show", "nobody"), "", "no request nobody"),
        (("show", "no/body"), "", "request id"),
        (("result", "nobody"), "", "no request nobody"),
        (("cancel", "nobody"), "", "no request nobody"),
        (("cancel",), "", "ID"),
        (("requeue", "nobody"), "", "no request nobody"),
        (("requeue",), "", "--all"),
        (("requeue", "a", "--queue", "b"), "", "--all"),
        (("worker",), "", "QUEUE"),
        (("worker", "x" * 501), "", "queue name"),
        (("worker", "--", "--burst"), "", "QUEUE"),
        (("worker", "gpu", "--heartbeat", "0"), "", "PERDURE_HEARTBEAT"),
        (("list", "--url", "http://localhost"), "", "redis://"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_mistake_in_the_call_is_one_message(
    quick: Run, redis_url: str, arguments: tuple[str, ...], stdin: str, text: str
) -> None:
    done = quick(*arguments, stdin=stdin, PERDURE_REDIS_URL=redis_url)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr


def test_a_taken_id_is_a_usage_error(perdure: Run, client: Client) -> None:
    client.submit(PATH, 1, id="a")
    done = perdure("submit", PATH, "1", "--id", "a")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the id a " in done.stderr


def started(*arguments: str, url: str) -> subprocess.Popen[str]:
    """A command that runs while the test plays the worker."""
    return subprocess.Popen(
        [PERDURE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PERDURE_REDIS_URL": url},
    )


def test_submit_streams_outputs_and_waits(redis_url: str, hands: Hands) -> None:
    process = started("submit", PATH, "1", "--stream", "--wait", "--timeout", "50", url=redis_url)
    assert process.stderr is not None
    assert re.match(r"request \w+\n", process.stderr.readline())
    claim = hands.one()
    hands.put(claim, 0, 1, [2], "three", state=b"1234")
    hands.finish(claim, 3, {"sum": 6})
    out, err = process.communicate(timeout=LONG)
    assert (out, err, process.returncode) == ('1\n[2]\nthree\n{"sum": 6}\n', "", 0)


@pytest.mark.slow
def test_generated_text_is_printed_as_text(perdure: Run, client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    claim = hands.one()
    hands.put(claim, 0, {"token": 1, "text": "日本"}, {"token": 2, "text": ", \x1b[31mred"}, state=b"1234")
    hands.finish(claim, 2, None)
    assert perdure("result", handle.id, "--stream").stdout == "日本, \\x1b[31mred\n"
    assert perdure("result", handle.id, "--stream", "--start", "2").stdout == ""
    assert perdure("result", handle.id, "--stream", PYTHONIOENCODING="latin-1").stdout == "??, \\x1b[31mred\n"


def test_json_streams_are_lines(perdure: Run, client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    claim = hands.one()
    hands.put(claim, 0, "a", b"\xff", state=b"1234")
    hands.finish(claim, 2, {1: b"\x00"})
    lines = perdure("result", handle.id, "--stream", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"offset": 0, "output": "a"},
        {"offset": 1, "output": {"base64": "/w=="}},
        {"id": handle.id, "status": "finished", "result": {"1": {"base64": "AA=="}}},
    ]


def test_a_failed_request_is_exit_code_1(perdure: Run, client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1)
    hands.fail(hands.one(), FailureKind.INVALID_REQUEST, "max_tokens must be at least 1")
    done = perdure("result", handle.id, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "id": handle.id,
        "status": "failed",
        "error": {"kind": "INVALID_REQUEST", "reason": "max_tokens must be at least 1"},
    }
    assert "max_tokens must be at least 1" in done.stderr
    assert perdure("result", handle.id).stdout == ""


def test_a_result_that_is_not_there_in_time_is_exit_code_4(perdure: Run, client: Client) -> None:
    handle = client.submit(PATH, 1)
    for options in ((), ("--stream",)):
        done = perdure("result", handle.id, "--timeout", "0", *options)
        assert (done.returncode, done.stdout) == (4, "")
        assert f"perdure show {handle.id}" in done.stderr


def test_ctrl_c_leaves_the_request_alone(redis_url: str, connection: redis.Redis) -> None:
    process = started("submit", PATH, "1", "--wait", "--timeout", "50", url=redis_url)
    assert process.stderr is not None
    identifier = process.stderr.readline().split()[1]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONG)
    assert (out, process.returncode) == ("", 130)
    assert f"perdure result {identifier}" in err or err.strip() in ("", "Aborted!")
    assert "Traceback" not in err
    assert connection.hget(key("job", identifier), "status") == b"queued"


# --- show, list ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_show_has_the_promised_keys(perdure: Run, client: Client, hands: Hands) -> None:
    handle = client.submit(PATH, 1, id="shown")
    waiting = json.loads(perdure("show", "shown", "--json").stdout)
    names = "id status queue task attempt executions worker offset checkpoint error history"
    assert set(names.split()) <= set(waiting)
    assert (waiting["status"], waiting["worker"], waiting["checkpoint"], waiting["error"]) == (
        *("queued", None, None, None),
    )
    claim = hands.one()
    hands.put(claim, 0, "a", "b", state=b"1234")
    running = json.loads(perdure("show", "shown", "--json").stdout)
    assert (running["status"], running["attempt"], running["executions"], running["worker"], running["offset"]) == (
        *("started", 1, 1, "hands", 2),
    )
    assert list(running["checkpoint"]) == ["seq", "offset", "age", "bytes"]
    assert (running["checkpoint"]["offset"], running["checkpoint"]["bytes"]) == (2, 4)
    hands.fail(claim, FailureKind.INVALID_REQUEST, "a reason\x1b[0m")
    failed = json.loads(perdure("show", "shown", "--json").stdout)
    assert failed["error"] == {"kind": "INVALID_REQUEST", "reason": "a reason\x1b[0m"}
    events = [event["event"] for event in failed["history"]]
    assert events == ["submitted", "started", "failed"]
    assert {"at", "event", "worker", "execution", "offset", "reason"} <= set(failed["history"][-1])
    text = perdure("show", "shown").stdout
    assert "INVALID_REQUEST: a reason\\x1b[0m" in text
    assert "\x1b" not in text
    assert handle.done()


@pytest.mark.slow
def test_show_says_what_was_asked_for_and_what_it_waits_for(
    perdure: Run, client: Client, hands: Hands, connection: redis.Redis
) -> None:
    """Dates with their distance on the server's clock; and no lines about what was not asked for."""
    handle = client.submit(
        PATH,
        {"n": 9},
        priority="low",
        idempotency_key="k",
        delay=3600,
        deadline=7200,
        queue_timeout=60,
        step_timeout=2.5,
        degraded={"n": 1},
        meta={"user": "ä", "night": [1, None]},
    )
    facts = json.loads(perdure("show", handle.id, "--json").stdout)
    now = connection.time()[0]
    assert [facts["due"] - now, facts["deadline"] - now, facts["queue_deadline"] - now] == pytest.approx(
        [3600, 7200, 3660], abs=LONG
    )
    del facts["due"], facts["deadline"], facts["queue_deadline"]
    expected = {
        "status": "scheduled", "queue": "default-low", "priority": "low", "step_timeout": 2.5, "degraded": False,
        "idempotent": True, "meta": {"user": "ä", "night": [1, None]}, "retries_left": 3,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    text = perdure("show", handle.id).stdout
    assert re.search(r"^due +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, in (1:00:00|0:59:\d\d)$", text, re.MULTILINE)
    assert re.search(r"^deadline .*, in (2:00:00|1:59:\d\d)$", text, re.MULTILINE)
    assert re.search(r"^claim until .*, in 1:0[01]:\d\d$", text, re.MULTILINE)
    assert "step timeout  2.5 s\ndegraded      no, but" in text
    assert 'meta          {"user": "ä", "night": [1, null]}' in text
    connection.hset(key("job", handle.id), mapping={"degraded": "1", "meta": b"cos\nsystem\n.", "deadline": 1000})
    facts = json.loads(perdure("show", handle.id, "--json").stdout)
    assert (facts["degraded"], facts["meta"], facts["deadline"]) == (True, None, 1.0)
    text = perdure("show", handle.id).stdout
    assert "degraded      yes, it has its overrides" in text
    assert re.search(r"^deadline +1970-01-01 00:00:01 UTC, \d+ days, .* ago$", text, re.MULTILINE)
    plain = client.submit(PATH, 1).id
    text = perdure("show", plain).stdout
    lines = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert lines == ["request", "status", "queue", "task", "attempt", "executions", "worker", "outputs", "history"]
    facts = json.loads(perdure("show", plain, "--json").stdout)
    assert [facts[name] for name in ("due", "deadline", "queue_deadline", "step_timeout", "degraded")] == [None] * 5
    assert (facts["idempotent"], facts["meta"], facts["priority"]) == (False, {}, "normal")


@pytest.mark.slow
def test_list_shows_requests_page_by_page(perdure: Run, client: Client) -> None:
    assert perdure("list").stdout == ""
    client.submit_many([{"task": PATH, "payload": 1, "id": f"r{number}"} for number in range(5)])
    page = json.loads(perdure("list", "--json", "--limit", "3").stdout)
    assert [item["id"] for item in page["items"]] == ["r0", "r1", "r2"]
    done = perdure("list", "--limit", "3", "--cursor", page["cursor"])
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["ID", "STATUS", "QUEUE"],
        ["r3", "queued", "default"],
        ["r4", "queued", "default"],
    ]
    assert json.loads(perdure("list", "--json", "--status", "failed").stdout) == {"items": [], "cursor": None}
    process = subprocess.run(f"{PERDURE} list | head -n 1", shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in process.stderr


# --- cancel, requeue -----------------------------------------------------------------------------


@pytest.mark.slow
def test_cancel_says_what_became_of_each(perdure: Run, client: Client, hands: Hands) -> None:
    for name in ("running", "waiting"):
        client.submit(PATH, 1, id=name)
    hands.one()
    done = perdure("cancel", "waiting", "running", "nobody", "--reason", "enough")
    assert done.stdout.splitlines() == ["waiting  canceled", "running  cancel requested"]
    assert done.returncode == 2
    assert "no request nobody" in done.stderr
    items = json.loads(perdure("cancel", "waiting", "--json").stdout)["items"]
    assert items == [{"id": "waiting", "canceled": True, "status": "canceled"}]
    assert perdure("result", "waiting").returncode == 1


def test_requeue_sends_failed_requests_back(
    perdure: Run, client: Client, hands: Hands, connection: redis.Redis
) -> None:
    for name in ("a", "b", "c"):
        client.submit(PATH, 1, id=name)
    claims = [hands.one() for _ in range(2)]
    for claim in claims:
        hands.put(claim, 0, "x", state=b"1234")
        hands.fail(claim, FailureKind.INVALID_REQUEST, "broken")
    hands.held.clear()
    done = perdure("requeue", "a", "c", "nobody")
    assert (done.returncode, done.stdout) == (2, "a\n")
    assert "request c is queued, not failed" in done.stderr
    assert json.loads(perdure("requeue", "--all", "--json").stdout) == {"items": [{"id": "b"}]}
    assert perdure("requeue", "--all").returncode == 0
    assert [connection.ttl(key("job", name)) for name in "abc"] == [-1, -1, -1]
    order = [hands.one() for _ in range(3)]
    assert [claim.id for claim in order] == ["c", "a", "b"]
    assert [claim.offset for claim in order] == [0, 1, 1]  # from the checkpoint
    hands.finish(order[1], 1, "done")
    assert perdure("result", "a").stdout == "done\n"


# --- processes -----------------------------------------------------------------------------------


def test_worker_becomes_rqs_and_hides_the_password(redis_url: str, tmp_path: Path) -> None:
    """A sitecustomize stands in for the worker: it writes down what the process was given, and ends it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os, sys\n"
        "if '-m' in sys.orig_argv:\n"
        "    names = ('RQ_REDIS_URL', 'PERDURE_REDIS_URL', 'PERDURE_HEARTBEAT_TIMEOUT', 'PERDURE_TASKS')\n"
        "    print(json.dumps([sys.orig_argv[1:], {name: os.environ.get(name) for name in names}]), flush=True)\n"
        "    os._exit(0)\n"
    )
    secret = redis_url.replace("redis://", "redis://:s3cret@")
    options = ["--url", secret, "--burst", "--heartbeat-timeout", "9", "--tasks", "a.b, c.d", "--name", "w1"]
    with redis.Redis.from_url(redis_url) as connection:
        connection.config_set("requirepass", "s3cret")
        try:
            done = call("worker", "high", "low", *options, "--", "--max-idle-time", "60", PYTHONPATH=str(tmp_path))
        finally:
            connection.execute_command("AUTH", "s3cret")
            connection.config_set("requirepass", "")
    arguments, environment = json.loads(done.stdout)
    assert arguments == [
        *("-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--name", "w1", "--burst"),
        *("--max-idle-time", "60", "--", "high", "low"),
    ]
    assert environment == {
        "RQ_REDIS_URL": secret,
        "PERDURE_REDIS_URL": secret,
        "PERDURE_HEARTBEAT_TIMEOUT": "9.0",
        "PERDURE_TASKS": "a.b,c.d",
    }


def test_reaper_is_the_module_by_another_name(redis_url: str) -> None:
    assert "--reap-interval" in call("reaper", "--help").stdout
    process = started("reaper", "--reap-interval", "0.1", url=redis_url)
    assert process.stderr is not None
    while "sweeping" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=LONG)
    assert process.returncode == 0
