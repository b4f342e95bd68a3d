"""``perdure doctor``: each finding by what was read, and the real thing: a stock worker killed with a request in its
hands.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from typing import Any

import psutil
import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.queries.inspection import QueueFacts
from perdure.protocol.queries.server_load import pressure
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.recovery.strays import Stray, find, find_everywhere, take_back
from perdure.scripts.cli.findings import Level, judge_pool, judge_server
from perdure.scripts.cli.host_findings import judge_host
from perdure.scripts.cli.top import Looks, headline
from tests.kit.lab import Lab, eventually, send
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.scripts.commands import Run, call


def doctor(lab_or_url: Any, *flags: str) -> tuple[int, dict[str, Any]]:
    url = getattr(lab_or_url, "url", lab_or_url)
    done = call("doctor", "--json", *flags, PERDURE_REDIS_URL=url)
    return done.returncode, json.loads(done.stdout)


def bad(told: dict[str, Any]) -> list[str]:
    return [item["what"] for item in told["findings"] if item["level"] != "ok"]


@pytest.mark.slow
def test_priorities_of_a_served_queue_are_served_in_every_view(lab: Lab) -> None:
    """A worker for gpu serves gpu-high and gpu-low; nobody says that what waits there waits for nobody."""
    lab.worker()
    lab.moved(lab.submit("count", {"n": 10_000, "sleep": 0.05}))
    for queue in ("gpu-high", "gpu-low", "cpu-low"):
        lab.submit("count", {"n": 1}, queue=queue)
    assert [what for what in bad(doctor(lab)[1]) if "wait in" in what] == ["1 requests wait in cpu-low"]
    queues = json.loads(call("queues", "--json", PERDURE_REDIS_URL=lab.url).stdout)["items"]
    assert {item["name"]: item["workers"] for item in queues} == {"gpu": 1, "gpu-high": 1, "gpu-low": 1, "cpu-low": 0}
    page = {item["name"]: item["workers"] for item in Looks(Settings(redis_url=lab.url), None, 10).take()["queues"]}
    assert page == {"gpu": 1, "gpu-high": 1, "gpu-low": 1, "cpu-low": 0}


def test_a_missing_task_is_judged_per_priority() -> None:
    """One worker for gpu, and one for gpu-low only: they serve one queue together."""
    lack = {"task": "app.big", "reason": "no memory"}
    one = {"worker": "one", "queues": ["gpu"], "ready": True, "dead_in": 3, "unfit": "", "unable": [lack], "stale": ""}
    one |= {"held": [], "interval": None, "usual": None}
    other = one | {"worker": "other", "queues": ["gpu-low"], "unable": []}
    found = judge_pool(
        workers=[one, other],
        stock={},
        queues=[],
        overdue=[],
        pulse_age=0,
        unfit=[],
        mode="",
        states=0,
        room=None,
        reap_interval=1,
        heartbeat=1,
    )
    assert [item.level for item in found if "could not load" in item.what] == [Level.WARN]


# --- RQ's own hole -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_lost_by_a_stock_worker_is_requeued(lab: Lab) -> None:
    """Kill -9 of RQ's own worker and its horse while it has a request: found, requeued, run to its end."""
    one = lab.submit("count", {"n": 3})
    stock = lab.worker("-w", "held_jobs.SlowStock", ours=False)
    eventually(lambda: lab.connection.zcard(key("wip", "gpu")) and stock.children())
    # The worker before its horse: it must not see the horse die.
    send(stock.pid, signal.SIGSTOP)
    for pid in [*stock.children(), stock.pid]:
        send(pid, signal.SIGKILL)
    stock.process.wait()
    assert lab.waiting() == []
    code, told = doctor(lab, "--stuck", "0")
    assert code == 4
    (stray,) = told["strays"]
    assert (stray["id"], stray["where"]) in ((one, "started"), (one, "intermediate"))
    assert any("RQ's own worker was killed" in what for what in bad(told))
    assert any(f"worker {stock.name} on gpu is RQ's own" in what for what in bad(told))
    early = doctor(lab, "--stuck", "3600")[1]["strays"]
    assert all(stray["where"] == "intermediate" for stray in early), "a worker may still give it back"
    _, told = doctor(lab, "--stuck", "0", "--fix")
    assert told["fixed"] == [one]
    assert lab.waiting() == [one]
    lab.worker()
    lab.check(one, 3)
    assert ("readmitted", "") in lab.events(one)
    assert lab.connection.llen(f"{key('queue', 'gpu')}:intermediate") == 0
    assert doctor(lab, "--stuck", "0")[1]["strays"] == []


@pytest.mark.slow
def test_a_request_that_rq_failed_is_requeued(lab: Lab) -> None:
    """Kill -9 of the horse alone: RQ's worker fails the request; --fix has it wait again."""
    one = lab.submit("count", {"n": 3}, max_retries=0)
    stock = lab.worker("-w", "held_jobs.SlowStock", ours=False)
    horse = eventually(lambda: stock.children() and lab.connection.zcard(key("wip", "gpu")) and stock.children()[0])
    psutil.Process(horse).kill()
    eventually(lambda: lab.connection.zscore(key("failed", "gpu"), one))
    stock.kill_tree()
    code, told = doctor(lab)
    assert (code, [(stray["id"], stray["where"]) for stray in told["strays"]]) == (4, [(one, "failed")])
    assert doctor(lab, "--fix")[1]["fixed"] == [one]
    lab.worker()
    lab.check(one, 3)


def test_what_stands_nowhere_is_found_among_all_jobs(connection: redis.Redis) -> None:
    """A pop without a trace: only a walk through all jobs finds it, and takes nothing that waits, runs or has ended."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    pool.submit("lost", "waits", "runs", "failed", "canceled", "between", retries=0)
    store = Store(connection, Settings())
    for name in ("lost", "runs", "failed", "canceled", "between"):
        connection.lrem(key("queue", "gpu"), 1, name)
    pool.connection.rpush(key("queue", "gpu"), "runs", "failed")
    connection.lrem(key("queue", "gpu"), 1, "waits")
    for name in ("runs", "failed"):
        claim = hand.take(name)
        if name == "failed":
            hand.fail(claim)
    pool.cancel("canceled")
    connection.rpush(key("queue", "gpu"), "waits")
    connection.rpush(f"{key('queue', 'gpu')}:intermediate", "between")
    assert [(stray.id, stray.where) for stray in find(store, ["gpu"], stuck=0)] == [("between", "intermediate")]
    assert [(stray.id, stray.where) for stray in find_everywhere(store, ["gpu"])] == [("lost", "nowhere")]
    strays = [*find(store, ["gpu"], stuck=0), *find_everywhere(store, ["gpu"])]
    assert take_back(
        store, [*strays, *(Stray(id=name, queue="gpu", where="nowhere") for name in ("runs", "failed"))]
    ) == [
        "between",
        "lost",
    ]
    assert pool.waiting() == ["lost", "between", "waits"]
    assert connection.llen(f"{key('queue', 'gpu')}:intermediate") == 0


# --- a pool that is well, and one that is not ------------------------------------------------------


@pytest.mark.slow
def test_a_pool_that_is_well_has_nothing_to_change(lab: Lab) -> None:
    lab.worker()
    lab.reaper()
    code, told = doctor(lab, "--strict")
    # This machine may be slow, and far from its clock.
    assert [what for what in bad(told) if "round trip" not in what and "driver" not in what] == []
    assert code in (0, 4)
    assert "ok    1 of 1 workers are ready" in call("doctor", PERDURE_REDIS_URL=lab.url).stdout


def test_requests_that_nobody_serves_are_unhealthy(quick: Run, redis_url: str, connection: redis.Redis) -> None:
    """Exit code 4, and the command that helps."""
    Pool.over(connection).submit("a", "b")
    done = quick("doctor", PERDURE_REDIS_URL=redis_url)
    assert done.returncode == 4
    assert "fail  2 requests wait in gpu\n      no worker lives\n      change: perdure worker gpu\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_an_eviction_policy_is_told_with_its_line(quick: Run, redis_url: str, connection: redis.Redis) -> None:
    """The checks that workers make at their start."""
    before: Any = connection.config_get("maxmemory*")
    connection.config_set("maxmemory", 10**9)
    connection.config_set("maxmemory-policy", "allkeys-lru")
    try:
        done = quick("doctor", PERDURE_REDIS_URL=redis_url)
    finally:
        connection.config_set("maxmemory", before["maxmemory"])
        connection.config_set("maxmemory-policy", before["maxmemory-policy"])
    assert done.returncode == 4
    assert "change: redis.conf: maxmemory-policy noeviction" in done.stdout


def test_a_server_that_keeps_requests_in_more_memory_is_told(
    quick: Run, redis_url: str, connection: redis.Redis
) -> None:
    """The two lines of a stock server, each with its change."""
    names = ("hash-max-ziplist-value", "stream-node-max-bytes")
    before: Any = {name: connection.config_get(name)[name] for name in names}
    for name, value in zip(names, (64, 4096), strict=True):
        connection.config_set(name, value)
    try:
        done = quick("doctor", PERDURE_REDIS_URL=redis_url)
    finally:
        for name, value in before.items():
            connection.config_set(name, value)
    assert "warn  hash-max-listpack-value is 64\n" in done.stdout
    assert "change: redis.conf: hash-max-listpack-value 1024\n" in done.stdout
    assert "change: redis.conf: stream-node-max-bytes 512\n" in done.stdout
    assert "max" not in quick("doctor", PERDURE_REDIS_URL=redis_url).stdout.replace("maxmemory", "")


# --- the judgements --------------------------------------------------------------------------------

WELL: dict[str, Any] = {
    "workers": [
        {"worker": "w", "host": "h", "queues": ["gpu"], "ready": True, "dead_in": 4.0, "age": 1.0, "unfit": "",
        "unable": [], "stale": "", "held": ["a"], "interval": 0.12, "usual": 0.1},
    ],
    "stock": {}, "queues": [], "overdue": [], "pulse_age": 0.3, "unfit": [], "mode": "", "states": 10, "room": None,
    "reap_interval": 0.5, "heartbeat": 1.0,
}  # fmt: skip

LACKS = [{"task": "app.t", "kind": "broken", "seconds": 3.0, "reason": "no weights"}]

QUEUE = QueueFacts(
    name="gpu",
    waiting=3,
    suspects=0,
    due_later=0,
    running=0,
    failed=0,
    finished=0,
    workers=1,
    oldest=1.0,
    counters={"submitted": 3},
)


@pytest.mark.parametrize(
    ("change", "level", "said", "line"),
    [
        ({"queues": [replace(QUEUE, name="cpu")]}, Level.FAIL, "3 requests wait in cpu", "perdure worker cpu"),
        ({"queues": [QUEUE], "stock": {"s": ["gpu", "x"]}}, Level.WARN, "worker s on gpu is RQ's own",
         "-w perdure.workers.Worker gpu"),
        ({"workers": [WELL["workers"][0] | {"dead_in": -20.0, "age": 25.0}]}, Level.WARN, "silent for 25 s",
         "perdure reaper"),
        ({"workers": [WELL["workers"][0] | {"unfit": "GPU_RESET"}]}, Level.WARN, "w leaves its device", "repair"),
        ({"workers": [WELL["workers"][0] | {"unable": LACKS}]}, Level.FAIL, "could not load app.t, and no other one",
         "install"),
        ({"workers": [WELL["workers"][0] | {"unable": LACKS}, WELL["workers"][0] | {"worker": "v"}]}, Level.WARN,
         "w could not load app.t", "install"),
        ({"workers": [WELL["workers"][0] | {"interval": 1.2}]}, Level.WARN,
         "1 of 1 workers checkpoint less often, w every 1.2 s instead of every 0.1 s", "redis-cli --latency"),
        ({"unfit": [{"device": "GPU-1", "host": "h", "reason": "Xid"}]}, Level.WARN, "GPU-1 on h is not used",
         "repair"),
        ({"pulse_age": 60.0}, Level.FAIL, "nobody has swept for 60 s", "perdure reaper"),
        ({"pulse_age": None}, Level.FAIL, "nobody has ever swept", "perdure reaper"),
        ({"overdue": ["a"]}, Level.WARN, "1 leases are overdue", "perdure leases"),
        ({"mode": "the pool is degraded"}, Level.WARN, "the pool is degraded", "perdure workers"),
        ({"states": 10, "room": 5}, Level.WARN, "checkpoints have 10 B", "maxmemory"),
    ],
)  # fmt: skip
def test_each_trouble_of_a_pool_is_named(change: dict[str, Any], level: Level, said: str, line: str) -> None:
    """One finding each, with what to change; none of them in a pool that is well."""
    assert {item.level for item in judge_pool(**WELL)} == {Level.OK}
    (finding,) = [item for item in judge_pool(**WELL | change) if item.level is not Level.OK]
    assert finding.level is level
    assert said in finding.what
    assert line in finding.change


def test_an_idle_pool_without_workers_is_not_accused() -> None:
    """Nothing is submitted, nobody works, nobody sweeps; a stock worker on queues of plain jobs is RQ's business."""
    assert judge_pool(**WELL | {"workers": [], "pulse_age": None, "stock": {"s": ["mail"]}}) == []


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        ("persistence", {"fsync": "no"}, "appendfsync is no"),
        ("persistence", {"delayed_fsyncs": 3}, "too slow for the append-only file 3 times"),
        ("memory", {"evicted": 7}, "7 keys were evicted"),
        ("memory", {"ratio": 0.93, "limit": 2**30}, "93 % of its 1.0 GiB"),
        ("latency", {"median": 0.02}, "a round trip takes 20.0 ms"),
    ],
)
def test_each_trouble_of_a_server_is_named(
    connection: redis.Redis, place: str, change: dict[str, Any], said: str
) -> None:
    """From the shape in which a real server answers."""
    facts = pressure(connection, slow=0)
    facts["latency"] = {"min": 1e-4, "median": 1e-4, "max": 1e-4}
    facts["persistence"] |= {"delayed_fsyncs": 0}
    facts["memory"] |= {"evicted": 0}
    assert {item.level for item in judge_server(facts, skew=0.2)} == {Level.OK}
    changed = facts | {place: facts[place] | change}
    (finding,) = [item for item in judge_server(changed, skew=-0.2) if item.level is not Level.OK]
    assert said in finding.what
    (skewed,) = [item for item in judge_server(facts, skew=-3.0) if item.level is not Level.OK]
    assert "differ by 3.0 s" in skewed.what


HOST: dict[str, Any] = {
    "rq": "3.0.0", "files": 4096, "shared": 2**33, "settings": Settings(), "driver": False, "devices": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rq": "3.1.0"}, "RQ 3.1.0 was not tested"),
        ({"files": 256}, "256 open files"),
        ({"shared": 2**26, "settings": Settings(ranks=2)}, "/dev/shm has 64.0 MiB"),
        ({"driver": True}, "torch sees no device"),
        ({"settings": Settings(device="cuda")}, "PERDURE_DEVICE is cuda"),
    ],
)
def test_each_trouble_of_a_machine_is_named(change: dict[str, Any], said: str) -> None:
    assert {item.level for item in judge_host(**HOST)} == {Level.OK}
    (finding,) = [item for item in judge_host(**HOST | change) if item.level is not Level.OK]
    assert said in finding.what
    assert finding.change


def test_a_machine_that_only_submits_is_well() -> None:
    assert [item.level for item in judge_host(**HOST | {"devices": None})] == [Level.OK]


# --- settings, completion --------------------------------------------------------------------------


def test_settings_are_shown_with_their_origin(quick: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default, variable, RQ's variable; also one that is set to its default. Never a password."""
    monkeypatch.delenv("PERDURE_MODEL_PATH", raising=False)
    environment = {"PERDURE_SLOTS": "4", "PERDURE_DEVICE": "auto", "RQ_REDIS_URL": "redis://me:s3cret@there/1"}
    done = quick("config", "show", "--json", **environment)
    items = {item["name"]: item for item in json.loads(done.stdout)["items"]}
    assert (items["PERDURE_SLOTS"]["value"], items["PERDURE_SLOTS"]["origin"]) == (4, "PERDURE_SLOTS")
    assert items["PERDURE_DEVICE"]["origin"] == "PERDURE_DEVICE"
    assert items["PERDURE_HEARTBEAT"]["origin"] == "default"
    assert (items["PERDURE_REDIS_URL"]["value"], items["PERDURE_REDIS_URL"]["origin"]) == (
        "redis://me:***@there/1",
        "RQ_REDIS_URL",
    )
    assert "s3cret" not in done.stdout
    shown = quick("config", "show", "--changed", **environment).stdout
    assert [line.split()[0] for line in shown.splitlines()] == [
        "SETTING",
        "PERDURE_REDIS_URL",
        "PERDURE_DEVICE",
        "PERDURE_SLOTS",
    ]
    assert quick("config", "show", PERDURE_SLOT="4").returncode == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(quick: Run, shell: str) -> None:
    done = quick("completion", shell)
    assert done.returncode == 0
    assert f"_PERDURE_COMPLETE={shell}_complete" in done.stdout


def test_completion_knows_commands_and_flags() -> None:
    """As bash asks for it: by the variable of the script."""
    done = call(_PERDURE_COMPLETE="bash_complete", COMP_WORDS="perdure doctor --f", COMP_CWORD="2")
    assert "plain,--fix" in done.stdout.splitlines()


# --- top -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_top_shows_a_pool_on_plain_lines(lab: Lab) -> None:
    """Without a terminal: queues with rates, workers with slots, running requests; no escape."""
    lab.worker()
    one = lab.submit("many", {"n": 3000, "sleep": 0.01})
    eventually(lambda: lab.store.workers()[0]["slots"] == 4)
    done = call("top", "--once", "--every", "0.1", PERDURE_REDIS_URL=lab.url)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("perdure top  redis://")
    assert lines[1].startswith("the pool is normal")
    (queue,) = [line for line in lines if line.startswith("gpu ")]
    assert queue.split()[-1] == "0.0"
    (worker,) = [line for line in lines if line.startswith("worker-0")]
    assert worker.endswith("1 of 4")
    assert any(line.startswith(one) for line in lines)


def test_top_draws_on_a_terminal(lab: Lab) -> None:
    """In a pseudo-terminal: the live screen, again and again, until Ctrl-C; exit code 130."""
    import pty
    import subprocess

    pytest.importorskip("rich")
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "perdure.scripts.main", "top", "--every", "0.2"], stdin=terminal, stdout=terminal,
        stderr=terminal, start_new_session=True,
        env={**os.environ, "PERDURE_REDIS_URL": lab.url, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(master, False)
    seen = bytearray()

    def read() -> bytes:
        try:
            seen.extend(os.read(master, 65536))
        except OSError:
            pass  # nothing new, or the process has ended
        return bytes(seen)

    try:
        eventually(lambda: read().count(b"perdure top") >= 2)
        process.send_signal(signal.SIGINT)
        assert eventually(lambda: read() and process.poll() is not None)
        assert process.returncode == 130
        assert b"\x1b[?1049h" in seen, "the screen beneath comes back"
        assert b"Traceback" not in seen
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)


def test_an_outage_leaves_the_last_screen(redis_url: str) -> None:
    """With one line that says why it is old; it goes on by itself."""
    screen = Looks(Settings(redis_url=redis_url), None, 5).take()
    kept = Looks(Settings(redis_url="redis://127.0.0.1:1"), None, 5).retake(screen)
    assert kept["queues"] == screen["queues"]
    assert "Cannot reach Redis" in headline(kept)[-1]
    assert headline(Looks(Settings(redis_url=redis_url), None, 5).retake(kept))[-1].startswith("Redis ")
