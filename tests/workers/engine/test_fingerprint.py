"""A fingerprint never lets another model continue, and a model that is gone never loses a request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.lab import Lab, Process, eventually

PAYLOAD = {"n": 40, "sleep": 0.02}


def shows(fingerprint: str) -> dict[str, str]:
    return {"LAB_FINGERPRINT": fingerprint}


def begun(lab: Lab, fingerprint: str, **options: Any) -> tuple[str, Process]:
    """A request with a checkpoint by a worker of this model, which is then killed."""
    worker = lab.worker(environment=shows(fingerprint), **options)
    one = lab.submit("model", PAYLOAD)
    lab.moved(one, 5)
    worker.kill()
    eventually(lambda: lab.record(one).status == "queued")
    return one, worker


@pytest.mark.slow
def test_another_model_hands_a_request_back(lab: Lab) -> None:
    """While a living worker of its queue has the model that began it, no other continues or restarts the request."""
    full = lab.worker(queues=("elsewhere", "gpu"), slots=1, environment=shows("A"))
    busy = lab.submit("model", {"n": 10_000, "sleep": 0.02}, queue="elsewhere")
    lab.moved(busy, 1)
    one, _ = begun(lab, "A")
    lab.worker(environment=shows("B"))

    def released() -> int:
        return sum("another model" in event.reason for event in lab.store.history(one))

    eventually(lambda: released() >= 2)
    assert "restart" not in [event for event, _ in lab.events(one)]
    assert lab.record(busy).worker == full.name
    lab.worker(environment=shows("A"))
    record = lab.check(one, 40)
    assert (lab.store.result(one), record.epoch, record.attempt) == ("A", 0, 0)


@pytest.mark.slow
def test_a_model_that_is_gone_restarts_the_request(lab: Lab) -> None:
    """When no living worker shows the fingerprint, the request begins from zero in a new epoch, uncharged."""
    one, _ = begun(lab, "A")
    lab.worker(environment=shows("B"))
    record = lab.check(one, 40)
    assert (lab.store.result(one), record.epoch, record.attempt) == ("B", 1, 0)
    assert "restart" in [event for event, _ in lab.events(one)]


@pytest.mark.slow
def test_a_checkpoint_without_a_fingerprint_restarts_too(lab: Lab) -> None:
    """A task that shows a fingerprint for the first time does not hand old requests round until they fail."""
    one, _ = begun(lab, "")
    lab.worker(environment=shows("B"))
    record = lab.check(one, 40)
    assert (lab.store.result(one), record.epoch, record.attempt) == ("B", 1, 0)
