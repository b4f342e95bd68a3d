"""Health over HTTP: real sockets, one guardian or one server each."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.protocol.settings import Settings, variable
from perdure.scripts.pool.server import Server
from perdure.workers.health import server as health_server
from perdure.workers.health.server import serve
from perdure.workers.health.state import Health
from tests.kit.lab import Lab, eventually, gone, laboratory
from tests.kit.places import DOCS
from tests.kit.workers.health import ask, free_port, status

QUICK: dict[str, Any] = {"health_interval": 0.1}


@pytest.fixture
def url() -> str:
    """A server about this process."""
    made = serve(Health(os.getpid(), [], claims=True), "127.0.0.1", free_port(), logging.getLogger("test"))
    assert made
    return made


def test_each_question_has_its_path(url: str) -> None:
    assert ask(url, "/livez")[:2] == (200, {"live": True, "reason": ""})
    assert ask(url, "/quarantine")[:2] == (200, {"quarantined": False, "reason": ""})
    status, body, response = ask(url, "/readyz?verbose=1")
    assert status == 200
    assert set(body) == {"healthy", "checks", "timestamp"}
    assert set(body["checks"]["worker"]) == {"state", "reason", "at"}
    assert response.getheader("Content-Type") == "application/json"
    assert response.getheader("Cache-Control") == "no-store"


def test_head_has_the_length_and_no_body(url: str) -> None:
    status, body, response = ask(url, "/livez", "HEAD")
    assert (status, body) == (200, None)
    assert int(response.getheader("Content-Length") or 0) > 0


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 404), ("/readyz/", "GET", 404), ("/../etc/passwd", "GET", 404), ("/livez", "POST", 405)],
)
def test_what_is_not_served_is_refused_as_json(url: str, path: str, method: str, status: int) -> None:
    answered, body, response = ask(url, path, method)
    assert answered == status
    assert body["error"]
    assert (response.getheader("Allow") == "GET, HEAD") == (status == 405)


def test_clients_that_say_nothing_do_not_keep_others_waiting(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few are borne; more than there are places are turned away, and leave their places after a while."""
    host, port = "127.0.0.1", int(url.rpartition(":")[2])
    silent = [socket.create_connection((host, port)) for _ in range(8)]
    assert ask(url, "/livez")[0] == 200
    monkeypatch.setattr(health_server._Handler, "timeout", 0.3)
    silent += [socket.create_connection((host, port)) for _ in range(2 * health_server.MOST)]

    eventually(lambda: status(url, "/livez") == 200)
    for connection in silent:
        connection.close()
    assert eventually(lambda: status(url, "/livez")) == 200


@pytest.mark.parametrize("said", [b"\r\n\r\n", b"GET\r\n\r\n", b"GET /livez HTTP/9.9\r\n\r\n", b"\xff" * 70_000])
def test_what_is_no_request_harms_nobody(url: str, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection:
        try:
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:
            pass  # it hung up before all was sent
    assert ask(url, "/livez")[0] == 200


def test_the_next_port_is_taken_if_one_is_not_free() -> None:
    health = Health(os.getpid(), [], claims=True)
    log = logging.getLogger("test")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        first = serve(health, "127.0.0.1", port, log)
        second = serve(health, "127.0.0.1", port, log)
    assert len({port, *(int(url.rpartition(":")[2]) for url in (first, second))}) == 3
    assert ask(second, "/livez")[0] == 200


def test_a_guardian_without_a_port_is_a_guardian_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    health = Health(os.getpid(), [])
    assert serve(health, "192.0.2.1", 9, logging.getLogger("test")) == ""  # an address of nobody
    assert "cannot serve health on 192.0.2.1 port 9" in caplog.text


def test_an_ipv6_address_is_served() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    url = serve(Health(os.getpid(), []), "::1", free_port(), logging.getLogger("test"))
    if not url:
        pytest.skip("this machine has no ::1")
    assert url.startswith("http://[::1]:")
    assert ask(url, "/livez")[0] == 200


def test_the_page_shows_what_is_served(url: str) -> None:
    """The report in docs/health.md has the keys of a real one, and a setting that it names is one."""
    page = (DOCS / "health.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shown, served = json.loads(block), ask(url)[1]
    assert set(shown) == set(served)
    assert {frozenset(check) for check in shown["checks"].values()} == {frozenset(served["checks"]["worker"])}
    assert set(shown["checks"]) == {"worker", "gpu", "network", "memory", "disk"}
    fields = {variable(item.name) for item in dataclasses.fields(Settings)}
    assert set(re.findall(r"PERDURE_\w+", page)) <= fields
    assert set(re.findall(r"`(/\w+)`", page)) - {"/tmp"} == set(health_server._Handler.paths)


# --- of a real worker ------------------------------------------------------------------------------------


def address_of(lab: Lab, name: str) -> str | None:
    """Where a worker's guardian says that it serves its health."""
    record = lab.ready(name)
    return None if record is None else str(record["health"])


def address(lab: Lab, name: str) -> str:
    return str(eventually(lambda: address_of(lab, name)))


def test_a_worker_is_ready_once_it_claims(lab: Lab, tmp_path: Path) -> None:
    """By its guardian: a worker that is stopped answers nothing, and it is told all the same."""
    worker = lab.worker(health_port=free_port(), health_folder=str(tmp_path), heartbeat_timeout=60.0, **QUICK)
    url = address(lab, worker.name)
    eventually(lambda: ask(url)[1]["checks"]["disk"]["state"] in ("ok", "degraded"))
    checks = ask(url)[1]["checks"]
    assert set(checks) == {"worker", "network", "memory", "disk"}
    assert str(tmp_path) in checks["disk"]["reason"]
    eventually(lambda: status(url) == 200)
    worker.send(signal.SIGSTOP)
    assert ask(url, "/livez")[0] == 200
    worker.send(signal.SIGCONT)


@pytest.mark.slow
def test_two_workers_of_a_host_have_two_ports_and_say_which(lab: Lab) -> None:
    """A port goes over to the next guardian; without the setting nothing listens."""
    port = free_port()
    workers = [lab.worker(health_port=port, **QUICK) for _ in range(2)]
    urls = [address(lab, worker.name) for worker in workers]
    assert len(set(urls)) == 2
    assert all(ask(url, "/livez")[0] == 200 for url in urls)
    (guardian,) = workers[0].children()
    os.kill(guardian, signal.SIGKILL)
    eventually(lambda: gone(guardian))
    eventually(lambda: status(urls[0], "/livez") == 200)
    silent = lab.worker()
    assert address_of(lab, silent.name) == ""
    for pid in (silent.pid, *silent.children()):
        assert [item for item in psutil.Process(pid).net_connections("inet") if item.status == psutil.CONN_LISTEN] == []


@pytest.mark.slow
def test_without_redis_a_worker_lives_and_is_not_ready(tmp_path: Path, server_binary: Path) -> None:
    """A restart would not bring Redis back; work that is routed to it would not be done.

    One that is gone does not live, for as long as its guardian is there to say so: it has something to hand on yet.
    """
    data, place = tmp_path / "data", tmp_path / "lab"
    data.mkdir()
    place.mkdir()
    with Server(data, binary=server_binary, die_with_parent=True) as server, laboratory(server.url, place) as lab:
        worker = lab.worker(health_port=free_port(), **QUICK)
        url = address(lab, worker.name)
        eventually(lambda: status(url) == 200)
        server.kill()
        eventually(lambda: status(url) == 503)
        found = ask(url)[1]["checks"]["network"]
        assert found["state"] == "fail"
        assert "Redis does not answer" in found["reason"]
        assert ask(url, "/livez")[:2] == (200, {"live": True, "reason": ""})
        server.restart()
        eventually(lambda: status(url) == 200)
        assert worker.running
        server.kill()
        worker.kill()
        eventually(lambda: status(url, "/livez") == 503)
        assert ask(url, "/livez")[1] == {"live": False, "reason": "the worker process is gone"}
