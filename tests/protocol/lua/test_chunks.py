"""Large states: written in chunks, committed by one pointer, never seen half, and gone when nobody needs them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.packed_state import CHUNK, PackedState, pack_state
from perdure.protocol.records import FailureKind
from perdure.protocol.transitions.calls import Claim
from perdure.protocol.transport.refusals import memory_full
from tests.kit.protocol.clock import CLOCKS
from tests.kit.protocol.pool import Hand, Pool, dump


def value(letter: str, chunks: int = 3) -> bytes:
    return letter.encode() * ((chunks - 1) * CHUNK + 1000)


def large(letter: str, chunks: int = 3) -> PackedState:
    return pack_state(value(letter, chunks), limit=1 << 26)


def chunks(pool: Pool) -> list[str]:
    """All chunks that stand in Redis, as `<id>:<seq>:<number>`."""
    stem = key("chunk")
    found: Any = pool.connection.scan_iter(f"{stem}*")
    return sorted(name.decode().removeprefix(stem) for name in found)


def stored(pool: Pool, hand: Hand, letter: str = "a", number: int = 3) -> Claim:
    """A request whose first checkpoint has a large state and one output."""
    pool.submit("a")
    claim = hand.take("a")
    state = large(letter, number)
    assert set(hand.write(claim, state)) == {"ok"}
    assert hand.commit(claim, state, ["x"]) == "ok"
    return claim


def test_a_large_state_is_stored_in_chunks_and_read_back(pool: Pool, hand: Hand):
    """With its true size, and nothing that never expires besides the checkpoint's entry in its index."""
    stored(pool, hand)
    assert pool.store.state("a") == (value("a"), True)
    checkpoint = pool.store.checkpoint("a")
    assert checkpoint is not None
    assert (checkpoint.seq, checkpoint.offset, checkpoint.bytes) == (1, 1, large("a").stored.length)
    assert chunks(pool) == ["a:1:1", "a:1:2", "a:1:3"]
    assert all(pool.connection.ttl(key("chunk", name)) > 80_000 for name in chunks(pool))


def test_each_checkpoint_drops_the_chunks_of_the_one_before(pool: Pool, hand: Hand):
    """Larger, smaller, and small enough to need none."""
    claim = stored(pool, hand)
    for seq, number in ((2, 4), (3, 2)):
        state = large("b", number)
        hand.write(claim, state, seq=seq)
        assert pool.store.state("a")[0] != value("b", number)
        assert hand.commit(claim, state, seq=seq, offset=1) == "ok"
        assert pool.store.state("a") == (value("b", number), True)
        assert chunks(pool) == [f"a:{seq}:{n}" for n in range(1, number + 1)]
    assert hand.step(claim, ["y"], offset=1, seq=4) == "ok"
    assert pool.store.state("a") == ({"upto": 2}, True)
    assert chunks(pool) == []


def test_outputs_without_a_state_leave_the_chunks_alone(pool: Pool, hand: Hand):
    """The state stays the one of an earlier checkpoint."""
    claim = stored(pool, hand)
    row = replace(hand.progress(claim, ["y"], 1, 2), state=None)
    assert pool.store.progress(hand.incarnation, [row]) == ["ok"]
    assert pool.store.state("a") == (value("a"), True)
    assert len(chunks(pool)) == 3


def test_a_half_written_state_is_never_seen(pool: Pool, hand: Hand):
    """Whatever number of chunks is there, the old state is read, and a commit is told that some are missing."""
    claim = stored(pool, hand)
    state = large("b")
    for number in (1, 2):
        hand.write(claim, state, seq=2, numbers=[number])
        assert hand.commit(claim, state, ["y"], seq=2, offset=1) == "missing"
        assert pool.store.state("a") == (value("a"), True)
        assert pool.store.all_outputs("a") == ["x"]
    hand.write(claim, state, seq=2, numbers=[3])
    assert hand.commit(claim, state, ["y"], seq=2, offset=1) == "ok"
    assert pool.store.state("a") == (value("b"), True)
    assert pool.store.all_outputs("a") == ["x", "y"]


@pytest.mark.parametrize("harm", ["lost", "short"])
def test_a_chunk_that_redis_lost_is_missed(pool: Pool, hand: Hand, harm: str):
    """Before, it is asked for again; after, the state is known to be unsound."""

    def damage() -> None:
        name = key("chunk", chunks(pool)[1])
        if harm == "lost":
            pool.connection.delete(name)
        else:
            pool.connection.set(name, b"x")

    pool.submit("a")
    claim = hand.take("a")
    state = large("a")
    hand.write(claim, state)
    damage()
    assert hand.commit(claim, state) == "missing"
    hand.write(claim, state)
    assert hand.commit(claim, state) == "ok"
    damage()
    assert pool.store.state("a") == (None, False)


def test_chunks_and_commits_sent_twice_change_nothing(pool: Pool, hand: Hand):
    """Replies get lost: at once, and after a later checkpoint."""
    pool.submit("a")
    claim = hand.take("a")
    first, second = large("a"), large("b")
    hand.write(claim, first, numbers=[1])
    before = dump(pool.connection, without=CLOCKS)
    assert hand.write(claim, first, numbers=[1]) == ["ok"]
    assert dump(pool.connection, without=CLOCKS) == before
    hand.write(claim, first)
    hand.commit(claim, first, ["x"])
    before = dump(pool.connection, without=(*CLOCKS, "checkpoint"))
    assert hand.commit(claim, first, ["x"]) == "ok"
    assert hand.write(claim, first, numbers=[1, 2]) == ["ok", "ok"]
    assert dump(pool.connection, without=(*CLOCKS, "checkpoint")) == before
    hand.write(claim, second, seq=2, numbers=[1])
    before = dump(pool.connection, without=CLOCKS)
    assert hand.write(claim, first) == ["ok"] * 3  # long on its way
    assert hand.commit(claim, first, ["x"]) == "ok"
    assert dump(pool.connection, without=CLOCKS) == before
    hand.write(claim, second, seq=2)
    assert hand.commit(claim, second, seq=2, offset=1) == "ok"
    assert pool.store.state("a") == (value("b"), True)
    assert chunks(pool) == ["a:2:1", "a:2:2", "a:2:3"]


def test_a_stale_execution_can_write_no_chunk(pool: Pool, hand: Hand):
    """Presumed dead in the middle of its second state; the new holder's has the same number."""
    old = stored(pool, hand)
    stale = large("b", 4)
    hand.write(old, stale, seq=2, numbers=[1, 2, 4])
    pool.reap(hand.incarnation)
    other = Hand(pool, "w2")
    claim = other.take("a")
    assert (claim.seq, pool.store.state("a")) == (1, (value("a"), True))
    state = large("c")
    other.write(claim, state, numbers=[1])
    assert chunks(pool) == ["a:1:1", "a:1:2", "a:1:3", "a:2:1"], "what the other one left is gone"
    assert hand.write(old, stale, seq=2) == ["lost"] * 4
    assert hand.commit(old, stale, seq=2, offset=1) == "lost"
    assert other.commit(claim, state) == "missing", "half of its own, half of the other's"
    other.write(claim, state)
    assert hand.write(old, stale, seq=2) == ["lost"] * 4
    assert other.commit(claim, state) == "ok"
    assert hand.write(old, stale, seq=2) == ["lost"] * 4
    assert pool.store.state("a") == (value("c"), True)
    assert chunks(pool) == ["a:2:1", "a:2:2", "a:2:3"]


def finish(pool: Pool, hand: Hand, claim: Claim) -> None:
    hand.finish(claim, 1, offset=1)


def cancel(pool: Pool, hand: Hand, claim: Claim) -> None:
    pool.cancel("a")
    hand.confirm_cancel(claim)


def cancel_waiting(pool: Pool, hand: Hand, claim: Claim) -> None:
    hand.release(claim)
    pool.cancel("a")


def cancel_of_the_dead(pool: Pool, hand: Hand, claim: Claim) -> None:
    pool.cancel("a")
    pool.reap(hand.incarnation)


def expire(pool: Pool, hand: Hand, claim: Claim) -> None:
    hand.release(claim)
    pool.age_checkpoint("a", 4000)
    pool.store.expire(["gpu"])


def expire_dead_letter(pool: Pool, hand: Hand, claim: Claim) -> None:
    hand.fail(claim, FailureKind.INVALID_REQUEST)
    pool.age_checkpoint("a", 4000)
    pool.store.expire(["gpu"])


def restart(pool: Pool, hand: Hand, claim: Claim) -> None:
    hand.release(claim, fingerprints=["nobody has it"])


def deleted(pool: Pool, hand: Hand, claim: Claim) -> None:
    pool.connection.delete(key("job", "a"))
    hand.step(claim, ["y"], offset=1, seq=9)


def deleted_and_written(pool: Pool, hand: Hand, claim: Claim) -> None:
    pool.connection.delete(key("job", "a"))
    assert hand.write(claim, large("c"), seq=9) == ["lost"] * 3


def submitted_anew(pool: Pool, hand: Hand, claim: Claim) -> None:
    pool.connection.delete(key("job", "a"))
    pool.submit("a")


@pytest.mark.parametrize("end", [
    finish, cancel, cancel_waiting, cancel_of_the_dead, expire, expire_dead_letter, restart, deleted,
    deleted_and_written, submitted_anew,
])  # fmt: skip
def test_whatever_drops_a_checkpoint_drops_its_chunks(pool: Pool, hand: Hand, end: Callable[[Pool, Hand, Claim], None]):
    """Those that are committed, and those of a state on its way."""
    claim = stored(pool, hand)
    hand.write(claim, large("b", 4), seq=2, numbers=[1, 2])
    assert len(chunks(pool)) == 5
    end(pool, hand, claim)
    assert chunks(pool) == []
    assert not pool.connection.exists(key("checkpoint", "a"))


def test_a_first_state_that_was_never_committed_is_nothing(pool: Pool, hand: Hand):
    """The request starts from zero, and the chunks are gone; until then they have a TTL, the note of them too."""
    pool.submit("a")
    hand.write(hand.take("a"), large("a"), numbers=[1, 2])
    assert pool.store.checkpoint("a") is None
    assert pool.store.state("a") == (None, True)
    names = [key("checkpoint", "a"), *(key("chunk", name) for name in chunks(pool))]
    assert all(pool.connection.ttl(name) > 0 for name in names)
    pool.reap(hand.incarnation)
    claim = Hand(pool, "w2").take("a")
    assert (claim.seq, claim.offset, claim.epoch) == (0, 0, 0)
    assert chunks(pool) == []


@pytest.mark.parametrize("touch", ["renew", "progress"])
def test_chunks_live_as_long_as_their_request_runs(pool: Pool, hand: Hand, touch: str):
    """However long that takes: what renews the checkpoint renews them."""
    claim = stored(pool, hand)
    for name in chunks(pool):
        pool.connection.expire(key("chunk", name), 50)
    if touch == "renew":
        hand.renew(claim)
    else:
        pool.age_checkpoint("a", 3600)
        row = replace(hand.progress(claim, ["y"], 1, 2), state=None)
        pool.store.progress(hand.incarnation, [row])
    assert all(pool.connection.ttl(key("chunk", name)) > 80_000 for name in chunks(pool))


def test_an_older_release_takes_a_chunked_state_for_damaged(pool: Pool, hand: Hand):
    """It reads two fields of the hash; with no state at all it would go on at the right offset from nothing."""
    stored(pool, hand)
    reply: Any = pool.connection.hmget(key("checkpoint", "a"), "state", "crc")
    raw, crc = reply
    assert raw is not None
    assert zlib.crc32(raw) != int(crc)


def test_at_maxmemory_checkpoints_give_way_and_all_else_passes(pool: Pool, hand: Hand):
    """Chunks and checkpoints are refused whole; leases are renewed, and requests end, move on and are claimed."""
    claim = stored(pool, hand)
    pool.submit("b", "c", "d")
    before = dump(pool.connection, without=CLOCKS)
    pool.expire_lease("a")
    pool.connection.config_set("maxmemory", 1)
    try:
        for refused in (
            lambda: hand.write(claim, large("b"), seq=2),
            lambda: hand.commit(claim, large("b"), ["y"], seq=2, offset=1),
            lambda: hand.step(claim, ["y"], offset=1, seq=2),
        ):
            with pytest.raises(redis.ResponseError) as caught:
                refused()
            assert memory_full(caught.value)
        assert dump(pool.connection, without=CLOCKS) == before
        assert hand.renew(claim) == "ok"
        lease: Any = pool.connection.zscore(key("leases", "gpu"), "a")
        assert lease > 1e12
        assert hand.beat() == "ok"
        others = {item.id: item for item in hand.claim(3).claims}
        assert hand.finish(others["b"], 1, outputs=["last"]) == "ok"
        assert hand.fail(others["c"]) == "scheduled"
        assert hand.release(others["d"]) == ["queued"]
        assert pool.cancel("d") == "canceled"
        assert pool.reap(hand.incarnation)
    finally:
        pool.connection.config_set("maxmemory", 0)
    assert pool.store.all_outputs("b") == ["last"]
    assert pool.store.state("a") == (value("a"), True)
