"""The memory that the text engine says it needs, and how requests wait for it."""

from __future__ import annotations

import pytest
import redis

from perdure.protocol.errors import InvalidRequest
from perdure.protocol.settings import Settings
from perdure.workers.text import Generate
from perdure.workers.text.golden import answers
from tests.kit.workers.bench import Turns
from tests.kit.workers.text import batch_of


def test_the_text_engine_knows_what_it_needs(connection: redis.Redis) -> None:
    """Keys and values of prompt and answers; with a limit, what does not fit waits, and what never will is told."""
    settings = Settings(model="tiny", device="cpu", threads=1, slots=8)
    unlimited = Generate(settings)
    unlimited.load()
    short = {"prompt": "x", "max_tokens": 20, "seed": 1}
    one = unlimited.memory_needed(short)
    assert one is not None
    assert one == batch_of(unlimited)._llama.keys(21).nbytes
    assert unlimited.memory_needed(short | {"n": 3}) == 3 * one
    assert unlimited.memory_free() is None, "no limit on a CPU"
    task = Generate(settings.replace(kv_memory=3 * one + 1))
    turns = Turns(connection, task)
    assert task.memory_free() == 3 * one + 1
    payloads = {name: short | {"seed": number} for number, name in enumerate("abcdef")} | {"g": short | {"n": 2}}
    with pytest.raises(InvalidRequest, match="max_tokens"):
        task.memory_needed(short | {"max_tokens": 10**6})
    turns.submit_all({**payloads, "large": short | {"n": 4}})
    most = 0

    def admitted() -> bool:
        nonlocal most
        most = max(most, len(turns.engine.admitted))
        return all(turns.record(name).ended for name in payloads)

    turns.until(admitted)
    assert most == 3
    assert [turns.pool.store.result(name) for name in payloads] == answers(payloads.items(), settings)
    turns.until(lambda: turns.record("large").attempt)
    assert f"{4 * one:,} bytes needed, {3 * one + 1:,} bytes free" in turns.reasons("large")[-1][1]
    assert task.memory_free() == 3 * one + 1
