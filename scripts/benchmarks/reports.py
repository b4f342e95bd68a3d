"""The figures of the parts as tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .drawing import Curve, bars, curves
from .tables import Table

Pictures = dict[str, str]

_QUEUE = (
    ("submit/s", "submit"), ("bulk/s", "bulk"), ("drain/s, 1 worker", "drain_1"), ("2 workers", "drain_2"),
    ("p50 ms", "latency_p50"), ("p99", "latency_p99"), ("idle p50", "idle_p50"), ("half load p50", "load_p50"),
    ("p99", "load_p99"), ("B queued", "bytes_queued"), ("B finished", "bytes_finished"),
    ("queued, stock", "bytes_queued_stock"), ("finished, stock", "bytes_finished_stock"),
    ("Redis µs", "cpu_us"), ("round trips", "round_trips"), ("wrong", "wrong"),
)  # fmt: skip


def queue_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each system."""
    medians = found["medians"]
    rows = [[name, *(medians[name].get(figure) for _, figure in _QUEUE)] for name in medians]
    sizes = found["sizes"]
    counts = [len(values) for figures in found["rounds"].values() for values in figures.values()]
    rounds = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(max(counts, default=0))
    notes = [
        f"Medians of {rounds} rounds; {sizes['requests']:,} no-op requests of 200 bytes, or what ended in "
        f"{sizes['limit']:g} s; the rate is that after the first quarter.",
        *(f"{name}: {how}" for name, how in found["systems"].items()),
        *(f"{name}: {why.splitlines()[0]}" for name, why in found["problems"].items()),
    ]
    return [Table("No-op requests", ["system", *(head for head, _ in _QUEUE)], rows, notes), ratio_table(found)]


def ratio_table(found: Mapping[str, Any]) -> Table:
    """The ratios that the targets speak of."""
    return Table("Ratios", ["", "median of the rounds"], [[name, value] for name, value in found["ratios"].items()])


def queue_pictures(found: Mapping[str, Any], note: str) -> Pictures:
    """Bars: drains by one and by two workers, submits, latency."""
    medians = found["medians"]

    def of(figure: str) -> list[tuple[str, float | None]]:
        known = [(name, values.get(figure)) for name, values in medians.items()]
        return [(name, value) for name, value in known if value is not None]

    titles = {
        "drain_1": ("No-op requests drained by one worker process", "requests/s"),
        "drain_2": ("No-op requests drained by two worker processes", "requests/s"),
        "submit": ("Requests submitted one by one", "requests/s"),
        "bulk": ("Requests submitted in bulk", "requests/s"),
        "latency_p50": ("Submit to result, p50", "ms"),
        "bytes_finished": ("Memory of Redis for a finished request", "bytes"),
    }
    return {
        f"queue-{figure.replace('_', '-')}.svg": bars(title, unit, values, note)
        for figure, (title, unit) in titles.items()
        if (values := of(figure))
    }


def recovery_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each scenario."""
    heads = ("kills", "p50 ms", "p99 ms", "steps twice", "at most")
    names = ("kills", "p50_ms", "p99_ms", "repeated", "repeated_most")
    rows = [[scenario, *(row[name] for name in names)] for scenario, row in found["medians"].items()]
    sizes = found["sizes"]
    notes = [
        f"From a kill (or the begin of a hang) at step {sizes['at']} ± {sizes['around']} of 20 ms to the next step by "
        "another worker; of the peers the whole worker is killed.",
        *(f"{name}: {how}" for name, how in found["systems"].items()),
        *(f"{name}: {why.splitlines()[0]}" for name, why in found["problems"].items()),
    ]
    return [Table("From a kill to the next step elsewhere", ["what", *heads], rows, notes)]


def recovery_pictures(found: Mapping[str, Any], note: str) -> Pictures:
    """Bars: the delay, and what is computed twice."""
    medians = found["medians"]
    delays = [(name, row["p50_ms"]) for name, row in medians.items()]
    twice = [(name, row["repeated"]) for name, row in medians.items()]
    return {
        "recovery.svg": bars("From a kill to the next step elsewhere, p50", "ms", delays, note),
        "recovery-steps.svg": bars("Steps of 20 ms computed twice", "steps", twice, note),
    }


def checkpoint_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each way of storing."""
    heads = ("tokens/s", "bytes/s", "calls/s", "Redis ms/s")
    names = ("tokens_per_s", "bytes_per_s", "calls_per_s", "redis_ms_per_s")
    rows = [[way, *(row.get(name) for name in names)] for way, row in _ways(found)]
    sizes = found["sizes"]
    notes = [
        f"Medians of {sizes['rounds']} rounds; {sizes['model']}, {sizes['slots']} requests at once, {sizes['tokens']} "
        f"tokens each, {found['step_ms']:.1f} ms a step; far: {found['far_ms']:g} ms put before Redis.",
    ]
    tables = [Table("Checkpoints while generating", ["", *heads], rows, notes)]
    if windows := found.get("windows"):
        rows = [[way, *(item[name] for name in ("windows", "ratio", "low", "high"))] for way, item in windows.items()]
        note = (
            f"Windows of {sizes['window']:g} s with checkpoints, each against the two without beside it, within "
            f"{sizes['generations']} generations of {sizes['long']} tokens; "
            "from and to: of the median, with 95 % confidence."
        )
        columns = ["", "windows", "tokens/s with against without", "from", "to"]
        tables.append(Table("With checkpoints and without, in turn", columns, rows, [note]))
    return [*tables, ratio_table(found)]


def _ways(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """None before all others, whichever came first in the first round."""
    return sorted(found["medians"].items(), key=lambda item: item[0] != "off")


def checkpoint_pictures(found: Mapping[str, Any], note: str) -> Pictures:
    """Bars: tokens/s of each way."""
    values = [(way, row["tokens_per_s"]) for way, row in _ways(found)]
    return {"checkpoints.svg": bars("Tokens/s of a full batch while checkpoints are stored", "tokens/s", values, note)}


def scale_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each operation, one column for each size."""
    rows = found["rows"]
    heads = [f"{row['queued']:,} waiting" for row in rows]
    tables = []
    for figure, title in (
        ("redis_us", "Redis time of one operation, µs"),
        ("commands", "Commands of one operation, those within its script counted"),
        ("ms", "The time that the caller sees, ms"),
    ):
        cells = [[name, *(row["costs"][name][figure] for row in rows)] for name in rows[0]["costs"]]
        tables.append(Table(title, ["", *heads], cells))
    notes = [
        f"beside {row['queued']:,} waiting: {row['retries']:,} retries, {row['workers']:,} workers' beats, "
        f"{row['leases']:,} leases"
        for row in rows
    ]
    first = Table(tables[0].title, tables[0].heads, tables[0].rows, notes)
    return [first, *tables[1:], *_fleet_tables(found["fleet"]), ratio_table(found)]


def _fleet_tables(found: Mapping[str, Any]) -> list[Table]:
    """Many queue names, idle workers, and lost ones."""
    sizes = found["sizes"]
    names = [[f"{row['names']:,}", row["claim_us"], row["sweep_us"]] for row in found["names"]]
    idle = [[f"{row['workers']:,}", 100 * row["core"]] for row in found["idle"]]
    lost = [
        [f"{row['workers']:,}", f"{row['requests']:,}", row["seconds"], 100 * row["core"], row["longest_ms"]]
        for row in found["lost"]
    ]
    of_idle = (
        "simulated by their calls: heartbeats, waits on the bell, claims, looks for notes; with one reaper. One worker "
        f"claims each second; {sizes['seconds']:g} s."
    )
    log = found["log"]
    of_log = f"{log['outputs']:,} outputs of one request, each in an entry of its own, read page by page."
    of_lost = "from the first sweep that may judge them until all requests wait again; one reaper."
    return [
        Table("Queue names of which none holds anything: Redis' time, µs", ["", "an idle claim", "a sweep"], names),
        Table("Idle workers", ["", "% of a core of Redis"], idle, [of_idle]),
        Table(
            "What a claim reads to go on from a long log: ms",
            ["", "to read and decode", "of it decoding", "longest page"],
            [["one request", log["read_ms"], log["decode_ms"], log["longest_ms"]]],
            [of_log],
        ),
        Table(
            "Workers that are lost at once",
            ["", "requests", "seconds", "% of a core of Redis", "longest call, ms"],
            lost,
            [of_lost],
        ),
    ]


def saturation_tables(found: Mapping[str, Any]) -> list[Table]:
    """A row for each level of load; a column while a large pool is full, and one while it comes back."""
    sizes = found["sizes"]
    levels = [
        [
            "–" if row.get("asked") is None else f"{row['asked']:.0%}", row["workers"], f"{row['requests']:,}",
            row["checkpoints_a_second"], 100 * row["core"], 100 * row["predicted"], row["interval"], row["deaths"],
            row["ping_p50_ms"], row["beat_p50_ms"], row["beat_p99_ms"],
        ]
        for row in found["rows"]
    ]  # fmt: skip
    of_levels = (
        f"What Redis could store is what a whole core would, by what a checkpoint costs in the pool of the first row: "
        f"{found['capacity']:,} a second. Workers of {sizes['held']} requests, whose processes share the machine with "
        "Redis. Foretold: by the formula of production.md."
    )
    figures = {
        "deaths": "workers that were declared dead", "checkpoints_a_second": "checkpoints stored a second",
        "interval": "seconds between two of a worker", "in_flight": "calls in flight at most",
        "ping_p50_ms": "a ping, p50, ms", "ping_worst_ms": "a ping, worst, ms", "beat_p50_ms": "a heartbeat, p50, ms",
        "beat_p99_ms": "a heartbeat, p99, ms", "beat_worst_ms": "a heartbeat, worst, ms", "seconds": "seconds",
    }  # fmt: skip
    cells = [[text, found["full"][name], found["back"][name]] for name, text in figures.items()]
    note = (
        f"{sizes['workers']} workers of {sizes['held']} requests. Coming back: all are declared dead "
        "by hand, one after the other, and those are the ones counted here. Its seconds are those "
        "from the last until all requests are held again; what else stands in its column is from the first on."
    )
    heads = ["", "full", "coming back"]
    names = [
        "of what Redis could store", "workers", "requests", "checkpoints a second", "% of a core", "foretold",
        "seconds between two of a worker", "declared dead", "a ping, p50, ms", "a heartbeat, p50, ms", "p99",
    ]  # fmt: skip
    return [
        Table("Near what one Redis can store, and beyond", names, levels, [of_levels]),
        Table("Many more requests than one Redis can checkpoint at the usual interval", heads, cells, [note]),
        ratio_table(found),
    ]


def stream_tables(found: Mapping[str, Any]) -> list[Table]:
    """Lags beside the bare way; one client and many streams; what a reader costs the engine, and a start."""
    sizes = found["sizes"]
    figures = {
        "p50_ms": "p50 ms", "p99_ms": "p99", "first_ms": "first output, p50", "redis_us": "Redis µs an output",
        "client_us": "client µs an output",
    }  # fmt: skip
    lags = [[name, *(row[figure] for figure in figures)] for name, row in found["medians"].items()]
    many = [
        [
            f"{row['streams']:,}", row["asked_per_s"], row["read_per_s"], row["wrong"], row["p50_ms"], row["p99_ms"],
            100 * row["cpu"], 100 * row["silent_cpu"], row["writer_late_s"],
        ]
        for row in found["many"]
    ]  # fmt: skip
    note = (
        f"{sizes['steps']} steps of {sizes['pause'] * 1000:g} ms, each of which puts out the time; medians of "
        f"{sizes['rounds']} rounds. The lag is that from the end of the step to the caller of `async for`; those of "
        "first outputs are in a column of their own."
    )
    of_many = (
        f"one AsyncClient on one core; {sizes['rate']:g} outputs a second of each for {sizes['seconds']} s, from a "
        "writer that plays the workers. Late: by how much the writer missed its times at most."
    )
    tokens, costs = found["tokens"], found["import"]
    cells = [
        ["tokens/s of a batch that is read against one that is not", tokens["ratio"]],
        ["`import perdure` and a client against `import redis`, processor time", costs["ratio"]],
    ]
    heads = [
        "streams", "asked/s", "read/s", "missing or wrong", "p50 ms", "p99", "% of a core", "silent, % of a core",
        "late s",
    ]  # fmt: skip
    return [
        Table("From a step to who reads its output", ["", *figures.values()], lags, [note]),
        Table("Many streams in one process", heads, many, [of_many]),
        Table("What it costs", ["", "×"], cells),
    ]


def scale_pictures(found: Mapping[str, Any], note: str) -> Pictures:
    """Curves: what each operation costs the server against the number of those that wait."""
    rows = found["rows"]
    lines = [
        Curve(name, [(row["queued"], row["costs"][name]["redis_us"]) for row in rows]) for name in rows[0]["costs"]
    ]
    picture = curves(
        "What an operation costs Redis, beside so many waiting requests",
        "requests that wait",
        "µs",
        lines,
        log_x=True,
        log_y=True,
        note=note,
    )
    return {"scale.svg": picture}
