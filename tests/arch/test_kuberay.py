"""The manifests of deploy/kuberay hold together: fields, names, ports, resources, secrets, and what runs inside."""

import base64
import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from pydantic import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.arch.commands import job_command, parsed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own code
    from ray.serve.schema import ServeDeploySchema

    from elasticrec.serving.graph import Args

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
MANIFESTS = ("cluster", "job", "service", "redis", "shared", "disruption", "network")
KUBERNETES = "1.32"
SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text(encoding="utf-8"))
CLUSTER_AT = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|KEY$")
KUBECTL = shutil.which("kubectl")
UNITS = {
    "m": 1e-3,
    "": 1,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "mb": 2**20,
    "gb": 2**30,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
REDIS_SHARE = 0.5  # of its limit: a rewrite of the log copies what is written meanwhile
MARGIN_S = 30  # between the end of the drain and the kill
Document = dict[str, Any]


@cache
def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def documents() -> list[Document]:
    return [document for name in MANIFESTS for document in yaml.safe_load_all(_read(f"{name}.yaml"))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """A pod's template and where it stands."""

    where: str
    template: Document
    claimed: tuple[str, ...] = ()  # volumes that a StatefulSet gives

    @property
    def labels(self) -> Mapping[str, str]:
        return dict(self.template["metadata"].get("labels", {}))

    @property
    def spec(self) -> Document:
        return dict(self.template["spec"])

    @property
    def containers(self) -> list[Document]:
        return list(self.spec["containers"])


def ray_spec(document: Document) -> Document | None:
    """The RayClusterSpec of a document of KubeRay."""
    if document["kind"] not in CLUSTER_AT:
        return None
    key = CLUSTER_AT[document["kind"]]
    return dict(document["spec"][key] if key else document["spec"])


def pods(document: Document) -> Iterator[Pod]:
    where = f"{document['kind']} {document['metadata']['name']}"
    if spec := ray_spec(document):
        yield Pod(where=f"{where}, head", template=spec["headGroupSpec"]["template"])
        for group in spec.get("workerGroupSpecs", []):
            yield Pod(where=f"{where}, {group['groupName']}", template=group["template"])
    elif document["kind"] == "StatefulSet":
        claimed = tuple(claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", []))
        yield Pod(where=where, template=document["spec"]["template"], claimed=claimed)


def findings(all_of_them: list[Document], secrets: Mapping[str, set[str]]) -> list[str]:
    """One line for each thing that would not work."""
    every_pod = [pod for document in all_of_them for pod in pods(document)]
    found: list[str] = []
    for document in all_of_them:
        found += [*_schema(document), *_names(document), *_selectors(document, every_pod), *_inside(document)]
    claims = {one["metadata"]["name"] for one in all_of_them if one["kind"] == "PersistentVolumeClaim"}
    for pod in every_pod:
        found += [*_pod_schema(pod), *_volumes(pod, secrets, claims)]
        for container in pod.containers:
            found += [*_ports(pod, container), *_resources(pod, container), *_secrets(pod.where, container, secrets)]
            found += [*_hardened(pod, container), *_redis(pod, container)]
    return [*found, *_addresses(all_of_them)]


def _schema(document: Document) -> Iterator[str]:
    where = f"{document['kind']} {document['metadata'].get('name')}"
    try:
        if document["kind"] in CLUSTER_AT:
            jsonschema.validate(document, SCHEMA)
        elif said := _refused(json.dumps(document)):
            yield f"{where}: {said}"
    except jsonschema.ValidationError as error:
        yield f"{where}: {(jsonschema.exceptions.best_match([error]) or error).message}"


def _pod_schema(pod: Pod) -> Iterator[str]:
    metadata = {"name": "checked"} | pod.template["metadata"]
    text = json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec})
    if said := _refused(text):
        yield f"{pod.where}: {said}"


@cache  # its schemas are read anew at each call
def _refused(text: str) -> str:
    """What Kubernetes' schema, with unknown fields refused, says of a document as JSON."""
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return error.message
    return ""


def _names(document: Document) -> Iterator[str]:
    name = document["metadata"].get("name", "")
    if not NAME.fullmatch(name):
        yield f"{document['kind']}: name '{name}' is none"
    if document["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != "elasticrec":
        yield f"{document['kind']} {name}: no label app.kubernetes.io/part-of"
    for pod in pods(document):
        if "app.kubernetes.io/component" not in pod.labels:
            yield f"{pod.where}: no label app.kubernetes.io/component"


def _selectors(document: Document, every_pod: list[Pod]) -> Iterator[str]:
    spec, where = document["spec"], f"{document['kind']} {document['metadata']['name']}"
    selector = spec.get("podSelector") or spec.get("selector")
    if selector is None:
        return
    wanted = selector.get("matchLabels", {}) if "matchLabels" in selector else selector
    matched = [pod for pod in every_pod if wanted.items() <= pod.labels.items()]
    if not matched:
        yield f"{where}: selects no pod"
    if document["kind"] == "PodDisruptionBudget" and not isinstance(spec.get("minAvailable"), int):
        yield f"{where}: pods of Ray have no scale, of which Kubernetes counts minAvailable alone, as a number"
    for port in spec.get("ports", []):
        names = {port_of["name"] for pod in matched for box in pod.containers for port_of in box.get("ports", [])}
        if port.get("targetPort") not in names:
            yield f"{where}: no container has the port {port.get('targetPort')}"


def _ports(pod: Pod, container: Document) -> Iterator[str]:
    ports = container.get("ports", [])
    where = f"{pod.where}, {container['name']}"
    for key in ("name", "containerPort"):
        values = [port[key] for port in ports]
        if len(set(values)) < len(values):
            yield f"{where}: a {key} of ports is there twice"
    known = {port["name"] for port in ports} | {port["containerPort"] for port in ports}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        action = container.get(probe, {})
        asked = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
        if asked is not None and asked not in known:
            yield f"{where}: {probe} asks port {asked}, which is none of its ports"
    for probe in ("readinessProbe", "livenessProbe"):
        if probe not in container:
            yield f"{where}: no {probe}"


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def _resources(pod: Pod, container: Document) -> Iterator[str]:
    where = f"{pod.where}, {container['name']}"
    asked, most = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
    for name in ("cpu", "memory"):
        if name not in asked or name not in most:
            yield f"{where}: {name} needs a request and a limit"
    for name, value in asked.items():
        if name in most and quantity(value) > quantity(most[name]):
            yield f"{where}: requests {value} of {name}, more than its limit of {most[name]}"


def _secrets(where: str, container: Document, secrets: Mapping[str, set[str]]) -> Iterator[str]:
    for entry in container.get("env", []):
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        if reference and reference["key"] not in secrets.get(reference["name"], set()):
            yield f"{where}: no secret {reference['name']} with a {reference['key']}"
        if "value" in entry and SECRET_NAME.search(entry["name"]):
            yield f"{where}: {entry['name']} stands there for everybody; take it from a secret"


def _volumes(pod: Pod, secrets: Mapping[str, set[str]], claims: set[str]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in {*volumes, *pod.claimed}:
                yield f"{pod.where}: mounts {mount['name']}, which is no volume"
    for volume in volumes.values():
        secret, claim = volume.get("secret", {}).get("secretName"), volume.get("persistentVolumeClaim", {})
        if secret and secret not in secrets:
            yield f"{pod.where}: no secret {secret}"
        if claim and claim["claimName"] not in claims:
            yield f"{pod.where}: no claim {claim['claimName']}"


def _hardened(pod: Pod, container: Document) -> Iterator[str]:
    where = f"{pod.where}, {container['name']}"
    if not pod.spec.get("securityContext", {}).get("runAsNonRoot"):
        yield f"{where}: may run as root"
    locked = container.get("securityContext", {})
    if locked.get("allowPrivilegeEscalation") is not False or locked.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{where}: may gain privileges"
    if container["name"] == "ray-worker":
        yield from _drains(where, pod, container)


def _redis(pod: Pod, container: Document) -> Iterator[str]:
    if container["name"] != "redis":
        return
    options = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    limit = quantity(container["resources"]["limits"]["memory"])
    if not 0 < quantity(options.get("--maxmemory", "0")) <= REDIS_SHARE * limit:
        yield f"{pod.where}: maxmemory is none, or more than half of its limit"
    if options.get("--maxmemory-policy") != "noeviction":
        yield f"{pod.where}: what is acknowledged may be evicted"
    if "redis-cli ping | grep -q PONG" not in container["readinessProbe"]["exec"]["command"]:
        yield f"{pod.where}: is ready whatever Redis answers"


def _addresses(all_of_them: list[Document]) -> Iterator[str]:
    """Of Redis: each is a service of here, and events are not where the head's state is."""
    specs = [spec for document in all_of_them if (spec := ray_spec(document))]
    heads = {spec.get("gcsFaultToleranceOptions", {}).get("redisAddress", "").split(":")[0] for spec in specs}
    configs = [one["spec"]["serveConfigV2"] for one in all_of_them if one["kind"] == "RayService"]
    events = {host for text in configs for host in re.findall(r"events: redis://([\w.-]+)", text)}
    services = {one["metadata"]["name"] for one in all_of_them if one["kind"] == "Service"}
    yield from (f"no service {host} for Redis" for host in (heads | events) - services)
    yield from (f"{host} holds both events and the head's state" for host in heads & events)


def _drains(where: str, pod: Pod, container: Document) -> Iterator[str]:
    command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if "/opt/elasticrec/deploy/drain.py" not in command:
        yield f"{where}: is not drained before it ends"
    elif float(command[-1]) + MARGIN_S > pod.spec.get("terminationGracePeriodSeconds", 30):
        yield f"{where}: is killed before its drain of {command[-1]} s is over"


def _inside(document: Document) -> Iterator[str]:
    """What Ray itself makes of it."""
    spec, name = ray_spec(document), document["metadata"]["name"]
    if spec is None:
        return
    where = f"{document['kind']} {name}"
    if spec.get("rayVersion") != ray.__version__:
        yield f"{where}: rayVersion {spec.get('rayVersion')}, the image has {ray.__version__}"
    try:
        types = _node_types(spec)
    except Exception as error:  # noqa: BLE001 - whatever Ray's autoscaler says of it
        yield f"{where}: Ray's autoscaler refuses it: {error!r}"
        return
    yield from _groups(where, spec, types)
    if document["kind"] == "RayJob":
        yield from _entrypoint(where, document["spec"]["entrypoint"], types)
    if document["kind"] == "RayService":
        yield from _serve_config(where, document["spec"]["serveConfigV2"], types)
    yield from _secrets(where, {"env": spec.get("autoscalerOptions", {}).get("env", [])}, {})


def _node_types(spec: Document) -> Document:
    cluster = {"metadata": {"name": "checked", "namespace": "elasticrec"}, "spec": copy.deepcopy(spec)}
    return dict(_derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"])


def _groups(where: str, spec: Document, types: Document) -> Iterator[str]:
    if types["headgroup"]["resources"]["CPU"] != 0:
        yield f"{where}: work may be placed on the head"
    for group in spec.get("workerGroupSpecs", []):
        if not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield f"{where}, {group['groupName']}: replicas are not between minReplicas and maxReplicas"
        component = group["template"]["metadata"]["labels"].get("app.kubernetes.io/component")
        if ("train_slot" in types[group["groupName"]]["resources"]) != (component == "training"):
            yield f"{where}, {group['groupName']}: train_slot is for training alone"


def _entrypoint(where: str, entrypoint: str, types: Document) -> Iterator[str]:
    words = [word.replace("/opt/elasticrec", str(ROOT)) for word in entrypoint.split()]
    try:
        config = parsed(job_command(words))
    except ValueError as error:
        yield f"{where}: {error}"
        return
    for name, kind in types.items():
        offered, slots = (kind["resources"].get(key, 0) for key in ("GPU", "train_slot"))
        taken = slots * config.elastic.gpus_per_worker
        if slots and offered != taken:
            yield f"{where}, {name}: its pods have {offered} GPUs, and the entrypoint's workers take {taken:g}"


def _serve_config(where: str, text: str, types: Document) -> Iterator[str]:
    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(text))
        for application in config.applications:
            if application.import_path != "elasticrec.serving.graph:app":
                yield f"{where}: import path {application.import_path}"
            args = Args.model_validate(application.args)
            if args.keys is None and config.http_options.host == "0.0.0.0":
                yield f"{where}: answers everybody"
            if not args.events.startswith("redis"):
                yield f"{where}: events of several pods need redis"
            wanted = args.label_selector.items()
            taken = [kind["resources"] for kind in types.values() if wanted <= kind["labels"].items()]
            if not wanted or not taken or any("train_slot" in resources for resources in taken):
                yield f"{where}: label_selector {args.label_selector} is not that of nodes without train_slot"
    except ValidationError as error:
        yield f"{where}: {error}"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Secrets and their keys, as secrets.sh makes them: run, with a kubectl that writes down what it is asked.

    What needs no cluster is answered by the real one, where there is one.
    """
    folder = tmp_path_factory.mktemp("secrets")
    kubectl, asked, drawn, applied, keys = (
        folder / name for name in ("kubectl", "asked", "drawn", "applied", "keys.json")
    )
    secret = f'{KUBECTL} "$@"' if KUBECTL else 'echo "data: {keys.json: e30=}"'
    cases = (
        '*" get "*|get*) exit 1',
        f"*/dev/stdin) cat >{drawn}",
        f"*--dry-run=client*) {secret}",
        f'*"apply -f -") cat >{applied}',
    )
    answers = f'case "$*" in {";; ".join(cases)};; esac'
    kubectl.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{asked}\n{answers}\n')
    kubectl.chmod(0o755)
    keys.write_text("{}")
    env = os.environ | {"KUBECTL": str(kubectl)}
    subprocess.run([FOLDER / "secrets.sh", keys], env=env, check=True, timeout=60)
    made: dict[str, set[str]] = {}
    for line in asked.read_text().splitlines():
        if match := re.search(r"create secret generic (\S+) --from-\w+=([\w.]+)=(\S+)", line):
            made.setdefault(match[1], set()).add(match[2])
            assert match[3] in (str(keys), "/dev/stdin")  # no value on a command line
    assert re.fullmatch(r"[0-9a-f]{64}", drawn.read_text())
    assert "create namespace elasticrec" in asked.read_text()
    assert base64.b64decode(yaml.safe_load(applied.read_text())["data"]["keys.json"]) == keys.read_bytes()
    assert "delete" not in asked.read_text()  # a pod that starts meanwhile would find none
    return made


def test_manifests_hold_together(secrets: dict[str, set[str]]) -> None:
    assert secrets == {"elasticrec-redis": {"password"}, "elasticrec-keys": {"keys.json"}}
    assert [one["kind"] for one in documents() if one["kind"] in CLUSTER_AT] == ["RayCluster", "RayJob", "RayService"]
    assert findings(documents(), secrets) == []


def test_no_secret_lies_in_the_folder() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "kind: Secret\n" not in text
        assert not re.search(r"[0-9a-f]{32}|er_[A-Za-z0-9_-]{20}", text), path.name


def test_the_kustomization_takes_files_that_are_there() -> None:
    kustomization = yaml.safe_load(_read("kustomization.yaml"))
    assert all((FOLDER / name).is_file() for name in kustomization["resources"])
    assert {name.removesuffix(".yaml") for name in kustomization["resources"]} == {*MANIFESTS} - {"cluster", "job"}


@pytest.mark.skipif(not KUBECTL, reason="needs kubectl")
def test_kubectl_puts_together_what_the_kustomization_names() -> None:
    run = subprocess.run([str(KUBECTL), "kustomize", FOLDER], stdout=subprocess.PIPE, check=True, timeout=60)
    found = [one for one in yaml.safe_load_all(run.stdout) if one]
    listed = yaml.safe_load(_read("kustomization.yaml"))["resources"]
    written = [one for name in listed for one in yaml.safe_load_all(_read(name)) if one]
    in_namespace = [one | {"metadata": one["metadata"] | {"namespace": "elasticrec"}} for one in written]
    assert _by_name(found) == _by_name(in_namespace)


def _by_name(resources: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in resources}


def test_all_of_ray_runs_from_one_image_and_none_is_whatever_is_newest() -> None:
    images = {pod.where: box["image"] for one in documents() for pod in pods(one) for box in pod.containers}
    assert {image for where, image in images.items() if where.startswith("Ray")} == {
        "registry.example.org/elasticrec:0.1.0"
    }
    assert all(re.search(r":\d+\.\d+\.\d+$", image) for image in images.values())


def test_a_job_keeps_the_head_that_its_driver_runs_on() -> None:
    job = next(one for one in documents() if one["kind"] == "RayJob")
    head = next(pods(job))
    budgets = [one["spec"] for one in documents() if one["kind"] == "PodDisruptionBudget"]
    kept = [one for one in budgets if one["selector"]["matchLabels"].items() <= head.labels.items()]
    assert [one["minAvailable"] for one in kept] == [1]
    others = [pod for one in documents() for pod in pods(one) if pod.where != head.where]
    assert not [pod for pod in others if kept[0]["selector"]["matchLabels"].items() <= pod.labels.items()]


def _at(kind: str, *path: str | int) -> Callable[[list[Document]], tuple[Any, str | int]]:
    def find(all_of_them: list[Document]) -> tuple[Any, str | int]:
        node: Any = next(one for one in all_of_them if one["kind"] == kind)
        for step in path[:-1]:
            node = node[step]
        return node, path[-1]

    return find


HEAD = ("spec", "headGroupSpec", "template", "spec")
WORKER = ("spec", "workerGroupSpecs", 0, "template", "spec")
BOX = (*WORKER, "containers", 0)
REDIS = ("spec", "template", "spec", "containers", 0)
SERVE_BOX = ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("find", "value", "said"),
    [
        (_at("RayCluster", "spec", "enableInTreeAutoscalin"), True, "enableInTreeAutoscalin"),
        (_at("RayCluster", "spec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
        (_at("RayCluster", "spec", "rayVersion"), "2.9.0", "rayVersion 2.9.0, the image has"),
        (_at("RayCluster", "spec", "headGroupSpec", "rayStartParams", "num-cpus"), "2", "placed on the head"),
        (_at("RayCluster", "spec", "workerGroupSpecs", 0, "minReplicas"), "1", "is not of type 'integer'"),
        (_at("RayCluster", "spec", "workerGroupSpecs", 0, "replicas"), 99, "not between minReplicas"),
        (
            _at("RayCluster", "spec", "workerGroupSpecs", 0, "rayStartParams"),
            {"resources": "{}}"},
            "autoscaler refuses",
        ),
        (
            _at("RayCluster", "spec", "workerGroupSpecs", 0, "rayStartParams"),
            {"labels": "kind=gateway"},
            "False schema does not allow",
        ),
        (_at("RayCluster", "spec", "workerGroupSpecs", 1, "rayStartParams"), {}, "train_slot is for training"),
        (_at("RayCluster", *HEAD, "containerz"), [], "'containerz' was unexpected"),
        (_at("RayCluster", *BOX, "livenessProbe", "httpGet", "port"), "agents", "asks port agents"),
        (_at("RayCluster", *BOX, "livenessProbe", "httpGt"), {}, "'httpGt' was unexpected"),
        (_at("RayCluster", *BOX, "resources", "requests", "memory"), "9Gi", "more than its limit of 8Gi"),
        (_at("RayCluster", *BOX, "resources", "limits"), {"memory": "8Gi"}, "cpu needs a request and a limit"),
        (_at("RayCluster", *BOX, "ports", 0, "name"), "agent", "a name of ports is there twice"),
        (_at("RayCluster", *BOX, "lifecycle"), {}, "is not drained before it ends"),
        (_at("RayCluster", *WORKER, "terminationGracePeriodSeconds"), 120, "killed before its drain"),
        (_at("RayCluster", *WORKER, "securityContext"), {}, "may run as root"),
        (_at("RayCluster", *BOX, "securityContext"), {}, "may gain privileges"),
        (_at("RayCluster", *WORKER, "volumes", 0, "persistentVolumeClaim", "claimName"), "mine", "no claim mine"),
        (_at("RayCluster", *BOX, "volumeMounts", 0, "name"), "share", "mounts share, which is no volume"),
        (_at("RayCluster", *BOX, "env"), [{"name": "REDIS_PASSWORD", "value": "x"}], "stands there for everybody"),
        (_at("RayCluster", "metadata", "name"), "Elastic_Rec", "name 'Elastic_Rec' is none"),
        (_at("RayCluster", "metadata", "labels"), {}, "no label app.kubernetes.io/part-of"),
        (_at("RayJob", "spec", "entrypoint"), "python -m jobs.trian", "no job: python -m jobs.trian"),
        (_at("RayJob", "spec", "entrypoint"), "python -m jobs.train --elastic.max-worker 8", "elastic.max-worker"),
        (
            _at("RayJob", "spec", "entrypoint"),
            "python -m jobs.train",
            "have 1 GPUs, and the entrypoint's workers take 0",
        ),
        (
            _at("RayJob", "spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "containers"),
            [{"name": "ray-worker", "resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}],
            "spot: its pods have 0 GPUs, and the entrypoint's workers take 1",
        ),
        (_at("RayJob", "spec", "submissionMode"), "HTTP", "'HTTP' is not one of"),
        (_at("RayService", "spec", "serveConfigV2"), "applications: [{name: a, importpath: b}]", "import_path"),
        (_at("RayService", *SERVE_BOX, "readinessProbe", "httpGet", "port"), 8001, "asks port 8001"),
        (
            _at("RayService", "spec", "rayClusterConfig", *HEAD[1:], "volumes", 1, "secret", "secretName"),
            "elasticrec-key",
            "no secret elasticrec-key",
        ),
        (
            _at("RayCluster", "spec", "gcsFaultToleranceOptions", "redisAddress"),
            "elasticrec-redis:6379",
            "both events and the head's state",
        ),
        (_at("RayCluster", "spec", "gcsFaultToleranceOptions", "redisAddress"), "reddis:6379", "no service reddis"),
        (_at("StatefulSet", *REDIS, "args", 9), "2gb", "maxmemory is none, or more than half"),
        (_at("StatefulSet", *REDIS, "args", 11), "allkeys-lru", "what is acknowledged may be evicted"),
        (
            _at("StatefulSet", *REDIS, "readinessProbe", "exec", "command"),
            ["redis-cli", "ping"],
            "whatever Redis answers",
        ),
        (_at("StatefulSet", "spec", "replica"), 1, "'replica' was unexpected"),
        (_at("Service", "spec", "selector"), {"app.kubernetes.io/component": "reddis"}, "selects no pod"),
        (_at("Service", "spec", "ports", 0, "targetPort"), "reddis", "no container has the port reddis"),
        (_at("PodDisruptionBudget", "spec", "selector", "matchLabels"), {"app": "x"}, "selects no pod"),
        (_at("PodDisruptionBudget", "spec", "minAvailable"), "50%", "counts minAvailable alone"),
        (_at("PodDisruptionBudget", "spec", "minAvailabel"), 1, "'minAvailabel' was unexpected"),
        (
            _at("StatefulSet", *REDIS, "env", 0, "valueFrom", "secretKeyRef", "key"),
            "pass",
            "no secret elasticrec-redis with a pass",
        ),
    ],
)
def test_each_mistake_is_found(
    secrets: dict[str, set[str]],
    find: Callable[[list[Document]], tuple[Any, str | int]],
    value: object,
    said: str,
) -> None:
    broken = copy.deepcopy(documents())
    node, key = find(broken)
    node[key] = value
    assert any(said in line for line in findings(broken, secrets)), findings(broken, secrets)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("keys: /etc", "key: /etc", "Extra inputs are not permitted"),
        ("keys: /etc/elasticrec/keys/keys.json\n", "\n", "answers everybody"),
        ("events: redis://elasticrec-redis:6379/0", "events: events.sqlite", "need redis"),
        ("replicas: 2\n", "replicas: none\n", "valid integer"),
        ("label_selector: { kind: gateway }", "label_selector: {}", "is not that of nodes without train_slot"),
        ("label_selector: { kind: gateway }", "label_selector: { kind: gatewya }", "is not that of nodes without"),
        ("serving.graph:app", "serving.graph:application", "import path elasticrec.serving.graph:application"),
        ("port: 8000 }", "port: eight }", "valid integer"),
        ("proxy_location: EveryNode", "proxy_location: EveryNodes", "EveryNode"),
    ],
)
def test_each_mistake_in_the_service_is_found(secrets: dict[str, set[str]], old: str, new: str, said: str) -> None:
    broken = copy.deepcopy(documents())
    spec = next(one for one in broken if one["kind"] == "RayService")["spec"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)
    assert any(said in line for line in findings(broken, secrets)), findings(broken, secrets)


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: its words and what follows them, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", _read("Dockerfile")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_small_and_not_root() -> None:
    found = instructions()
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert bases
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-slim-\w+", base) for base in bases)
    assert [rest for word, rest in found if word == "USER"] == ["1000"]
    assert [word for word, _ in found].index("USER") < [word for word, _ in found].index("HEALTHCHECK")
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert installs
    assert all("-c constraints.txt" in rest for rest in installs)
    assert "PIP_NO_CACHE_DIR=1" in " ".join(rest for word, rest in found if word == "ENV")
    assert not [rest for word, rest in found if word in ("ADD", "ARG")]


def test_the_image_gets_what_it_copies_and_nothing_else() -> None:
    copied = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    sources = {source for words in copied for source in words}
    ignored = _read("Dockerfile.dockerignore").splitlines()
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_has_this_package(tmp_path: Path) -> None:
    """Its first stage, step by step, without the dependencies."""
    folder, venv = tmp_path / "opt", tmp_path / "venv"
    folder.mkdir()
    path = os.pathsep.join([f"{venv}/bin", str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PIP_NO_DEPS": "1"}
    for word, rest in itertools.takewhile(lambda step: step[0] != "FROM", instructions()[1:]):
        if word == "COPY":  # files stay as old as they are
            subprocess.run(["cp", "--archive", *(ROOT / source for source in rest.split()[:-1]), folder], check=True)
        if word == "RUN":
            command = re.sub(r"--mount=\S+", "", rest).replace("/opt/venv", str(venv))
            subprocess.run(command, shell=True, cwd=folder, env=env, check=True)
    ask = "import elasticrec, importlib.metadata as m; print(elasticrec.__version__, m.version('elasticrec'))"
    run = subprocess.run([venv / "bin/python", "-c", ask], cwd=tmp_path, env={}, stdout=subprocess.PIPE, check=True)
    one, other = run.stdout.decode().split()
    assert one == other
