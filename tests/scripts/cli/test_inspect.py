"""The commands that look into a pool, as files and as subcommands, on real data; each also without any, and without
Redis.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from perdure.producer import Client
from perdure.protocol.codec import pack
from perdure.protocol.keys import key, kind_of_key
from perdure.protocol.packed_state import pack_state
from perdure.protocol.queries.dead_letters import fingerprint_of
from perdure.protocol.queries.inspection import queue_facts
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.scripts.cli.decoding import constants, decode
from perdure.scripts.present.reading import Rates, duration, size
from tests.kit.hands import Hands
from tests.kit.lab import Quiet
from tests.kit.places import ROOT
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.scripts.commands import PATH, Run, call

FILES = {
    "inspect_queues": ["--sample", "0"],
    "inspect_requests": [],
    "inspect_workers": [],
    "inspect_leases": [],
    "inspect_checkpoints": [],
    "inspect_dead_letters": [],
    "inspect_redis": [],
}


@pytest.fixture
def told(quick: Run, redis_url: str) -> Any:
    """What a command prints as JSON."""

    def ask(*arguments: str, code: int = 0) -> Any:
        done = quick(*arguments, "--json", PERDURE_REDIS_URL=redis_url)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.fixture
def shown(quick: Run, redis_url: str) -> Any:
    """What it prints for people."""

    def ask(*arguments: str, code: int = 0) -> str:
        done = quick(*arguments, PERDURE_REDIS_URL=redis_url)
        assert done.returncode == code, done.stderr
        return done.stdout

    return ask


# --- the frame -----------------------------------------------------------------------------------


def test_every_file_is_named_here() -> None:
    """Two more need an argument: inspect_request.py (tests/scripts/cli/test_show.py) and inspect_key.py (below)."""
    there = {path.stem for path in (ROOT / "scripts").glob("inspect_*.py")}
    assert there == {*FILES, "inspect_request", "inspect_key"}
    assert not {path.stem for path in (ROOT / "scripts").glob("*.py")} & (set(sys.stdlib_module_names) - {"__init__"})


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_from_a_checkout_on_an_empty_redis(redis_url: str, name: str) -> None:
    """By its path and --url, in a process of its own; an empty pool is no error."""
    done = subprocess.run(
        [sys.executable, f"scripts/{name}.py", "--url", redis_url, "--json", *FILES[name]],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout).get("items", []) == []


LOOKS = [
    ("queues", "--sample", "0"), ("workers",), ("leases",), ("checkpoints",), ("dead-letters",), ("redis",),
    ("inspect-key", "rq:queues"), ("top", "--once"), ("doctor",), ("show", "a"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", LOOKS, ids=lambda arguments: arguments[0])
def test_without_redis_there_is_one_line(quick: Run, arguments: tuple[str, ...]) -> None:
    """Exit code 3, where and why on stderr, no password and no half a table."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://me:s3cret@127.0.0.1:{probe.getsockname()[1]}/0"
    done = quick(*arguments, "--url", url)
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "s3cret" not in done.stderr


@pytest.mark.parametrize("arguments", LOOKS[:6], ids=lambda arguments: arguments[0])
def test_an_empty_pool_is_told_in_words(shown: Any, quick: Run, redis_url: str, arguments: tuple[str, ...]) -> None:
    """For people on stderr, so that a pipe gets nothing. Redis itself is never empty of facts."""
    done = quick(*arguments, PERDURE_REDIS_URL=redis_url)
    assert done.returncode == 0
    assert bool(done.stdout) == (arguments[0] == "redis")
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("name", ["demo", "up", "reaper"])
def test_commands_of_no_other_table_have_an_example(name: str) -> None:
    assert f"  perdure {name}" in call(name, "--help").stdout.partition("Examples:")[2]


# --- queues, leases, checkpoints ----------------------------------------------------------------


def test_queues_tell_depth_age_and_rates(
    told: Any, shown: Any, client: Client, hands: Hands, connection: redis.Redis
) -> None:
    """Waiting, delayed, running and failed each where it is; what is canceled does not wait, and is not the oldest."""
    ids = [client.submit(PATH, {"n": n}).id for n in range(5)]
    client.submit(PATH, {"n": 9}, delay=60)
    client.submit(PATH, {"n": 9}, queue="other")
    hands.fail(hands.one(), FailureKind.INVALID_REQUEST, "no")
    hands.one()
    client.get(ids[2]).cancel()
    connection.hset(key("job", ids[2]), "enqueued_at", "2001-01-01T00:00:00.000000Z")
    connection.hset(key("job", ids[4]), "enqueued_at", "2020-01-01T00:00:00.000000Z")
    one, other = told("queues", "--sample", "0.01")["items"]
    assert (one["name"], one["waiting"], one["due_later"], one["running"], one["failed"]) == ("default", 2, 1, 1, 1)
    assert 5 * 365 * 86400 < one["oldest"] < 20 * 365 * 86400
    assert one["per_second"] == {"submitted": 0.0, "finished": 0.0, "failed": 0.0}
    assert one["counters"]["submitted"] == 6
    assert (other["name"], other["waiting"]) == ("other", 1)
    assert [item["name"] for item in told("queues", "other", "--sample", "0")["items"]] == ["other"]
    header, first, _ = shown("queues", "--sample", "0").splitlines()
    assert header.split() == [
        "QUEUE",
        "WAITING",
        "OLDEST",
        "LATER",
        "RUNNING",
        "FAILED",
        "WORKERS",
        "IN/S",
        "DONE/S",
        "FAILED/S",
    ]
    assert first.split()[-3:] == ["-", "-", "-"]


def test_rates_count_between_two_looks() -> None:
    """Nothing at the first look; a counter that began anew is no negative rate."""
    rates = Rates()
    assert rates.since_last({"q": {"finished": 4000}}) == {}
    rates._at -= 2000
    assert rates.since_last({"q": {"finished": 10_000}, "new": {"finished": 1000}}) == {
        "q": {"finished": pytest.approx(3.0, rel=0.05)},
        "new": {"finished": pytest.approx(0.5, rel=0.05)},
    }
    rates._at -= 1000
    assert rates.since_last({"q": {"finished": 2000}}) == {"q": {"finished": 0.0}}


def test_looking_at_queues_does_not_depend_on_what_waits(connection: redis.Redis, client: Client) -> None:
    """Two round trips of two commands a queue and a few heads, for three requests or for three thousand."""
    store = Store(connection, Settings())

    def commands() -> int:
        before: Any = connection.info("stats")
        queue_facts(store, ["default"])
        after: Any = connection.info("stats")
        return int(after["total_commands_processed"] - before["total_commands_processed"])

    client.submit_many([(PATH, {"n": 1})] * 20)
    few = commands()
    client.submit_many([(PATH, {"n": 1})] * 3000)
    assert commands() == few


def test_leases_are_listed_from_the_first_to_end(
    told: Any, shown: Any, client: Client, hands: Hands, connection: redis.Redis
) -> None:
    """With who holds them; --within leaves out what has time; an overdue one says so."""
    ids = [client.submit(PATH, {"n": n}).id for n in range(3)]
    for _ in ids:
        hands.one()
    connection.zadd(key("leases", "default"), {ids[1]: 1000.0})
    items = told("leases")["items"]
    assert next(item["id"] for item in items) == ids[1]
    assert sorted(item["id"] for item in items) == sorted(ids)
    assert items[0]["expires_in"] < 0 < items[1]["expires_in"] <= 30
    assert {(item["worker"], item["task"], item["queue"]) for item in items} == {("hands", PATH, "default")}
    assert [item["id"] for item in told("leases", "--within", "1")["items"]] == [ids[1]]
    assert len(told("leases", "--limit", "2")["items"]) == 2
    assert "overdue" in shown("leases", "--within", "1")


def test_checkpoints_are_listed_by_age_in_pages(
    told: Any, shown: Any, client: Client, hands: Hands, connection: redis.Redis
) -> None:
    """The oldest first; stale is what is old and held by nobody."""
    ids = [client.submit(PATH, {"n": n}).id for n in range(3)]
    for _ in ids:
        hands.put(hands.one(), 0, "a", "b", state=b"1234")
    connection.zadd(key("checkpoints"), {ids[2]: 1000.0, ids[0]: 2000.0})
    connection.hset(key("job", ids[2]), "execution", "")
    first = told("checkpoints", "--limit", "2")
    assert ([item["id"] for item in first["items"]], first["cursor"], first["number"]) == ([ids[2], ids[0]], 2, 3)
    assert [item["stale"] for item in first["items"]] == [True, False]
    (last,) = told("checkpoints", "--limit", "2", "--cursor", "2")["items"]
    assert (last["id"], last["seq"], last["offset"], last["bytes"], last["held"]) == (ids[1], 1, 2, 4, True)
    assert told("checkpoints", "--newest", "--limit", "1")["items"][0]["id"] == ids[1]
    assert "STALE" in shown("checkpoints", "--limit", "1")


def test_requests_are_found_by_worker_and_kind(told: Any, client: Client, hands: Hands) -> None:
    """Running and failed ones of a worker; failures of a kind; nobody's are nobody's."""
    ids = [client.submit(PATH, {"n": n}).id for n in range(3)]
    hands.fail(hands.one(), FailureKind.INVALID_REQUEST, "no")
    running = hands.one().id
    assert [item["id"] for item in told("list", "--worker", "hands")["items"]] == [running, ids[0]]
    assert [item["id"] for item in told("list", "--kind", "INVALID_REQUEST")["items"]] == [ids[0]]
    assert told("list", "--worker", "nobody")["items"] == []
    assert [item["id"] for item in told("list", "--worker", "hands", "--status", "started")["items"]] == [running]


# --- dead letters --------------------------------------------------------------------------------


def test_dead_letters_are_grouped_and_requeued_by_group(
    told: Any, shown: Any, quick: Run, redis_url: str, client: Client, hands: Hands
) -> None:
    """What differs in numbers is one error. Without --yes only the number is said; with it, the group waits again."""
    ids = [client.submit(PATH, {"n": n}).id for n in range(4)]
    for number in range(3):
        hands.fail(hands.one(), FailureKind.INVALID_REQUEST, f"item {number} of 'x{number}' is bad")
    hands.fail(hands.one(), FailureKind.INVALID_REQUEST, "another")
    large, small = told("dead-letters")["items"]
    assert (large["number"], large["kind"], large["task"], large["queues"]) == (3, "INVALID_REQUEST", PATH, ["default"])
    assert (small["number"], small["sample"], small["reason"]) == (1, ids[3], "another")
    assert large["error"] in shown("dead-letters")
    assert [item["id"] for item in told("dead-letters", "--ids", "--error", small["error"])["items"]] == [ids[3]]
    assert told("dead-letters", "--kind", "GPU_OOM")["items"] == []
    asked = quick("dead-letters", "--error", large["error"], "--requeue", PERDURE_REDIS_URL=redis_url)
    assert (asked.returncode, asked.stdout) == (2, "3 failures would be requeued.\n")
    assert "--yes" in asked.stderr
    assert told("dead-letters")["items"][0]["number"] == 3, "nothing was done"
    assert shown("dead-letters", "--error", large["error"], "--requeue", "--yes") == "3 failures requeued.\n"
    assert [item["error"] for item in told("dead-letters")["items"]] == [small["error"]]
    assert sorted(hands.one().id for _ in range(3)) == sorted(ids[:3])
    assert quick("dead-letters", "--yes", PERDURE_REDIS_URL=redis_url).returncode == 2


def test_what_rq_itself_failed_is_grouped_by_its_last_line(told: Any, connection: redis.Redis) -> None:
    """A plain job has no reason of ours; its traceback ends in one."""
    from rq import Queue

    queue = Queue("plain", connection=connection)
    for number in (1, 2):
        queue.enqueue("operator.truediv", number, 0)
    Quiet([queue], connection=connection).work(burst=True)
    (group,) = told("dead-letters", "--kind", "RQ")["items"]
    assert (group["number"], group["kind"], group["task"]) == (2, None, "operator.truediv")
    assert group["reason"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("no block 17 left", "no block 3 left", True),
        ("at 0x7f00aa in a", "at 0x7f11bb in a", True),
        ("'a' is not there", "'b' is not there", True),
        ("request 3fa94c01d2-77aa gone", "request aa94c01d21-0001 gone", True),
        ("out of memory", "out of time", False),
    ],
)
def test_a_fingerprint_leaves_out_what_changes(one: str, other: str, same: bool) -> None:
    assert (fingerprint_of("t", "K", one) == fingerprint_of("t", "K", other)) is same
    assert fingerprint_of("t", "K", one) != fingerprint_of("u", "K", one)


# --- the server, and single keys -----------------------------------------------------------------


def test_redis_is_shown_without_arguments_of_commands(
    told: Any, shown: Any, connection: redis.Redis, client: Client
) -> None:
    """Of a slow script its name; a payload that made it slow stays where it is."""
    before: Any = connection.config_get("slowlog-log-slower-than")
    connection.config_set("slowlog-log-slower-than", 0)
    try:
        client.submit(PATH, {"secret": "s3cret"})
    finally:
        connection.config_set("slowlog-log-slower-than", before["slowlog-log-slower-than"])
    facts = told("redis", "--slow", "128")
    assert "s3cret" not in json.dumps(facts)
    assert "EVALSHA enqueue" in {entry["command"] for entry in facts["slow"]}
    assert facts["memory"]["policy"] == "noeviction"
    assert (facts["persistence"]["aof"], facts["persistence"]["fsync"]) == (True, "everysec")
    assert 0 < facts["latency"]["min"] <= facts["latency"]["median"] <= facts["latency"]["max"]
    assert re.search(r"^policy +noeviction, \d+ keys evicted$", shown("redis"), re.MULTILINE)


def test_a_user_who_may_not_ask_sees_the_rest(redis_url: str, connection: redis.Redis, told: Any, quick: Run) -> None:
    """As the viewer of docs/security.md: no INFO, no CONFIG, no SLOWLOG."""
    connection.execute_command(
        "ACL", "SETUSER", "looks", "on", ">x", "%R~*", "&*", "-@all", "+@read", "+@connection", "+time"
    )  # type: ignore[no-untyped-call]
    url = redis_url.replace("redis://", "redis://looks:x@")
    try:
        for name in ("redis", "queues", "leases", "checkpoints", "dead-letters", "workers", "list"):
            done = quick(name, "--json", "--url", url, *(["--sample", "0"] if name == "queues" else []))
            assert done.returncode == 0, done.stderr
        assert json.loads(quick("redis", "--json", "--url", url).stdout)["slow"] is None
        assert "this user may not call INFO" in quick("doctor", "--url", url).stdout
    finally:
        connection.acl_deluser("looks")


def test_keys_are_decoded_and_nothing_is_unpickled(
    told: Any, shown: Any, client: Client, connection: redis.Redis
) -> None:
    """Each kind of key of a request that ran, was retried and failed; a pickle that would run code does not."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    pool.submit("a", retries=1)
    claim = hand.take("a")
    assert hand.commit(claim, pack_state({"step": 7}, limit=999), [{"token": 5}]) == "ok"
    hand.fail(claim)
    pool.make_due("a")
    hand.fail(hand.take("a"))
    job = told("inspect-key", key("job", "a"))
    assert (job["what"], job["id"], job["type"]) == ("job", "a", "hash")
    assert job["content"]["status"] == "failed"
    assert isinstance(job["content"]["payload"], dict | list | str | int | None)
    assert "perdure.workers.envelope.wrong_worker" in job["content"]["data"]["pickle of"]
    assert told("inspect-key", "output:a")["content"] == [[0, 0, [{"token": 5}]]]
    assert told("inspect-key", "checkpoint:a")["content"]["state"] == {"step": 7}
    assert [event["event"] for event in told("inspect-key", "history:a")["content"]] == ["retry", "failed"]
    (entry,) = told("inspect-key", "results:a")["content"]
    assert any("it broke" in line for line in entry["exc_string"])
    (row,) = told("inspect-key", key("failed", "gpu"))["content"]
    assert row["member"] == "a"
    assert row["date"].endswith("UTC")
    assert told("inspect-key", "queues")["content"] == [key("queue", "gpu")]
    assert "it broke" in shown("inspect-key", "results:a")
    connection.hset("elsewhere", mapping={"a": pack({"x": 1}, limit=99, what="payload"), "b": b"\xff\x00"})
    assert told("inspect-key", "elsewhere")["content"]["b"] == {"bytes": 2, "begin": "ff00"}
    assert shown("inspect-key", "nothing", code=2) == ""


def test_hostile_values_are_only_shown(tmp_path: Path) -> None:
    """A pickle that would make a file; a msgpack bomb of nothing; what claims to be a state."""
    file = tmp_path / "made"
    evil = b"cos\nsystem\n(S'touch " + str(file).encode() + b"'\ntR."
    assert "os system" in str(constants(evil)["pickle of"])
    assert not file.exists()
    assert decode("job", "payload", b"\xc1") == {"bytes": 1, "begin": "c1"}
    assert decode("checkpoint", "state", b"\xc1T\xff\xff\xff\x7f") == ""
    assert decode("history", "", b"no tabs") == "no tabs"
    assert decode("results", "return_value", b"!") == "!"


def test_the_kind_of_a_key_follows_from_its_name() -> None:
    assert kind_of_key(key("checkpoint", "a:b")) == ("checkpoint", "a:b")
    assert kind_of_key(key("checkpoints")) == ("checkpoints", "")
    assert kind_of_key("foreign") is None


def test_numbers_for_people() -> None:
    assert [duration(at) for at in (None, 0.44, 12.3, 150, 7300, 200_000, -3)] == [
        "-",
        "0.4 s",
        "12 s",
        "2 min",
        "2 h",
        "2 d",
        "-3.0 s",
    ]
    assert [size(at) for at in (None, 5, 2048, 3 * 2**20, 5 * 2**30)] == ["-", "5 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
