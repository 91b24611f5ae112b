"""Hosts made of namespaces: each with its own address, name, /etc/hosts, /dev/shm and loopback, on one bridge.

    this machine  10.77.k.254 --- bridge srk --- eth0 of h0  10.77.k.1
                                             +-- eth0 of h1  10.77.k.2

    with Hosts(2) as hosts:
        hosts[1].popen([sys.executable, "server.py"])
        hosts[0].blackhole(hosts[1])        # what h0 sends to h1 is swallowed; h1's packets still arrive
        hosts[1].down()                     # its cable is pulled
        hosts.heal()

A host is kept by one process that waits for its input to end, so it cannot outlive this one; commands enter its
namespaces. k is claimed by a lock that dies with its holder: who starts removes what a killed run left. Processes
share one table of pids and one disk. Costs about 60 ms a host.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PREFIX = "sr"
NETNS, ETC = Path("/run/netns"), Path("/etc/netns")
SUBNETS = range(256)
SSHD_USER = "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
KEEP = """
set -e
hostname "$0"
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mkdir -m 755 /run/sshd
echo kept
exec cat
"""


def ip(*words: str, check: bool = True) -> str:
    """What `ip` prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str:
    """Why hosts cannot be made here, in a sentence; nothing when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here (iproute2 and util-linux bring it)"
    try:
        with Hosts(1) as hosts:
            hosts[0].run(["true"])
    except OSError as error:
        return f"namespaces are refused here: {error}"
    return ""


class Host:
    """One host; made by Hosts."""

    def __init__(self, subnet: int, index: int):
        self.subnet, self.index, self.name = subnet, index, f"h{index}"
        self.namespace = f"{PREFIX}{subnet}{self.name}"
        self.address = f"10.77.{subnet}.{index + 1}"
        self._outside = f"{PREFIX}{subnet}v{index}"
        self._keeper: subprocess.Popen[str] | None = None

    def make(self, names: str) -> None:
        """The namespaces, the cable and the keeper. `names` is the /etc/hosts of all."""
        etc = ETC / self.namespace
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(names)
        (etc / "resolv.conf").write_text("")
        (etc / "passwd").write_text(Path("/etc/passwd").read_text() + SSHD_USER)
        ip("netns", "add", self.namespace)
        ip("link", "add", self._outside, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self._outside, "master", f"{PREFIX}{self.subnet}", "up")
        for words in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
        ):
            self.ip(*words)
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--ipc", "--mount"]
        command += ["sh", "-c", KEEP, self.name]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)  # fmt: skip
        if self._keeper.stdout.readline() != "kept\n":
            raise OSError(self._keeper.stderr.read().strip())

    def ip(self, *words: str, check: bool = True) -> str:
        """`ip` inside."""
        return ip("-n", self.namespace, *words, check=check)

    def inside(self, command: list) -> list[str]:
        """The command that runs `command` there, in this folder and under the same pid."""
        enter = ["nsenter", "--target", str(self._keeper.pid), "--net", "--uts", "--ipc", "--mount"]
        return [*enter, f"--wdns={os.getcwd()}", *map(str, command)]

    def run(self, command: list, timeout: float = 60.0, **keywords) -> subprocess.CompletedProcess:
        """Run to its end; text, output captured."""
        settings = {"capture_output": True, "text": True, "timeout": timeout} | keywords
        return subprocess.run(self.inside(command), **settings)

    def popen(self, command: list, **keywords) -> subprocess.Popen:
        """Start a process there; it is killed with the host."""
        return subprocess.Popen(self.inside(command), **{"text": True, **keywords})

    def pids(self) -> list[int]:
        """Every process that runs there."""
        keeper = self._keeper.pid if self._keeper is not None else 0
        return [pid for pid in map(int, ip("netns", "pids", self.namespace, check=False).split()) if pid != keeper]

    def signal(self, number: int) -> None:
        """To every process there: SIGKILL, SIGSTOP, SIGCONT."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def down(self) -> None:
        """Pull its cable."""
        self.ip("link", "set", "eth0", "down")

    def up(self) -> None:
        """Put it back."""
        self.ip("link", "set", "eth0", "up")

    def blackhole(self, other: "Host | str") -> None:
        """Swallow what this host sends to `other`: connections stay half open, without a word to either side."""
        address = other.address if isinstance(other, Host) else other
        self.ip("route", "replace", "blackhole", f"{address}/32")

    def heal(self) -> None:
        """As it was made: cable in, no blackholes."""
        self.ip("route", "flush", "type", "blackhole", check=False)
        self.up()

    def close(self) -> None:
        """End its processes and remove it; also what another run left of it."""
        for _ in range(100):
            self.signal(signal.SIGKILL)
            if not self.pids():
                break
            time.sleep(0.02)
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
            for stream in (self._keeper.stdin, self._keeper.stdout, self._keeper.stderr):
                stream.close()
        ip("link", "del", self._outside, check=False)
        ip("netns", "del", self.namespace, check=False)
        shutil.rmtree(ETC / self.namespace, ignore_errors=True)
        with contextlib.suppress(OSError):
            ETC.rmdir()


class Hosts:
    """`count` hosts on a bridge. Use as a context: all of it is gone afterwards."""

    def __init__(self, count: int):
        self._count, self.hosts, self._lock = count, [], None
        self.subnet = -1

    def __enter__(self) -> "Hosts":
        self.subnet, self._lock = claim()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __len__(self) -> int:
        return len(self.hosts)

    def __iter__(self):
        return iter(self.hosts)

    @property
    def address(self) -> str:
        """This machine, as the hosts see it."""
        return f"10.77.{self.subnet}.254"

    def _make(self) -> None:
        bridge = f"{PREFIX}{self.subnet}"
        ip("link", "add", "name", bridge, "type", "bridge")
        ip("addr", "add", f"{self.address}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        hosts = [Host(self.subnet, index) for index in range(self._count)]
        names = "".join(f"{host.address} {host.name}\n" for host in hosts)
        for host in hosts:
            self.hosts.append(host)
            host.make("127.0.0.1 localhost\n" + names)

    def heal(self) -> None:
        """Every host as it was made."""
        for host in self.hosts:
            host.heal()

    def close(self) -> None:
        """Remove everything, and give the subnet back."""
        for host in self.hosts:
            host.close()
        sweep(self.subnet)
        self._lock.close()


def claim() -> tuple[int, socket.socket]:
    """The first subnet that nobody holds, swept, and its lock: a name that the kernel frees with its holder."""
    for subnet in SUBNETS:
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0serac-hosts-{subnet}")
        except OSError:
            lock.close()
            continue
        sweep(subnet)
        return subnet, lock
    raise OSError("every subnet is taken")


def sweep(subnet: int) -> None:
    """Remove what bears this subnet's names."""
    for index in leftovers(subnet):
        Host(subnet, index).close()
    ip("link", "del", f"{PREFIX}{subnet}", check=False)


def leftovers(subnet: int) -> list[int]:
    """Hosts of a subnet that are still there, by index."""
    names = [path.name for folder in (NETNS, ETC) if folder.is_dir() for path in folder.iterdir()]
    start = f"{PREFIX}{subnet}h"
    return sorted({int(name.removeprefix(start)) for name in names if name.startswith(start)})
