"""Snapshots on disk: whatever happens, the newest that is whole is found, and it is never an older one than was
promised.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest

from perdure.protocol.errors import InvalidRequest, SnapshotError, UsageError
from perdure.recovery import Snapshot, Snapshots
from perdure.recovery.snapshot_file import HEADER, MAGIC
from tests.kit.lab import eventually, gone, send
from tests.kit.places import TESTS
from tests.kit.snapshot_saver import value_of

SAVER = TESTS / "kit" / "snapshot_saver.py"


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path / "state", "state")


def sealed(number: int, tree: bytes, section: bytes = b"") -> bytes:
    """A file with a header that fits, as somebody would write it who wants it to be read."""
    fields = struct.pack("<8sIIQQQ", MAGIC, 1, 0, number, len(tree), len(section))
    return fields + hashlib.sha256(fields + tree + section).digest() + tree + section


def loaded(snapshots: Snapshots, id: int | None = None) -> Any:
    snapshot = snapshots.load(id)
    assert snapshot is not None
    return snapshot.value


# --- values ------------------------------------------------------------------------------------------


def test_a_value_comes_back(snapshots: Snapshots) -> None:
    """Under a number that grows, and by that number as well."""
    assert snapshots.load() is None
    value = {"text": "to be", "bytes": b"\0\xff", "numbers": [1, 2**63, -1.5, None, True], 7: {"deep": [[]]}}
    assert snapshots.save(value) == 1
    assert snapshots.save(["other"]) == 2
    assert snapshots.load() == Snapshot(2, ["other"])
    assert loaded(snapshots, 1) == value
    assert snapshots.list() == [1, 2]


def test_tensors_come_back_and_other_tools_read_them(snapshots: Snapshots) -> None:
    """Of torch and numpy, of any dtype and layout; their part of the file is safetensors."""
    torch, numpy = pytest.importorskip("torch"), pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors")
    value = {
        "odd": torch.arange(12.0).reshape(3, 4).T[1:],
        "half": torch.full((2, 2), 1.5, dtype=torch.bfloat16),
        "one": torch.tensor(7),
        "none": torch.empty(0, 3),
        "wide": torch.tensor([1 + 2j], dtype=torch.complex128),
        "rows": [numpy.arange(6, dtype="<i2").reshape(2, 3), numpy.array(["2026-11-23"], dtype="M8[D]")],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    number = snapshots.save(value)
    back = loaded(snapshots)
    for name in ("odd", "half", "one", "none", "wide", "parameter"):
        assert torch.equal(back[name], value[name]), name
        assert back[name].dtype == value[name].dtype
    for mine, other in zip(back["rows"], value["rows"], strict=True):
        assert (mine == other).all()
        assert mine.dtype == other.dtype
    back["odd"] += 1  # on memory of its own
    data = snapshots.path(number).read_bytes()
    tree, section = struct.unpack("<QQ", data[24:40])
    assert HEADER + tree + section == len(data)
    read = {name: (item["dtype"], item["shape"]) for name, item in safetensors.deserialize(data[HEADER + tree :])}
    assert read["0"] == ("F32", [3, 3])
    assert read["1"] == ("BF16", [2, 2])
    assert len(read) == 8


def test_what_only_torch_holds_is_read_with_weights_only(snapshots: Snapshots) -> None:
    """Sparse and quantised tensors, a dtype, a device: by torch's own format, tried before it is written."""
    torch = pytest.importorskip("torch")
    value = {"sparse": torch.eye(3).to_sparse(), "dtype": torch.float16, "device": torch.device("cpu")}
    snapshots.save(value)
    back = loaded(snapshots)
    assert torch.equal(back["sparse"].to_dense(), torch.eye(3))
    assert (back["dtype"], back["device"]) == (torch.float16, torch.device("cpu"))
    with pytest.raises(InvalidRequest, match=r"Linear.*weights_only=True.*state_dict"):
        snapshots.save({"model": torch.nn.Linear(2, 2)})
    with pytest.raises(InvalidRequest, match="object of the type Snapshots"):
        snapshots.save([torch.float16, snapshots])
    assert snapshots.list() == [1]


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": [0, object()]}, r"snapshot\['a'\]\[1\] is an object"), ({"a": 2**64}, r"more than 64 bits")],
)
def test_what_cannot_be_saved_is_named(snapshots: Snapshots, value: Any, place: str) -> None:
    """And the file system is not touched."""
    with pytest.raises(InvalidRequest, match=place):
        snapshots.save(value)
    assert not snapshots.folder.exists()


class Burglar:
    """Its pickle would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_file_made_by_somebody_else_runs_no_code(
    snapshots: Snapshots, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its digest fits, and what is in it would be harmful to unpickle, or lies about its tensors."""
    torch = pytest.importorskip("torch")
    snapshots.save("good")
    saved = io.BytesIO()
    torch.save(Burglar(tmp_path / "burgled"), saved)
    header = b'{"0":{"dtype":"F32","shape":[4],"data_offsets":[0,1000000000]}}'
    evil = [
        sealed(2, msgpack.packb(msgpack.ExtType(4, saved.getvalue()))),
        sealed(3, msgpack.packb(msgpack.ExtType(4, pickle.dumps(Burglar(tmp_path / "burgled"))))),
        sealed(4, msgpack.packb(msgpack.ExtType(2, msgpack.packb(["float32", [4], "0"]))),
               struct.pack("<Q", len(header)) + header),
        sealed(5, msgpack.packb(msgpack.ExtType(2, msgpack.packb(["float32", [-4, -1], "0"]))),
               struct.pack("<Q", 2**63) + header),
        sealed(6, b"\x91" * 2000),
        sealed(7, msgpack.packb(msgpack.ExtType(99, b""))),
        sealed(8, msgpack.packb(msgpack.ExtType(3, msgpack.packb(["O", [1], "0"]))), struct.pack("<Q", 2) + b"[]"),
    ]  # fmt: skip
    for number, data in enumerate(evil, 2):
        snapshots.path(number).write_bytes(data)
    assert snapshots.load() == Snapshot(1, "good")
    assert caplog.text.count("cannot be used: it holds no value") == len(evil)
    assert not (tmp_path / "burgled").exists()


# --- which one is found ------------------------------------------------------------------------------


def test_the_last_ones_stay_and_times_play_no_part(snapshots: Snapshots) -> None:
    """Five of nine; the numbers say which are the newest, whatever the clock did."""
    for number in range(1, 10):
        assert snapshots.save({"number": number}) == number
        os.utime(snapshots.path(number), (1e9 - number, 1e9 - number))
    assert snapshots.list() == [5, 6, 7, 8, 9]
    assert loaded(snapshots) == {"number": 9}
    other = Snapshots(snapshots.folder, "state.more", keep=1)
    assert [other.save(None) for _ in range(3)] == [1, 2, 3]
    assert (other.list(), snapshots.list()) == ([3], [5, 6, 7, 8, 9])


def test_a_damaged_newest_snapshot_is_passed_over(snapshots: Snapshots) -> None:
    """Cut at every length, and with every single byte another: the one before is found, always."""
    snapshots.save("before")
    snapshots.save({"newest": list(range(20))})
    path = snapshots.path(2)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert snapshots.load() == Snapshot(1, "before"), length
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        assert snapshots.load() == Snapshot(1, "before"), place
    path.write_bytes(data + b"\0")
    assert snapshots.load() == Snapshot(1, "before")
    path.write_bytes(data)
    assert loaded(snapshots) == {"newest": list(range(20))}


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("empty", "it has 0 bytes, less than a header"),
        ("torn", "it has 100 of"),
        ("tampered", "its content does not match its digest"),
        ("foreign", "it is no snapshot"),
        ("newer", "it has version 2, but this release reads 1"),
        ("renamed", "it is the snapshot 1 under another name"),
        ("link", "it is a symbolic link"),
        ("folder", "it is no regular file"),
        ("fifo", "it is no regular file"),
    ],
)
def test_a_damaged_newest_snapshot_is_named_with_the_reason(
    snapshots: Snapshots, caplog: pytest.LogCaptureFixture, harm: str, why: str
) -> None:
    """In the log, with the one that was used instead; asked for by its number, it raises the same; the next is above
    it.
    """
    snapshots.save({"number": 1})
    snapshots.save({"number": 2, "bytes": bytes(200)})
    path = snapshots.path(2)
    data = bytearray(path.read_bytes())
    path.unlink()
    match harm:
        case "torn":
            path.write_bytes(data[:100])
        case "tampered":
            data[-1] ^= 1
            path.write_bytes(data)
        case "newer":
            data[8] = 2
            path.write_bytes(data)
        case "link":
            path.symlink_to(snapshots.path(1))
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            path.write_bytes({"empty": b"", "foreign": bytes(500), "renamed": snapshots.path(1).read_bytes()}[harm])
    with caplog.at_level(logging.WARNING):
        assert snapshots.load() == Snapshot(1, {"number": 1})
    assert f"{path} cannot be used: {why}" in caplog.text
    assert f"went on with the snapshot {snapshots.path(1)}" in caplog.text
    with pytest.raises(SnapshotError, match=f"{path} cannot be used: {why}"):
        snapshots.load(2)
    assert snapshots.save("next") == 3
    assert loaded(snapshots) == "next"


def test_when_none_is_whole_it_is_said_and_nothing_is_given(
    snapshots: Snapshots, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache starts empty then; a number that is not there is an error."""
    snapshots.save(1)
    snapshots.path(1).write_bytes(b"")
    assert snapshots.load() is None
    assert "none of the snapshots state" in caplog.text
    with pytest.raises(SnapshotError, match=r"000000000009\.snapshot cannot be used: No such file"):
        snapshots.load(9)


# --- files and folders -------------------------------------------------------------------------------


def test_only_the_owner_reads_them(snapshots: Snapshots) -> None:
    """Whatever the umask."""
    before = os.umask(0)
    try:
        snapshots.save("secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE(snapshots.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in snapshots.folder.iterdir()} == {0o600}


def test_an_unsafe_folder_or_name_is_refused(tmp_path: Path) -> None:
    """A folder for everybody, a lock that is a link, a folder that is none, a name that leads elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o1777)
    for call in (lambda: Snapshots(folder, "a").save(1), lambda: Snapshots(folder, "a").load()):
        with pytest.raises(SnapshotError, match="anybody can write into"):
            call()
    folder.chmod(0o700)
    (folder / ".a.lock").symlink_to(victim)
    with pytest.raises(SnapshotError, match=r"\.a\.lock cannot be used: it is a symbolic link"):
        Snapshots(folder, "a").save(1)
    with pytest.raises(SnapshotError, match="victim of snapshots cannot be used"):
        Snapshots(victim, "a").load()
    assert victim.read_text() == "precious"
    for name in ("", "../a", "a/b", ".a", "a\n", "ü", "a" * 101):
        with pytest.raises(UsageError, match="the name of snapshots"):
            Snapshots(folder, name)
    with pytest.raises(UsageError, match="keep must be at least 1"):
        Snapshots(folder, "a", keep=0)


LIMITED = """
import resource, sys
from perdure.recovery import Snapshots
from perdure.protocol.errors import SnapshotError
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    Snapshots(sys.argv[1], "state").save(bytes(1_000_000))
except SnapshotError as error:
    sys.exit(str(error))
"""


def test_a_file_that_gets_too_large_leaves_nothing_behind(snapshots: Snapshots) -> None:
    """A real limit of the operating system: the error says what and where, those before stay."""
    snapshots.save("before")
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(snapshots.folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 1
    assert f"{snapshots.path(2)} was not saved: File too large (it has 1,000," in ran.stderr
    assert "Those saved before are as they were" in ran.stderr
    assert sorted(path.name for path in snapshots.folder.iterdir()) == [".state.lock", snapshots.path(1).name]
    assert loaded(snapshots) == "before"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "perdure-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_ones(small_disk: Path) -> None:
    """ENOSPC: the unfinished file is removed, the message has the numbers; with room again, it goes on."""
    snapshots = Snapshots(small_disk, "state", keep=2)
    for number in range(3):
        snapshots.save({"number": number, "bytes": bytes(300_000)})
    with pytest.raises(
        SnapshotError, match=r"No space left on device \(it has 600,.* bytes, \d+.* are free\)"
    ) as raised:
        snapshots.save(bytes(600_000))
    assert isinstance(raised.value.__cause__, OSError)
    assert snapshots.list() == [2, 3]
    assert not [path for path in small_disk.iterdir() if path.suffix == ".saving"]
    assert loaded(snapshots)["number"] == 2
    assert snapshots.save("small") == 4


# --- processes ---------------------------------------------------------------------------------------


class Savers:
    """Starts processes that save into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        self.process = subprocess.Popen(
            [sys.executable, str(SAVER), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pids: list[int] = []

    def start(self, saves: int, point: int | None = None) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{saves} {'' if point is None else point}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        self.pids.append(pid)
        return pid

    @property
    def saved(self) -> list[int]:
        """Numbers of the saves that have returned."""
        path = self.folder / "saved"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def more_than(self, number: int) -> bool:
        return len(self.saved) > number

    def close(self) -> None:
        for pid in self.pids:
            if not gone(pid):
                send(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def savers(tmp_path: Path) -> Iterator[Savers]:
    running = Savers(tmp_path / "state")
    yield running
    running.close()


def check(snapshots: Snapshots, savers: Savers) -> None:
    """The newest one is whole, and none older than what was promised."""
    snapshot = snapshots.load()
    newest = max(savers.saved, default=0)
    if snapshot is None:
        assert newest == 0
        return
    assert snapshot.id >= newest
    assert snapshot.value == value_of(snapshot.value["number"])


def test_killed_at_each_of_its_calls(savers: Savers, caplog: pytest.LogCaptureFixture) -> None:
    """A save that ends at its first, second, third … call into the system, a write half done: nothing
    promised is lost.
    """
    snapshots = Snapshots(savers.folder, "state", keep=2)
    for number in (1, 2):
        snapshots.save(value_of(number))
    ended = 0
    for point in range(100):
        before = len(savers.saved)
        pid = savers.start(1, point)
        eventually(partial(gone, pid))
        check(snapshots, savers)
        assert snapshots.load(), point
        if len(savers.saved) > before:
            break
        ended += 1
    assert ended >= 10, "a save has at least so many calls"
    assert not caplog.records, "never was one found that is not whole"
    snapshots.save(value_of(1))
    names = {path.name for path in savers.folder.iterdir()}
    assert names == {".state.lock", "saved", *(snapshots.path(number).name for number in snapshots.list())}


def test_killed_at_any_moment(savers: Savers, caplog: pytest.LogCaptureFixture) -> None:
    """Real processes that save without end, and kill -9: the newest one is whole each time, and the last promised or
    newer.
    """
    moments = random.Random(5)
    snapshots = Snapshots(savers.folder, "state")
    for _ in range(30):
        before = len(savers.saved)
        pid = savers.start(10_000)
        eventually(partial(savers.more_than, before))
        time.sleep(moments.uniform(0, 0.02))  # until that moment
        send(pid, signal.SIGKILL)
        eventually(partial(gone, pid))
        check(snapshots, savers)
    assert savers.saved == sorted(set(savers.saved))
    assert not caplog.records


def test_many_processes_save_at_once(savers: Savers) -> None:
    """Each number once, none torn, and whoever reads meanwhile always finds one."""
    snapshots = Snapshots(savers.folder, "state", keep=2)
    snapshots.save(value_of(1))
    pids = [savers.start(15) for _ in range(3)]
    while not all(map(gone, pids)):
        assert snapshots.load()
    assert sorted(savers.saved) == list(range(2, 47))
    assert snapshots.list() == [42, 43, 44, 45, 46], "the savers keep five"


def test_a_saver_that_stands_still_holds_nobody_up_for_ever(snapshots: Snapshots) -> None:
    """Whoever waits for it gives up with a message, readers do not wait at all, and the lock goes with its holder."""
    snapshots.save("before")
    lock = os.open(snapshots.folder / ".state.lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    other = Snapshots(snapshots.folder, "state", patience=0.1)
    with pytest.raises(SnapshotError, match=r"another process has been saving state in .* for 0\.1 s"):
        other.save("never")
    assert loaded(other) == "before"
    os.close(lock)
    assert other.save("after") == 2
