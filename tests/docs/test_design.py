"""docs/design.md says which way a request takes; one is followed on its way."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import redis

from perdure.producer import Client
from perdure.protocol.scripts import Script
from perdure.workers.tasks import BatchTask, Request, Step
from tests.kit.docs.pages import names, rows, section
from tests.kit.places import DOCS
from tests.kit.protocol.pool import TASK
from tests.kit.workers.bench import Turns


class Once(BatchTask):
    """Each request ends with its first step."""

    def load(self) -> None:
        self.ids: list[str] = []

    def admit(self, request: Request) -> None:
        self.ids.append(request.id)

    def step(self) -> list[Step]:
        ids, self.ids = self.ids, []
        return [Step(request_id=identifier, output=1, result=2) for identifier in ids]

    def drop(self, request_id: str) -> None:
        self.ids = [identifier for identifier in self.ids if identifier != request_id]


def test_a_request_goes_through_the_six_files_in_their_order(connection: redis.Redis, redis_url: str) -> None:
    table = rows(section(DOCS / "design.md", "A request's way through the files"))
    way = [(names(file)[0], names(place)) for file, place, _ in table]
    assert len(way) == 6
    wanted = {(file, place) for file, places in way for place in places or [""]}
    seen: list[tuple[str, str]] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code is Script.__call__.__code__:
            step = (f"protocol/lua/{frame.f_locals['self'].name}.lua", "")
        else:
            step = (code.co_filename.rpartition("/perdure/")[2], code.co_qualname)
        if step in wanted and step not in seen:
            seen.append(step)

    turns = Turns(connection, Once())
    with Client(redis_url) as client:
        sys.setprofile(watch)
        try:
            name = client.submit(TASK, {}, queue="gpu").id
            turns.run(name)
        finally:
            sys.setprofile(None)
        assert client.get(name).result(timeout=60) == 2
    assert seen == [(file, place) for file, places in way for place in places or [""]]
