"""The model of a pool is replaced while requests run and clients read: nothing is lost, mixed or charged."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.producer import Client, Handle
from perdure.protocol.errors import OutputsRestarted
from perdure.protocol.settings import Settings
from tests.kit.lab import LONG, Lab, eventually
from tests.kit.workers.models import weights, write_folder

TEXT = "perdure.workers.text.generate"
N = 60


class Reading:
    """A client that reads a stream in a thread of its own, and how that ended."""

    def __init__(self, handle: Handle, *, restarts: bool = False) -> None:
        self.handle = handle
        self.outputs: list[Any] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, args=(restarts,), daemon=True)
        self._thread.start()

    def _read(self, restarts: bool) -> None:
        try:
            for output in self.handle.stream(restarts=restarts, timeout=LONG):
                self.outputs.append(output)
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self._thread.join(2 * LONG)
        assert not self._thread.is_alive()


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, settings=Settings()) as client:
        yield client


def model(lab: Lab, fingerprint: str, *, slots: int = 4, wait: bool = True) -> Any:
    return lab.worker(wait=wait, environment={"LAB_FINGERPRINT": fingerprint, "LAB_SLOTS": str(slots)})


def assert_restarted_once_uncharged(handle: Handle) -> None:
    record = handle.record()
    assert (str(record.status), record.attempt, record.epoch) == ("finished", 0, 1), record
    restarts = [event for event in handle.history() if event.event == "restart"]
    assert [event.reason for event in restarts] == ["no living worker has the model that began it"]
    assert restarts[0].offset > 0


@pytest.mark.slow
def test_all_workers_are_replaced_by_another_model(lab: Lab, client: Client) -> None:
    """One killed, one drained: every request ends with the new model; no client reads the outputs of two as one."""
    payload = {"n": N, "sleep": 0.02}
    signed = payload | {"signed": True}
    old = [model(lab, "A", slots=2), model(lab, "A", slots=2)]
    equal, refused, going_on, unread = (
        Reading(client.submit("lab_tasks.model", body, queue="gpu"), restarts=restarts)
        for body, restarts in ((payload, False), (signed, False), (signed, True), (payload, False))
    )
    readings = [equal, refused, going_on, unread]
    eventually(lambda: all(len(reading.outputs) >= 5 for reading in readings))
    old[0].kill()
    old[1].send(signal.SIGTERM)
    old[1].end()
    model(lab, "B", wait=False)
    for reading in readings:
        reading.end()
        assert reading.handle.result() == "B"
        assert_restarted_once_uncharged(reading.handle)
    assert (equal.error, unread.error, going_on.error) == (None, None, None)
    # Equal outputs: the reader skips what it has.
    assert equal.outputs == unread.outputs == list(range(N))
    # Different ones: it is told, unless it said that it goes on from the first of the new ones.
    assert isinstance(refused.error, OutputsRestarted)
    assert refused.outputs == [["A", index] for index in range(refused.error.offset)]
    begun = len(going_on.outputs) - N
    assert begun >= 5
    assert going_on.outputs == [["A", index] for index in range(begun)] + [["B", index] for index in range(N)]
    assert lab.nothing_held()


@pytest.mark.slow
def test_side_by_side_the_old_model_ends_what_it_began(lab: Lab, client: Client) -> None:
    """While one worker of the old model lives, even a busy one, no new one continues or restarts its requests."""

    def submit(**payload: Any) -> Handle:
        body = {"n": 20, "signed": True, "folder": str(lab.folder)} | payload
        return client.submit("lab_tasks.model", body, queue="gpu")

    first = model(lab, "A", slots=1)
    begun = submit(gate=5)
    lab.moved(begun.id, 5)
    staying = model(lab, "A", slots=1)
    busy = submit(gate=3)
    lab.moved(busy.id, 3)
    assert busy.record().worker == staying.name
    new = model(lab, "B")
    reading = Reading(begun)
    first.kill()
    eventually(lambda: ("released", "") in lab.events(begun.id))
    assert submit().result(LONG) == "B"
    # Handed back again and again, the request would wait longer each time until the old worker meets it first.
    new.send(signal.SIGTERM)
    new.end()
    (lab.folder / "open").touch()
    reading.end()
    assert (begun.result(LONG), busy.result(LONG), reading.error) == ("A", "A", None)
    assert reading.outputs == [["A", index] for index in range(20)]
    assert [(handle.record().epoch, handle.record().attempt) for handle in (begun, busy)] == [(0, 0), (0, 0)]
    assert begun.record().worker == staying.name
    released = [event.reason for event in begun.history() if event.event == "released"]
    assert all(reason.startswith("another model began it") for reason in released)


@pytest.mark.slow
def test_a_pool_of_text_generation_gets_another_model(lab: Lab, client: Client, tmp_path: Path) -> None:
    """Real generations, cut in the middle: each answer is wholly that of the new model, also after an old beginning."""
    folder = write_folder(tmp_path / "model", weights(tied=False), max_position_embeddings=1024)
    # A random vocabulary's end may come early: not before the old model's part is outgrown.
    payload = {"prompt": "Once upon a time", "max_tokens": 500, "min_tokens": 500, "temperature": 0.9, "seed": 7}

    def worker(name: str) -> Any:
        environment = {"PERDURE_MODEL": name, "PERDURE_DEVICE": "cpu", "PERDURE_THREADS": "1"}
        return lab.worker(tasks=(TEXT,), environment=environment)

    old = worker("tiny")
    refused, going_on = (Reading(client.submit(TEXT, payload, queue="gpu"), restarts=on) for on in (False, True))
    eventually(lambda: min(len(refused.outputs), len(going_on.outputs)) >= 3)
    old.kill()
    worker(str(folder))
    twin = client.submit(TEXT, payload, queue="gpu")
    for reading in (refused, going_on):
        reading.end()
        reading.handle.result(LONG)
        assert_restarted_once_uncharged(reading.handle)
    whole = twin.result(LONG)
    tokens: Callable[[list[Any]], list[int]] = lambda outputs: [output["token"] for output in outputs]  # noqa: E731
    assert (twin.record().epoch, len(whole["token_ids"])) == (0, 500)
    assert refused.handle.result() == going_on.handle.result() == whole
    assert isinstance(refused.error, OutputsRestarted)
    assert going_on.error is None
    assert tokens(going_on.outputs)[-500:] == whole["token_ids"]
    begun = tokens(going_on.outputs)[:-500]
    assert len(begun) >= 3
    assert begun != whole["token_ids"][: len(begun)]
