"""The command that starts a process of the cluster, and its environment, wherever it runs.

    [numactl ...] PYTHON -m engine.cli worker MODEL [settings] --lane=p0 --role=prefill --mesh=tp=8 --rank=0
        --processes=2 --devices=0,1,2,3 --lane-interface=10.0.0.1 [--trusted-network] [--front=HOST:PORT]

JAX reads devices and flags from the environment as it starts: on GPUs CUDA_VISIBLE_DEVICES, on CPU a number of
virtual devices. No secret stands in either: a worker hears it on its input, or reads the file that it is told of.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

from engine.cluster.found import Found, bind
from engine.cluster.process import Command
from engine.cluster.topology import LOCAL, LOOPBACK, Placed, Topology
from engine.config import ROWS, Value
from engine.environment import DEVICE_COUNT, virtual_devices
from engine.errors import ConfigError

LANE = "lane"  # the folder of a worker's certificates among those of serac certs init
OF_FRONT = (  # settings of serve that no lane reads
    *("model", "download", "tls_cert", "tls_key", "tls_client_ca", "worker_api", "token_file"),
    *("insecure_allow_remote", "max_message_size", "max_calls", "max_wait", "stall", "drain", "log_dir"),
)
SECRET_FILE = "SERAC_CLUSTER_SECRET_FILE"
PASSED = re.compile(r"NCCL_\w+|HF_HOME|HF_HUB_OFFLINE|LANG|LC_ALL|TZ")  # from whoever starts, to every host
NOT_PASSED = re.compile(r"SECRET(?!_FILE$)|TOKEN|PASSWORD|CREDENTIAL|_KEY")


def settings_flags(serve: Mapping[str, Value]) -> list[str]:
    """Settings of a lane as flags, where they differ from the default; the model is no flag."""
    given = {name: value for name, value in serve.items() if name not in OF_FRONT and value != ROWS[name].default}
    return [
        f"{ROWS[name].flag}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in given.items()
    ]


def worker(topology: Topology, placed: Placed, front: str = "", interface: str = "") -> list[str]:
    """The arguments of `serac` for one process. `interface`: its address, where the topology does not say it."""
    lane, interface = placed.lane, interface or placed.host.address
    words = ["worker", str(topology.serve.get("model", ROWS["model"].default)), *settings_flags(topology.serve)]
    words += [f"--lane={lane.name}", f"--role={lane.role}", f"--mesh=tp={lane.tp}", f"--rank={placed.rank}"]
    words += [f"--processes={len(lane.hosts)}", f"--devices={','.join(map(str, placed.devices))}"]
    words += [f"--lane-interface={LOOPBACK if interface == LOCAL else interface}"]
    if front and topology.security.certs is not None:  # who is started by us gets his over the channel
        words += [f"--certs={topology.security.certs / LANE}"]
    words += ["--trusted-network"] * topology.security.trusted_network
    return words + [f"--front={front}"] * bool(front)


def command(topology: Topology, placed: Placed, found: Found, python: str, words: Sequence[str]) -> Command:
    """The whole of it on a machine that has what was `found`. Raises ConfigError for devices it does not have."""
    check(topology, placed, found)
    arguments = [
        *bind(found, placed.devices if _on_gpus(topology, found) else ()),
        python,
        "-m",
        "engine.cli",
        *words,
    ]
    return Command(arguments, environment(topology, placed, found))


def check(topology: Topology, placed: Placed, found: Found) -> None:
    """Raise ConfigError where a process would not find its devices."""
    missing = [device for device in placed.devices if device >= len(found.gpus)]
    if _on_gpus(topology, found) and missing:
        words = f"host {placed.host.name}: rank {placed.rank} of {placed.lane.name} takes device {missing[0]}, "
        raise ConfigError(
            words + f"and it has {len(found.gpus)} GPUs; correct devices in its [[host]]", field="devices"
        )


def environment(topology: Topology, placed: Placed, found: Found) -> dict[str, str]:
    """What must be set for one process, and nothing else."""
    made = {} if topology.security.secret_file is None else {SECRET_FILE: str(topology.security.secret_file)}
    if not _on_gpus(topology, found):
        count = virtual_devices(len(placed.devices))
        return made | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{DEVICE_COUNT}={count}"}
    made |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, placed.devices))}
    if found.interface:
        made["NCCL_SOCKET_IFNAME"] = f"={found.interface}"  # = : that name, not all that begin so
    if topology.autotune is not None and (flags := autotune_flags(topology, placed, found)):
        made["XLA_FLAGS"] = " ".join(flags)
    return made


def autotune_flags(topology: Topology, placed: Placed, found: Found) -> list[str]:
    """XLA's flags: all load the file of this lane where it is, else the leader writes it.

    The folder must be one for all hosts: ranks that load different files may run different programs.
    """
    assert topology.autotune is not None
    name = autotune_file(found.kind, found.versions.get("jaxlib", ""), topology, placed.lane.tp)
    path = topology.autotune / name
    if name in found.autotuned:
        return [f"--xla_gpu_load_autotune_results_from={path}"]
    return [f"--xla_gpu_dump_autotune_results_to={path}"] * (placed.rank == 0)


def autotune_file(kind: str, jaxlib: str, topology: Topology, tp: int) -> str:
    """One file for each (device kind, jaxlib, model with its settings, mesh)."""
    what = "\n".join([str(topology.serve.get("model", "")), *sorted(settings_flags(topology.serve))])
    digest = hashlib.sha256(what.encode()).hexdigest()[:12]
    return re.sub(r"[^a-z0-9.-]+", "-", f"{kind}-jaxlib{jaxlib}-tp{tp}-{digest}.txt".lower())


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """What of this environment another host may see."""
    return {
        name: value for name, value in environ.items() if PASSED.fullmatch(name) and not NOT_PASSED.search(name)
    }


def kept(environ: Mapping[str, str]) -> dict[str, str]:
    """What of this environment a worker on this machine has: all but the settings, which it gets as arguments."""
    without = {row.variable for row in ROWS.values()} | {"SERAC_CONFIG", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES"}
    return {name: value for name, value in environ.items() if name not in without}


def _on_gpus(topology: Topology, found: Found) -> bool:
    return topology.serve.get("device") != "cpu" and bool(found.gpus)
