"""The checks of memory, disk and Redis, against real disks and servers, and cgroups made of files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from perdure.protocol.connection import connect
from perdure.scripts.chaos.proxy import Proxy
from perdure.scripts.pool.server import Server as RedisServer
from perdure.workers.guardian.companion import private_connection
from perdure.workers.health import checks
from perdure.workers.health.checks import Memory, RedisCheck, disk
from perdure.workers.health.state import CheckState

GIB = 2**30

# --- memory ----------------------------------------------------------------------------------------------


class Machine:
    """A /proc and a cgroup tree of files, for one process with the number 7."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self.write(self.proc / "meminfo", f"MemTotal: {100 * GIB // 1024} kB\nMemAvailable: {50 * GIB // 1024} kB\n")
        self.write(self.proc / "7" / "cgroup", "0::/pod/worker\n")
        for place in (".", "pod", "pod/worker"):
            self.write(self.cgroups / place / "cgroup.controllers", "memory\n")
        self.limit("pod/worker", None, 0)
        self.limit("pod", None, 0)

    def write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def limit(self, place: str, limit: int | None, used: int, *, cache: int = 0) -> None:
        folder = self.cgroups / place
        self.write(folder / "memory.max", "max\n" if limit is None else f"{limit}\n")
        self.write(folder / "memory.current", f"{used + cache}\n")
        self.write(folder / "memory.stat", f"anon {used}\nfile {cache}\ninactive_file {cache}\n")

    def memory(self) -> Memory:
        return Memory(7, cgroups=self.cgroups, proc=self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_limit_the_hosts_memory_counts(machine: Machine) -> None:
    reading = machine.memory().look()
    assert (reading.state, reading.reason) == (
        CheckState.OK,
        "50% of 100.0 GiB in use (of the host; no cgroup limits it)",
    )


@pytest.mark.parametrize(("used", "state"), [(80, CheckState.OK), (91, CheckState.DEGRADED), (98, CheckState.FAIL)])
def test_the_limit_of_its_cgroup_counts(machine: Machine, used: int, state: CheckState) -> None:
    machine.limit("pod/worker", 100 * GIB, used * GIB)
    assert machine.memory().look().state is state


def test_file_pages_that_can_be_dropped_do_not_count(machine: Machine) -> None:
    """A worker that has read its weights has a full page cache."""
    machine.limit("pod/worker", 10 * GIB, 2 * GIB, cache=8 * GIB)
    assert machine.memory().look().reason == "20% of 10.0 GiB in use (limit of its cgroup)"


def test_the_tightest_limit_above_it_counts(machine: Machine) -> None:
    machine.limit("pod/worker", 10 * GIB, 2 * GIB)
    machine.limit("pod", 20 * GIB, 19 * GIB)
    assert machine.memory().look().state is CheckState.DEGRADED


def test_a_container_sees_its_own_memory_limit(machine: Machine) -> None:
    """The name in /proc may be another namespace's; the folder that is mounted is the container's."""
    machine.write(machine.proc / "7" / "cgroup", "0::/../../kubepods/x\n")
    machine.limit(".", 4 * GIB, 4 * GIB)
    assert machine.memory().look().state is CheckState.FAIL


def test_version_1_and_no_cgroups_at_all_leave_the_hosts_memory(machine: Machine) -> None:
    machine.write(machine.proc / "7" / "cgroup", "5:memory:/pod/worker\n")
    machine.limit("pod/worker", GIB, GIB)
    assert machine.memory().look().state is CheckState.OK


@pytest.mark.parametrize(
    ("percent", "state"), [("9.99", CheckState.OK), ("25.00", CheckState.DEGRADED), ("80.10", CheckState.FAIL)]
)
def test_a_cgroup_that_waits_for_memory_is_told(machine: Machine, percent: str, state: CheckState) -> None:
    """Its own pressure, not the host's."""
    text = f"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={percent} avg60=0.00 avg300=0.00 total=1\n"
    machine.write(machine.cgroups / "pod/worker/memory.pressure", text)
    machine.write(machine.proc / "pressure/memory", text.replace(percent, "99.00"))
    assert machine.memory().look().state is state


def test_a_kill_by_the_kernel_is_told_for_a_while(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those from before this worker."""
    events = machine.cgroups / "pod/worker/memory.events"
    machine.write(events, "low 0\noom 3\noom_kill 3\n")
    memory = machine.memory()
    assert memory.look().state is CheckState.OK
    machine.write(events, "low 0\noom 4\noom_kill 4\n")
    reading = memory.look()
    assert reading.state is CheckState.DEGRADED
    assert "killed a process of this cgroup" in reading.reason
    assert memory.look().state is CheckState.DEGRADED
    monkeypatch.setattr(checks, "OOM_MEMORY", 0.0)
    assert memory.look().state is CheckState.OK


def test_this_machine_can_be_read() -> None:
    """Whatever it is: the numbers are real ones."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    reason = Memory(os.getpid()).look().reason
    assert re.search(r"^\d+% of \d+\.\d GiB in use|of the last 10 s$|for its memory$", reason), reason


# --- disk ------------------------------------------------------------------------------------------------


def test_a_disk_with_room_is_well_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    reading = disk(tmp_path)
    assert reading.state in (CheckState.OK, CheckState.DEGRADED), reading
    assert "GiB free in" in reading.reason or "inodes free" in reading.reason
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    reading = disk(tmp_path / "missing")
    assert (reading.state, reading.reason) == (
        CheckState.FAIL,
        f"cannot write to {tmp_path / 'missing'}: it is not there",
    )


MOUNTED = """
import os, subprocess, sys
from pathlib import Path
from perdure.workers.health.checks import disk
folder, options, fill = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
if fill == "space":
    with (folder / "large").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
if fill == "most":
    (folder / "large").write_bytes(bytes(int(os.statvfs(folder).f_blocks * 4096 * 0.97)))
if fill == "inodes":
    try:
        for number in range(10**6):
            (folder / str(number)).touch()
    except OSError:
        pass
if fill == "most inodes":
    for number in range(96):
        (folder / str(number)).touch()
if fill == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
before = sorted(folder.iterdir())
reading = disk(folder)
assert sorted(folder.iterdir()) == before
print(reading.state, reading.reason, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "fill", "state", "reason"),
    [
        ("size=1m", "space", "fail", "no space or no inode is left"),
        ("size=1m", "most", "fail", "no space"),  # the probe still fits; what a worker writes would not
        ("size=1g,nr_inodes=20", "inodes", "fail", "no space or no inode is left"),
        ("size=1g,nr_inodes=100", "most inodes", "degraded", "3 of 100 inodes free"),
        ("size=1g", "read-only", "fail", "mounted read-only"),
        ("size=1g", "", "ok", "1.0 of 1.0 GiB free"),
    ],
)
def test_a_real_disk_that_is_full_is_told(tmp_path: Path, options: str, fill: str, state: str, reason: str) -> None:
    """Space, inodes, read-only: a file system of its own, in a namespace of its own."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("may not mount here")
    done = subprocess.run(
        [*alone, sys.executable, "-c", MOUNTED, str(tmp_path), options, fill],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if "permission denied" in done.stderr.lower():
        pytest.skip("may not mount here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == state, done.stdout
    if fill != "most":
        assert reason in done.stdout


# --- Redis -----------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    """Between the check and the server."""
    with connect(redis_url) as client:
        kwargs = client.connection_pool.connection_kwargs
        proxy = Proxy(kwargs["host"], kwargs["port"])
    proxy.start()
    yield proxy
    proxy.stop()


def through(proxy: Proxy, *, timeout: float = 10.0, slow: float = 30.0) -> RedisCheck:
    client = redis.Redis(host="127.0.0.1", port=proxy.port)
    return RedisCheck(private_connection(client, timeout=timeout), slow=slow)


def test_a_server_that_answers_is_well(connection: redis.Redis) -> None:
    reading = RedisCheck(connection, slow=30.0).look()
    assert reading.state is CheckState.OK
    assert "round trip took" in reading.reason


def test_a_slow_network_is_degraded_and_a_silent_one_fails(proxy: Proxy) -> None:
    proxy.delay = 0.03  # each way
    assert through(proxy, slow=0.05).look().state is CheckState.DEGRADED
    proxy.delay, proxy.silent = 0.0, True
    check = through(proxy, timeout=0.2)
    reading = check.look()
    assert reading.state is CheckState.FAIL
    assert "Redis does not answer: TimeoutError" in reading.reason
    proxy.silent = False
    assert check.look().state in (CheckState.OK, CheckState.DEGRADED)


def test_a_server_that_is_gone_fails_and_is_found_again(tmp_path: Path, server_binary: Path) -> None:
    with RedisServer(tmp_path, binary=server_binary, die_with_parent=True) as server:
        with connect(server.url) as client:
            check = RedisCheck(private_connection(client, timeout=5.0), slow=30.0)
        assert check.look().state is CheckState.OK
    reading = check.look()
    assert reading.state is CheckState.FAIL
    assert server.url not in reading.reason


@pytest.mark.parametrize(("offset", "side"), [(-90.0, "behind"), (90.0, "ahead of")])
def test_a_clock_that_is_off_is_told(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch, offset: float, side: str
) -> None:
    """It is no failure: all deadlines are the server's."""
    real = connection.time

    def shifted() -> tuple[int, int]:
        seconds, micros = real()
        return seconds - round(offset), micros

    monkeypatch.setattr(connection, "time", shifted)  # of this client alone
    reading = RedisCheck(connection, slow=30.0).look()
    assert reading.state is CheckState.DEGRADED
    assert reading.reason.startswith("this host's clock is ")
    assert f"s {side} the server's" in reading.reason


def test_a_process_with_another_clock_tells_it(redis_url: str) -> None:
    """The same with a real clock that is an hour ahead."""
    if shutil.which("faketime") is None:
        pytest.skip("needs the command faketime (Debian: apt install faketime)")
    code = (
        "import sys\n"
        "from perdure.protocol.connection import connect\n"
        "from perdure.workers.health.checks import RedisCheck\n"
        "print(RedisCheck(connect(sys.argv[1]), slow=30.0).look().reason)"
    )
    said = subprocess.check_output(["faketime", "-f", "+1h", sys.executable, "-c", code, redis_url], text=True)
    assert "s ahead of the server's" in said
    assert abs(float(said.split()[4]) - 3600) < 60
