"""The names of all keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perdure.protocol import keys
from perdure.protocol.errors import InvalidRequest, UsageError

# Drives a request through the real scripts on a pretended server, and lists every key that came to be.
SCRIPT = """
import fakeredis
from perdure.protocol.keys import NAMES, PREFIX
from perdure.protocol.records import NewRequest
from perdure.protocol.transitions.calls import Progress
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.protocol.codec import pack

connection = fakeredis.FakeRedis()
store = Store(connection, Settings())
store.enqueue([NewRequest(id="a", nonce="n", queue="q", task="app.count", payload=b"", max_retries=1, result_ttl=9,
                          failure_ttl=9, description="")])
store.heartbeat(incarnation="i", worker="w", queues=["q"], pid=1, host="h", fingerprints=["f"])
(claim,) = store.claim(incarnation="i", worker="w", queues=["q"], task="", free=1, slots={}, known=[]).claims
store.progress("i", [Progress(id="a", execution=claim.execution, seq=1, offset=0, outputs=1,
                              blob=pack([0, 0, [1]], limit=99, what="x"), state=b"s", fingerprint="f")])
store.reap(["q"], kind="WORKER_LOST", reason="")
names = sorted(name.decode() for name in connection.scan_iter())
print(PREFIX)
print(*sorted(NAMES.values()))
print(*names)
"""

# What RQ itself calls its keys, beside what we call them.
OF_RQ = """
import json
from redis import Redis
from rq.command import PUBSUB_CHANNEL_TEMPLATE
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.queue import Queue
from rq.rate_limit import RateLimitRegistry
from rq.registry import (
    CanceledJobRegistry, DeferredJobRegistry, FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.suspension import WORKERS_SUSPENDED
from rq.worker import Worker
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY
from perdure.protocol.keys import PREFIX, key

registries = {
    "wip": StartedJobRegistry, "finished": FinishedJobRegistry, "failed": FailedJobRegistry,
    "canceled": CanceledJobRegistry, "scheduled": ScheduledJobRegistry, "deferred": DeferredJobRegistry,
}
theirs = {
    "job": Job.key_for("x"),
    "queue": Queue("x", connection=Redis()).key,
    "queues": Queue.redis_queues_keys,
    "execution": Execution(id="y", job_id="x", connection=Redis()).key.removesuffix(":y"),
    "executions": ExecutionRegistry("x", Redis()).key,
    "worker": Worker.redis_worker_namespace_prefix + "x",
    "workers": REDIS_WORKER_KEYS,
    "workers_of": WORKERS_BY_QUEUE_KEY % "x",
    "results": Result.get_key("x"),
    "suspended": WORKERS_SUSPENDED,
    "commands": PUBSUB_CHANNEL_TEMPLATE % "x",
    "limited": RateLimitRegistry.rl_keys_key,
    "limit": RateLimitRegistry("x", Redis()).config_key,
} | {name: registry("x", connection=Redis()).key for name, registry in registries.items()}
ours = {name: key(name) if name in ("queues", "workers", "suspended", "limited") else key(name, "x") for name in theirs}
print(json.dumps([[RQ_KEY_PREFIX, theirs], [PREFIX, ours]]))
"""


def python(script: str, prefix: str | None) -> str:
    """What a script prints in a process that starts with a prefix, or without one."""
    environment = {name: value for name, value in os.environ.items() if name != "RQ_KEY_PREFIX"}
    if prefix is not None:
        environment["RQ_KEY_PREFIX"] = prefix
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def run(prefix: str | None) -> tuple[str, list[str], list[str]]:
    first, table, made = python(SCRIPT, prefix).splitlines()
    return first, table.split(), made.split()


@pytest.mark.parametrize("prefix", [None, "{x}", "a.b:c-1_Z"])
def test_rqs_keys_are_those_of_rq_itself(prefix):
    """They are spelled without it: its own objects say what is right, whatever the prefix."""
    theirs, ours = json.loads(python(OF_RQ, prefix))
    assert ours == theirs
    assert set(theirs[1]) == {name for name, stem in keys.NAMES.items() if not stem.startswith(keys.OURS)}


@pytest.mark.parametrize("prefix", ["", "a'b", "a b", "ü", "a\n"])
def test_a_prefix_that_rq_refuses_is_refused_in_one_line(prefix):
    """It becomes part of Lua source. RQ itself raises a ValueError."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        python("import rq", prefix)
    assert "ValueError: Invalid RQ_KEY_PREFIX" in caught.value.stderr
    command = Path(sys.executable).with_name("perdure")
    done = subprocess.run(
        [command, "queues"],
        env={**os.environ, "RQ_KEY_PREFIX": prefix},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("perdure: RQ_KEY_PREFIX may only have")
    assert len(done.stderr.splitlines()) == 1


def test_one_prefix_puts_every_key_into_one_slot():
    """RQ_KEY_PREFIX='{x}': no name, RQ's or ours, stands outside; nothing that the scripts make does."""
    prefix, table, made = run("{x}")
    assert prefix == "{x}"
    assert table
    assert made
    assert [name for name in (*table, *made) if not name.startswith("{x}:")] == []
    default, other_table, other_made = run(None)
    assert default == "rq"
    assert [name.replace("{x}:", "rq:", 1) for name in table] == other_table
    fixed = [name for name in other_made if ":execution:" not in name]
    assert [name.replace("{x}:", "rq:", 1) for name in made if ":execution:" not in name] == fixed


def test_no_name_is_spelled_twice():
    """Each key has one name; ours stand below one stem and cannot meet RQ's."""
    assert len(set(keys.NAMES.values())) == len(keys.NAMES)
    ours = {name for name in keys.NAMES.values() if name.startswith(keys.OURS)}
    assert len(ours) == 35


def test_names_fit_into_lua_source_without_escapes():
    """The table is baked into the scripts as it stands."""
    for name in keys.NAMES.values():
        assert not set(name) & set("'\\\n")


def test_the_full_key_is_the_stem_and_the_id():
    """As RQ's own tools spell it."""
    assert keys.key("job", "42") == "rq:job:42"
    assert keys.key("queue", "gpu") == "rq:queue:gpu"
    assert keys.key("leases", "gpu") == "rq:perdure:leases:gpu"
    assert keys.key("counters") == "rq:perdure:counters"


@pytest.mark.parametrize("identifier", ["a", "A-b_9", "x" * 200])
def test_ids_that_rq_allows_pass(identifier):
    """Letters, digits, underscore and dash."""
    assert keys.check_id(identifier) == identifier


@pytest.mark.parametrize("identifier", ["", "a:b", "a b", "a\n", "ü", "x" * 201, None, 7, b"a", "*", "{a}", "a/b"])
def test_other_ids_are_refused_with_what_is_allowed(identifier):
    """An id is part of a key's name: nothing in it may be read as something else."""
    with pytest.raises(InvalidRequest, match="a request id has 1 to 200") as caught:
        keys.check_id(identifier)
    assert caught.value.field == "id"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "queue", ["gpu", "gpu.large", "a@b", "low-1", "bench:default", "a b", "a,b", "a\n", "große", "x" * 500]
)
def test_any_text_is_a_queue_as_in_rq(queue):
    """Also what separates other things in a key or a list."""
    assert keys.check_queue(queue) == queue


@pytest.mark.parametrize("queue", ["", "x" * 501, None, b"gpu", "\udcff"])
def test_what_is_no_text_is_no_queue(queue):
    """Nothing, what cannot be stored, and what nobody could read."""
    with pytest.raises(InvalidRequest, match="a queue name must be a string of 1 to 500"):
        keys.check_queue(queue)


@pytest.mark.parametrize("queues", [["gpu"], ["a,b", "c"], ["100%", "a%2Cb", "a,b", "%25"], ["a\n", "ä b:c"]])
def test_a_list_of_queues_comes_back_as_it_was(queues):
    """Whatever their names are; ordinary ones stand in it as they are."""
    assert keys.unlisted(keys.listed(queues)) == queues
    assert keys.listed(["gpu", "bench:default"]) == "gpu,bench:default"


@pytest.mark.parametrize("path", ["app.count", "a.b_c.D9"])
def test_dotted_paths_pass(path):
    """A module and a name in it."""
    assert keys.check_task(path) == path


@pytest.mark.parametrize("path", ["count", "", "a..b", "a.b()", "a.1b", "a.b\n", "a.ü", None, print, "a." + "b" * 500])
def test_what_is_no_dotted_path_is_refused(path):
    """A path is imported by workers: it must be one."""
    with pytest.raises(UsageError, match="dotted path"):
        keys.check_task(path)
