"""The worker's side of its guardian: two threads of the worker use it at the same time."""

from __future__ import annotations

import redis

from perdure.protocol.settings import Settings
from perdure.workers.companion import Companion


def test_news_for_a_guardian_that_is_being_dismissed_reaches_the_next_one(connection: redis.Redis) -> None:
    """The courier's thread closes the pipe (the worker was declared dead) while the main thread says "ready"."""
    companion = Companion(connection, Settings(), "w", ["gpu"])
    companion.watch("one")
    try:
        process = companion._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()  # where dismiss() stands when it waits for the guardian's end
        companion.tell(ready=True)
        companion.watch("two")
        assert companion.ready, "told to the next guardian with its first line"
    finally:
        companion.dismiss()
