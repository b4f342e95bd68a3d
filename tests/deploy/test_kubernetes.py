"""The manifests fit Kubernetes' schemas and each other, and their commands, probes and hooks work on real processes.

KEDA's definition is in no package; the part of it that is used here is written down by hand.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from perdure.protocol.connection import connect
from perdure.protocol.queries.deployment import look_at
from perdure.protocol.settings import Settings
from perdure.workers.pool.draining import LEAVE
from tests.kit.deploy.deployment import SCHEMAS, SCRIPTS, compose, free_port, host, namespace, understood
from tests.kit.deploy.kubernetes import container, documents, find
from tests.kit.lab import eventually

KUBERNETES: dict[str, Any] = json.loads((SCHEMAS / "kubernetes.json").read_text("utf-8"))

COUNT = {"type": "integer", "minimum": 1}
SCALED_OBJECT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "keda.sh/v1alpha1"},
        "kind": {"const": "ScaledObject"},
        "metadata": {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["scaleTargetRef", "triggers"],
            "properties": {
                "scaleTargetRef": {
                    "type": "object", "additionalProperties": False, "required": ["name"],
                    "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name")},
                },
                "minReplicaCount": {"type": "integer", "minimum": 0},
                "maxReplicaCount": COUNT,
                "pollingInterval": COUNT,
                "cooldownPeriod": COUNT,
                "fallback": {
                    "type": "object", "additionalProperties": False, "required": ["failureThreshold", "replicas"],
                    "properties": {"failureThreshold": COUNT, "replicas": COUNT},
                },
                "advanced": {
                    "type": "object", "additionalProperties": False,
                    "properties": {
                        "horizontalPodAutoscalerConfig": {
                            "type": "object", "additionalProperties": False,
                            "properties": {
                                "behavior": {
                                    "type": "object", "additionalProperties": False,
                                    "properties": {
                                        "scaleDown": {
                                            "type": "object", "additionalProperties": False,
                                            "properties": {
                                                "stabilizationWindowSeconds": {"type": "integer", "maximum": 3600},
                                                "policies": {
                                                    "type": "array",
                                                    "items": {
                                                        "type": "object", "additionalProperties": False,
                                                        "required": ["type", "value", "periodSeconds"],
                                                        "properties": {
                                                            "type": {"enum": ["Pods", "Percent"]},
                                                            "value": COUNT,
                                                            "periodSeconds": {**COUNT, "maximum": 1800},
                                                        },
                                                    },
                                                },
                                            },
                                        }
                                    },
                                }
                            },
                        }
                    },
                },
                "triggers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object", "additionalProperties": False, "required": ["type", "metadata"],
                        "properties": {
                            "type": {"const": "prometheus"},
                            # Texts all of them: KEDA refuses numbers.
                            "metadata": {
                                "type": "object", "required": ["serverAddress", "query", "threshold"],
                                "additionalProperties": False,
                                "properties": {
                                    "serverAddress": {"type": "string", "pattern": "^https?://"},
                                    "query": {"type": "string"},
                                    "threshold": {"type": "string", "pattern": "^[0-9.]+$"},
                                    "ignoreNullValues": {"enum": ["true", "false"]},
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def said(document: dict[str, Any]) -> list[str]:
    """What the schema of its kind objects to."""
    kind = f"{document['apiVersion']} {document['kind']}"
    head = SCALED_OBJECT if document["kind"] == "ScaledObject" else {"$ref": f"#/$defs/{KUBERNETES['kinds'][kind]}"}
    schema = {**head, "$schema": KUBERNETES["$schema"], "$defs": KUBERNETES["$defs"]}
    return [
        f"{list(e.absolute_path)}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(document)
    ]


DEPLOYMENTS = [item for item in documents() if item["kind"] in ("Deployment", "StatefulSet")]
OURS = [item for item in DEPLOYMENTS if "perdure:" in container(item)["image"]]
WORKERS = [item for item in OURS if "worker" in item["metadata"]["name"]]


def name_of(item: dict[str, Any]) -> str:
    return f"{item['kind']}-{item['metadata']['name']}"


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_a_manifest_fits_the_schema_of_its_kind(document: dict[str, Any]):
    assert said(document) == []


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "perdure-worker", ("spec", "replica"), 2),
        ("Deployment", "perdure-worker", ("spec", "template", "spec", "terminationGracePeriod"), 60),
        ("Deployment", "perdure-worker", ("spec", "template", "spec", "containers", 0, "livenessProbe", "http"), {}),
        ("Deployment", "perdure-worker", ("spec", "template", "spec", "containers", 0, "args"), "perdure up"),
        ("PodDisruptionBudget", "perdure-worker", ("spec", "maxUnavailable"), [1]),
        ("ScaledObject", "perdure-worker", ("spec", "minReplicas"), 1),
        ("ScaledObject", "perdure-worker", ("spec", "triggers", 0, "metadata", "threshold"), 8),
    ],
)
def test_the_schemas_refuse_what_is_misspelt(kind: str, name: str, path: tuple[Any, ...], value: Any):
    """So that a pass means something."""
    document = copy.deepcopy(find(kind, name))
    at: Any = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert said(document)


def test_what_is_named_is_there():
    """Selectors find their pods; config maps, secrets, ports and scaled deployments exist."""
    for item in DEPLOYMENTS:
        labels = item["spec"]["template"]["metadata"]["labels"]
        assert item["spec"]["selector"]["matchLabels"] == labels, "only its own pods"
        only = container(item)
        ports = {port["name"] for port in only.get("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            how = only.get(probe, {})
            for ask in ("httpGet", "tcpSocket"):
                assert ask not in how or how[ask]["port"] in ports
        for source in only.get("envFrom", []):
            assert find("ConfigMap", source["configMapRef"]["name"])
        for variable in only.get("env", []):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in find("Secret", reference["name"])["stringData"]
    pods = [item["spec"]["template"]["metadata"]["labels"] for item in DEPLOYMENTS]
    assert len({json.dumps(labels, sort_keys=True) for labels in pods}) == len(pods)
    for item in documents():
        if item["kind"] in ("PodDisruptionBudget", "Service", "NetworkPolicy"):
            spec = item["spec"]
            selector = spec.get("podSelector") or spec["selector"]
            assert selector.get("matchLabels", selector) in pods, name_of(item)
    url = find("Secret", "perdure-redis")["stringData"]["url"]
    assert url == f"redis://{find('Service', 'perdure-redis')['metadata']['name']}:6379/0"


@pytest.mark.parametrize("item", OURS, ids=name_of)
def test_a_pod_of_ours_runs_a_command_that_there_is(item: dict[str, Any]):
    """As nobody in particular, behind the image's init, with settings that are known."""
    only, pod = container(item), item["spec"]["template"]["spec"]
    assert "command" not in only, "it would replace the image's tini"
    assert understood(only["args"])
    given = find("ConfigMap", "perdure")["data"] | {v["name"]: v["value"] for v in only["env"] if "value" in v}
    Settings.from_environment(given)
    assert pod["securityContext"]["runAsNonRoot"]
    assert only["securityContext"]["allowPrivilegeEscalation"] is False
    assert only["image"] in {service["image"] for service in compose()["services"].values()}


@pytest.mark.parametrize("item", WORKERS, ids=name_of)
def test_a_worker_pod_is_asked_and_ended_as_it_should_be(item: dict[str, Any]):
    """No restart because Redis is away, time to drain, and one at a time."""
    only, pod, settings = container(item), item["spec"]["template"]["spec"], Settings()
    assert only["startupProbe"]["httpGet"]["path"] == only["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert only["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert pod["terminationGracePeriodSeconds"] > settings.drain_timeout + 2 * LEAVE + 5
    assert item["spec"]["progressDeadlineSeconds"] > settings.load_timeout + 60
    assert find("PodDisruptionBudget", item["metadata"]["name"])["spec"]["maxUnavailable"] == 1


def test_workers_with_and_without_a_gpu_differ_in_nothing_else():
    plain, gpu = (copy.deepcopy(find("Deployment", f"perdure-worker{suffix}")) for suffix in ("", "-gpu"))
    assert container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container(gpu)["args"] == ["perdure", "up", "gpu", "--gpus", "all"]
    for item in (plain, gpu):
        item["spec"].pop("strategy")
        pod = item["spec"]["template"]["spec"]
        pod.pop("tolerations", None)
        (only,) = pod["containers"]
        for name in ("args", "image", "resources"):
            only.pop(name)
        only["env"] = [variable for variable in only["env"] if variable["name"] != "PERDURE_DEVICE"]
    text = json.dumps(gpu).replace("perdure-worker-gpu", "perdure-worker").replace('"worker-gpu"', '"worker"')
    assert json.loads(text) == plain


def test_scaling_down_is_no_degradation():
    """The workers that must always be there are those that KEDA always leaves; it follows waiting and
    running requests.
    """
    scaled = find("ScaledObject", "perdure-worker")["spec"]
    assert find("Deployment", scaled["scaleTargetRef"]["name"])
    assert find("ConfigMap", "perdure")["data"]["PERDURE_CAPACITY"] == str(scaled["minReplicaCount"])
    (trigger,) = scaled["triggers"]
    assert "perdure_requests_waiting" in trigger["metadata"]["query"]
    assert "perdure_requests_running" in trigger["metadata"]["query"]
    assert trigger["metadata"]["threshold"] == str(Settings().slots)


def test_redis_is_the_compositions(tmp_path: Path, server_binary: Path):
    """The same options, a folder that is a volume, and nothing for ``doctor`` to say."""
    only = container(find("StatefulSet", "perdure-redis"))
    options = list(only["args"])
    folder = options[options.index("--dir") + 1]
    assert folder in [mount["mountPath"] for mount in only["volumeMounts"]]
    composed = compose()["services"]["redis"]
    assert [*composed["command"], "--dir", folder] == options
    assert only["readinessProbe"]["exec"]["command"][-1] == composed["healthcheck"]["test"][-1]
    with host(tmp_path, server_binary) as here:
        here.serve([str(tmp_path) if option == folder else option for option in options])
        with connect(here.url) as connection:
            assert look_at(connection) == []


def probe(port: int, path: str) -> int:
    """What a kubelet sees; 0 when nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.skipif(not namespace() or not shutil.which("nsenter"), reason="needs the right to make PID namespaces")
def test_a_pod_is_probed_drained_and_ended(tmp_path: Path, server_binary: Path):
    """The worker's command, probes and hook: the hook drains it before Kubernetes' own SIGTERM, within the grace
    period.
    """
    deployment = find("Deployment", "perdure-worker")
    only, port = container(deployment), free_port()
    with host(tmp_path, server_binary) as here:
        here.serve(container(find("StatefulSet", "perdure-redis"))["args"][:-2])
        here.start("reaper", container(find("Deployment", "perdure-reaper"))["args"], {"PERDURE_REDIS_URL": here.url})
        given = find("ConfigMap", "perdure")["data"] | {v["name"]: v["value"] for v in only["env"] if "value" in v}
        given |= {
            "PERDURE_REDIS_URL": here.url, "PERDURE_TASKS": "lab_tasks.count", "PERDURE_HEALTH_PORT": str(port),
            "PERDURE_HEALTH_BIND": "127.0.0.1",
        }  # fmt: skip
        with connect(here.url) as connection:
            lab = here.lab(connection)
            pod = here.start("worker", only["args"], given)
            eventually(lambda: probe(port, only["startupProbe"]["httpGet"]["path"]) == 200)
            eventually(lambda: probe(port, only["readinessProbe"]["httpGet"]["path"]) == 200)
            one = lab.submit("count", {"n": 5000, "sleep": 0.02})
            lab.moved(one, 3)

            hook = [word.replace("9100", str(port)) for word in only["lifecycle"]["preStop"]["exec"]["command"]]
            grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
            path = f"{SCRIPTS}:{os.environ['PATH']}"
            subprocess.run(
                ["nsenter", "--target", str(pod.main), "--pid", "--mount", *hook],
                check=False, timeout=grace, env={**os.environ, "PATH": path},
            )  # fmt: skip
            record = lab.record(one)
            assert (record.status, record.attempt, lab.events(one)) == ("queued", 0, [("released", "")])
            assert lab.nothing_held()
            if pod.process.poll() is None:
                pod.stop(grace)
            pod.process.wait(grace)
            assert pod.process.returncode == 0
            assert "Traceback" not in pod.log
