"""What follows from what workers say that they cannot load: a pure decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from perdure.protocol.reading.words import Inability, WorkerWord, trouble
from perdure.protocol.records import FailureKind
from perdure.recovery.unserved import unserved

MISSING = Inability("app.t", "missing", 100.0, "No module named 'app'")
BROKEN = Inability("app.t", "broken", 100.0, "FileNotFoundError: /models/x")


def word(name: str, *unable: Inability, queues: str = "gpu", joined: float = 50.0, spare: bool = False) -> WorkerWord:
    return WorkerWord(name, name, queues.split(","), spare, joined, list(unable))


def due(words: list[WorkerWord], now: float, **limits: Any) -> set[tuple[str, FailureKind]]:
    return {(item.queue, item.kind) for item in unserved(words, now, missing=60, broken=900, **limits) if item.due}


GPU = {"gpu-high", "gpu", "gpu-low"}


@pytest.mark.parametrize(("item", "limit", "kind"), [(MISSING, 60, "INVALID_REQUEST"), (BROKEN, 900, "ERROR")])
def test_requests_end_once_all_have_failed_for_long_enough(item: Inability, limit: float, kind: str) -> None:
    """In the queue and its priorities, with the reason; not a moment before."""
    words = [word("a", item), word("b", replace(item, since=130.0))]
    assert due(words, 130 + limit - 0.1) == set()
    assert due(words, 130 + limit) == {(queue, FailureKind(kind)) for queue in GPU}
    (found, *_) = unserved(words, 131.0, missing=60, broken=900)
    assert found.reason == f"none of the 2 workers of queue {found.queue} could load app.t: {item.reason}"
    assert found.workers == ("a", "b")


def test_one_that_can_or_has_not_tried_is_waited_for() -> None:
    assert unserved([word("a", MISSING), word("b")], 10**6, missing=60, broken=900) == []


def test_the_clock_starts_anew_with_each_worker_that_joins() -> None:
    words = [word("a", MISSING), word("late", replace(MISSING, since=5000.0), joined=4999.0)]
    assert due(words, 5059) == set()
    assert {queue for queue, _ in due(words, 5060)} == GPU


def test_without_a_worker_nothing_ends() -> None:
    assert unserved([], 10**9, missing=60, broken=900) == []
    assert unserved([word("spare", MISSING, spare=True)], 10**9, missing=60, broken=900) == []


def test_who_serves_other_queues_has_no_say() -> None:
    """Neither as one that could, nor as one that could not; a priority of a queue may be served by itself."""
    words = [word("a", MISSING), word("other", queues="cpu"), word("low", queues="gpu-low")]
    assert {queue for queue, _ in due(words, 10**6)} == {"gpu-high", "gpu"}


def test_as_long_as_one_has_the_module_its_trouble_counts() -> None:
    """Weights may still come to where the module is."""
    words = [word("a", MISSING), word("b", BROKEN)]
    assert due(words, 200) == set()
    (found, *_) = unserved(words, 1000.0, missing=60, broken=900)
    assert (found.kind, found.due) == (FailureKind.ERROR, True)
    assert found.reason.endswith("FileNotFoundError: /models/x")


def test_who_waits_is_told() -> None:
    assert trouble([word("a", MISSING)], "gpu", "app.t") == (
        "the only worker of queue gpu could not load app.t: No module named 'app'"
    )
    assert trouble([word("a", MISSING), word("b")], "gpu-low", "app.t").startswith("1 of 2 workers of queue gpu-low")
    assert trouble([word("a", MISSING)], "gpu", "app.other") == trouble([], "gpu", "app.t") == ""
