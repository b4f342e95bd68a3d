"""``rediss://`` with a CA of one's own, and a unix socket: producer, worker, guardian and reaper, all the way."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from perdure.producer import Client
from perdure.protocol.connection import connect
from perdure.protocol.errors import RedisUnavailable
from tests.kit.lab import eventually, laboratory

BINARY = "/usr/bin/redis-server"


def _needed(path: str | None, what: str) -> str:
    """The embedded server has no TLS. Elsewhere its absence skips; in CI it fails."""
    if path is None or not Path(path).exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} is missing: .ci/run installs it")
        pytest.skip(f"{what} is not installed")
    return path


@dataclass(frozen=True)
class Secured:
    """A server that speaks TLS at its port and plainly at a socket, and two CAs, the second of which signed nothing."""

    port: int
    socket: Path
    ca: Path
    stranger: Path

    def url(self, ca: Path | None = None) -> str:
        return f"rediss://localhost:{self.port}/0?ssl_ca_certs={ca or self.ca}"


def _authority(openssl: str, folder: Path, name: str) -> tuple[Path, Path]:
    key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
    _run(
        openssl,
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    )
    return key, certificate


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    binary, openssl = _needed(BINARY, "Debian's redis-server"), _needed(shutil.which("openssl"), "openssl")
    folder = tmp_path_factory.mktemp("tls")
    ca_key, ca = _authority(openssl, folder, "ca")
    _, stranger = _authority(openssl, folder, "stranger")
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    _run(
        openssl,
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-keyout",
        str(folder / "server.key"),
        "-out",
        str(folder / "server.csr"),
    )
    _run(
        openssl,
        "x509",
        "-req",
        "-in",
        str(folder / "server.csr"),
        "-CA",
        str(ca),
        "-CAkey",
        str(ca_key),
        "-days",
        "2",
        "-CAcreateserial",
        "-extfile",
        str(folder / "names"),
        "-out",
        str(folder / "server.crt"),
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--tls-auth-clients", "no",
                "--tls-cert-file", str(folder / "server.crt"), "--tls-key-file", str(folder / "server.key"),
                "--tls-ca-cert-file", str(ca), "--unixsocket", str(folder / "redis.sock"), "--dir", str(folder),
                "--appendonly", "yes", "--save", "",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        eventually(lambda: (folder / "redis.sock").exists() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield Secured(port, folder / "redis.sock", ca, stranger)
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tls", "socket"])
def test_the_whole_way(secured: Secured, tmp_path: Path, way: str) -> None:
    """Submit, stream, a killed worker whose guardian hands on, a reaper that finds a lost host."""
    url = secured.url() if way == "tls" else f"unix://{secured.socket}?db=0"
    with connect(url) as connection:
        connection.flushall()
    with laboratory(url, tmp_path) as lab, Client(url) as client:
        worker = lab.worker()
        handle = client.submit("lab_tasks.gate", {"folder": str(tmp_path)}, queue="gpu")
        lab.moved(handle.id, 3)
        worker.kill()  # its guardian has nothing but the pipe and its own connection
        eventually(lambda: lab.events(handle.id) == [("redelivered", "WORKER_LOST")])
        lab.reaper()
        second = lab.worker()
        eventually(lambda: lab.record(handle.id).worker == second.name)
        second.kill_tree()
        eventually(lambda: len(lab.events(handle.id)) == 3)
        lab.worker()
        (tmp_path / "open").touch()
        assert list(handle.stream(timeout=60)) == list(range(6))
        assert [kind for _, kind in lab.events(handle.id) if kind] == ["WORKER_LOST"] * 3


def _commands(url: str) -> dict[str, list[str]]:
    script = Path(sys.executable).with_name
    return {
        "client": [str(script("perdure")), "list", "--url", url],
        "worker": [str(script("perdure")), "worker", "gpu", "--url", url],
        "rq": [str(script("rq")), "worker", "-w", "perdure.workers.Worker", "--url", url, "gpu"],
        "reaper": [str(script("perdure")), "reaper", "--url", url],
    }


@pytest.mark.slow
@pytest.mark.parametrize("who", ["client", "worker", "reaper", "rq"])
def test_another_ca_ends_the_start_with_one_line(secured: Secured, who: str) -> None:
    done = subprocess.run(
        _commands(secured.url(secured.stranger))[who], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    if who == "rq":
        assert "CERTIFICATE_VERIFY_FAILED" in done.stderr + done.stdout
    else:
        assert done.returncode == 3
        assert "TLS failed: CERTIFICATE_VERIFY_FAILED" in done.stderr
        assert "certificates" in done.stderr


def test_a_scheme_without_tls_is_told(secured: Secured) -> None:
    with pytest.raises(RedisUnavailable, match="Cannot reach Redis at"), connect(f"redis://localhost:{secured.port}"):
        pass


def test_the_name_of_the_server_is_checked(secured: Secured) -> None:
    """A certificate of the right authority, for another name."""
    url = secured.url().replace("localhost", "127.0.0.1")
    with pytest.raises(RedisUnavailable, match="CERTIFICATE_VERIFY_FAILED"), connect(url):
        pass
