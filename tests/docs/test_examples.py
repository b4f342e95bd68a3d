"""The examples: run as their docstrings say, and killed with -9 where it hurts. The answers are those
of a quiet run.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from perdure.producer import Client
from perdure.protocol.codec import pack
from perdure.protocol.errors import RequestFailed
from perdure.protocol.packed_state import pack_state, unpack_state
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.recovery.failures import classify
from perdure.workers import InvalidRequest, Request
from tests.kit.lab import LONG, Lab, Process, eventually
from tests.kit.places import ROOT

EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))

ALONE = {"OMP_NUM_THREADS": "1"}
"""One thread for each process that computes: several run at once, on few cores."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the examples is where a person would stand."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def workers(lab: Lab, number: int, **settings: Any) -> list[Process]:
    """So many plain rq workers that can import the examples, started at once."""
    started = [
        lab.worker(environment=ALONE | {"PYTHONPATH": str(EXAMPLES)}, wait=False, **settings) for _ in range(number)
    ]
    for process in started:
        eventually(lambda process=process: lab.ready(process.name) or not process.running)  # type: ignore[misc]
        assert process.running, process.log
        lab.seen.update(process.children())
    return started


def kill_holder(lab: Lab, identifier: str, among: list[Process]) -> None:
    """SIGKILL to the worker that runs a request now."""
    name = eventually(lambda: lab.record(identifier).execution and lab.record(identifier).worker)
    next(process for process in among if process.name == name).kill()


def kill_at(lab: Lab, identifier: str, among: list[Process], *numbers: int) -> None:
    """Kill whoever runs it once so many outputs are stored, each time with work left to do; wait for its end."""
    for number in numbers:
        lab.moved(identifier, number)
        assert not lab.record(identifier).ended, "the kill came too late to show anything"
        kill_holder(lab, identifier, among)
    # None of it was charged to the request, and each time it went on from what was stored.
    assert lab.ended(identifier).attempt == 0
    # Besides those that hand it on: the second loss in a row makes it a suspect.
    events = [event for event in lab.store.history(identifier) if event.event in ("redelivered", "retry")]
    assert [event.kind for event in events] == ["WORKER_LOST"] * len(numbers), events
    assert all(event.offset >= number for event, number in zip(events, numbers, strict=True)), events


def answer(lab: Lab, identifier: str) -> bytes:
    """Everything that a client gets of a request, as bytes."""
    with Client(lab.url, settings=Settings()) as client:
        handle = client.get(identifier)
        return pack([list(handle.stream(timeout=LONG)), handle.result(LONG)], limit=10**8, what="answer")


def run_through(generator: Any) -> tuple[list[Any], Any]:
    """All outputs and the result of a generator task without any worker."""
    outputs = []
    while True:
        try:
            outputs.append(next(generator).output)
        except StopIteration as end:
            return outputs, end.value


# --- documents ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_document_is_counted_the_same_after_two_kills(lab: Lab) -> None:
    """Two kills in a row in the middle of a file: every piece once, and the sums of an uninterrupted run."""
    path = lab.folder / "novel.txt"
    path.write_text("naïve 夜 🌩 шёл,\n" * 3000, encoding="utf-8")
    payload = {"path": str(path), "chunk": 1000, "pause": 0.02}
    among = workers(lab, 3)
    quiet = lab.submit("documents.count", payload | {"pause": 0})
    lab.ended(quiet)
    one = lab.submit("documents.count", payload)
    kill_at(lab, one, among, 8, 25)
    assert answer(lab, one) == answer(lab, quiet)


def test_characters_and_words_may_be_cut_anywhere(tmp_path: Path) -> None:
    """Whatever the size of a piece, the sums are those of the whole text."""
    documents = importlib.import_module("documents")
    text = "äö\n夜 🌩🌩 word another\n\n  шёл"
    path = tmp_path / "cut.txt"
    path.write_bytes(text.encode())
    for size in range(4, 50):
        _, result = run_through(documents.count(Request(id="a", payload={"path": str(path), "chunk": size})))
        assert (result["characters"], result["words"], result["lines"]) == (len(text), len(text.split()), 3), size


@pytest.mark.parametrize("change", ["grown", "truncated", "rewritten", "removed"])
def test_a_file_that_has_changed_is_not_gone_on_with(tmp_path: Path, change: str) -> None:
    """A resume on another file, or a change within a run, ends the request with the reason, and not in a wrong sum."""
    documents = importlib.import_module("documents")
    path = tmp_path / "file.txt"
    path.write_bytes(b"0123456789" * 10)
    payload = {"path": str(path), "chunk": 10}
    running = documents.count(Request(id="a", payload=payload))
    state = [next(running) for _ in range(3)][-1].state
    match change:
        case "grown":
            path.write_bytes(b"0123456789" * 11)
        case "truncated":
            path.write_bytes(b"0123456789" * 2)
        case "rewritten":
            stamp = path.stat().st_mtime_ns + 1
            path.write_bytes(b"9876543210" * 10)
            os.utime(path, ns=(stamp, stamp))
        case "removed":
            path.unlink()
    words = "cannot read" if change == "removed" else "has changed"
    with pytest.raises(InvalidRequest, match=words) as caught:
        run_through(documents.count(Request(id="a", payload=payload, state=state)))
    assert caught.value.field == "path"
    if change != "removed":  # one that is open stays readable without its name
        with pytest.raises(InvalidRequest, match="has changed"):
            run_through(running)


@pytest.mark.parametrize("data", [b"fine \xff not", "cut at its end: 夜".encode()[:-1]])
def test_bytes_that_are_no_text_are_named(tmp_path: Path, data: bytes) -> None:
    """What is not UTF-8 ends the request with the place."""
    documents = importlib.import_module("documents")
    (tmp_path / "file").write_bytes(data)
    place = data.index(b"\xff") if b"\xff" in data else len(data) - 2
    with pytest.raises(InvalidRequest, match=f"byte {place} "):
        run_through(documents.count(Request(id="a", payload={"path": str(tmp_path / "file"), "chunk": 4})))


# --- diffusion -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_image_is_the_same_after_a_kill(lab: Lab) -> None:
    """A kill between two steps: the outputs and the image of a quiet run in one process, byte for byte."""
    pytest.importorskip("torch")
    payload = {"seed": 7, "steps": 80, "size": 64}
    among = workers(lab, 2, tasks=("diffusion.Diffuse",))
    quiet = lab.submit("diffusion.Diffuse", payload)
    lab.ended(quiet)
    one = lab.submit("diffusion.Diffuse", payload)
    kill_at(lab, one, among, 20)
    assert answer(lab, one) == answer(lab, quiet)


NAMED = (("one", 7), ("two", 8))


def images(*requests: Request) -> dict[str, Any]:
    """What an instance makes of requests: the results by id, and the states by id and step."""
    batch = importlib.import_module("diffusion").Diffuse()
    batch.load()
    for request in requests:
        batch.admit(request)
    made: dict[str, Any] = {}
    while batch.images:
        for step in batch.step():
            made[step.request_id if step.ends else f"{step.request_id} {step.output['step']}"] = (
                step.result["png"] if step.ends else stored(step.state)
            )
    return made


def stored(state: Any) -> bytes:
    """A state as its bytes, to be compared."""
    return b"".join(pack_state(state, limit=10**7).stored.pieces)


def test_an_image_does_not_depend_on_who_else_is_there() -> None:
    """Two images at once are, bit by bit, the two made one after the other, and so is one resumed at any step."""
    pytest.importorskip("torch")
    one, two = (Request(id=name, payload={"seed": seed, "steps": 8, "size": 16}) for name, seed in NAMED)
    both = images(one, two)
    assert both == images(one) | images(two)
    assert both["one"] != both["two"]
    for step in range(1, 9):
        resumed = images(Request(id="one", payload=one.payload, state=unpack_state(both[f"one {step}"])), two)
        assert resumed == {
            name: made for name, made in both.items() if name not in (f"one {i}" for i in range(step + 1))
        }
    rows = zlib.decompress(both["one"][both["one"].index(b"IDAT") + 4 : -16])
    assert len(rows) == 16 * (1 + 16 * 3)


# --- http_map ------------------------------------------------------------------------------------------------


class Api(ThreadingHTTPServer):
    """An API that counts calls and applies each key once. ``script`` says how the next calls of an item end."""

    daemon_threads = True

    def __init__(self, script: dict[int, list[str]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.lock = threading.Lock()
        self.script = script or {}
        self.calls: list[tuple[str, int]] = []
        self.applied: dict[str, int] = {}
        self.open = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def meet(self, key: str, item: int) -> str:
        """Count a call and apply its item if its key is new; returns how the call is to end."""
        with self.lock:
            self.calls.append((key, item))
            endings = self.script.get(item, [])
            ending = endings.pop(0) if endings else "answer"
            if ending in ("answer", "hold"):
                self.applied.setdefault(key, item)
            return ending

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that was killed is no error here."""

    def close(self) -> None:
        self.open.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Call(BaseHTTPRequestHandler):
    """One call."""

    server: Api

    def do_POST(self) -> None:
        item = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ending = self.server.meet(self.headers["Idempotency-Key"], item)
        if ending == "hold":  # applied, and the answer never comes
            self.server.open.wait(LONG)
            return
        status = 200 if ending == "answer" else int(ending)
        body = json.dumps({"item": item, "squared": item * item}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def api() -> Iterator[Callable[..., Api]]:
    """Makes APIs, and closes them."""
    made: list[Api] = []

    def make(script: dict[int, list[str]] | None = None) -> Api:
        made.append(Api(script))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.slow
def test_each_item_is_applied_once_whatever_is_killed(lab: Lab, api: Callable[..., Api]) -> None:
    """Kills while the API has applied an item and not answered, twice for the same one: once applied, all in order."""
    quiet, harsh = api(), api({5: ["hold", "hold"], 9: ["hold"]})
    among = workers(lab, 4)
    items = list(range(12))
    one = lab.submit("http_map.call_each", {"url": quiet.url, "items": items})
    lab.ended(one)
    two = lab.submit("http_map.call_each", {"url": harsh.url, "items": items})
    for item, times in ((5, 1), (5, 2), (9, 1)):
        eventually(lambda item=item, times=times: [i for _, i in list(harsh.calls)].count(item) == times)  # type: ignore[misc]
        kill_holder(lab, two, among)
    lab.ended(two)
    assert answer(lab, two) == answer(lab, one)
    assert list(harsh.applied.values()) == items, "each once, in order"
    assert [item for _, item in harsh.calls] == [0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9, 9, 10, 11]
    assert len({key for key, _ in harsh.calls}) == len(items), "a repeated call has the key of the first"
    assert lab.record(two).attempt == 0


@pytest.mark.slow
def test_what_may_pass_is_retried_and_the_rest_is_noted(lab: Lab, api: Callable[..., Api]) -> None:
    """503 is retried with backoff, with the same key; 422 is that item's answer; 401 ends the request."""
    flaky = api({1: ["503"], 2: ["422"]})
    closed = api({0: ["401"]})
    workers(lab, 1)
    one = lab.submit("http_map.call_each", {"url": flaky.url, "items": [0, 1, 2, 3]})
    two = lab.submit("http_map.call_each", {"url": closed.url, "items": [0, 1]})
    assert lab.ended(one).status == "finished", lab.events(one)
    assert [item for _, item in flaky.calls] == [0, 1, 1, 2, 3]
    assert len({key for key, _ in flaky.calls}) == 4
    assert lab.events(one) == [("retry", "NETWORK")]
    with Client(lab.url, settings=Settings()) as client:
        assert client.get(one).result(LONG) == {"answered": 3, "refused": 1}
        assert [sorted(output)[0] for output in client.get(one).outputs()] == ["answer", "answer", "error", "answer"]
        with pytest.raises(RequestFailed, match="mend the url") as caught:
            client.get(two).result(LONG)
    assert caught.value.kind == "INVALID_REQUEST"
    assert len(closed.calls) == 1


@pytest.mark.parametrize("ending", ["408", "409", "425", "429", "500", "502", "503", "504", "hold"])
def test_a_call_that_may_pass_fails_as_a_network_does(api: Callable[..., Api], ending: str) -> None:
    """A busy API, and one that does not answer in time, are the network's fault, and that is retried."""
    http_map = importlib.import_module("http_map")
    payload = {"url": api({0: [ending]}).url, "items": [0], "timeout": 0.1 if ending == "hold" else 10}
    with pytest.raises((ConnectionError, TimeoutError)) as caught:
        run_through(http_map.call_each(Request(id="a", payload=payload)))
    assert classify(caught.value) == FailureKind.NETWORK


# --- all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_payload_that_is_wrong_names_its_field(name: str) -> None:
    """No payload ends in a TypeError somewhere: what is wrong is told by name."""
    if name == "diffusion":
        pytest.importorskip("torch")
    example = importlib.import_module(name)
    read = example.read if name == "diffusion" else example.checked
    good = GOOD[name]
    read(good)
    changed = [{**good, field: value} for field in FIELDS[name] for value in (None, -1, "x", [1])]
    bad: list[Any] = [None, 7, [], {}, *changed]
    for payload in bad:
        if payload in ({**good, "path": "x"}, {**good, "items": [1]}):
            continue  # these are right
        with pytest.raises(InvalidRequest) as caught:
            read(payload)
        assert caught.value.field in FIELDS[name], payload


GOOD: dict[str, dict[str, Any]] = {
    "documents": {"path": "x"},
    "diffusion": {"seed": 1},
    "http_map": {"url": "http://x", "items": []},
}
FIELDS = {
    "documents": ("path", "chunk", "pause"),
    "diffusion": ("seed", "steps", "size"),
    "http_map": ("url", "items", "timeout"),
}


def commands(name: str) -> list[str]:
    """The commands in the docstring of an example."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    return re.findall(r"^ {4}\$ (.+)$", text, re.MULTILINE)


@pytest.mark.slow
def test_a_newcomer_can_follow_the_docstrings(tmp_path: Path) -> None:
    """The pool and then the example, each by the command that its docstring shows, on an embedded server."""
    pytest.importorskip("torch")
    here = tmp_path / "examples"
    shutil.copytree(EXAMPLES, here, ignore=shutil.ignore_patterns("__pycache__"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        **ALONE,
        "PATH": path,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONUNBUFFERED": "1",
    }
    ups = {next(line for line in commands(name) if " up " in line) for name in NAMES}
    assert ups == {"perdure up examples", "perdure up examples --tasks diffusion.Diffuse"}
    with (tmp_path / "pool.log").open("wb") as log:
        pool = subprocess.Popen(
            "exec " + max(ups, key=len),
            shell=True,
            cwd=here,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    text = tmp_path / "pool.log"
    try:
        # A newcomer looks at the terminal, and then opens the other one. The three examples in three of them: each
        # waits for what is in front of it.
        eventually(lambda: "Listening on" in text.read_text(errors="replace") or pool.poll() is not None)
        assert pool.poll() is None, text.read_text(errors="replace")
        with ThreadPoolExecutor(len(NAMES)) as terminals:
            calls = {name: next(line for line in commands(name) if line.startswith("python ")) for name in NAMES}
            ended = {
                name: terminals.submit(
                    subprocess.run,
                    call,
                    shell=True,
                    cwd=here,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=90,
                )
                for name, call in calls.items()
            }
        printed = {}
        for name, end in ended.items():
            done = end.result()
            assert done.returncode == 0, done.stdout + done.stderr + text.read_text(errors="replace")
            printed[name] = done.stdout
    finally:
        pool.send_signal(signal.SIGTERM)
        pool.wait(LONG)
    assert "'words': 650000" in printed["documents"]
    assert "12 orders applied in 12 calls" in printed["http_map"]
    image = here / printed["diffusion"].split("wrote ")[1].strip()
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_the_other_command_of_a_docstring_is_a_worker(name: str) -> None:
    """It is the plain rq worker of the tests above, on the queue that the example submits to."""
    (line,) = [line for line in commands(name) if "rq worker" in line]
    assert line.endswith("rq worker -w perdure.workers.Worker --url redis://localhost:6379 examples")
    assert 'queue="examples"' in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert (f"PERDURE_TASKS={name}." in line) == ("PERDURE_TASKS" in line)


@pytest.mark.slow
def test_examples_and_docs_are_in_the_source_distribution(tmp_path: Path) -> None:
    """They are not installed: who unpacks the source finds them."""
    copy = tmp_path / "source"
    names = ["examples", "docs", "src", "protocol", "producer", "workers", "recovery", "scripts"]
    for name in names:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("examples", "docs", "scripts/chaos")
        for path in (ROOT / folder).rglob("*")
    }
    assert {name for name in wanted if "__pycache__" not in name} <= packed
