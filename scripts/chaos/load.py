"""A producer as a process: submits, streams, and writes down what it was promised and what it saw.

``python -m perdure.scripts.chaos.load CONFIG`` with a JSON file. It ends by itself some time after SIGTERM: it submits
nothing more, and its open streams end. SIGKILL it at any time: the next one with the same configuration goes on with
what was accepted and has not ended, from the output after the last one in the journal.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

from ...producer import Client
from ...protocol.errors import PerdureError, RedisUnavailable, RequestCanceled, RequestFailed
from ...protocol.settings import Settings
from . import journal

WALK: Final = "perdure.scripts.chaos.tasks.walk"
BLEND: Final = "perdure.scripts.chaos.tasks.Blend"
WORDS: Final = "perdure.workers.text.generate"

STEPS, TEXTS = "steps", "texts"
"""The queues: one for all workers, and one for those that have loaded the model."""

WINDOW: Final = 6
"""Requests that one producer has under way, beside one of text generation."""

SILENCE: Final = 30.0
"""Seconds without an output after which a stream is opened again."""

PATIENCE: Final = 2.0
"""Seconds that a submit outlasts an outage. Short: its outcome is unknown then, which is what the judge wants to see.
"""

BROKEN: Final = 70
"""Exit status of a producer that met something unforeseen."""

PAUSE: Final = 0.1
"""Seconds before the next try after Redis has refused or not answered."""


def words(seed: int) -> list[dict[str, Any]]:
    """The few payloads of text generation; their answers are made once, before the judge needs them."""
    chance = random.Random(f"words {seed}")
    openings = ("Once upon a time", "The sea was", "def main():", "In the beginning", "12, 24, 36")
    return [
        {"prompt": text, "max_tokens": chance.randint(12, 30), "temperature": 0.9, "seed": chance.randrange(10**6)}
        for text in openings
    ]


@dataclass(frozen=True, slots=True)
class Order:
    """One request to be: its id follows from producer, process and number, its payload from the seed."""

    id: str
    task: str
    payload: dict[str, Any]
    queue: str


def orders(name: str, process: int, seed: int) -> Iterator[Order]:
    """What one producer process submits, without end. Most are walks; one in 40 asks to be refused."""
    chance = random.Random(f"{name} {process} {seed}")
    for number in itertools.count(1):
        draw = chance.random()
        length = chance.randint(120, 200) if chance.random() < 0.06 else chance.randint(10, 40)
        payload: dict[str, Any] = {
            "seed": chance.randrange(10**9), "n": length, "sleep": round(chance.uniform(0.001, 0.005), 4),
        }  # fmt: skip
        if draw < 0.025:
            payload["refuse"] = True
        yield Order(f"{name}-{process}-{number}", BLEND if draw > 0.8 else WALK, payload, STEPS)


def texts(name: str, process: int, seed: int) -> Iterator[Order]:
    """The same for text generation, in a lane of its own: it must not hold up the rest while the model is loaded."""
    chance = random.Random(f"{name} {process} {seed} texts")
    choices = words(seed)
    for number in itertools.count(1):
        yield Order(f"{name}-{process}-t{number}", WORDS, chance.choice(choices), TEXTS)


@dataclass(slots=True)
class ChaosProducer:
    """Some threads, each with one request under way."""

    client: Client
    journal: journal.Journal
    lanes: list[Iterator[Order]]
    """Each thread has one; several threads may have the same."""
    open: list[tuple[str, int]]
    """Accepted before this process: id, and outputs seen."""
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in self.lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _lane(self, orders: Iterator[Order]) -> None:
        try:
            self._work(orders)
        except BaseException:
            # What nobody has foreseen must not end in a thread that is missing from then on.
            traceback.print_exc()
            os._exit(BROKEN)

    def _work(self, orders: Iterator[Order]) -> None:
        while True:
            with self._lock:
                known = self.open.pop() if self.open else None
            if known is not None:
                self._follow(*known)
            elif self.stop.is_set():
                return
            else:
                with self._lock:
                    order = next(orders)
                if submit(self.client, self.journal, order):
                    self._follow(order.id, 0)
                else:
                    time.sleep(PAUSE)

    def _follow(self, identifier: str, seen: int) -> None:
        """Stream one request to its end, through whatever the connection does."""
        while True:
            try:
                handle = self.client.get(identifier)
                for output in handle.stream(start=seen, restarts=True, timeout=SILENCE):
                    # Ours say where they stand; a stream that began again from the first shows by it.
                    index = output[0] if isinstance(output, list) else seen
                    self.journal.write(journal.OUTPUT, identifier, index=index, output=output)
                    seen = index + 1
                self.journal.write(journal.END, identifier, status="finished", result=handle.result(timeout=SILENCE))
            except RequestFailed as error:
                self.journal.write(journal.END, identifier, status="failed", kind=error.kind, reason=error.reason)
            except RequestCanceled:
                self.journal.write(journal.END, identifier, status="canceled")
            except (RedisUnavailable, TimeoutError, redis.RedisError) as error:
                self.journal.write(journal.NOTE, identifier, error=f"{type(error).__name__}: {error}"[:300])
                time.sleep(PAUSE)
                continue
            except PerdureError as error:
                # A gap in the log, a result that cannot be read: it is for the judge, not to be tried again.
                self.journal.write(journal.END, identifier, status="broken", reason=f"{type(error).__name__}: {error}")
            return


def submit(client: Client, log: journal.Journal, order: Order) -> bool:
    """Submit and write down what came of it; False if it was refused, or if nobody knows."""
    log.write(journal.INTENT, order.id, task=order.task, payload=order.payload)
    try:
        client.submit(order.task, order.payload, id=order.id, queue=order.queue)
    except (PerdureError, redis.RedisError) as error:
        log.write(journal.REFUSED, order.id, error=f"{type(error).__name__}: {error}"[:300])
        return False
    log.write(journal.ACCEPTED, order.id, durable=True)
    return True


def left_over(paths: list[Path]) -> list[tuple[str, int]]:
    """What earlier processes of this producer were promised and have not seen the end of, with outputs seen."""
    open_: dict[str, int] = {}
    for path in paths:
        for line in journal.read(path):
            if line["what"] == journal.ACCEPTED:
                open_[line["id"]] = 0
            elif line["what"] == journal.OUTPUT and line["id"] in open_:
                open_[line["id"]] = line["index"] + 1
            elif line["what"] == journal.END:
                open_.pop(line["id"], None)
    return list(open_.items())


def main(argv: list[str]) -> int:
    """Produce until SIGTERM."""
    config = json.loads(Path(argv[0]).read_text())
    name, folder = config["name"], Path(config["folder"])
    earlier = sorted(folder.glob(f"{name}.*.jsonl"), key=lambda path: int(path.suffixes[-2][1:]))
    process = len(earlier) + 1
    settings = Settings.from_environment()
    stop = threading.Event()
    _on_sigterm(stop)
    with Client(settings.redis_url, settings=settings, patience=PATIENCE) as client:
        lanes = [orders(name, process, config["seed"])] * WINDOW
        if config["text"]:
            lanes.append(texts(name, process, config["seed"]))
        log = journal.Journal(folder / f"{name}.{process}.jsonl")
        producer = ChaosProducer(client, log, lanes, left_over(earlier), stop)
        producer.run()
    return 0


def _on_sigterm(stop: threading.Event) -> None:
    """Set ``stop`` on SIGTERM, from a thread: a handler could need the lock that its own thread holds."""
    signals = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        signal.sigwait(signals)
        stop.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
