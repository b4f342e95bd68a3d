"""A real server for every test that asks for one.

One server per test process, an empty one per test. ``TEST_SERVER_BINARY`` chooses its executable (it is no
``PERDURE_…`` name because those are the product's own); without it, the embedded one runs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from perdure.protocol.connection import connect
from perdure.scripts.pool.executable import find_binary
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, laboratory
from tests.kit.protocol.pool import Hand, Pool

_FOR_EVER = {"log", "health"}
"""Threads of the product that go on until the end of their process, and touch nothing of a test."""

_NEEDS_A_SERVER = {"server", "server_binary", "redis_url", "connection"}


def pytest_configure(config: pytest.Config) -> None:
    """What the caller has set for their own pool must reach neither the tests nor the processes they start."""
    for name in list(os.environ):
        if name.startswith(("PERDURE_", "RQ_")) and name not in ("PERDURE_MODEL_PATH", "PERDURE_UNTESTED_RQ"):
            del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what talks to a server, so that ``-m server`` runs it on another one."""
    for item in items:
        if _NEEDS_A_SERVER & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test finds, or announces, an embedded server of the person who runs the tests."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["XDG_STATE_HOME"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """What a test has started ends with it: a thread that is left would run into what later tests do."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10

    def left() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before and thread.name not in _FOR_EVER]

    while left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left(), f"threads that were started here go on: {left()}"


@pytest.fixture(scope="session")
def server_binary() -> Path:
    """The executable for tests that start servers of their own."""
    return find_binary(os.environ.get("TEST_SERVER_BINARY"))


@pytest.fixture(scope="session")
def server(server_binary: Path) -> Iterator[Server]:
    """The server of this test process. Leave it running; to kill one, start your own."""
    with Server(binary=server_binary, die_with_parent=True) as running:
        yield running


@pytest.fixture
def redis_url(server: Server) -> str:
    """The URL of an empty server."""
    with connect(server.url) as client:
        client.flushall()
        client.script_flush()
    return server.url


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    """A client of an empty server."""
    with connect(redis_url, name="test") as client:
        yield client


@pytest.fixture
def no_leaks(connection: redis.Redis) -> Iterator[set[bytes]]:
    """Fails the test if it leaves a key of ours that never expires, except those added to this set."""
    allowed: set[bytes] = set()
    yield allowed
    keys = [key for key in connection.scan_iter(match=b"*:perdure:*", count=1000) if key not in allowed]
    immortal = sorted(key for key in keys if connection.ttl(key) == -1)
    assert not immortal, f"keys without an expiry are left: {immortal}"


@pytest.fixture
def lab(redis_url: str, tmp_path: Path) -> Iterator[Lab]:
    """Worker and reaper processes on an empty server; all are gone afterwards."""
    with laboratory(redis_url, tmp_path) as started:
        yield started


@pytest.fixture
def pool(connection: redis.Redis) -> Pool:
    """Pretended producers, workers and reapers over an empty server."""
    return Pool.over(connection)


@pytest.fixture
def hand(pool: Pool) -> Hand:
    """One pretended worker of it."""
    return Hand(pool)
