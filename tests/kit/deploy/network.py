"""Several hosts on one machine: network namespaces around a switch, each with its own address and host name.

Pulling a host's cable makes its packets vanish, in both directions, without a reset and without any sign on the
host itself: its link stays up, and it knows the others' hardware addresses for good. That needs root, ``ip``
(iproute2) and ``unshare`` (util-linux); where it cannot be, a proxy stands for the cables.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from perdure.protocol.connection import connect
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, Process, eventually

PORT = 6379
"""Each host has all ports to itself."""


def missing() -> str:
    """Why there can be no hosts on this machine; empty if there can."""
    if os.geteuid():
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "ip (iproute2) or unshare (util-linux) is not installed"
    name = f"pd{os.getpid()}try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces are not allowed here"
    ran = subprocess.run(
        ["ip", "-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "other"],
        capture_output=True,
        check=False,
    )
    subprocess.run(["ip", "netns", "del", name], check=False)
    return "veth pairs are not allowed here" if ran.returncode else ""


def _ip(*arguments: str) -> None:
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"ip {' '.join(arguments)}: {ran.stderr}"


@dataclass
class Network:
    """A switch and the hosts on it. Names of namespaces have this process' id, so that test processes do not meet."""

    names: Sequence[str]
    prefix: str = field(default_factory=lambda: f"pd{os.getpid()}")

    def __post_init__(self) -> None:
        self.switch = f"{self.prefix}switch"
        self._spaces: list[str] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def space(self, name: str) -> str:
        return f"{self.prefix}{name}"

    def command(self, name: str) -> list[str]:
        """What to put in front of a command so that it runs on that host. It keeps the process id."""
        inside = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.space(name), "unshare", "--uts", "sh", "-c", inside, name]

    def _build(self) -> None:
        self._add(self.switch)
        _ip("-n", self.switch, "link", "add", "name", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for name in self.names:
            space = self.space(name)
            self._add(space)
            _ip(
                "-n",
                self.switch,
                "link",
                "add",
                "name",
                f"to-{name}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            _ip("-n", space, "link", "set", "eth0", "address", self._hardware(name))
            _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", space, "link", "set", link, "up")
            _ip("-n", self.switch, "link", "set", f"to-{name}", "master", "bridge", "up")
            for other in self.names:
                if other != name:
                    address = self.address(other)
                    _ip("-n", space, "neigh", "replace", address, "lladdr", self._hardware(other), "dev", "eth0")

    def _hardware(self, name: str) -> str:
        return f"02:00:00:00:00:{self.names.index(name) + 1:02x}"

    def _add(self, space: str) -> None:
        _ip("netns", "add", space)
        self._spaces.append(space)

    def cut(self, name: str) -> None:
        """Pull the host's cable out of the switch."""
        _ip("-n", self.switch, "link", "set", f"to-{name}", "nomaster")

    def mend(self, name: str) -> None:
        """Put it back."""
        _ip("-n", self.switch, "link", "set", f"to-{name}", "master", "bridge")

    def close(self) -> None:
        while self._spaces:
            subprocess.run(["ip", "netns", "del", self._spaces.pop()], check=False)

    def url(self, name: str) -> str:
        """Where Redis is for processes on that host."""
        return f"redis://{self.address('redis')}:{PORT}/0"

    def forget(self, name: str, connection: redis.Redis) -> None:
        """The server closes all connections of that host, as after a restart. While it is cut off, it does not hear of
        it.
        """
        found: Any = connection.client_list()
        for client in found:
            if client["addr"].startswith(f"{self.address(name)}:"):
                connection.client_kill(client["addr"])


class BlackHole:
    """Where there can be no namespaces: each host reaches Redis through a proxy, which can stop handing on anything.

    Its connections stay open then, and new ones are taken and never answered.
    """

    def __init__(self, names: Sequence[str], port: int) -> None:
        self._port = port
        self._open = {name: threading.Event() for name in names}
        self._listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in names}
        self._pairs: dict[str, list[tuple[socket.socket, socket.socket]]] = {name: [] for name in names}
        for name in names:
            self._open[name].set()
            threading.Thread(target=self._accept, args=(name,), daemon=True).start()

    def command(self, name: str) -> list[str]:
        """Nothing: all processes run on this machine."""
        return []

    def url(self, name: str) -> str:
        return f"redis://127.0.0.1:{self._listeners[name].getsockname()[1]}/0"

    def cut(self, name: str) -> None:
        self._open[name].clear()

    def mend(self, name: str) -> None:
        self._open[name].set()

    def forget(self, name: str, connection: redis.Redis) -> None:
        """The server's side of each connection ends; the other hears of it once the cable is mended."""
        for _, far in self._pairs[name]:
            _shut(far)

    def close(self) -> None:
        for name, listener in self._listeners.items():
            _shut(listener)
            listener.close()
            self.mend(name)
            for pair in self._pairs[name]:
                for item in pair:
                    _shut(item)
                    item.close()

    def _accept(self, name: str) -> None:
        while True:
            try:
                near, _ = self._listeners[name].accept()
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return  # closed
            self._pairs[name].append((near, far))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(name, source, target), daemon=True).start()

    def _pump(self, name: str, source: socket.socket, target: socket.socket) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(65536)
                self._open[name].wait()
                target.sendall(data)
            except OSError:
                break  # the other direction has ended
        self._open[name].wait()
        for item in (source, target):
            _shut(item)


def _shut(item: socket.socket) -> None:
    try:
        item.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was never connected, or has ended already


@dataclass
class Hosts(Lab):
    """A lab whose processes run on several hosts."""

    wires: Network | BlackHole = field(default_factory=lambda: BlackHole((), 0))
    here: str = ""
    """On which host the next process starts."""

    def on(self, name: str) -> Hosts:
        """The next processes start on this host."""
        self.here, self.url = name, self.wires.url(name)
        return self

    def run(self, name: str, code: str, *arguments: str) -> Process:
        """Start a piece of Python on the host."""
        return self._start(name, [sys.executable, "-c", code, *arguments], {}, {"PERDURE_REDIS_URL": self.url})

    def cut(self, name: str) -> None:
        """Cut a host off, and have the server forget its connections."""
        self.wires.cut(name)
        self.wires.forget(name, self.connection)

    def _start(
        self, name: str, command: list[str], settings: dict[str, Any], environment: dict[str, str] | None
    ) -> Process:
        return super()._start(name, [*self.wires.command(self.here), *command], settings, environment)


@contextmanager
def hosts(binary: Path, folder: Path, names: Sequence[str]) -> Iterator[Hosts]:
    """Hosts of these names and one of Redis, which the test itself reaches beside the network; default settings."""
    if missing():
        with Server(folder / "redis", binary=binary) as own:
            yield from _lab(BlackHole(names, own.port), own.url, folder)
        return
    network = Network(("redis", *names))
    path = folder / "redis.sock"
    command = [
        *network.command("redis"), str(binary), "--port", str(PORT), "--bind", network.address("redis"),
        "--unixsocket", str(path), "--save", "", "--protected-mode", "no", "--dir", str(folder),
    ]  # fmt: skip
    try:
        with (folder / "redis.log").open("wb") as log:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    except BaseException:
        network.close()
        raise
    try:
        eventually(lambda: path.exists() or server.poll() is not None)
        assert server.poll() is None, (folder / "redis.log").read_text()
        yield from _lab(network, f"unix://{path}", folder)
    finally:
        server.kill()
        server.wait()
        network.close()


def _lab(wires: Network | BlackHole, url: str, folder: Path) -> Iterator[Hosts]:
    with connect(url, name="test") as connection:
        lab = Hosts(url, folder, connection, {}, wires=wires)
        try:
            yield lab
        finally:
            lab.close()
            wires.close()
