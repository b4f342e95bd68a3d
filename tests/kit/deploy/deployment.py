"""What a deployment's files say, run as the processes that they would be in containers.

A container is a process group and, where the kernel lets us, a PID namespace of its own: its main process is number 1
there, and everything in it ends with that one.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
import yaml

from perdure.protocol.connection import connect
from perdure.scripts.main import main
from tests.kit.lab import LONG, Lab, eventually, send
from tests.kit.places import ROOT, TASKS, TESTS

SCHEMAS = TESTS / "schemas"
SCRIPTS = Path(sys.executable).parent

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def resolved(value: Any, variables: dict[str, str]) -> Any:
    """Compose's ``${NAME:-default}``, replaced as Compose does."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: variables.get(found[1]) or found[2] or "", value)
    if isinstance(value, dict):
        return {name: resolved(item, variables) for name, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, variables) for item in value]
    return value


def compose(**variables: str) -> dict[str, Any]:
    """``docker-compose.yml`` with its variables."""
    found: dict[str, Any] = resolved(yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8")), variables)
    return found


def seconds(duration: str) -> float:
    """A duration of Compose or systemd: ``1m30s``."""
    parts = re.findall(r"(\d+)(h|min|m|s|$)", str(duration))
    return float(sum(int(number) * {"h": 3600, "min": 60, "m": 60}.get(unit, 1) for number, unit in parts))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@functools.cache
def namespace() -> tuple[str, ...]:
    """What gives a command a PID namespace of its own; nothing where that needs more rights than we have."""
    prefix = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if shutil.which("unshare") is None:
        return ()
    tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return () if tried.returncode else prefix


@dataclass
class Container:
    """One started container: its outer process, and its main process."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def main(self) -> int:
        """The process id, as we see it, of what is number 1 inside."""
        if not namespace():
            return self.process.pid
        return int(eventually(lambda: psutil.Process(self.process.pid).children())[0].pid)

    @property
    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids, as we see them, of the workers inside."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "perdure.workers.Worker" in process.cmdline():
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def stop(self, grace: float) -> float:
        """What ``docker stop`` does, without its SIGKILL; returns the seconds that it took, at most ``grace``."""
        begun = time.monotonic()
        send(self.main, signal.SIGTERM)
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {grace} s:\n{self.log}") from None
        return time.monotonic() - begun

    def kill(self) -> None:
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                send(process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()


@dataclass
class Host:
    """Starts the containers of a deployment; Redis is on a port of this machine that nobody else has."""

    folder: Path
    server_binary: Path
    port: int = field(default_factory=free_port)
    containers: list[Container] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def serve(self, options: Sequence[str]) -> Container:
        """The server, with the options that the image would get; ready to answer."""
        started = self.start(
            "redis", [str(self.server_binary), *options, "--port", str(self.port), "--bind", "127.0.0.1"]
        )
        with connect(self.url, check=False) as connection:
            eventually(lambda: _answers(connection) or started.process.poll() is not None)
        assert started.process.poll() is None, started.log
        return started

    @staticmethod
    def environment(given: dict[str, str]) -> dict[str, str]:
        """What a container sees: nothing of the settings of who runs the tests."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("PERDURE_", "RQ_"))}
        return {**ours, "PYTHONPATH": str(TASKS), "PYTHONUNBUFFERED": "1", **given}

    def start(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> Container:
        """One container: the command from our environment instead of the image's, and nothing of the
        caller's settings.
        """
        folder = self.folder / f"{name}-{len(self.containers)}"
        folder.mkdir()
        program = shutil.which(command[0], path=f"{SCRIPTS}:{os.environ['PATH']}")
        assert program, f"{command[0]} is in no image"
        output = folder / "log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*namespace(), program, *command[1:]],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=self.environment(environment or {}),
            )
        started = Container(name, process, output)
        self.containers.append(started)
        return started

    def lab(self, connection: redis.Redis) -> Lab:
        """What submits to this pool and looks at it."""
        return Lab(self.url, self.folder, connection)

    def close(self) -> None:
        for container in reversed(self.containers):
            container.kill()


def _answers(connection: redis.Redis) -> bool:
    try:
        return bool(connection.ping())
    except redis.RedisError:
        return False


@contextmanager
def host(folder: Path, server_binary: Path) -> Iterator[Host]:
    """A host that leaves no process behind."""
    started = Host(folder, server_binary)
    try:
        yield started
    finally:
        started.close()


def understood(command: Sequence[str]) -> bool:
    """Whether a ``perdure …`` command is one of ours, with options that it has."""
    program, *arguments = command
    assert Path(program).name == "perdure", command
    try:
        return main([*arguments, "--help"]) == 0
    except SystemExit as ended:
        return not ended.code


def passes(command: Sequence[str], patience: float = LONG) -> bool:
    """Whether a health check, run as it is written, says yes."""
    path = f"{SCRIPTS}:{os.environ['PATH']}"
    done = subprocess.run(
        list(command), capture_output=True, check=False, timeout=patience, env={**os.environ, "PATH": path}
    )
    return done.returncode == 0
