"""The composition is valid, says what Perdure needs, and its own commands make a pool that drains when
it is stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis

from perdure.protocol.connection import connect
from perdure.protocol.queries.deployment import look_at
from perdure.protocol.settings import Settings
from perdure.workers.pool.draining import LEAVE
from tests.kit.deploy.deployment import SCHEMAS, compose, free_port, host, namespace, passes, seconds, understood
from tests.kit.lab import eventually, send
from tests.kit.places import ROOT

SPECIFICATION: dict[str, Any] = json.loads((SCHEMAS / "compose-spec.json").read_text("utf-8"))
OURS = {name: service for name, service in compose()["services"].items() if "perdure" in service["image"]}
WORKERS = {name: service for name, service in OURS.items() if name.startswith("worker")}


def said(composition: Any) -> list[str]:
    """What the specification's schema objects to."""
    return [error.message for error in jsonschema.Draft202012Validator(SPECIFICATION).iter_errors(composition)]


def test_the_composition_fits_its_specification():
    """As it is written, and with the defaults of its variables."""
    jsonschema.Draft202012Validator.check_schema(SPECIFICATION)
    assert said(compose()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"stop_grace": "60s"},
        {"deploy": {"replicas": [2]}},
        {"healthcheck": {"tests": ["CMD", "true"]}},
        {"depends_on": {"redis": {"condition": "service_well"}}},
        {"deploy": {"resources": {"reservations": {"devices": [{"driver": "nvidia"}]}}}},
    ],
)
def test_the_specification_refuses_what_is_misspelt(change: dict[str, Any]):
    """So that a pass means something."""
    wrong = compose()
    wrong["services"]["worker"] |= change
    assert said(wrong)


def test_what_is_named_is_there():
    """Volumes, services that others wait for, files that are mounted, and what the image is made from."""
    whole = compose()
    for name, service in whole["services"].items():
        waits = service.get("depends_on", {})
        assert set(waits) <= set(whole["services"]), name
        for other, how in waits.items() if isinstance(waits, dict) else ():
            assert how["condition"] != "service_healthy" or "healthcheck" in whole["services"][other], name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in whole["volumes"], volume
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    text = (ROOT / "Dockerfile").read_text("utf-8")
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for source in line.split()
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_redis_keeps_what_it_was_given(tmp_path: Path, server_binary: Path, monkeypatch: pytest.MonkeyPatch):
    """Its very options leave nothing for ``doctor`` to say; its check says no to a server that refuses."""
    service = compose(REDIS_MEMORY="100mb")["services"]["redis"]
    with host(tmp_path, server_binary) as here:
        here.serve(service["command"])
        with connect(here.url) as connection:
            assert look_at(connection) == []
            set_up: Any = connection.config_get("*")
            if shutil.which("redis-cli") or shutil.which("valkey-cli"):
                kind, test = service["healthcheck"]["test"]
                assert kind == "CMD-SHELL"
                asked = ["sh", "-c", test.replace("ping", f"-p {here.port} ping")]
                assert passes(asked)
                connection.config_set("requirepass", "x")  # an error as an answer, and 0 as the exit status
                assert not passes(asked)
        assert (set_up["maxmemory-policy"], set_up["maxmemory"]) == ("noeviction", str(100 * 2**20))
        assert (set_up["stream-node-max-bytes"], set_up["hash-max-listpack-value"]) == ("512", "1024")
        assert (set_up["appendonly"], set_up["appendfsync"], set_up["save"]) == ("yes", "everysec", "")


def test_who_runs_by_default_and_who_on_request():
    """Two reapers and CPU workers, which a variable turns off; one service for each device."""
    services = compose()["services"]
    default = {name for name, service in services.items() if not service.get("profiles")}
    assert default == {"redis", "reaper", "worker"}
    assert services["reaper"]["deploy"]["replicas"] == 2
    assert services["worker"]["deploy"]["replicas"] == "2"
    assert compose(CPU_WORKERS="0")["services"]["worker"]["deploy"]["replicas"] == "0"
    devices = []
    for name, service in services.items():
        if "gpu" in service.get("profiles", []):
            (device,) = service["deploy"]["resources"]["reservations"]["devices"]
            devices += device["device_ids"]
            assert name == f"worker-gpu-{device['device_ids'][0]}"
            assert service["profiles"] == ["gpu", f"gpu-{device['device_ids'][0]}"]
            assert service["environment"]["PERDURE_DEVICE"] == "cuda"
    assert devices == ["0", "1"]


@pytest.mark.parametrize("name", OURS)
def test_a_service_of_ours_starts_a_command_that_there_is(name: str):
    """With settings that are known, after Redis, and again whenever it has ended."""
    service = OURS[name]
    assert understood(service["command"])
    if "up" in service["command"]:
        assert not understood([*service["command"], "--worker-count"]), "a pass means something"
    Settings.from_environment(service["environment"])
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert service["restart"] == "unless-stopped"
    assert service["build"]["context"] == "."


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_the_time_that_it_needs(name: str):
    """To load before it is called unhealthy, and to drain before it is killed."""
    service, settings = WORKERS[name], Settings()
    assert seconds(service["stop_grace_period"]) > settings.drain_timeout + 2 * LEAVE + 5
    assert seconds(service["healthcheck"]["start_period"]) >= settings.load_timeout + 60


def test_the_image_is_not_roots_and_has_an_init():
    """And holds no compiler's leftovers: it is made in two stages."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    first, last = re.split(r"^FROM .+$", text, flags=re.MULTILINE)[1:]
    assert "pip install" in first
    assert "pip install" not in last
    assert re.search(r"^USER \d+$", last, re.MULTILINE)
    assert 'ENTRYPOINT ["tini", "--"]' in last
    extras = set(re.search(r'"\.\[(.+)\]"', first)[1].split(","))  # type: ignore[index]
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


@pytest.mark.slow
def test_the_commands_make_a_pool_that_survives_and_drains(tmp_path: Path, server_binary: Path):
    """A worker that is killed is replaced in its container; SIGTERM hands its requests on within the grace period.

    Only the image, Redis' address, the health port and the tasks are others.
    """
    services = compose(CPU_WORKERS="1")["services"]
    with host(tmp_path, server_binary) as here:
        here.serve(services["redis"]["command"])
        reapers = [
            here.start("reaper", services["reaper"]["command"], {"PERDURE_REDIS_URL": here.url})
            for _ in range(services["reaper"]["deploy"]["replicas"])
        ]
        worker, port = services["worker"], free_port()
        environment = {name: str(value) for name, value in worker["environment"].items()} | {
            "PERDURE_REDIS_URL": here.url,
            "PERDURE_TASKS": "lab_tasks.count",
            "PERDURE_HEALTH_PORT": str(port),
        }
        kind, *check = worker["healthcheck"]["test"]
        assert kind == "CMD"
        check = [word.replace("9100", str(port)) for word in check]
        assert not passes(check)
        with connect(here.url) as connection:
            lab = here.lab(connection)
            first = here.start("worker", worker["command"], environment)
            one = lab.submit("count", {"n": 5000, "sleep": 0.02})
            lab.moved(one, 3)
            eventually(lambda: passes(check))

            (victim,) = first.workers()
            send(victim, signal.SIGKILL)
            eventually(lambda: ("redelivered", "WORKER_LOST") in lab.events(one))
            assert first.process.poll() is None, "the container lives on"
            lab.moved(one, len(lab.outputs(one)) + 3)
            eventually(lambda: passes(check))

            grace = seconds(worker["stop_grace_period"])
            assert first.stop(grace) < grace
            assert first.process.returncode == 0
            record = lab.record(one)
            assert (record.status, record.attempt) == ("queued", 0)
            assert lab.nothing_held()

            again = here.start("worker", worker["command"], environment)
            done = len(lab.outputs(one))
            number = lab.moved(one, done + 3)
            assert lab.outputs(one)[:number] == list(range(number))
            again.stop(grace)
        for reaper in reapers:
            assert reaper.stop(seconds(services["reaper"]["stop_grace_period"])) < 10
            assert "Traceback" not in reaper.log


@pytest.mark.slow
@pytest.mark.skipif(not namespace(), reason="needs the right to make PID namespaces")
def test_a_hang_is_seen_and_accused_once_in_a_container(tmp_path: Path, server_binary: Path, redis_url: str):
    """The worker is not process 1 there, so its guardian can end it, and outlives it to say why."""
    with host(tmp_path, server_binary) as here, redis.Redis.from_url(redis_url) as connection:
        lab = here.lab(connection)
        environment = {"PERDURE_REDIS_URL": redis_url, "PERDURE_CHECKPOINT_INTERVAL": "0.02"}
        pool = here.start("worker", compose()["services"]["worker"]["command"], environment)
        one = lab.submit("hang", {"folder": str(tmp_path), "seconds": 600})
        record = lab.ended(one)
        assert (record.status, lab.events(one)) == ("finished", [("suspected", "HANG"), ("retry", "HANG")])
        assert pool.process.poll() is None
        pool.stop(60)
