"""No queue at all: the loops that redis-py allows, with a hash and a list. Nothing is safe here; it is the limit.

``one``: each request is popped, and its result stored, by one script call. ``batch``: 64 are.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from typing import Any

import kit
import redis

_SUBMIT = """
redis.call('HSET', 'bare:job:' .. ARGV[1], 'payload', ARGV[2], 'status', 'queued')
redis.call('LPUSH', 'bare:queue', ARGV[1])
return 1
"""

# Stores the results of the last call and gives the next requests.
_TURN = """
for place = 2, #ARGV, 2 do
    redis.call('HSET', 'bare:job:' .. ARGV[place], 'result', ARGV[place + 1], 'status', 'finished')
    redis.call('INCR', 'bare:finished')
    redis.call('RPUSH', 'bare:answer:' .. ARGV[place], ARGV[place + 1])
    redis.call('EXPIRE', 'bare:answer:' .. ARGV[place], 600)
end
local found = {}
for _ = 1, tonumber(ARGV[1]) do
    local id = redis.call('RPOP', 'bare:queue')
    if not id then break end
    found[#found + 1] = id
    found[#found + 1] = redis.call('HGET', 'bare:job:' .. id, 'payload')
end
return found
"""


class Bare(kit.Producer):
    bulk = True

    def open(self, url: str) -> None:
        self.connection = redis.Redis.from_url(url)
        self.script = self.connection.register_script(_SUBMIT)
        self.connection.script_load(_SUBMIT)

    def submit(self, payload: dict[str, Any]) -> Any:
        name = uuid.uuid4().hex
        self.script(args=[name, json.dumps(payload)])
        return name

    def submit_many(self, payloads: list[dict[str, Any]]) -> Any:
        names = [uuid.uuid4().hex for _ in payloads]
        for first in range(0, len(names), 100):
            with self.connection.pipeline(transaction=False) as pipeline:
                for name, payload in zip(names[first : first + 100], payloads[first : first + 100], strict=True):
                    pipeline.hset(f"bare:job:{name}", mapping={"payload": json.dumps(payload), "status": "queued"})
                pipeline.lpush("bare:queue", *names[first : first + 100])
                pipeline.execute()
        return names

    def result(self, handle: Any) -> Any:
        found: Any = self.connection.blpop([f"bare:answer:{handle}"], timeout=int(kit.WAIT))
        return int(found[1]) if found else None


def work(url: str, batch: int) -> None:
    """Run requests until the process is ended; an empty queue is waited on by BLMOVE."""
    connection = redis.Redis.from_url(url)
    turn = connection.register_script(_TURN)
    done: list[Any] = []
    while True:
        found: Any = turn(args=[batch, *done])
        done = []
        for place in range(0, len(found), 2):
            done += [found[place], json.loads(found[place + 1])["n"]]
        if not found:
            connection.blmove("bare:queue", "bare:queue", 1, "RIGHT", "RIGHT")


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(os.environ["BENCH_URL"], int(sys.argv[2]))
    else:
        kit.serve(Bare())
