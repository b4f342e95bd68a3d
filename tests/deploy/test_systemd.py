"""The units of a single worker and of a reaper: systemd takes them, and their commands are run as it would run them."""

from __future__ import annotations

import configparser
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from perdure.protocol.connection import connect
from perdure.protocol.settings import Settings
from perdure.workers.pool.draining import LEAVE
from tests.kit.deploy.deployment import host, seconds, understood
from tests.kit.lab import Lab, eventually, gone, send
from tests.kit.places import ROOT

FOLDER = ROOT / "deploy" / "systemd"
SCRIPTS = Path(sys.executable).parent
PLACE = "/opt/perdure/.venv/bin"
WORKER, REAPER = "perdure-worker@.service", "perdure-reaper.service"


def service(name: str) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((FOLDER / name).read_text(encoding="utf-8"))
    return unit["Service"]


@pytest.mark.parametrize("name", [WORKER, REAPER])
def test_a_unit_starts_a_command_that_there_is(name: str):
    found = service(name)
    assert found["ExecStart"].startswith(f"{PLACE}/perdure ")
    assert understood(found["ExecStart"].split())
    assert (found["Type"], found["Restart"], found["User"]) == ("exec", "always", "perdure")
    given = dict(item.split("=", 1) for item in found.get("Environment", "").split())
    Settings.from_environment(given)


def test_a_workers_unit_waits_for_its_drain():
    found, settings = service(WORKER), Settings()
    assert seconds(found["TimeoutStopSec"]) > settings.drain_timeout + LEAVE + 5
    assert found["KillMode"] == "process"


@pytest.mark.parametrize("name", [WORKER, REAPER])
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(name: str, tmp_path: Path):
    """``systemd-analyze verify`` finds nothing to say but that the program is not installed there."""
    unit = tmp_path / name.replace("@", "@0")
    unit.write_text((FOLDER / name).read_text(encoding="utf-8").replace(PLACE, str(SCRIPTS)), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "perdure" in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.slow
def test_the_units_commands_recover_and_drain(tmp_path: Path, server_binary: Path, redis_url: str):
    """SIGKILL of the main process alone: its guardian hands on. SIGTERM: it hands back and leaves in time."""
    with host(tmp_path, server_binary) as here, connect(redis_url) as connection:
        lab: Lab = here.lab(connection)
        environment = {"PERDURE_REDIS_URL": redis_url, "PERDURE_CHECKPOINT_INTERVAL": "0.02"}
        reaper = here.start("reaper", service(REAPER)["ExecStart"].replace(PLACE, str(SCRIPTS)).split(), environment)
        command = service(WORKER)["ExecStart"].replace(PLACE, str(SCRIPTS)).split()
        first = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=here.environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        one = lab.submit("count", {"n": 5000, "sleep": 0.02})
        lab.moved(one, 3)
        guardians = [child.pid for child in psutil.Process(first.pid).children()]
        assert guardians
        send(first.pid, signal.SIGKILL)
        first.wait()
        eventually(lambda: ("redelivered", "WORKER_LOST") in lab.events(one))
        eventually(lambda: all(gone(pid) for pid in guardians))

        second = here.start("worker", command, environment)
        done = len(lab.outputs(one))
        number = lab.moved(one, done + 3)
        assert lab.outputs(one)[:number] == list(range(number))
        second.stop(seconds(service(WORKER)["TimeoutStopSec"]))
        assert second.process.returncode == 0
        assert lab.record(one).status == "queued"
        reaper.stop(seconds(service(REAPER)["TimeoutStopSec"]))
