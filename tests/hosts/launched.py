"""`serac launch` over hosts that are namespaces with a real sshd each, as a person starts it.

    h0 front and launcher --ssh--> h1, h2  p0 prefill tp=2      h3  d0 decode tp=1      one device a process, CPU
                          all of it in mutual TLS by `serac certs init`; clients come from this machine

    with Launched(folder) as made:
        made.kill("p0", 1)            # the worker of rank 1, on its host
        made.hosts[3].down()

Costs about 20 s a start on two free cores, once programs are in the cache.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from engine.serve.client import Client
from tests.faults.served import Served, environment
from tests.hosts.namespaces import Host, Hosts
from tests.hosts.sshd import Sshd, python

PLACES = {("p0", 0): 1, ("p0", 1): 2, ("d0", 0): 3}
SERVE = {
    "model": "embedded",
    "device": "cpu",
    "numerics": "invariant",
    "max_num_seqs": 1,
    "max_num_batched_tokens": 16,
    "max_model_len": 256,
    "insecure_allow_remote": True,
}


class Launched:
    """The cluster. `serve` are settings over SERVE, `pythons` other interpreters by the number of a host."""

    lane, wait, restored = Served.lane, Served.wait, Served.restored

    def __init__(
        self, folder: Path, flags: tuple[str, ...] = (), pythons: Mapping[int, Path] | None = None, **serve
    ):
        self.folder, self._stack, self._flags = folder, ExitStack(), flags
        self._pythons, self._serve = pythons or {}, SERVE | serve
        self.log, self.file = folder / "log", folder / "cluster.toml"
        self.hosts = Hosts(4)
        self.ready: dict = {}

    def __enter__(self) -> "Launched":
        with ExitStack() as stack:
            stack.enter_context(self.hosts)
            self._servers = [stack.enter_context(Sshd(host, self.folder)) for host in list(self.hosts)[1:]]
            self._certificates()
            self.file.write_text("\n".join(self.lines()) + "\n")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _certificates(self) -> None:
        if (self.folder / "certs").exists():
            return
        names = [f"--host={host.name}={host.address}" for host in self.hosts]
        words = ["certs", "init", self.folder / "certs", "--cluster=lab", *names]
        subprocess.run([sys.executable, "-m", "engine.cli", *words], check=True, capture_output=True, timeout=60)

    def lines(self) -> list[str]:
        """The file."""
        (self.folder / "known").write_text("".join(server.known_hosts.read_text() for server in self._servers))
        own, address = python(self.folder), self.hosts[0].address
        lines = ["[cluster]", 'name = "lab"', "[security]", "trusted_network = true"]
        lines += [f'certs = "{self.folder}/certs"', f'known_hosts = "{self.folder}/known"']
        lines += ["[front]", f'address = "{address}:0"', f'host = "{address}"', f'admin_host = "{address}"']
        lines += ["port = 0", "admin_port = 0"]
        for name, role, tp in (("p0", "prefill", 2), ("d0", "decode", 1)):
            hosts = [f"h{index}" for (lane, _), index in PLACES.items() if lane == name]
            lines += ["[[lane]]", f'name = "{name}"', f'role = "{role}"', f'mesh = "tp={tp}"']
            lines += [f"hosts = {json.dumps(hosts)}"]
        for index, server in enumerate(self._servers, 1):
            host = server.host
            lines += ["[[host]]", f'name = "{host.name}"', f'address = "{host.address}"', "devices = 1"]
            lines += ['user = "root"', f"port = {server.port}", f'key = "{server.key}"']
            lines += [f'python = "{self._pythons.get(index, own)}"']
        return [*lines, "[serve]", *(f"{name} = {json.dumps(value)}" for name, value in self._serve.items())]

    def begin(self) -> subprocess.Popen:
        """Start the launcher; returns at once."""
        command = ["env", "-u", "XLA_FLAGS", sys.executable, "-m", "engine.cli", "launch", self.file]
        with self.log.open("w") as errors:
            self.front = self.hosts[0].popen(
                [*command, "--over", "ssh", *self._flags], stdout=subprocess.PIPE, stderr=errors, env=environment()
            )
        return self.front

    def start(self) -> float:
        """Start it and wait until it is ready; the seconds that took."""
        began = time.monotonic()
        self.begin()
        self.ready = json.loads(self.front.stdout.readline() or "{}")
        assert self.ready.get("event") == "ready", self.log.read_text()[-3000:]
        self.client = Client(self.ready["grpc"], admin=self.ready["admin"])
        return time.monotonic() - began

    def host(self, lane: str, rank: int = 0) -> Host:
        """Where a process runs."""
        return self.hosts[PLACES[lane, rank]]

    def workers(self, host: Host) -> list[int]:
        """The pids of the worker processes of a host, and of what sshd started for them."""
        return [pid for pid in host.pids() if "engine.cli\0worker" in words(pid)]

    def left(self) -> dict[str, list[int]]:
        """Workers that run anywhere, by host."""
        return {host.name: found for host in self.hosts if (found := self.workers(host))}

    def kill(self, lane: str, rank: int = 0, how: signal.Signals = signal.SIGKILL) -> float:
        """Kill -9, or another signal, to a worker on its host; when."""
        for pid in self.workers(self.host(lane, rank)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        return time.monotonic()

    def ssh_of(self, lane: str, rank: int = 0) -> list[int]:
        """The ssh clients of the launcher for a process."""
        wanted = (f"--lane={lane}", f"--rank={rank}")
        found = ((pid, words(pid)) for pid in self.hosts[0].pids())
        return [pid for pid, said in found if said.startswith("ssh\0") and all(word in said for word in wanted)]

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.front.terminate()
        try:
            return self.front.wait(60)
        finally:
            self.close()

    def close(self) -> None:
        """End the launcher, however it is."""
        self.front.kill()
        self.front.wait()
        self.front.stdout.close()
        if self.ready:
            self.client.close()
            self.ready = {}


def words(pid: int) -> str:
    """The command line of a process, its words apart by NUL; empty where it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
