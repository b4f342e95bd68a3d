"""Settings: one frozen dataclass, one spelling rule, one screen of defaults.

Field ``heartbeat_timeout`` ↔ environment ``PERDURE_HEARTBEAT_TIMEOUT`` ↔ flag
``--heartbeat-timeout``. All durations are seconds. The environment is read once, by
:meth:`Settings.from_environment`, never at import.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints
from urllib.parse import urlsplit, urlunsplit

from .errors import SettingsError

PREFIX = "PERDURE_"

SECRETS = frozenset({"PERDURE_WEB_TOKEN"})
"""Variables with the prefix that are no settings: settings are printed, and handed on to every process of a pool."""

LEASE = 1.5
"""A lease lasts so many step timeouts (``lua/lib/lease/lease.lua`` says the same)."""

# Kubernetes sets these for every service of the namespace, also for one that is called "perdure".
_KUBERNETES = re.compile(r"(.*_)?SERVICE_(HOST|PORT(_.*)?)|(.*_)?PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. Each field's line says what it rules."""

    redis_url: str = field(
        default="", metadata={"help": "where Redis is; else RQ_REDIS_URL, else a running embedded server"}
    )
    tasks: tuple[str, ...] = field(
        default=(), metadata={"help": "dotted paths, comma-separated, that a worker loads before its first claim"}
    )
    heartbeat: float = field(default=1.0, metadata={"help": "seconds between heartbeats"})
    heartbeat_timeout: float = field(
        default=5.0, metadata={"help": "seconds without a heartbeat after which a worker counts as dead"}
    )
    step_timeout: float = field(
        default=20.0, metadata={"help": "seconds one step may take; a lease lasts 1.5 times as long"}
    )
    load_timeout: float = field(default=600.0, metadata={"help": "seconds that loading a task's model may take"})
    missing_timeout: float = field(
        default=60.0,
        metadata={"help": "seconds after which requests end whose module or task no worker of their queue has"},
    )
    unloadable_timeout: float = field(
        default=900.0,
        metadata={"help": "the same for a task that no worker of their queue can load: weights, a licence, a device"},
    )
    checkpoint_interval: float = field(
        default=0.1, metadata={"help": "seconds between checkpoints of a running request"}
    )
    checkpoint_ttl: float = field(
        default=3600.0, metadata={"help": "seconds after its last write at which a checkpoint becomes stale"}
    )
    max_retries: int = field(default=3, metadata={"help": "retries after the first attempt"})
    retry_base: float = field(
        default=1.0, metadata={"help": "seconds before the first retry; doubles with each further one"}
    )
    retry_cap: float = field(default=30.0, metadata={"help": "longest delay before a retry, in seconds"})
    max_crashes: int = field(
        default=3, metadata={"help": "crashes of a request alone on its worker after which it is a dead letter"}
    )
    max_crashes_total: int = field(
        default=10, metadata={"help": "crashes in total after which a request is a dead letter"}
    )
    max_executions: int = field(
        default=40, metadata={"help": "executions without progress after which a request is a dead letter"}
    )
    reap_interval: float = field(default=0.5, metadata={"help": "seconds between two sweeps of the reaper"})
    drain_timeout: float = field(
        default=10.0, metadata={"help": "seconds a stopping worker waits for the running step"}
    )
    response_timeout: float = field(
        default=0.0, metadata={"help": "seconds that result() and stream() wait by default; 0: until the request ends"}
    )
    result_ttl: float = field(
        default=86400.0, metadata={"help": "seconds that a finished request and its outputs are kept"}
    )
    failure_ttl: float = field(default=604800.0, metadata={"help": "seconds that a failed request is kept"})
    queue_limit: int = field(
        default=0, metadata={"help": "most requests that submit lets wait in a queue; 0 is no limit"}
    )
    capacity: int = field(
        default=0,
        metadata={"help": "expected workers; below half of it the pool is degraded; 0 takes the most of the last hour"},
    )
    max_payload: int = field(default=8 * 1024 * 1024, metadata={"help": "most bytes of a payload or an output, packed"})
    max_state: int = field(default=64 * 1024 * 1024, metadata={"help": "most bytes of a state, packed"})
    compression: str = field(
        default="none", metadata={"help": "none or zstd: how states are compressed; zstd needs the extra perdure[zstd]"}
    )
    engine: str = field(
        default="builtin", metadata={"help": "what computes in text generation: builtin, transformers or vllm"}
    )
    engine_args: tuple[str, ...] = field(
        default=(), metadata={"help": "name=value, comma-separated: arguments of the engine itself (vLLM's EngineArgs)"}
    )
    model: str = field(
        default="smollm2", metadata={"help": "smollm2, tiny, or a path to a GGUF file or a model folder"}
    )
    model_path: str = field(
        default="",
        metadata={"help": "folder in which package weights lie (default: .models beside the current folder)"},
    )
    torch_index: str = field(default="", metadata={"help": "package index for torch; read by scripts/setup only"})
    python: str = field(
        default="", metadata={"help": "interpreter for the virtual environment; read by scripts/setup only"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    slots: int = field(default=8, metadata={"help": "requests that one worker runs at once (text generation)"})
    threads: int = field(default=0, metadata={"help": "torch threads; 0 keeps torch's default"})
    ranks: int = field(
        default=1, metadata={"help": "processes that share one model in text generation; they must divide its heads"}
    )
    collective_timeout: float = field(
        default=0.0,
        metadata={"help": "seconds one collective of a group may take; 0 is 30, but at most 3/4 of the step timeout"},
    )
    kv_memory: int = field(
        default=0,
        metadata={
            "help": "bytes for keys and values in text generation; 0 is what a CUDA device has free, or no limit"
        },
    )
    spare: bool = field(
        default=False, metadata={"help": "1 loads the tasks and then claims nothing until SIGUSR1 says so"}
    )
    reload: bool = field(
        default=False,
        metadata={"help": "1 has a worker leave when code that it has loaded was edited, to be started again"},
    )
    log_format: str = field(
        default="text", metadata={"help": "text, json (one object a line), or auto: text on a terminal, JSON elsewhere"}
    )
    trace: str = field(default="", metadata={"help": "folder into which workers append one line per forward pass"})
    resume: bool = field(
        default=True,
        metadata={"help": "0 starts every request from zero; what resuming is worth is measured against it"},
    )
    health_port: int = field(
        default=0,
        metadata={
            "help": "port of /livez and /readyz, served beside each worker; the next free one if it is taken; 0 is none"
        },
    )
    health_bind: str = field(default="127.0.0.1", metadata={"help": "address on which health is served"})
    health_interval: float = field(default=5.0, metadata={"help": "seconds between two looks of each health check"})
    health_folder: str = field(
        default="", metadata={"help": "folder whose disk is checked; else that of the trace, else the temporary one"}
    )
    untested_rq: bool = field(
        default=False, metadata={"help": "1 runs with an RQ release that this one was not tested with"}
    )

    _POSITIVE: ClassVar[tuple[str, ...]] = (
        "heartbeat", "heartbeat_timeout", "step_timeout", "load_timeout", "missing_timeout", "unloadable_timeout",
        "checkpoint_interval", "checkpoint_ttl",
        "retry_base", "retry_cap", "reap_interval", "result_ttl", "failure_ttl", "max_crashes",
        "max_crashes_total", "max_executions", "max_payload", "max_state", "slots", "ranks", "health_interval",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingsError(f"{variable(item.name)} must be a finite number, not {value}")
            if isinstance(value, int | float) and value < 0:
                raise SettingsError(f"{variable(item.name)} must not be negative, but is {value}")
        for name in self._POSITIVE:
            if getattr(self, name) == 0:
                raise SettingsError(f"{variable(name)} must be more than 0")
        if self.heartbeat_timeout < 2 * self.heartbeat:
            raise SettingsError(
                f"PERDURE_HEARTBEAT_TIMEOUT ({self.heartbeat_timeout:g}) must be at least twice PERDURE_HEARTBEAT "
                f"({self.heartbeat:g}); otherwise one late heartbeat would lose a healthy worker"
            )
        if self.retry_cap < self.retry_base:
            raise SettingsError(
                f"PERDURE_RETRY_CAP ({self.retry_cap:g}) must not be less than PERDURE_RETRY_BASE ({self.retry_base:g})"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise SettingsError(f"PERDURE_DTYPE must be float32 or bfloat16, not {self.dtype!r}")

        if self.health_port > 65535:
            raise SettingsError(f"PERDURE_HEALTH_PORT must be at most 65535, but is {self.health_port}")
        if self.log_format not in ("text", "json", "auto"):
            raise SettingsError(f"PERDURE_LOG_FORMAT must be text, json or auto, not {self.log_format!r}")

        if self.compression not in ("none", "zstd"):
            raise SettingsError(f"PERDURE_COMPRESSION must be none or zstd, not {self.compression!r}")

    @property
    def lease(self) -> float:
        """Seconds that a lease lasts: one and a half step timeouts."""
        return LEASE * self.step_timeout

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; ``None`` leaves a field as it is (as an unset flag does)."""
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, *, strict: bool = False) -> Self:
        """Read ``PERDURE_*``; an unknown name is a warning, or with ``strict`` a :class:`SettingsError`.

        Raises :class:`SettingsError` for a value that cannot be read, naming the variable.
        """
        environment = os.environ if environment is None else environment
        known = {variable(item.name): item.name for item in fields(cls)}
        kinds = get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, text in environment.items():
            if not name.startswith(PREFIX) or name in SECRETS or _from_kubernetes(name, text, known):
                continue
            if name not in known:
                message = _unknown(name, list(known))
                if strict:
                    raise SettingsError(message)
                warnings.warn(message, stacklevel=2)
                continue
            values[known[name]] = _parse(name, text, kinds[known[name]])
        if "redis_url" not in values and environment.get("RQ_REDIS_URL"):
            values["redis_url"] = environment["RQ_REDIS_URL"]
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """The variables that give another process these settings: only what differs from the defaults."""
        result = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                text = ",".join(value) if isinstance(value, tuple) else str(int(value)) if value is True else str(value)
                result[variable(item.name)] = text
        return result


def variable(name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + name.upper()


def _from_kubernetes(name: str, text: str, known: Mapping[str, str]) -> bool:
    # A service called "perdure-health" sets PERDURE_HEALTH_PORT too, to a URL.
    return bool(_KUBERNETES.fullmatch(name.removeprefix(PREFIX))) and (name not in known or "://" in text)


def _unknown(name: str, known: list[str]) -> str:
    # Without the prefix that all have in common, or everything would be near to everything.
    near = difflib.get_close_matches(name.removeprefix(PREFIX), [item.removeprefix(PREFIX) for item in known], n=1)
    hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
    return f"{name} is not a setting of Perdure{hint}"


def _parse(name: str, text: str, kind: Any) -> Any:
    text = text.strip()
    asked = {int: "a whole number", bool: "yes or no"}.get(kind, "a number of seconds")
    try:
        if kind is bool:
            if text.lower() not in ("", "0", "1", "true", "false", "yes", "no"):
                raise ValueError
            return text.lower() in ("1", "true", "yes")
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except ValueError:
        raise SettingsError(f"{name} must be {asked}, not {text!r}") from None
    if kind is str:
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())


def redact(url: str) -> str:
    """A Redis URL without its password, fit for messages and logs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(unreadable URL)"
    query = re.sub(r"(?i)(password=)[^&]*", r"\1***", parts.query)
    netloc = parts.netloc
    try:
        unescaped = parts.scheme != "unix" and (
            "@" in parts.path + query or bool(parts.fragment) or (parts.port or 0) < 0
        )
    except ValueError:
        unescaped = True
    if unescaped:
        # A "/", "#" or "?" in a password ends it too early: what follows would be shown.
        return f"{parts.scheme}://(unreadable URL)"
    if "@" in netloc:
        credentials, _, host = netloc.rpartition("@")
        user, colon, _ = credentials.partition(":")
        netloc = f"{user}:***@{host}" if colon else f"{user}@{host}"
    if parts.scheme == "unix":
        return f"unix://{netloc}{parts.path}" + (f"?{query}" if query else "")
    return urlunsplit((parts.scheme, netloc, parts.path, query, ""))


def default_model_path(settings: Settings) -> Path:
    """The folder that holds package weights: the setting, else ``.models`` beside the current folder."""
    return Path(settings.model_path) if settings.model_path else Path.cwd() / ".models"
