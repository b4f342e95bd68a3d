"""What systemd is told, over a real datagram socket; and the unit file."""

from __future__ import annotations

import configparser
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from perdure.protocol.settings import Settings
from perdure.workers.pool.notify import Notifier
from tests.kit.deploy.notified import heard
from tests.kit.places import ROOT

UNIT = ROOT / "deploy" / "systemd" / "perdure.service"


def test_it_says_what_systemd_documents(systemd: socket.socket) -> None:
    """A status only when it has changed, on one line; a sign of life every half of the interval."""
    environment = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier.from_environment(environment)
    assert notifier.interval == 1.5
    for status in ("loading", "loading", "up\nREADY=1"):
        notifier.status(status)
    for now in (10.0, 11.4, 11.5, 12.0):
        notifier.beat(now)
    notifier.ready()
    notifier.stopping()
    assert heard(systemd) == [
        "STATUS=loading",
        "STATUS=up READY=1",
        "WATCHDOG=1",
        "WATCHDOG=1",
        "READY=1",
        "STOPPING=1",
    ]


def test_a_name_in_no_folder() -> None:
    """``@``: Linux' abstract sockets."""
    name = f"perdure-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        Notifier.from_environment({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert heard(listening) == ["READY=1"]


@pytest.mark.parametrize(
    "environment",
    [
        {}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/notify"}, {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ],
)  # fmt: skip
def test_without_systemd_nothing_happens(environment: dict[str, str]) -> None:
    """Nobody listens, or the watchdog is another's: no error, and no sign of life."""
    notifier = Notifier.from_environment(environment)
    assert notifier.interval == 0
    notifier.ready()
    notifier.beat(1.0)


def test_a_full_socket_does_not_hold_up_the_supervisor(systemd: socket.socket) -> None:
    """The next sign of life says the same."""
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": systemd.getsockname()})
    for number in range(5000):
        notifier.status(str(number))
    assert heard(systemd)[0] == "STATUS=0"


def test_the_unit_fits_the_command() -> None:
    """Its times are longer than those that they wait for, and its signals are those that ``perdure up`` knows."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"
    assert float(service["WatchdogSec"]) > 10
    assert float(service["TimeoutStopSec"]) > Settings().drain_timeout + 16
    assert service["TimeoutStartSec"] == "infinity", "loading has a timeout of its own"
    assert service["KillMode"] == "mixed", "workers are told by the supervisor"
    assert service["Restart"] == "always"
    assert "-USR1" in service["ExecReload"]
    words = service["ExecStart"].split()
    assert words[:2] == ["/opt/perdure/.venv/bin/perdure", "up"]
    from perdure.scripts.main import main

    assert main([words[1], *words[2:], "--help"]) == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """``systemd-analyze verify`` finds nothing to say but that the program is not installed there."""
    unit = tmp_path / "perdure.service"
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/perdure/.venv/bin/perdure", str(Path(sys.executable).with_name("perdure"))))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "perdure.service" in line]
    assert (done.returncode, said) == (0, []), done.stderr
