"""Generator tasks with several slots in real workers: side by side, in threads; one holds no other up."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, eventually, laboratory


def gate(lab: Lab, name: str, *, at: int = 3, **payload: object) -> str:
    """A request that waits in its step number ``at`` until its gate is opened."""
    return lab.submit("gates", {"folder": str(lab.folder), "name": name, "n": 6, "at": at, **payload})


def waits(lab: Lab, *names: str) -> None:
    eventually(lambda: all((lab.folder / f"{name}-waits").exists() for name in names))


def release(lab: Lab, *names: str) -> None:
    for name in names:
        (lab.folder / f"{name}-open").touch()


def test_one_that_waits_holds_nobody_up(lab: Lab) -> None:
    """While one sits in a step: a mate of its moves and ends, another is claimed, and all that is stored at once."""
    worker = lab.worker()
    slow, quick = gate(lab, "slow"), gate(lab, "quick", at=99)
    waits(lab, "slow")
    lab.check(quick, 6)
    later = [gate(lab, f"later-{number}", at=99) for number in range(5)]
    for name in later:
        lab.check(name, 6)
    assert lab.outputs(slow) == [0, 1, 2]
    assert not lab.record(slow).ended
    release(lab, "slow")
    assert lab.check(slow, 6).executions == 1
    assert worker.running
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_killed_worker_with_four_threads_loses_nothing(lab: Lab) -> None:
    """Kill -9 while all four sit in a step: each goes on elsewhere at its own last checkpoint, uncharged."""
    first = lab.worker()
    names = ["a", "b", "c", "d"]
    requests = [gate(lab, name, at=number + 1) for number, name in enumerate(names)]
    waits(lab, *names)
    for number, name in enumerate(requests):
        lab.moved(name, number + 1)
    first.kill()
    release(lab, *names)
    second = lab.worker(wait=False)
    for number, name in enumerate(requests):
        record = lab.check(name, 6)
        (event,) = lab.store.history(name)
        assert (event.kind, event.offset, record.worker, record.attempt) == ("WORKER_LOST", number + 1, second.name, 0)
    assert lab.nothing_held()


@pytest.mark.slow
def test_a_thread_that_hangs_is_found_though_its_mates_move(lab: Lab) -> None:
    """Its request goes elsewhere as HANG; the mates and all later requests of the worker are not touched."""
    lab.reaper()
    worker = lab.worker()
    poison = lab.submit("hang_among_others", {"folder": str(lab.folder), "seconds": 600})
    eventually((lab.folder / "hung").exists)
    mates = [lab.submit("hang_among_others", {"folder": str(lab.folder)}) for _ in range(6)]
    for name in (*mates, poison):
        record = lab.check(name, 20)
        assert record.worker == worker.name
    assert [lab.events(name) for name in mates] == [[]] * 6
    assert lab.events(poison)[:2] == [("suspected", "HANG"), ("redelivered", "HANG")]
    eventually(lambda: "1 of 2 left" in worker.log)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert "leaving without it" in worker.log


@pytest.mark.slow
def test_a_drain_keeps_what_running_steps_bring(lab: Lab) -> None:
    """SIGTERM: a step that runs may end, and what it yields is stored; then all is closed and handed back."""
    worker = lab.worker()
    slow, other = gate(lab, "slow"), gate(lab, "other", at=2)
    waits(lab, "slow", "other")
    worker.send(signal.SIGTERM)
    eventually(lambda: "warm shut down" in worker.log)
    release(lab, "slow", "other")
    assert worker.end() == 0
    assert (len(lab.outputs(slow)), len(lab.outputs(other))) == (4, 3)
    assert all((lab.folder / f"{name}-closed").exists() for name in ("slow", "other"))
    assert sorted(lab.waiting()) == sorted([slow, other])
    lab.worker("--burst").end()
    for name in (slow, other):
        assert lab.check(name, 6).attempt == 0


@pytest.mark.slow
def test_a_drain_leaves_a_thread_that_does_not_end(lab: Lab) -> None:
    """After the drain timeout its request is handed back as well, and the process ends."""
    worker = lab.worker(drain_timeout=0.5)
    slow, other = gate(lab, "slow"), gate(lab, "other", at=99, n=100_000, sleep=0.01)
    waits(lab, "slow")
    lab.moved(slow, 3)
    lab.moved(other, 3)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert "leaving without it" in worker.log
    for name in (slow, other):
        assert (lab.record(name).status, lab.events(name)) == ("queued", [("released", "")])


def test_a_cancel_does_not_wait_for_the_step(lab: Lab) -> None:
    """Canceled in the middle of a step: ended at once; the late step is not stored, its generator is closed then."""
    worker = lab.worker()
    one = gate(lab, "one")
    waits(lab, "one")
    lab.moved(one, 3)
    assert lab.store.cancel([(one, "")], reason="enough") == ["requested"]
    assert lab.ended(one).status == "canceled"
    assert not (lab.folder / "one-closed").exists()
    two = [gate(lab, f"two-{number}", at=99) for number in range(4)]
    for name in two:
        lab.check(name, 6)
    release(lab, "one")
    eventually((lab.folder / "one-closed").exists)
    assert lab.outputs(one) == [0, 1, 2]
    assert worker.running
    assert lab.nothing_held()


@pytest.mark.slow
def test_durable_steps_wait_for_themselves_alone(server_binary: Path, tmp_path: Path) -> None:
    """Redis is away: who asked for durable steps stands, its mate goes on; afterwards both end without a gap."""
    with Server(tmp_path / "redis", binary=server_binary) as server, laboratory(server.url, tmp_path) as lab:
        worker = lab.worker()
        durable = gate(lab, "durable", n=40, at=20, durable=True)
        mate = gate(lab, "mate", n=60, at=10, sleep=0.01)
        waits(lab, "durable", "mate")
        server.kill()
        eventually(lambda: "no contact to Redis" in worker.log)
        release(lab, "durable", "mate")
        # The mate has run to its end within the outage.
        eventually((lab.folder / "mate-closed").exists)
        assert not (lab.folder / "durable-closed").exists()
        server.restart()
        for name, number in ((durable, 40), (mate, 60)):
            record = lab.check(name, number)
            assert (record.executions, record.attempt) == (1, 0)
        assert worker.running
