"""A real Slurm of one node on this machine, from Debian's packages: controller, node and client on loopback.

    with Slurm(folder) as slurm:
        slurm.run(["srun", "-n2", "env"])
        slurm.run(["sbatch", "--requeue", "job.sh"])      # a job that exits with 75 is queued again

There is no authentication and nothing is installed; ports are free ones, every file lies in `folder`. The node says
that it has `cpus` processors, whatever this machine has. A requeued job starts again after about `EXPIRE_S`.
Costs 4 MB of packages once, a second a start.
"""

import os
import socket
import subprocess
import time
from pathlib import Path

from tests.hosts.packages import libraries, unpack

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libslurm38", "libhwloc15"]
START_S = 20.0
EXPIRE_S = 5  # until then the controller holds back a job that is queued again; its default is 120
REQUEUE = 75
TOOLS = ("srun", "sbatch", "squeue", "sinfo", "scontrol", "scancel")


def why_not() -> str:
    """Why there can be no Slurm here, in a sentence; nothing when there can."""
    if os.geteuid() != 0:
        return "a Slurm node needs root to become its users"
    try:
        unpack(PACKAGES)
    except LookupError as error:
        return str(error)
    return ""


def free_ports(count: int) -> list[int]:
    """Ports that nobody has."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Slurm:
    """One controller, one node."""

    def __init__(self, folder: Path, cpus: int = 4):
        self.folder, self._root = folder, unpack(PACKAGES)
        self.conf = folder / "slurm.conf"
        self._plugins = next(self._root.rglob("auth_none.so")).parent
        self._processes: list[subprocess.Popen] = []
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self.conf.write_text("\n".join(self._lines(cpus, *free_ports(2))) + "\n")

    def _lines(self, cpus: int, controller_port: int, node_port: int) -> list[str]:
        host = socket.gethostname().split(".")[0]
        return [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller_port}",
            f"SlurmdPort={node_port}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/none",
            f"AuthInfo=cred_expire={EXPIRE_S}",
            "CredType=cred/none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            f"RequeueExit={REQUEUE}",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",
            f"PluginDir={self._plugins}",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder / 'spool'}",
            f"SlurmctldPidFile={self.folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={self.folder / 'slurmd.pid'}",
            f"SlurmctldLogFile={self.folder / 'slurmctld.log'}",
            f"SlurmdLogFile={self.folder / 'slurmd.log'}",
            f"NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN",
            "PartitionName=all Nodes=n0 Default=YES MaxTime=INFINITE State=UP",
        ]

    @property
    def environment(self) -> dict[str, str]:
        """For srun, sbatch and the others, and for programs that call them."""
        tools = self.folder / "tools"
        return {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "LD_LIBRARY_PATH": libraries(self._root),
            "PATH": f"{tools}:{os.environ['PATH']}",
        }

    def run(self, command: list, timeout: float = 60.0, **keywords) -> subprocess.CompletedProcess:
        """Run a client of this Slurm."""
        settings = {"capture_output": True, "text": True, "cwd": self.folder} | keywords
        return subprocess.run(list(map(str, command)), env=self.environment, timeout=timeout, **settings)

    def __enter__(self) -> "Slurm":
        (self.folder / "tools").mkdir()
        for name in TOOLS:
            (self.folder / "tools" / name).symlink_to(self._root / "usr/bin" / name)
        sbin = self._root / "usr/sbin"
        commands = [
            [sbin / "slurmctld-wlm", "-D", "-c", "-f", self.conf],
            [sbin / "slurmd-wlm", "-D", "-N", "n0", "-f", self.conf, "-d", sbin / "slurmstepd-wlm"],
        ]
        with (self.folder / "start.log").open("w") as log:
            for command in commands:
                self._processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        until = time.monotonic() + START_S
        while "idle" not in self.run(["sinfo", "-h", "-o", "%t"]).stdout:
            if time.monotonic() > until or any(process.poll() is not None for process in self._processes):
                said = "\n".join(path.read_text()[-800:] for path in sorted(self.folder.glob("*.log")))
                self.close()
                raise OSError(f"Slurm does not start:\n{said}")
            time.sleep(0.1)
        return self

    def close(self) -> None:
        """End its jobs, then it."""
        self.run(["scancel", "--full", "--signal=KILL", "--user=root"])
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __exit__(self, *_) -> None:
        self.close()
