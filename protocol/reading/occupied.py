"""Which of many queues a claim has to look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import redis

from ..keys import key

FEW: Final = 16
"""A claim looks into so many queues itself."""

BLOCK: Final = 64
"""Names of one question, where some of all hold something."""


def occupied(connection: redis.Redis, queues: Sequence[str]) -> Sequence[str]:
    """Those of these queues, in their order, in which something may wait: all of a few; of many, those of a block in
    which a list holds something, and those that hold something aside. One round trip while all are empty.

    A script's work for each name costs a hundred times as much as that of ``EXISTS``.
    """
    if len(queues) <= FEW:
        return queues
    lists = [key("queue", queue) for queue in queues]
    with connection.pipeline(transaction=False) as pipe:
        pipe.exists(*lists)
        pipe.zrangebyscore(key("aside"), "-inf", "(+inf")
        number, found = pipe.execute()
        places = range(0, len(lists), BLOCK) if number else ()
        for begin in places:
            pipe.exists(*lists[begin : begin + BLOCK])
        full: list[Any] = pipe.execute()
    names = {name.decode(errors="replace") for name in found}
    for begin, some in zip(places, full, strict=True):
        if some:
            names.update(queues[begin : begin + BLOCK])
    return [queue for queue in queues if queue in names]
