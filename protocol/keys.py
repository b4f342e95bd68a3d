"""The names of all keys.

Those of RQ are spelled here, and nothing of RQ is imported: a guardian and a producer have no use for the rest of it.
A test compares each with what RQ's own objects say. ``RQ_KEY_PREFIX`` decides for RQ and for us: our names stand below
the same prefix. The Lua scripts get this table baked in when they are loaded (:mod:`.scripts`): no name is spelled
twice, and with ``RQ_KEY_PREFIX='{rq}'`` all of them lie in one cluster slot.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, Literal

from .errors import InvalidRequest, SettingsError, UsageError

SCHEMA: Final = 1
"""Version of what stands in Redis. A release meets only its own or an older one."""


def _prefix() -> str:
    """What RQ's keys begin with.

    Raises :class:`SettingsError` for what RQ refuses as well: it becomes part of Lua source.
    """
    prefix = os.environ.get("RQ_KEY_PREFIX", "rq")
    if not re.fullmatch(r"[A-Za-z0-9_.:{}-]+", prefix):
        raise SettingsError(
            f"RQ_KEY_PREFIX may only have letters, digits and _ . : - {{ }}, but it is {_shown(prefix)}"
        )
    return prefix


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


PREFIX: Final = _prefix()
OURS: Final = f"{PREFIX}:perdure:"

# Name -> everything before the id (a "stem", ends in a colon) or the whole key.
NAMES: Final[dict[str, str]] = {
    # RQ's
    "job": f"{PREFIX}:job:",
    "queue": f"{PREFIX}:queue:",
    "queues": f"{PREFIX}:queues",
    "wip": f"{PREFIX}:wip:",
    "finished": f"{PREFIX}:finished:",
    "failed": f"{PREFIX}:failed:",
    "canceled": f"{PREFIX}:canceled:",
    "scheduled": f"{PREFIX}:scheduled:",
    "deferred": f"{PREFIX}:deferred:",
    "execution": f"{PREFIX}:execution:",
    "executions": f"{PREFIX}:executions:",
    "worker": f"{PREFIX}:worker:",
    "workers": f"{PREFIX}:workers",
    "workers_of": f"{PREFIX}:workers:",
    "results": f"{PREFIX}:results:",
    "suspended": f"{PREFIX}:suspended",
    "commands": f"{PREFIX}:pubsub:",
    "limited": f"{PREFIX}:rl-keys",
    "limit": f"{PREFIX}:rl:",
    # ours
    "leases": f"{OURS}leases:",
    "retries": f"{OURS}retries:",
    "ended": f"{OURS}ended:",
    "bounced": f"{OURS}bounced:",
    "aside": f"{OURS}aside",
    "looker": f"{OURS}looker:",
    "turn": f"{OURS}turn:",
    "swept": f"{OURS}queues",  # of 0.2 and before: read, and emptied
    "spent": f"{OURS}spent:",
    "deadlines": f"{OURS}deadlines:",
    "suspects": f"{OURS}suspects:",
    "isolating": f"{OURS}isolating",
    "beats": f"{OURS}beats",
    "unready": f"{OURS}unready",
    "unable": f"{OURS}unable",
    "incarnation": f"{OURS}incarnation:",
    "held": f"{OURS}held:",
    "supervisors": f"{OURS}supervisors",
    "supervisor": f"{OURS}supervisor:",
    "output": f"{OURS}output:",
    "checkpoint": f"{OURS}checkpoint:",
    "chunk": f"{OURS}chunk:",
    "checkpoints": f"{OURS}checkpoints",
    "history": f"{OURS}history:",
    "bell": f"{OURS}bell:",
    "replies": f"{OURS}replies:",
    "unfit": f"{OURS}unfit",
    "fingerprints": f"{OURS}fingerprints",
    "parents": f"{OURS}parents",
    "notices": f"{OURS}notices",
    "notice": f"{OURS}notice:",
    "counters": f"{OURS}counters",
    "pulse": f"{OURS}pulse",
    "mode": f"{OURS}mode",
    "schema": f"{OURS}schema",
}


def key(name: str, identifier: str = "") -> str:
    """The full key: ``key("job", "42")`` is ``rq:job:42``."""
    return NAMES[name] + identifier


Priority = Literal["high", "normal", "low"]
PRIORITIES: Final = ("high", "normal", "low")
_SUFFIXES = ("-high", "-low")

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,200}")
_LONGEST_QUEUE = 500
_TASK = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def check_id(identifier: object) -> str:
    """Return the id; raise :class:`InvalidRequest` for one that RQ would refuse."""
    if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier):
        raise InvalidRequest(
            f"a request id has 1 to 200 letters, digits, '_' or '-', but this one is {_shown(identifier)}", "id"
        )
    return identifier


def id_of_key(idempotency_key: object) -> str:
    """The id of the request with an idempotency key: ``i`` and 39 digits of the key's SHA-256.

    Raises :class:`InvalidRequest` for what is no key.
    """
    if not isinstance(idempotency_key, str) or not 1 <= len(idempotency_key) <= 1000:
        raise InvalidRequest(
            f"an idempotency_key must be a string of 1 to 1000 characters, not {_shown(idempotency_key)}",
            "idempotency_key",
        )
    return "i" + hashlib.sha256(idempotency_key.encode(errors="surrogatepass")).hexdigest()[:39]


def check_queue(name: object) -> str:
    """Return the queue's name: any text, as in RQ. Raises :class:`InvalidRequest` for what is none, or too long."""
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_QUEUE or not _is_text(name):
        raise InvalidRequest(
            f"a queue name must be a string of 1 to {_LONGEST_QUEUE} characters, but this one is {_shown(name)}",
            "queue",
        )
    return name


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed(queues: Iterable[str]) -> str:
    """Queues as the text that a worker's record holds: with commas between, and ``%2C`` for a comma of a name."""
    return ",".join(queue.replace("%", "%25").replace(",", "%2C") for queue in queues)


def unlisted(text: str) -> list[str]:
    """The queues of such a text."""
    return [queue.replace("%2C", ",").replace("%25", "%") for queue in text.split(",")]


@lru_cache(maxsize=16)
def crowd(queues: tuple[str, ...]) -> str:
    """A short name for all workers that serve the same queues, in whatever order."""
    return hashlib.sha1(listed(sorted(queues)).encode(errors="surrogatepass"), usedforsecurity=False).hexdigest()


def with_priority(queue: str, priority: object) -> str:
    """The queue in which requests of a priority wait: ``<queue>-high``, ``<queue>``, ``<queue>-low``.

    Raises :class:`InvalidRequest` for another word, and for a queue that is one of a priority already.
    """
    if priority not in PRIORITIES:
        raise InvalidRequest(f"priority is 'high', 'normal' or 'low', not {_shown(priority)}", "priority")
    if priority == "normal":
        return queue
    if queue.endswith(_SUFFIXES):
        raise InvalidRequest(f"the queue {queue} already names a priority; leave out the priority", "priority")
    return check_queue(f"{queue}-{priority}")


def priority_of(queue: str) -> str:
    """The priority whose requests wait in a queue, by its name."""
    return next((suffix[1:] for suffix in _SUFFIXES if queue.endswith(suffix)), "normal")


def served(queue: str) -> list[str]:
    """The queues that are served for a name, first served first: those of all priorities.

    A name that is one of a priority already (``gpu-high``) stands for itself.
    """
    return [queue] if queue.endswith(_SUFFIXES) else [f"{queue}-high", queue, f"{queue}-low"]


def all_served(queues: Iterable[str]) -> set[str]:
    """Every queue that a worker serves which was started for these."""
    return {name for queue in queues for name in served(queue)}


def check_task(path: object) -> str:
    """Return the dotted path of a task; raise :class:`UsageError` for what cannot be one."""
    if not isinstance(path, str) or len(path) > 500 or not _TASK.fullmatch(path):
        raise UsageError(f"a task must be a dotted path, such as app.tasks.count, not {_shown(path)}")
    return path


def kind_of_key(name: str) -> tuple[str, str] | None:
    """Which of the known keys this is, and its id: ``("checkpoint", "42")``; ``None`` if it is none of them."""
    best = max(
        (
            stem
            for stem, prefix in NAMES.items()
            if name == prefix or (prefix.endswith(":") and name.startswith(prefix))
        ),
        key=lambda stem: len(NAMES[stem]),
        default=None,
    )
    return None if best is None else (best, name.removeprefix(NAMES[best]))
