"""What starts a process of the cluster: arguments, environment, and where it is bound, from what was found."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engine.cluster import found as looking
from engine.cluster import local, places, ssh
from engine.cluster.commands import autotune_file, command, environment, kept, passed_on, settings_flags, worker
from engine.cluster.found import Found, Gpu, bind, differing, look, told
from engine.cluster.reading import of_lanes, parse
from engine.cluster.topology import placed
from engine.errors import ConfigError

FILE = """\
[[host]]
name = "h0"
address = "10.0.0.1"
devices = 4
user = "serac"
port = 2222
key = "/keys/k"
python = "/opt/it's serac/bin/python"

[[host]]
name = "h1"
address = "10.0.0.2"
devices = [4, 5, 6, 7]

[[lane]]
name = "b0"
role = "both"
mesh = "tp=4"
hosts = ["h1", "h0"]

[front]
address = "10.0.0.1:50053"

[security]
certs = "/etc/serac/certs"
secret_file = "/etc/serac/secret"
known_hosts = "/keys/known"
trusted_network = true

[serve]
model = "/models/a b"
numerics = "invariant"
prefix_cache = false
drain = 90
token_file = "/etc/tokens"
"""
MADE = parse(FILE, "x.toml")
RANKS = placed(MADE)
NODES = {0: "0000:1b:00.0", 1: "0000:43:00.0", 2: "0000:9b:00.0", 3: "0000:c3:00.0"}
EIGHT = Found(gpus=tuple(Gpu(f"0000:{k}", "NVIDIA H200", k // 4) for k in range(8)), nodes=2, numactl=True)


def machine(root: Path, node_of=lambda index: index // 2, nodes: int = 2) -> Path:
    """A tree of /proc and /sys with four GPUs."""
    for index, address in NODES.items():
        driver = root / "proc/driver/nvidia/gpus" / address
        driver.mkdir(parents=True)
        (driver / "information").write_text(f"Model: \t\t NVIDIA H200\nBus Location: \t {address}\n")
        pci = root / "sys/bus/pci/devices" / address
        pci.mkdir(parents=True)
        (pci / "numa_node").write_text(f"{node_of(index)}\n")
    for node in range(nodes):
        (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    return root


def test_a_machine_is_read_from_its_files(tmp_path):
    found = look(machine(tmp_path))
    assert found.gpus == tuple(Gpu(address, "NVIDIA H200", index // 2) for index, address in NODES.items())
    assert (found.nodes, found.kind) == (2, "NVIDIA H200")
    assert look(tmp_path / "nothing") == replace(found, gpus=(), nodes=1)


@pytest.mark.parametrize(
    ("devices", "words"),
    [((0, 1), "0"), ((2,), "1"), ((3, 2), "1"), ((0, 1, 2, 3), None), ((1, 2), None)],
)
def test_a_process_is_bound_to_the_nodes_of_its_gpus(tmp_path, devices, words):
    found = replace(look(machine(tmp_path)), numactl=True)
    wanted = [] if words is None else ["numactl", f"--cpunodebind={words}", f"--membind={words}"]
    assert bind(found, devices) == wanted


def test_several_nodes_are_bound_together_where_there_are_more(tmp_path):
    found = replace(look(machine(tmp_path, lambda index: index, nodes=4)), numactl=True)
    assert bind(found, (2, 0)) == ["numactl", "--cpunodebind=0,2", "--membind=0,2"]


@pytest.mark.parametrize("change", [{"numactl": False}, {"gpus": ()}, {"nodes": 1}])
def test_nothing_is_bound_where_it_would_change_nothing(tmp_path, change):
    assert bind(replace(look(machine(tmp_path)), **{"numactl": True, **change}), (0,)) == []


def test_a_machine_that_names_no_node_of_a_gpu_binds_nothing(tmp_path):
    assert bind(replace(look(machine(tmp_path, lambda index: -1)), numactl=True), (0,)) == []


def test_what_a_machine_says_comes_back_and_other_lines_do_not(tmp_path):
    found = replace(look(machine(tmp_path)), interface="eth0", autotuned=("a.txt",))
    assert told(json.dumps(asdict(found))) == found
    for line in ("", "{}", "[]", "Welcome", json.dumps({**asdict(found), "more": 1})):
        with pytest.raises((ValueError, TypeError)):
            told(line)


def test_this_machine_says_what_it_has_in_one_line():
    asking = [sys.executable, "-m", "engine.cluster.found", "127.0.0.1"]
    found = told(subprocess.check_output(asking, text=True, timeout=60, cwd=Path(looking.__file__).parents[2]))
    assert found.interface == "lo" and found.versions == looking.here().versions
    assert "jax" in found.versions and looking.interface("192.0.2.7") == ""


def test_versions_that_differ_are_named():
    ours, theirs = (
        Found(versions={"jax": "1", "jaxlib": "2", "serac": ""}),
        Found(versions={"jax": "1", "jaxlib": "3"}),
    )
    assert differing(ours, theirs) == ["jaxlib 3 there, 2 here"]
    assert differing(ours, Found()) == ["jax none there, 1 here", "jaxlib none there, 2 here"]


def test_the_arguments_of_a_worker_say_its_lane_its_rank_and_its_devices():
    assert worker(MADE, RANKS[1], front="10.0.0.1:5") == [
        *("worker", "/models/a b", "--numerics=invariant", "--prefix-cache=false", "--lane=b0", "--role=both"),
        *("--mesh=tp=4", "--rank=1", "--processes=2", "--devices=0,1", "--lane-interface=10.0.0.1"),
        *("--certs=/etc/serac/certs/lane", "--trusted-network", "--front=10.0.0.1:5"),
    ]
    here = of_lanes("both:tp=1")
    assert worker(here, placed(here)[0])[-1] == "--lane-interface=127.0.0.1"
    assert settings_flags({"numerics": "fast"}) == [], "a default needs no flag"


def test_on_gpus_a_process_sees_its_own_by_number():
    made = environment(MADE, RANKS[0], replace(EIGHT, interface="ib0"))
    assert made == {
        "SERAC_CLUSTER_SECRET_FILE": "/etc/serac/secret",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "NCCL_SOCKET_IFNAME": "=ib0",
    }
    assert "NCCL_SOCKET_IFNAME" not in environment(MADE, RANKS[0], EIGHT)
    assert command(MADE, RANKS[0], EIGHT, "py", ["worker"]).arguments == [
        *("numactl", "--cpunodebind=1", "--membind=1", "py", "-m", "engine.cli", "worker")
    ]


@pytest.mark.parametrize(("found", "text"), [(Found(), FILE), (EIGHT, FILE + 'device = "cpu"\n')])
def test_on_cpu_a_process_sees_as_many_devices_as_it_has(found, text):
    made = parse(text, "x.toml")
    assert environment(made, placed(made)[0], found) == {
        "SERAC_CLUSTER_SECRET_FILE": "/etc/serac/secret",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    assert command(made, placed(made)[0], found, "py", []).arguments == ["py", "-m", "engine.cli"]


def test_a_device_that_is_not_there_is_named():
    found = replace(EIGHT, gpus=EIGHT.gpus[:5])
    with pytest.raises(ConfigError, match="host h1: rank 0 of b0 takes device 5, and it has 5 GPUs"):
        command(MADE, RANKS[0], found, "py", [])


def test_the_leader_writes_the_autotune_file_and_all_load_it_where_it_is():
    made = replace(MADE, autotune=Path("/shared"))
    name = autotune_file("NVIDIA H200", "0.10.2", made, 4)
    found = replace(EIGHT, versions={"jaxlib": "0.10.2"})
    flags = [environment(made, rank, found).get("XLA_FLAGS") for rank in RANKS]
    assert flags == [f"--xla_gpu_dump_autotune_results_to=/shared/{name}", None]
    there = replace(found, autotuned=(name,))
    flags = [environment(made, rank, there).get("XLA_FLAGS") for rank in RANKS]
    assert flags == [f"--xla_gpu_load_autotune_results_from=/shared/{name}"] * 2


def test_an_autotune_file_that_one_host_does_not_see_is_loaded_by_none():
    made = replace(MADE, autotune=Path("/shared"))
    name = autotune_file("NVIDIA H200", "0.10.2", made, 4)
    there = replace(EIGHT, versions={"jaxlib": "0.10.2"}, autotuned=(name, "other.txt"))
    for found, loads in (({"h0": there, "h1": there}, 2), ({"h0": there, "h1": replace(there, autotuned=())}, 0)):
        commands = places.commands(made, "ssh", found)
        assert sum("load_autotune" in one.arguments[-1] for one in commands.values()) == loads


def test_an_autotune_file_is_of_one_device_kind_jaxlib_model_and_mesh():
    other = replace(MADE, serve={**MADE.serve, "model": "/models/b"})
    names = {autotune_file(kind, jaxlib, made, tp) for kind in ("NVIDIA H100", "NVIDIA H200")
             for jaxlib in ("0.10.2", "0.11.0") for made in (MADE, other) for tp in (2, 4)}  # fmt: skip
    assert len(names) == 16 and all(name.isascii() and "/" not in name and " " not in name for name in names)
    assert any(name.startswith("nvidia-h200-jaxlib0.10.2-tp4-") for name in names)


def test_another_host_sees_an_allowed_few_of_our_variables_and_no_secret():
    ours = {"NCCL_DEBUG": "INFO", "LANG": "C", "PATH": "/bin", "HF_TOKEN": "t", "NCCL_SECRET": "s", "AWS_X": "k",
            "SERAC_CLUSTER_SECRET": "00", "LD_PRELOAD": "x", "XNCCL_A": "1"}  # fmt: skip
    assert passed_on(ours) == {"NCCL_DEBUG": "INFO", "LANG": "C"}
    assert kept({"PATH": "/bin", "SERAC_MESH": "tp=2", "XLA_FLAGS": "x", "CUDA_VISIBLE_DEVICES": "0"}) == {
        "PATH": "/bin"
    }


def test_over_ssh_every_word_is_quoted_and_nothing_is_forwarded():
    made = ssh.commands(MADE, {"h0": Found(), "h1": EIGHT}, {"LANG": "C", "HF_TOKEN": "t"})
    words = list(made["b0", 1].arguments)
    given = [words[k + 1] for k, word in enumerate(words) if word == "-o"]
    for option in ("BatchMode=yes", "StrictHostKeyChecking=yes", "ForwardAgent=no", "ForwardX11=no",
                   "ClearAllForwardings=yes", "ConnectTimeout=5", "ControlPath=none", "IdentityFile=/keys/k",
                   "UserKnownHostsFile=/keys/known", "IdentitiesOnly=yes", "ServerAliveInterval=2"):  # fmt: skip
        assert option in given
    end = words.index("--")
    assert words[end - 4 : end] == ["-p", "2222", "-l", "serac"] and words[end + 1] == "10.0.0.1"
    there = shlex.split(words[-1])
    assert there[:2] == ["exec", "env"] and "LANG=C" in there and not any("TOKEN" in word for word in there)
    assert there[there.index("/opt/it's serac/bin/python") :][1:5] == ["-m", "engine.cli", "worker", "/models/a b"]
    assert "CUDA_VISIBLE_DEVICES=4,5" in shlex.split(made["b0", 0].arguments[-1])
    assert not any("IdentityFile" in word for word in made["b0", 0].arguments)


def test_no_secret_stands_in_any_argument(tmp_path):
    """What proves who a process is comes by its input, or from a file that the argument names."""
    (tmp_path / "secret").write_text("a" * 64)
    made = parse(FILE.replace("/etc/serac/secret", str(tmp_path / "secret")), "x.toml")
    for one in ssh.commands(made, {"h0": Found(), "h1": EIGHT}, {"SERAC_CLUSTER_SECRET": "b" * 64}).values():
        assert not any("a" * 64 in word or "b" * 64 in word for word in one.arguments)


def test_on_this_machine_a_worker_has_our_environment_without_our_settings():
    made = of_lanes("prefill:tp=2, decode:tp=1", {"device": "cpu"})
    commands = local.commands(made, local.find(made), {"PATH": "/bin", "SERAC_NUMERICS": "fast"})
    assert list(commands) == [("p0", 0), ("d1", 0)]
    assert commands["p0", 0].arguments[:4] == [sys.executable, "-m", "engine.cli", "worker"]
    assert commands["p0", 0].environment == {
        "PATH": "/bin",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }


def test_over_what_a_cluster_starts_is_chosen_by_where_its_hosts_are():
    assert places.chosen(MADE, "auto") == "ssh" and places.chosen(of_lanes("both:tp=1"), "auto") == "local"
    assert places.chosen(MADE, "slurm") == "slurm"
    mixed = replace(MADE, hosts=(replace(MADE.hosts[0], address="127.0.0.1"), *MADE.hosts[1:]))
    assert places.chosen(mixed, "auto") == "ssh"
    with pytest.raises(ConfigError, match="host h0 is another machine; expected ssh"):
        places.commands(MADE, "local")
    nameless = replace(MADE, hosts=(replace(MADE.hosts[0], address=""), *MADE.hosts[1:]))
    with pytest.raises(ConfigError, match="host h0 has none; expected one, since ssh goes there"):
        places.commands(nameless, "ssh")


def test_a_dry_run_takes_the_devices_of_the_file_to_be_there():
    made = places.commands(MADE, "ssh", places.assumed(MADE))
    assert "CUDA_VISIBLE_DEVICES=4,5" in made["b0", 0].arguments[-1]
    on_cpu = parse(FILE + 'device = "cpu"\n', "x.toml")
    assert "JAX_PLATFORMS=cpu" in places.commands(on_cpu, "ssh", places.assumed(on_cpu))["b0", 0].arguments[-1]
