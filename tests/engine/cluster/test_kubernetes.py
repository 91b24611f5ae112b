"""The manifests hold what the published schema of LeaderWorkerSet allows, and say what the topology means.

The schema is that of the project's own CRD, kept beside its licence in lws/. Kubernetes drops unknown fields
without a word; here every object of the schema is closed first, so that a slip in a name is an error.
"""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from engine.cluster.kubernetes import Place, manifests
from engine.cluster.reading import parse
from engine.cluster.yaml_text import yaml_of
from engine.errors import ConfigError

FILE = """\
[[host]]
name = "a"
devices = 4

[[host]]
name = "b"
devices = 4

[[lane]]
name = "p0"
role = "prefill"
mesh = "tp=4"
hosts = ["a", "b"]

[[lane]]
name = "d1"
role = "decode"
mesh = "tp=2"
hosts = ["b"]

[front]
host = "0.0.0.0"
address = "0.0.0.0:50053"

[security]
certs = "/etc/serac/certs"
secret_file = "/etc/serac/secret/secret"
trusted_network = true

[serve]
model = "/models/a"
drain = 60
"""
PLACE = Place("example.org/serac:1", "models", "weights")
SCHEMA = json.loads((Path(__file__).parent / "lws/leaderworkerset.schema.json").read_text())


def closed(tree):
    """The schema with every object refusing what it does not name, and Kubernetes' int-or-string said in plain."""
    if isinstance(tree, list):
        return [closed(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    made = {key: closed(value) for key, value in tree.items()}
    if isinstance(tree.get("properties"), dict) and tree.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def objects(text=FILE, place=PLACE):
    """By kind and name, as a reader of the YAML has them."""
    made = yaml_of(manifests(parse(text, "topology.toml"), text, place))
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(made)}


def schema():
    made = closed(SCHEMA)
    made["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which a CRD leaves open
    template = made["properties"]["spec"]["properties"]["leaderWorkerTemplate"]["properties"]["workerTemplate"]
    template["properties"]["metadata"] = {"type": "object"}
    return made, template


def problems(made, against):
    return [
        f"{list(error.absolute_path)}: {error.message}" for error in Draft202012Validator(against).iter_errors(made)
    ]


def spec(made, name):
    return made["LeaderWorkerSet", name]["spec"]["leaderWorkerTemplate"]


def test_each_lane_is_a_leader_worker_set_that_the_published_schema_allows():
    whole, _ = schema()
    sets = [each for (kind, _), each in objects().items() if kind == "LeaderWorkerSet"]
    assert len(sets) == 2
    assert [problems(each, whole) for each in sets] == [[], []]


def test_the_front_is_a_deployment_whose_pods_the_same_schema_allows():
    _, template = schema()
    assert problems(objects()["Deployment", "serac-front"]["spec"]["template"], template) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("spec", "leaderWorkerTemplate", "restartPolicy"), "Always", "'Always' is not one of"),
        (("spec", "leaderWorkerTemplate", "sise"), 2, "'sise' was unexpected"),
        (("spec", "replicas"), "1", "is not of type 'integer'"),
        (
            ("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "containers"),
            [{"image": "x"}],
            "'name' is a req",
        ),
    ],
)
def test_the_schema_refuses_what_is_broken(path, value, words):
    made = objects()["LeaderWorkerSet", "serac-p0"]
    at = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert any(words in problem for problem in problems(made, schema()[0]))


def test_a_lane_is_a_group_that_falls_and_rises_as_one():
    made = objects()
    assert (spec(made, "serac-p0")["size"], spec(made, "serac-d1")["size"]) == (2, 1)
    assert all(spec(made, f"serac-{lane}")["restartPolicy"] == "RecreateGroupOnPodRestart" for lane in ("p0", "d1"))
    containers = [spec(made, f"serac-{lane}")["workerTemplate"]["spec"]["containers"][0] for lane in ("p0", "d1")]
    assert [each["resources"]["limits"] for each in containers] == [{"nvidia.com/gpu": 2}] * 2
    assert containers[0]["args"] == ["--lane=p0", "--front=serac-lanes.models.svc:50053"]
    assert containers[0]["command"][-2:] == ["launch", "/etc/serac/topology/topology.toml"]


def test_on_cpu_no_gpu_is_asked_for():
    text = FILE + 'device = "cpu"\n'
    container = spec(objects(text), "serac-p0")["workerTemplate"]["spec"]["containers"][0]
    assert container["resources"] == {"requests": {"cpu": 2}}


def test_the_front_is_probed_over_grpc_and_drained_before_it_ends():
    pod = objects()["Deployment", "serac-front"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": 50051}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800, "a large model loads for a while"
    settle = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= settle + 60 + 10


def test_behind_tls_the_port_is_probed_since_kubelet_cannot_speak_it():
    text = FILE + 'tls_cert = "/etc/serac/certs/front/cert.pem"\ntls_key = "/etc/serac/certs/front/key.pem"\n'
    container = objects(text)["Deployment", "serac-front"]["spec"]["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["tcpSocket"] == {"port": "grpc"}


def test_lanes_reach_the_front_before_it_is_ready_and_clients_after():
    made = objects()
    lanes, front = made["Service", "serac-lanes"]["spec"], made["Service", "serac-front"]["spec"]
    assert lanes["publishNotReadyAddresses"] is True and "publishNotReadyAddresses" not in front
    ports = {
        port["name"]
        for port in made["Deployment", "serac-front"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert {lanes["ports"][0]["targetPort"], front["ports"][0]["targetPort"]} == ports
    labels = made["Deployment", "serac-front"]["spec"]["template"]["metadata"]["labels"]
    assert lanes["selector"].items() <= labels.items()
    worker = spec(made, "serac-p0")["workerTemplate"]["metadata"]["labels"]
    assert not lanes["selector"].items() <= worker.items()
    inside = made["NetworkPolicy", "serac-inside"]["spec"]
    assert inside["podSelector"]["matchLabels"].items() <= worker.items() & labels.items()


def test_secrets_are_mounted_files_that_their_owner_alone_reads_each_role_its_own():
    made = objects()
    pods = [
        made["Deployment", "serac-front"]["spec"]["template"]["spec"],
        spec(made, "serac-p0")["workerTemplate"]["spec"],
    ]
    for pod, role in zip(pods, ("front", "lane"), strict=True):
        secrets = {each["secret"]["secretName"]: each for each in pod["volumes"] if "secret" in each}
        assert set(secrets) == {f"serac-{role}", "serac-cluster"}
        assert all(each["secret"]["defaultMode"] == 0o400 for each in secrets.values())
        mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["certs"]["mountPath"] == f"/etc/serac/certs/{role}" and mounts["secret"]["readOnly"]
        assert {each["name"] for each in pod["volumes"]} == set(mounts)
        assert not any(
            "valueFrom" in each and "secretKeyRef" in each["valueFrom"] for each in pod["containers"][0]["env"]
        )


def test_every_pod_reads_the_file_itself():
    assert objects()["ConfigMap", "serac-topology"]["data"]["topology.toml"] == FILE


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ('host = "0.0.0.0"', "", "host: got '127.0.0.1'; expected 0.0.0.0 in \\[front\\]"),
        ("0.0.0.0:50053", "0.0.0.0:0", "address: got no port"),
        ('secret_file = "/etc/serac/secret/secret"', "", "secret_file: got none in"),
        ("/etc/serac/secret/secret", "secret", "secret_file: got 'secret'; expected an absolute path in the pods"),
        ("/etc/serac/secret/secret", "/etc/serac/certs/secret", "secret_file: got a file inside certs"),
        (
            "drain = 60",
            'token_file = "/root/tokens"',
            "token_file: got '/root/tokens'; expected a file of the folder",
        ),
        (
            "[[host]]",
            '[cluster]\nautotune = "/t"\n[[host]]',
            "autotune: got a folder; expected none over kubernetes",
        ),
        ('"d1"', '"front"', "name: got 'front'; expected another"),
    ],
)
def test_what_pods_cannot_do_with_is_refused(was, now, words):
    with pytest.raises(ConfigError, match=words):
        objects(FILE.replace(was, now, 1))
