"""What the tests of producers share."""

from __future__ import annotations

from collections.abc import Iterator

import fakeredis
import pytest
import redis


@pytest.fixture(params=["server", "fakeredis"])
def redis_client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """An empty Redis: a real one, and fakeredis, which runs the same scripts."""
    if request.param == "server":
        yield request.getfixturevalue("connection")
    else:
        with fakeredis.FakeRedis() as connection:
            yield connection
