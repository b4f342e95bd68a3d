"""What the page shows, read as the commands read it: the same functions, the same fields. Blocking; any thread."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self, TypeVar

import redis

from ...producer import Client
from ...producer.reading.listing import Wanted, read_listing
from ...protocol.connection import connect
from ...protocol.errors import InvalidRequest, PerdureError
from ...protocol.keys import check_id, check_queue
from ...protocol.queries.dead_letters import dead_letters, grouped
from ...protocol.queries.inspection import leases
from ...protocol.queries.server_load import pressure
from ...protocol.settings import Settings, redact
from ...protocol.store import Store
from ...protocol.transport.explaining import explain
from ..cli.moves import requeue_one
from ..cli.views import as_item as request_item
from ..cli.views import describe, executions
from ..cli.workers import as_item as worker_item
from ..inspect_dead_letters import as_group, as_letter
from ..inspect_leases import as_item as lease_item
from ..inspect_queues import read_these
from ..present.console import plain
from ..present.drawing import Chart, draw
from ..present.reading import Rates
from ..present.timeline import chart_of
from .contents import contents

Answer = TypeVar("Answer")

TIMEOUT: Final = 3.0
"""Seconds that Redis may take for one answer."""

QUEUES: Final = 100
WORKERS: Final = 300
LEASES: Final = 25
"""How many of each a frame tells; of the rest the number."""

LETTERS: Final = 2000
"""The newest failures of each queue that are looked at."""

GROUPS: Final = 100
"""The largest groups, which are told; of the rest the number."""

PAGE: Final = 50
BATCH: Final = 100
"""Failures on a page, and the most that one call requeues."""


class NotAllowed(PerdureError):
    """The Redis user of this server has no permission to do that."""


class WebQueries:
    """A pool, to be looked at over a few connections that are kept."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._settings = settings
        self._address = address
        self._connection = connect(address, timeout=TIMEOUT, name="perdure-web", check=False)
        # No patience: a person waits, and the page asks again by itself.
        self._client = Client(settings=settings, connection=self._connection, patience=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._connection.close()

    @property
    def where(self) -> str:
        """The server's URL without its password."""
        return redact(self._address)

    def frame(self, rates: Rates) -> dict[str, Any]:
        """The whole pool at a glance; rates are those since the last frame with these ``rates``."""
        with self._reaching() as store:
            store.check_protocol()
            names = store.queues()
            queues = read_these(store, names[:QUEUES], rates)
            workers = sorted(map(worker_item, store.workers()), key=lambda item: (item["host"], item["name"]))
            held = leases(store, names[:QUEUES], within=None, limit=LEASES)
            mode = store.mode()
            return {
                "at": time.time(),
                "mode": {"degraded": mode.degraded, "live": mode.live, "expected": mode.expected, "since": mode.since},
                "queues": queues,
                "workers": workers[:WORKERS],
                "running": [lease_item(lease) for lease in held],
                "unfit": store.unfit_devices(),
                "quarantined": _quarantined(store),
                "server": pressure(self._connection, slow=8, pings=3),
                "left_out": {"queues": len(names[QUEUES:]), "workers": len(workers[WORKERS:])},
            }

    def listing(
        self, limit: int, cursor: str | None, *, status: str | None, queue: str | None, wanted: Wanted
    ) -> dict[str, Any]:
        """A page of requests. Raises ``InvalidRequest`` for filters and cursors that cannot be."""

        def call(operation: Callable[[Store], Answer]) -> Answer:
            return operation(store)

        with self._reaching() as store:
            page = read_listing(call, status=status, queue=queue, limit=limit, cursor=cursor, wanted=wanted)
        return {"items": [request_item(record) for record in page.items], "cursor": page.cursor}

    def request(self, identifier: str) -> dict[str, Any]:
        """One request as ``show`` tells it, with its chart. Raises ``UnknownRequest``."""
        handle = self._client.get(identifier)
        with self._reaching():
            facts = describe(handle)
            chart = self._chart(identifier)
        # As text: a browser's numbers have 53 bits, and no infinity; a pickled text may be none of UTF-8.
        meta = None if facts["meta"] is None else json.dumps(plain(facts["meta"]), ensure_ascii=False)
        meta = meta and meta.encode(errors="replace").decode()
        return {**facts, "meta": meta, "chart": as_chart(chart)}

    def contents(self, identifier: str) -> dict[str, Any]:
        """Payload, outputs and result as :func:`.contents.contents` tells them. Raises ``UnknownRequest``."""
        handle = self._client.get(identifier)
        with self._reaching() as store:
            finished = handle.status() == "finished"
            return contents(store, identifier, finished=finished)

    def cancel(self, identifier: str, reason: str) -> bool:
        """False if it had ended. Raises ``UnknownRequest``, and :class:`NotAllowed` if Redis forbids it."""
        handle = self._client.get(identifier)
        with self._reaching():
            return handle.cancel(reason)

    def drawing(self, identifier: str) -> str:
        """The chart as an SVG document."""
        with self._reaching():
            return draw(self._chart(identifier))

    def _chart(self, identifier: str) -> Chart:
        handle = self._client.get(identifier)
        now = handle.details().now
        return chart_of(handle.record(), executions(handle, now), now=now)

    def groups(self) -> dict[str, Any]:
        """Failures grouped by error."""
        with self._reaching() as store:
            names = store.queues()
            found = grouped(dead_letters(store, names, limit=LETTERS))
        return {"items": [as_group(group) for group in found[:GROUPS]], "left_out": len(found[GROUPS:])}

    def letters(self, fingerprint: str, begin: int, limit: int) -> dict[str, Any]:
        """The failures of one group, from the newest of each queue; ``cursor`` is for the next page."""
        with self._reaching() as store:
            found = [
                letter
                for letter in dead_letters(store, store.queues(), limit=LETTERS)
                if letter.fingerprint == fingerprint
            ]
        following = begin + limit if begin + limit < len(found) else None
        page = [as_letter(letter) for letter in found[begin : begin + limit]]
        return {"items": page, "number": len(found), "cursor": following}

    def requeue(self, items: Sequence[Any]) -> dict[str, list[str]]:
        """Send failures back to their queues; each is ``{"id", "queue"}``, at most :data:`BATCH`.

        What is not among the failures of that queue any more is ``left``. Raises ``InvalidRequest``, and
        :class:`NotAllowed` if the server's own user may not write.
        """
        if len(items) > BATCH:
            raise InvalidRequest(f"at most {BATCH} at a time, not {len(items)}", "items")
        pairs = [(check_id(_text(item, "id")), check_queue(_text(item, "queue"))) for item in items]
        done: list[str] = []
        left: list[str] = []
        with self._reaching():
            for identifier, queue in pairs:
                (done if requeue_one(self._connection, queue, identifier) else left).append(identifier)
        return {"requeued": done, "left": left}

    @contextmanager
    def _reaching(self) -> Iterator[Store]:
        """A store, whose errors become those that a person is told."""
        try:
            yield Store(self._connection, self._settings)
        except redis.exceptions.NoPermissionError:
            raise NotAllowed("the Redis user of this server has no permission to do that") from None
        except (redis.RedisError, OSError) as error:
            raise explain(error, self._address) from None


def as_chart(chart: Chart) -> dict[str, Any]:
    """A chart for a browser: times in seconds since its origin, links as places in the list of bars."""
    places = {id(bar): place for place, bar in enumerate(chart.bars)}
    return {
        "span": chart.end - chart.origin,
        "bars": [
            {
                "lane": bar.lane, "begin": bar.begin - chart.origin, "end": bar.end - chart.origin, "shape": bar.shape,
                "title": bar.title, "label": bar.label, "ticks": [tick - chart.origin for tick in bar.ticks],
            }
            for bar in chart.bars
        ],
        "crosses": [
            {"at": cross.at - chart.origin, "lane": cross.lane, "text": cross.text, "title": cross.title}
            for cross in chart.crosses
        ],
        "links": [[places[id(link.before)], places[id(link.after)]] for link in chart.links],
    }  # fmt: skip


def _quarantined(store: Store) -> list[dict[str, Any]]:
    """Places that a supervisor keeps empty, and what a person types to have them tried again."""
    return [
        {
            "supervisor": record["name"], "host": record.get("host"), "release": record.get("release"),
            "place": place.get("place"), "device": place.get("device"), "reason": place.get("reason"),
        }
        for record in store.supervisors()
        for place in record.get("places", ())
        if place.get("phase") == "quarantined"
    ]  # fmt: skip


def _text(item: Any, name: str) -> str:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, str):
        raise InvalidRequest(f'each item is {{"id": …, "queue": …}}; {name} is missing', name)
    return value
