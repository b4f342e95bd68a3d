"""Text generation: what exactness costs, and from how long a prompt on its keys are worth keeping.

``python -m perdure.scripts.benchmarks.measures.text [--model smollm2] [--tokens 128,512,2048] [--repeat 5] [--json
FILE]``

Each figure is the shortest of several runs that alternate with what they are compared with: the one
that others disturbed least. Where others use the machine all the time, ``--cpu`` (with ``--threads 1``)
counts this process' seconds of processor instead of those on the wall; it leaves out what the server
does. The keys go through a Redis server of its own, by the calls that a worker makes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ....protocol.codec import pack
from ....protocol.connection import connect
from ....protocol.identities import new_id
from ....protocol.packed_state import PackedState, pack_state, unpack_state
from ....protocol.records import NewRequest
from ....protocol.settings import Settings
from ....protocol.store import Store
from ....protocol.transitions.calls import Progress
from ....workers.leases.holdings import Holdings
from ....workers.leases.mailbox import Mailbox
from ....workers.redis_io.line import Line
from ....workers.redis_io.uploads import Uploads
from ....workers.tasks.base import NOTHING, Request
from ....workers.text import Generate
from ...pool.server import Server

TASK = "perdure.workers.text.generate"

_clock: Callable[[], float] = time.perf_counter


def shortest(repeat: int, *runs: Callable[[], float]) -> list[float]:
    """The least seconds of each, all run in turn so many times."""
    rounds = [[run() for run in runs] for _ in range(repeat)]
    return [min(column) for column in zip(*rounds, strict=True)]


def decode_seconds(task: Generate, batch: int, exact: bool, tokens: int = 16) -> float:
    """The median pass in which so many requests get a token each."""
    for place in range(batch):
        payload = {"prompt": "Once upon a time, in a house of two rooms,", "max_tokens": tokens, "exact": exact}
        task.admit(Request(id=str(place), payload=payload))
    times = []
    ended = 0
    while ended < batch:
        began = _clock()
        steps = task.step()
        seconds = _clock() - began
        ended += sum(step.ends for step in steps)
        if sum(step.output is not NOTHING for step in steps) == batch:
            times.append(seconds)
    # With one request the first of them is the pass that ends its prefill.
    return statistics.median(times[1:])


def first_token_seconds(task: Generate, request: Request) -> float:
    """From a request's admission to its next output."""
    began = _clock()
    task.admit(request)
    while not any(step.output is not NOTHING for step in task.step()):
        pass
    seconds = _clock() - began
    task.drop(request.id)
    return seconds


def prompt_of(tokens: int) -> list[int]:
    """Ids that mean nothing; the time does not depend on them."""
    return [100 + place * 7 % 150 for place in range(tokens)]


def shapes(task: Generate, lengths: Sequence[int], repeat: int) -> dict[str, Any]:
    """Canonical shapes against ordinary ones: milliseconds a pass, and seconds to the first token."""
    decode = {}
    for batch in (1, task.slots):
        runs = [partial(decode_seconds, task, batch, exact) for exact in (True, False)]
        exact, ordinary = shortest(repeat, *runs)
        decode[batch] = {"exact_ms": exact * 1000, "ordinary_ms": ordinary * 1000}

    def prefill(tokens: int, exact: bool) -> float:
        payload = {"token_ids": prompt_of(tokens), "max_tokens": 2, "exact": exact}
        return first_token_seconds(task, Request(id="prefill", payload=payload))

    prompts = {}
    for tokens in lengths:
        exact, ordinary = shortest(min(repeat, 2), partial(prefill, tokens, True), partial(prefill, tokens, False))
        prompts[tokens] = {"exact_s": exact, "ordinary_s": ordinary}
    return {"decode": decode, "prefill": prompts}


def keys(task: Generate, lengths: Sequence[int], repeat: int) -> dict[int, dict[str, float]]:
    """A resume by its prompt's keys against one that computes them, to the next token, in seconds."""
    result = {}
    with Server() as server, connect(server.url, name="benchmark") as connection:
        store = Store(connection, task._settings())
        for tokens in lengths:
            payload = {"token_ids": prompt_of(tokens), "max_tokens": 8, "kv": True}
            state, output = _begin(task, payload)
            began = _clock()
            packed = pack_state(state, limit=2**31)
            capture = _clock() - began
            identifier = new_id()
            size = packed.size
            write = _write(store, identifier, packed)

            def computed(payload: Any = payload, output: Any = output) -> float:
                return first_token_seconds(task, Request(id="computed", payload=payload, outputs=[output]))

            def read(payload: Any = payload, output: Any = output, identifier: str = identifier) -> float:
                began = _clock()
                raw, sound = store.packed_state(identifier)
                assert raw is not None
                assert sound
                request = Request(id="read", payload=payload, outputs=[output], state=unpack_state(raw))
                return _clock() - began + first_token_seconds(task, request)

            by_computing, by_reading = shortest(min(repeat, 3), computed, read)
            result[tokens] = {
                "bytes": size,
                "computed_s": by_computing,
                "read_s": by_reading,
                "capture_s": capture,
                "write_s": write,
            }
            connection.flushall()
    return result


def _begin(task: Generate, payload: Any) -> tuple[Any, Any]:
    """A request's state and its first output."""
    task.admit(Request(id="begin", payload=payload))
    state = output = NOTHING
    while output is NOTHING:
        for step in task.step():
            state = step.state if step.state is not NOTHING else state
            output = step.output if step.output is not NOTHING else output
    task.drop("begin")
    return state, output


def _write(store: Store, identifier: str, state: PackedState) -> float:
    """Store a state as a worker does; in seconds."""
    incarnation = new_id()
    request = NewRequest(
        id=identifier,
        nonce=identifier,
        queue="benchmark",
        task=TASK,
        payload=pack({}, limit=100, what="payload"),
        max_retries=0,
        result_ttl=600,
        failure_ttl=600,
        description="benchmark",
    )
    store.enqueue([request])
    found = store.claim(
        incarnation=incarnation, worker="benchmark", queues=["benchmark"], task="", free=1, slots={TASK: 1}, known=[]
    )
    (claim,) = found.claims
    row = Progress(
        id=claim.id, execution=claim.execution, seq=1, offset=0, outputs=0, blob=b"", state=state, fingerprint=""
    )
    began = _clock()
    uploads = Uploads(Line(store, "benchmark", Holdings(store.settings, Mailbox())), _refused)
    while not uploads.advance([row]):
        pass
    if store.progress(incarnation, [row]) != ["ok"]:
        raise RuntimeError("the checkpoint was refused")
    return _clock() - began


def _refused(row: Progress, answer: str) -> None:
    raise RuntimeError(f"the state of {row.id} was refused: {answer}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--model-path", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", default="128,512,1024,2048", help="lengths of prompts, comma-separated")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", default="", help="write the figures to this file")
    parser.add_argument("--cpu", action="store_true", help="count seconds of processor; give --threads 1 as well")
    options = parser.parse_args(arguments)
    global _clock
    _clock = time.process_time if options.cpu else time.perf_counter
    lengths = [int(number) for number in options.tokens.split(",")]
    # Long prompts are to be measured too, whatever the limit in operation.
    settings = Settings(
        model=options.model,
        model_path=options.model_path,
        device=options.device,
        slots=options.slots,
        threads=options.threads,
        max_state=2**31,
    )
    task = Generate(settings)
    task.load()
    load = os.getloadavg()[0]
    found = {"shapes": shapes(task, lengths, options.repeat), "kv": keys(task, lengths, options.repeat)}
    found["machine"] = {"cores": os.cpu_count(), "load": [load, os.getloadavg()[0]], "model": options.model}
    _print(found)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _print(found: dict[str, Any]) -> None:
    print(f"{found['machine']['cores']} cores, load {found['machine']['load'][0]:.1f}, {found['machine']['model']}\n")
    print("a token for each request    exact    not exact")
    for batch, row in found["shapes"]["decode"].items():
        print(f"{batch:>4} at once          {row['exact_ms']:>10.1f} ms {row['ordinary_ms']:>9.1f} ms")
    print("\nprompt to first token       exact    not exact")
    for tokens, row in found["shapes"]["prefill"].items():
        print(f"{tokens:>5} tokens         {row['exact_s']:>10.2f} s {row['ordinary_s']:>10.2f} s")
    print("\nresume: prompt     state   computed     read   (capture, write to Redis)")
    for tokens, row in found["kv"].items():
        print(
            f"{tokens:>8} tokens {row['bytes'] / 2**20:>5.1f} MiB {row['computed_s']:>8.2f} s "
            f"{row['read_s']:>6.2f} s   "
            f"({row['capture_s']:.2f} s, {row['write_s']:.2f} s)"
        )


if __name__ == "__main__":
    sys.exit(main())
