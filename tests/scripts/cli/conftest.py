"""What the tests of the commands share: calls of them, a client, and a worker without a process."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator

import pytest
import redis

from perdure.producer import Client
from perdure.protocol.settings import Settings
from perdure.scripts.main import main
from tests.kit.hands import Hands
from tests.kit.scripts.commands import Run, call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same within this process, for tables of mistakes."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            for name, value in environment.items():
                patch.setenv(name, value)
            code = main(arguments)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


@pytest.fixture
def perdure(redis_url: str) -> Run:
    """Calls a command with an empty Redis."""

    def run(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        return call(*arguments, **{"PERDURE_REDIS_URL": redis_url, **options})

    return run


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, settings=Settings()) as client:
        yield client


@pytest.fixture
def hands(connection: redis.Redis) -> Hands:
    return Hands(connection)
