"""A process that Slurm or Kubernetes started becomes its rank, with the devices and the address it was given."""

import pytest

from engine.cluster import found
from engine.cluster.become import become
from engine.cluster.found import Found, Gpu
from engine.cluster.reading import parse
from engine.errors import ConfigError

FILE = """\
[[host]]
name = "n1"
address = "10.0.0.1"
devices = 8
[[host]]
name = "n2"
address = "10.0.0.2"
devices = 8
[[lane]]
name = "p0"
role = "prefill"
mesh = 4
hosts = ["n1", "n2"]
[[lane]]
name = "d1"
role = "decode"
mesh = 4
hosts = ["n2", "n2"]
[front]
address = "10.0.0.1:50053"
[security]
certs = "/c"
trusted_network = true
"""
MADE = parse(FILE, "x.toml")
PODS = parse(FILE.replace('address = "10.0.0.1"\n', "").replace('address = "10.0.0.2"\n', "")
             .replace("10.0.0.1:50053", "0.0.0.0:50053"), "x.toml")  # fmt: skip
SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
POD = {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "POD_IP": "10.8.1.4"}


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """Eight of them."""
    has = Found(gpus=(Gpu("", "NVIDIA H200", -1),) * 8)
    monkeypatch.setattr("engine.cluster.become.here", lambda address, autotune: has)
    assert found.here().gpus == () or found.here().gpus


def flags(command):
    return {word.split("=")[0]: word.partition("=")[2] for word in command.arguments if word.startswith("--")}


def test_under_slurm_the_rank_runs_on_its_node_with_the_devices_of_the_file():
    made = become(MADE, "p0", {**SLURM, "SLURM_PROCID": "1", "SLURMD_NODENAME": "n2", "PATH": "/bin"})
    said = flags(made)
    assert (said["--rank"], said["--processes"], said["--devices"]) == ("1", "2", "0,1")
    assert (said["--lane-interface"], said["--front"]) == ("10.0.0.2", "10.0.0.1:50053")
    assert made.environment["PATH"] == "/bin" and made.environment["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(("rank", "visible", "devices"), [("0", "4,5,6,7", "4,5"), ("1", "4,5,6,7", "6,7")])
def test_two_ranks_of_one_node_share_the_devices_that_slurm_gave_the_job(rank, visible, devices):
    environment = {"SLURM_NTASKS": "2", "SLURM_PROCID": rank, "CUDA_VISIBLE_DEVICES": visible}
    made = become(MADE, "d1", environment)
    assert flags(made)["--devices"] == made.environment["CUDA_VISIBLE_DEVICES"] == devices


def test_devices_that_slurm_gave_go_before_those_of_the_file():
    made = become(MADE, "p0", {**SLURM, "SLURM_PROCID": "0", "CUDA_VISIBLE_DEVICES": "3,5"})
    assert made.environment["CUDA_VISIBLE_DEVICES"] == "3,5"


@pytest.mark.parametrize("visible", ["3", "1,2,3", "GPU-a,GPU-b"])
def test_too_few_devices_are_refused(visible):
    with pytest.raises(
        ConfigError, match="CUDA_VISIBLE_DEVICES: got . devices; expected 2 numbers, for rank 0 of p0"
    ):
        become(MADE, "p0", {**SLURM, "SLURM_PROCID": "0", "CUDA_VISIBLE_DEVICES": visible})


def test_a_pod_sees_its_own_devices_from_0_on_and_its_own_address():
    """The ids of the file count over a host; a pod of lane d1 has other numbers there, and its own here."""
    made = become(PODS, "d1", POD, front="serac-lanes.default.svc:50053")
    said = flags(made)
    assert (said["--rank"], said["--devices"], said["--lane-interface"]) == ("1", "0,1", "10.8.1.4")
    assert said["--front"] == "serac-lanes.default.svc:50053"


def test_a_pod_without_an_address_or_with_a_public_one_is_refused():
    with pytest.raises(ConfigError, match="address: host n2 has none in the topology, and POD_IP is not set"):
        become(PODS, "p0", {name: value for name, value in POD.items() if name != "POD_IP"})
    with pytest.raises(ConfigError, match="address: that of rank 1 of p0 is public"):
        become(PODS, "p0", POD | {"POD_IP": "8.8.8.8"})


def test_a_lane_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="lane: got 'p1'; expected one of p0, d1"):
        become(MADE, "p1", {})
