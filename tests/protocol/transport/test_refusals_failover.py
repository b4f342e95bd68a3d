"""A primary that becomes a replica, behind an address that leads to the new one by then: everybody finds it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import redis
from rq import Queue

from perdure.producer import AsyncClient, Client
from perdure.protocol.connection import connect
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, eventually, laboratory

PATH = "app.tasks.count"


class Switch:
    """An address that leads to one server, and from some moment on to another; what is open stays as it is."""

    def __init__(self, url: str) -> None:
        self.target = url
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", port_of(self.target)))
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


@pytest.fixture
def pair(server_binary: Path, tmp_path: Path) -> Iterator[tuple[Switch, Callable[[], redis.Redis]]]:
    """The address of a primary, and what fails over: its replica is the primary then, and given."""
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(Server(tmp_path / name, binary=server_binary, die_with_parent=True))
            for name in ("first", "second")
        )
        old, new = (stack.enter_context(connect(one.url, timeout=30)) for one in (first, second))
        old.config_set("repl-diskless-sync-delay", 0)
        new.replicaof("127.0.0.1", str(port_of(first.url)))
        eventually(lambda: new.info("replication").get("master_link_status") == "up")
        connection: redis.Redis = new
        switch = stack.enter_context(closing(Switch(first.url)))

        def fail_over() -> redis.Redis:
            old.execute_command("FAILOVER", "TO", "127.0.0.1", str(port_of(second.url)))
            eventually(lambda: old.info("replication")["role"] == "slave")
            switch.target = second.url
            return connection

        yield switch, fail_over


@contextmanager
def closing(switch: Switch) -> Iterator[Switch]:
    try:
        yield switch
    finally:
        switch.close()


Pair = tuple[Switch, Callable[[], redis.Redis]]


def test_clients_find_the_new_primary(pair: Pair) -> None:
    """Their connections to the old one are open, and it answers: as a replica that takes no writes."""
    switch, fail_over = pair
    with Client(switch.url, settings=Settings(), patience=10) as client:
        handle = client.submit(PATH, 1)
        assert handle.wait(timeout=0.1) is False  # it listens now
        new = fail_over()
        client.submit(PATH, 2)
        assert new.llen(key("queue", "default")) == 2
        # It listens at the new primary from now on: an end is told at once.
        eventually(lambda: new.pubsub_numsub(key("replies", client._session.client_id))[0][1] == 1)


def test_async_clients_find_the_new_primary(pair: Pair) -> None:
    switch, fail_over = pair

    async def main() -> None:
        async with AsyncClient(switch.url, settings=Settings(), patience=10) as client:
            await client.submit(PATH, 1)
            new = await asyncio.to_thread(fail_over)
            await client.submit_many([(PATH, 2)] * 3)
            assert new.llen(key("queue", "default")) == 4

    asyncio.run(main())


@pytest.mark.slow
def test_workers_guardians_and_reapers_find_the_new_primary(pair: Pair, tmp_path: Path) -> None:
    switch, fail_over = pair
    with laboratory(switch.url, tmp_path) as lab:
        worker = lab.worker()
        lab.reaper()
        name = lab.submit("count", {"n": 200, "sleep": 0.01})
        lab.moved(name, 10)
        new = fail_over()
        after = Lab(switch.url, tmp_path, new)
        after.check(name, 200)
        plain = Queue("gpu", connection=new).enqueue("lab_tasks.double", 4)
        eventually(lambda: plain.return_value() == 8)
        # The guardian's heartbeats and the reaper's sweeps arrive there as well.
        assert eventually(lambda: after.ready(worker.name))
        sweeps = new.hgetall(key("pulse"))
        eventually(lambda: new.hgetall(key("pulse")) != sweeps)
        clients = {item["name"] for item in new.client_list()}
        assert "perdure-reaper" in clients
        lab.processes[0].kill_tree()


@pytest.mark.slow
def test_a_running_plain_job_ends_at_the_new_primary(pair: Pair, tmp_path: Path) -> None:
    """RQ's own code writes the end, over RQ's own connection."""
    switch, fail_over = pair
    with laboratory(switch.url, tmp_path) as lab:
        worker = lab.worker()
        job = Queue("gpu", connection=lab.connection).enqueue("lab_tasks.nap", 2)
        eventually(lambda: job.get_status(refresh=True) == "started")
        new = fail_over()
        moved = Queue("gpu", connection=new).fetch_job(job.id)
        assert moved is not None
        eventually(lambda: moved.get_status(refresh=True) == "finished")
        assert worker.running
