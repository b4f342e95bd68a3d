"""A supervised pool of real workers: what is replaced, what is given up, and what is left behind by a kill -9."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.protocol.settings import Settings
from perdure.scripts.pool import examiner
from perdure.scripts.pool.pool import Pool
from perdure.workers.pool import undertaker
from perdure.workers.pool.gpus import Gpu
from perdure.workers.pool.places import Phase, Place
from perdure.workers.pool.restarts import BUDGET
from perdure.workers.pool.statuses import UNFIT_DEVICE
from tests.kit.deploy.notified import heard
from tests.kit.lab import QUICK, Lab, Process, eventually, gone, send
from tests.kit.places import TASKS

COMMAND = [sys.executable, "-P", "-m", "perdure.scripts.main", "up"]


@contextlib.contextmanager
def pool_of(lab: Lab, workers: int = 1, *, tasks: tuple[str, ...] = (), **options: Any) -> Iterator[Pool]:
    """A started pool, and nothing of it afterwards."""
    pool = Pool(lab.url, ["gpu"], workers, Settings().replace(tasks=tasks, **QUICK), lab.folder / "pool.log", **options)
    before = _descendants()
    pool.start()
    try:
        yield pool
    finally:
        below = _descendants() - before
        pool.stop()
    eventually(lambda: all(gone(pid) for pid in below))


def _descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def place(pool: Pool, name: str) -> Place:
    return next(child.place for child in pool.children if child.place.name == name)


def pid_in(pool: Pool, name: str) -> int:
    """The process in a place, once it claims (or waits, in a spare's)."""
    eventually(lambda: place(pool, name).phase in (Phase.READY, Phase.SPARE))
    process = next(child.process for child in pool.children if child.place.name == name)
    assert process is not None
    return process.pid


@contextlib.contextmanager
def up(lab: Lab, *arguments: str, environment: dict[str, str] | None = None, **settings: Any) -> Iterator[Process]:
    """A ``perdure up gpu`` process."""
    command = [*COMMAND, "gpu", *arguments]
    process = lab._start(
        f"up-{len(lab.processes)}", command, settings, {"RQ_REDIS_URL": lab.url, **(environment or {})}
    )
    try:
        yield process
    finally:
        lab.seen.update(process.children())
        if process.running:
            process.send(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.end(40)


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal; Linux knows."""
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def ready(lab: Lab) -> list[int]:
    return [item["pid"] for item in lab.store.workers() if item["ready"] and item["dead_in"] > 0]


@pytest.fixture(autouse=True)
def path_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TASKS))


@pytest.mark.slow
def test_a_spare_goes_on_with_what_a_killed_worker_held(lab: Lab) -> None:
    """It had loaded before; another spare takes its place; RQ's and our records show which process is which."""
    with pool_of(lab, spares=1, tasks=("lab_tasks.count",)) as pool:
        worker, spare = pid_in(pool, "worker-1"), pid_in(pool, "spare-1")
        one = lab.submit("count", {"n": 150, "sleep": 0.02})
        lab.moved(one, 3)
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: lab.record(one).executions == 2)
        assert lab.record(one).worker.startswith("spare-1-")
        assert pid_in(pool, "worker-1") == spare
        eventually(lambda: pid_in(pool, "spare-1") != spare)
        lab.check(one, 150)
        assert place(pool, "worker-1").budget.ends == []


@pytest.mark.slow
def test_a_place_that_cannot_load_is_quarantined_and_released(
    lab: Lab, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one failure too many, the log and Redis say why and what to do; after mending, a release is enough."""
    folder = tmp_path / "late"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{TASKS}{os.pathsep}{folder}")
    with pool_of(lab, tasks=("late_tasks.count",), release="kill -USR1 42") as pool:
        place(pool, "worker-1").budget.failures = BUDGET  # as if it had failed so often already
        eventually(lambda: place(pool, "worker-1").phase is Phase.QUARANTINED)
        eventually(lambda: "worker-1 is QUARANTINED" in caplog.text)
        assert "kill -USR1 42" in caplog.text
        assert not pool.supervisor.up
        (row,) = eventually(
            lambda: [
                row
                for record in lab.store.supervisors()
                for row in record["places"]
                if row["place"] == "worker-1" and row["phase"] == "quarantined"
            ]
        )
        assert "exit status 1" in row["reason"]
        (folder / "late_tasks.py").write_text("from lab_tasks import count\n")
        pool.release_quarantined()
        pid_in(pool, "worker-1")
        lab.check(lab.submit("count", {"n": 3}), 3)
    assert lab.store.supervisors() == []


@pytest.mark.slow
def test_a_poison_costs_no_place(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Crash after crash, each with a request in flight, some before anybody has seen the worker ready."""
    with pool_of(lab) as pool:
        poison = lab.submit("pool_tasks.leave", {"signal": signal.SIGSEGV})
        assert lab.ended(poison, 60).error_kind == "CRASH"
        lab.check(lab.submit("count", {"n": 3}), 3)
        assert place(pool, "worker-1").budget.ends == []
    assert caplog.text.count("signal SIGSEGV") == 3


class Driver:
    """NVML of a GPU that the test makes up."""

    def __init__(self) -> None:
        self.verdict = "NONE"
        self.on_it: set[int] = set()

    def count(self) -> int:
        return 2

    def identity(self, index: int) -> str:
        return f"GPU-{index}"

    def action(self, index: int) -> str:
        return self.verdict if index == 0 else "NONE"

    def processes(self, index: int) -> set[int]:
        return self.on_it if index == 0 else set()


@pytest.mark.slow
def test_a_gpu_that_needs_a_reset_is_given_up(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver is asked before a restart; each worker sees its own GPU; a dead process still on it is waited for."""
    driver = Driver()
    monkeypatch.setattr(examiner, "open_devices", lambda: driver)
    with pool_of(lab, gpus=[Gpu("0", 0), Gpu("1", 1)]) as pool:
        first, second = pid_in(pool, "gpu-0"), pid_in(pool, "gpu-1")
        for pid, token in ((first, "0"), (second, "1")):
            environment = psutil.Process(pid).environ()
            assert environment["CUDA_VISIBLE_DEVICES"] == token
            assert environment["PERDURE_DEVICE"] == "cuda"
        driver.on_it = {first}
        os.kill(first, signal.SIGKILL)
        eventually(lambda: place(pool, "gpu-0").phase is Phase.WAITING and place(pool, "gpu-0").examining is not None)
        assert not place(pool, "gpu-0").run, "the dead process still has memory there"
        driver.on_it = set()
        successor = pid_in(pool, "gpu-0")
        os.kill(second, signal.SIGSTOP)  # or it could take the request
        driver.verdict = "GPU_RESET"
        lab.submit("pool_tasks.leave", {"status": UNFIT_DEVICE})
        eventually(lambda: gone(successor))
        eventually(lambda: place(pool, "gpu-0").phase is Phase.QUARANTINED)
        os.kill(second, signal.SIGCONT)
        eventually(lambda: "nvidia-smi --gpu-reset -i 0" in caplog.text)
        assert place(pool, "gpu-1").phase is Phase.READY


# --- kill -9 and signals -------------------------------------------------------------------------------


def test_the_undertaker_ends_what_hears_nothing(tmp_path: Path) -> None:
    """A child that ignores SIGTERM and one that was stopped, with what they have started; and not who said good-bye."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '600']); print(1, flush=True); time.sleep(600)"
    )

    def child() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True, cwd=tmp_path
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        return process

    children = [child(), child(), child()]
    try:
        below = [grandchild.pid for item in children for grandchild in psutil.Process(item.pid).children()]
        os.kill(children[1].pid, signal.SIGSTOP)
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(undertaker.__file__), "0.3"], stdin=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.stdin is not None
            for item in children:
                process.stdin.write(f"+{item.pid}\n".encode())
            process.stdin.write(f"-{children[2].pid}\n".encode())
            process.stdin.flush()
            eventually(lambda: all(ignores(process.pid, number) for number in undertaker.SIGNALS))
            process.stdin.close()
            assert process.wait(30) == 0
        assert [item.wait(30) for item in children[:2]] == [-signal.SIGKILL, -signal.SIGKILL]
        eventually(lambda: all(gone(pid) for pid in below[:2]))
        assert children[2].poll() is None
    finally:
        for item in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(item.pid, signal.SIGKILL)
            item.wait()


@pytest.mark.slow
def test_a_killed_supervisor_leaves_nobody(lab: Lab) -> None:
    """Kill -9 while one worker was stopped and cannot hear of it; the next pool starts while the first one drains."""
    with up(lab, "--workers", "2", drain_timeout=0.1) as first:
        eventually(lambda: len(ready(lab)) == 2 or not first.running)
        assert first.running, first.log
        one = lab.submit("count", {"n": 200, "sleep": 0.02})
        lab.moved(one, 3)
        holder = next(item["pid"] for item in lab.store.workers() if item["held"])
        (other,) = [pid for pid in ready(lab) if pid != holder]
        below = first.children()
        lab.seen.update(below)
        send(other, signal.SIGSTOP)
        first.kill()
        with up(lab) as second:
            lab.moved(one, 100)
            assert second.running
            eventually(lambda: all(gone(pid) for pid in below), 60)
            lab.check(one, 200)


@pytest.mark.slow
def test_systemd_hears_of_it_and_children_do_not_speak_for_it(lab: Lab) -> None:
    """READY once the worker claims, signs of life, STOPPING; SIGUSR1 ends nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(lab.folder / "notify"))
        environment = {"NOTIFY_SOCKET": str(lab.folder / "notify"), "WATCHDOG_USEC": "200000"}
        with up(lab, environment=environment) as process:
            messages: list[str] = []

            def collect() -> list[str]:
                messages.extend(heard(listening))
                return messages

            eventually(lambda: "READY=1" in collect() or not process.running)
            assert process.running, process.log
            assert "STATUS=0 of 1 workers ready" in messages
            (worker,) = ready(lab)
            assert "NOTIFY_SOCKET" not in psutil.Process(worker).environ()
            process.send(signal.SIGUSR1)
            messages.clear()
            eventually(lambda: collect().count("WATCHDOG=1") >= 2)
            process.send(signal.SIGTERM)
            assert process.end() == 0
            assert "STOPPING=1" in collect()


@pytest.mark.slow
def test_stopping_while_workers_load(lab: Lab) -> None:
    """SIGTERM before anybody is ready: nothing is waited for, nothing is left."""
    with up(lab, environment={"POOL_GATE": str(lab.folder / "gate")}, tasks=("pool_tasks.Slow",)) as process:
        eventually(lambda: list(lab.folder.glob("gate.*")) or not process.running)
        below = process.children()
        process.send(signal.SIGTERM)
        assert process.end() == 0, process.log
        eventually(lambda: all(gone(pid) for pid in below))
        assert lab.store.workers() == []


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_a_step(lab: Lab) -> None:
    """The step would last for minutes, and the drain a minute; the request is handed back."""
    with up(lab, drain_timeout=60) as process:
        one = lab.submit("native", {"folder": str(lab.folder)})
        eventually((lab.folder / "native").exists)
        began = time.monotonic()
        process.send(signal.SIGINT)
        eventually(lambda: "hand their requests back" in process.log)
        process.send(signal.SIGINT)
        process.end()
        assert time.monotonic() - began < 45
        assert lab.waiting() == [one]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--gpus", "all", "--workers", "2"], 2, "cannot be combined"),
        (["--workers", "0"], 2, "0 is not in the range"),
        (["--spares", "-1"], 2, "-1 is not in the range"),
        (["--gpus", "first"], 2, "--gpus takes"),
        (["--gpus", "all"], 2, "CUDA_UNAVAILABLE"),
        (["--url", "redis://127.0.0.1:1"], 3, "127.0.0.1:1"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad values, a GPU that is not there, a Redis that does not answer."""
    from perdure.scripts.main import main
    from perdure.scripts.pool import up as command

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # or torch would have to be asked
    monkeypatch.setattr(command, "_signals", lambda: None)  # they are the test run's
    with contextlib.suppress(SystemExit):
        assert main(["up", "gpu", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_gpu_of_its_own_needs_no_other_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--gpus`` with a device that says something else is a contradiction, not a choice of ours."""
    from perdure.scripts.main import main

    monkeypatch.setenv("PERDURE_DEVICE", "cpu")
    assert main(["up", "gpu", "--gpus", "all"]) == 2
    assert "PERDURE_DEVICE is cpu" in capsys.readouterr().err
