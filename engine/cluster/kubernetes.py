"""Manifests for Kubernetes: a LeaderWorkerSet for each lane, and a Deployment with its Services for the front.

    ConfigMap NAME-topology     the file itself, which every pod reads
    LeaderWorkerSet NAME-p0     one group: a pod a rank; one that ends takes its group along
    Deployment NAME-front       gRPC probes, drained before it ends     Service NAME-front   for clients, when ready
    Service NAME-lanes          for lanes, which come before the front is ready
    NetworkPolicy NAME-inside   keeps all ports but the front's gRPC for pods of the cluster

Secrets stand in Secrets of the operator's: NAME-front and NAME-lane are folders of serac certs init,
NAME-cluster is the cluster's secret. Mounted files are 0400 and owned by the pod's user, by way of its group.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import NamedTuple

from engine.cluster.commands import SECRET_FILE
from engine.cluster.rules import check_for_others
from engine.cluster.topology import Topology
from engine.config import ROWS
from engine.errors import ConfigError, wrong
from engine.lanes import LaneSpec
from engine.movers import addresses

Tree = Mapping[str, "Tree"] | list["Tree"] | str | int | bool

FILE = "/etc/serac/topology/topology.toml"
MODELS = "/models"
CACHE = "/cache"  # of compiled programs
SECRET_MODE = 0o400
USER = 1000
SETTLE_S = 5  # until load balancers have heard that a pod leaves
SPARE_S = 15.0
STARTUP_S, PROBE_S = 1800, 5
PLAIN_NAME = {"app.kubernetes.io/name": "serac"}
FILES = ("tls_cert", "tls_key", "token_file")


class Place(NamedTuple):
    """Where the pods come from and go to. `models` is a PersistentVolumeClaim, mounted at /models."""

    image: str
    namespace: str = "default"
    models: str = ""


def manifests(topology: Topology, text: str, place: Place) -> list[Tree]:
    """Every object, in the order to create them. `text` is the file of the topology. Raises ConfigError."""
    check(topology)
    lanes = [_lane(topology, lane, place) for lane in topology.lanes]
    return [_config(topology, text, place), *_services(topology, place), _policy(topology, place),
            _front(topology, place), *lanes]  # fmt: skip


def check(topology: Topology) -> None:
    """Raise ConfigError for what pods need and the topology leaves out."""
    front, security = topology.front, topology.security
    if front.host not in ("0.0.0.0", "::"):
        raise ConfigError(wrong("host", front.host, "0.0.0.0 in [front], as kubelet and clients come from outside "
                                "its pod"), field="host")  # fmt: skip
    check_for_others(topology)
    if security.certs is None:
        raise ConfigError("certs: got none in [security]; expected the folder where pods mount them", field="certs")
    assert security.secret_file is not None
    if topology.autotune is not None:
        raise ConfigError("autotune: got a folder; expected none over kubernetes, as pods share "
                          "no folder to write in", field="autotune")  # fmt: skip
    for name, path in (("secret_file", security.secret_file), ("certs", security.certs)):
        if not path.is_absolute():
            raise ConfigError(wrong(name, str(path), "an absolute path in the pods"), field=name)
    if security.secret_file.is_relative_to(security.certs):
        raise ConfigError("secret_file: got a file inside certs; expected another folder, since two Secrets are "
                          "mounted", field="secret_file")  # fmt: skip
    for name in FILES:
        path = topology.serve.get(name)
        if path is not None and not PurePath(str(path)).is_relative_to(security.certs):
            raise ConfigError(wrong(name, str(path), "a file of the folder certs, which is mounted"), field=name)


def _meta(topology: Topology, place: Place, part: str, labels: Mapping[str, Tree] | None = None) -> dict[str, Tree]:
    return {
        "name": f"{topology.name}-{part}",
        "namespace": place.namespace,
        "labels": {**_labels(topology), **(labels or {})},
    }


def _labels(topology: Topology, component: str = "") -> dict[str, Tree]:
    labels: dict[str, Tree] = {**PLAIN_NAME, "app.kubernetes.io/instance": topology.name}
    return labels | ({"app.kubernetes.io/component": component} if component else {})


def _config(topology: Topology, text: str, place: Place) -> Tree:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _meta(topology, place, "topology"),
        "data": {PurePath(FILE).name: text},
    }


def _services(topology: Topology, place: Place) -> list[Tree]:
    port = {"name": "grpc", "port": topology.front.port, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"}
    lanes = {"name": "lanes", "port": addresses.parse(topology.front.address).port, "targetPort": "lanes"}
    kind = {"apiVersion": "v1", "kind": "Service"}
    selector = _labels(topology, "front")
    early = {"selector": selector, "ports": [lanes], "publishNotReadyAddresses": True}
    return [
        {**kind, "metadata": _meta(topology, place, "front"), "spec": {"selector": selector, "ports": [port]}},
        {**kind, "metadata": _meta(topology, place, "lanes"), "spec": early},
    ]


def _policy(topology: Topology, place: Place) -> Tree:
    """Who may come in: to the front's gRPC port everybody, to all other ports the pods of this cluster."""
    ours: Tree = {"podSelector": {"matchLabels": _labels(topology)}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(topology, place, "inside"),
        "spec": {
            "podSelector": {"matchLabels": _labels(topology)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [ours]}, {"ports": [{"port": "grpc", "protocol": "TCP"}]}],
        },
    }


def _front(topology: Topology, place: Place) -> Tree:
    listen = f"--listen=$(POD_IP):{addresses.parse(topology.front.address).port}"
    probe = _probe(topology)
    container = {
        **_container(topology, place, "front", ["--front-only", listen]),
        "name": "front",
        "ports": [
            {"name": "grpc", "containerPort": topology.front.port},
            {"name": "lanes", "containerPort": addresses.parse(topology.front.address).port},
        ],
        "startupProbe": {**probe, "periodSeconds": PROBE_S, "failureThreshold": STARTUP_S // PROBE_S},
        "readinessProbe": {**probe, "periodSeconds": PROBE_S, "failureThreshold": 1},
        "livenessProbe": {**probe, "periodSeconds": 4 * PROBE_S, "failureThreshold": 6},
        "lifecycle": {"preStop": {"sleep": {"seconds": SETTLE_S}}},
    }
    labels = _labels(topology, "front")
    pod: Tree = {"metadata": {"labels": labels}, "spec": _pod(topology, place, "front", container)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _meta(topology, place, "front"),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": pod,
        },
    }


def _probe(topology: Topology) -> dict[str, Tree]:
    """grpc.health.v1, which kubelet asks without TLS alone; behind TLS, whether the port is open, as when ready."""
    if topology.serve.get("tls_cert") is not None:
        return {"tcpSocket": {"port": "grpc"}, "timeoutSeconds": PROBE_S}
    return {"grpc": {"port": topology.front.port}, "timeoutSeconds": PROBE_S}


def _lane(topology: Topology, lane: LaneSpec, place: Place) -> Tree:
    port = addresses.parse(topology.front.address).port
    front = f"--front={topology.name}-lanes.{place.namespace}.svc:{port}"
    share = lane.tp // len(lane.hosts)
    on_cpu = topology.serve.get("device") == "cpu"
    container = {
        **_container(topology, place, "lane", [f"--lane={lane.name}", front]),
        "name": "worker",
        "resources": {"requests": {"cpu": share}} if on_cpu else {"limits": {"nvidia.com/gpu": share}},
    }
    labels = _labels(topology, "lane") | {"serac.lane": lane.name, "serac.role": lane.role}
    template: Tree = {"metadata": {"labels": labels}, "spec": _pod(topology, place, "lane", container)}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": _meta(topology, place, lane.name, {"serac.lane": lane.name}),
        "spec": {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": len(lane.hosts),
                "restartPolicy": "RecreateGroupOnPodRestart",
                "workerTemplate": template,
            },
        },
    }


def _container(topology: Topology, place: Place, part: str, flags: list[str]) -> dict[str, Tree]:
    """What front and workers have alike."""
    assert topology.security.secret_file is not None and topology.security.certs is not None
    mounts: list[Tree] = [
        {"name": "topology", "mountPath": str(PurePath(FILE).parent), "readOnly": True},
        {"name": "certs", "mountPath": str(topology.security.certs / part), "readOnly": True},
        {"name": "secret", "mountPath": str(topology.security.secret_file.parent), "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "cache", "mountPath": CACHE},
    ]
    models: list[Tree] = [{"name": "models", "mountPath": MODELS, "readOnly": True}] if place.models else []
    return {
        "image": place.image,
        "command": ["python", "-m", "engine.cli", "launch", FILE],
        "args": list[Tree](flags),
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "XDG_CACHE_HOME", "value": CACHE},
            {"name": SECRET_FILE, "value": str(topology.security.secret_file)},
        ],
        "volumeMounts": mounts + models,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def _pod(topology: Topology, place: Place, part: str, container: Tree) -> dict[str, Tree]:
    assert topology.security.secret_file is not None
    drain = topology.serve.get("drain", ROWS["drain"].default)
    key: Tree = {"key": "secret", "path": topology.security.secret_file.name}
    volumes: list[Tree] = [
        {"name": "topology", "configMap": {"name": f"{topology.name}-topology"}},
        {"name": "certs", "secret": {"secretName": f"{topology.name}-{part}", "defaultMode": SECRET_MODE}},
        {
            "name": "secret",
            "secret": {"secretName": f"{topology.name}-cluster", "defaultMode": SECRET_MODE, "items": [key]},
        },
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "cache", "emptyDir": {}},
    ]
    models: list[Tree] = [
        {"name": "models", "persistentVolumeClaim": {"claimName": place.models, "readOnly": True}}
    ]
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": round(float(str(drain)) + SETTLE_S + SPARE_S),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes + (models if place.models else []),
    }
