"""Redis is away for a minute, with every setting at its default: nobody dies, nothing is judged or done twice.

And what a Redis that dies may lose: nothing that a durable submit has confirmed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from perdure.producer import AsyncClient, Client
from perdure.protocol.connection import connect
from perdure.protocol.errors import RedisUnavailable
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.scripts.pool.server import Server
from tests.kit.lab import eventually, laboratory

OUTAGE = 60.0
STEPS, PAUSE = 750, 0.05
"""The lease, 30 s, ends before the outage does: so there is a pause, and about a hundred steps are left after it."""


def server_clock(connection: redis.Redis) -> float:
    seconds, micros = connection.time()
    return float(seconds) + float(micros) / 1e6


class Readers:
    """Two open streams, each in a thread: what came, and when the first output came after the outage."""

    def __init__(self, url: str, first: str, second: str) -> None:
        self.url = url
        self.came: dict[str, list[Any]] = {first: [], second: []}
        self.back: dict[str, float] = {}
        self.over: float | None = None
        self.errors: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._guarded, args=(self._sync, first), daemon=True),
            threading.Thread(
                target=self._guarded, args=(lambda name: asyncio.run(self._async(name)), second), daemon=True
            ),
        ]
        for thread in self.threads:
            thread.start()

    def _guarded(self, read: Callable[[str], None], name: str) -> None:
        try:
            read(name)
        except BaseException as error:
            self.errors.append(error)

    def _take(self, name: str, output: Any) -> None:
        self.came[name].append(output)
        if self.over is not None:
            self.back.setdefault(name, time.monotonic() - self.over)

    def _sync(self, name: str) -> None:
        with Client(self.url, settings=Settings()) as client:
            for output in client.get(name).stream():
                self._take(name, output)

    async def _async(self, name: str) -> None:
        async with AsyncClient(self.url, settings=Settings()) as client:
            async for output in client.get(name).stream():
                self._take(name, output)

    def end(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not self.errors


def steps_of(folder: Path, name: str) -> list[int]:
    return [int(line) for line in (folder / f"{name}.steps").read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_minute_without_redis(server_binary: Path, tmp_path: Path) -> None:
    """Workers compute on as long as their leases allow, then wait; afterwards all goes on where it stood."""
    with Server(tmp_path / "redis", binary=server_binary) as server, laboratory(server.url, tmp_path) as lab:
        lab.settings = {}
        reaper = lab.reaper(reap_interval=0.5)
        workers = [lab.worker() for _ in range(3)]
        guardians = [worker.children() for worker in workers]
        payload = {"n": STEPS, "sleep": PAUSE, "folder": str(tmp_path)}
        walks = [lab.submit("outage_tasks.walk", payload) for _ in range(2)]
        for name in walks:
            lab.moved(name, 10)
        holders = {name: lab.record(name).worker for name in walks}
        assert len(set(holders.values())) == 2, "the third worker is idle"
        readers = Readers(lab.url, *walks)
        eventually(lambda: all(readers.came.values()))

        server.terminate()  # its file is complete
        away = time.monotonic()
        before = {name: len(steps_of(tmp_path, name)) for name in walks}
        with Client(lab.url, settings=Settings(), patience=1.0) as impatient, pytest.raises(RedisUnavailable):
            impatient.submit("outage_tasks.walk", payload, queue="gpu")
        submitted: list[str] = []

        def submit() -> None:
            with Client(lab.url, settings=Settings(), patience=120.0) as client:
                handle = client.submit("lab_tasks.count", {"n": 3}, queue="gpu")
                submitted.append(handle.id)
                assert handle.result(timeout=60) == {"counted": 3}

        producer = threading.Thread(target=submit, daemon=True)
        producer.start()
        eventually(lambda: time.monotonic() - away >= OUTAGE, OUTAGE + 30)
        kept = {name: len(steps_of(tmp_path, name)) for name in walks}
        assert all(process.running for process in (*workers, reaper))
        readers.over = time.monotonic()
        server.restart()
        start = server_clock(lab.connection)
        readers.over = time.monotonic()

        moved: dict[str, float] = {}

        def stored(name: str) -> bool:
            at = lab.connection.hget(key("checkpoint", name), "at")
            return bool(at and float(at) / 1000 >= start)

        def look() -> bool:
            for name in walks:
                if name not in moved and stored(name):
                    moved[name] = server_clock(lab.connection) - start
            if "submit" not in moved and submitted:
                moved["submit"] = server_clock(lab.connection) - start
            if "claim" not in moved and submitted and lab.record(submitted[0]).started_at:
                moved["claim"] = server_clock(lab.connection) - start
            return len(moved) == 4 and len(readers.back) == 2

        eventually(look, 60)
        figures = [*moved.values(), *readers.back.values()]
        print(
            f"after {OUTAGE:g} s without Redis everything moved again within {max(figures):.2f} s: "
            f"{moved}, {readers.back}"
        )
        assert max(figures) < 15, "about 1 s on an idle machine"

        for name in walks:
            record = lab.check(name, STEPS)
            assert (record.worker, record.executions, record.attempt) == (holders[name], 1, 0)
            assert lab.events(name) == []
            assert steps_of(tmp_path, name) == list(range(STEPS)), "a step was done twice, or not at all"
            # It computed on for about a lease, and what it computed was kept.
            assert kept[name] - before[name] > 100
        producer.join(60)
        assert not producer.is_alive()
        lab.check(submitted[0], 3)
        readers.end()
        assert list(readers.came.values()) == [list(range(STEPS))] * 2
        for worker, guardian in zip(workers, guardians, strict=True):
            assert worker.running
            assert worker.children() == guardian
            assert "Traceback" not in worker.log
            assert "declared dead" not in worker.log
        assert reaper.running
        assert {item["worker"] for item in lab.store.workers()} == {worker.name for worker in workers}
        assert lab.nothing_held()


@pytest.mark.slow
def test_a_confirmed_durable_submit_survives_a_kill(server_binary: Path, tmp_path: Path) -> None:
    """SIGKILL of the server in the moment in which submit returns, twenty times; it synced once a second before."""
    with Server(tmp_path / "redis", binary=server_binary) as server, connect(server.url) as connection:
        version = tuple(int(part) for part in str(connection.info("server")["redis_version"]).split(".")[:2])
        if version < (7, 2):
            pytest.skip("WAITAOF came with Redis 7.2")
        names: list[str] = []
        for _ in range(20):
            with Client(server.url, settings=Settings()) as client:
                names.append(client.submit("app.tasks.count", {"n": 1}, durable=True).id)
                server.kill()
            server.restart()
            assert connection.hget(key("job", names[-1]), "status") == b"queued"
        assert connection.lrange(key("queue", "default"), 0, -1) == [name.encode() for name in names]
