"""The commands of a cluster over ssh: `ssh HOST "exec env NAME=VALUE python -m engine.cli worker ..."`.

    find:     ssh to every host at once -> what it has, or which host does not answer, within seconds
    commands: ssh for each process; its standard input and output are those of the worker

The host must be known and the key usable without asking: ssh never asks, forwards nothing and shares no connection.
A worker ends when its input ends, and sshd ends that with the channel: nothing is left behind. What the remote
command says can be read by everybody there, so no secret stands in it, and of our environment only an allowed few.
"""

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.cluster.commands import command, passed_on, worker
from engine.cluster.found import Found, differing, here, told
from engine.cluster.process import Command
from engine.cluster.topology import Host, Security, Topology, placed
from engine.errors import ConfigError, Misfit, Unavailable, shown

CONNECT_S, ANSWER_S = 5, 9.0  # a host that is not there is named within 10 s
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "UpdateHostKeys": "no",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "ControlMaster": "no",
    "ControlPath": "none",
    "ConnectTimeout": str(CONNECT_S),
    "ServerAliveInterval": "2",
    "ServerAliveCountMax": "3",
}
MOST_AT_ONCE = 32
REFUSED = 255  # of ssh itself
SAID = {
    "Host key verification failed": "its key is not the known one; add it to the known hosts",
    "Permission denied": "permission denied; its sshd must take a key that needs no typing",
    "Connection refused": "connection refused; does its sshd run, at this port?",
    "Could not resolve": "no such name; correct address in its [[host]]",
    "No route to host": "no route to it; is it up, and may this machine reach it?",
    "timed out": "no answer within 5 s; is it up, and may this machine reach it?",
}


def find(topology: Topology) -> dict[str, Found]:
    """What each host has. Raises Unavailable for one that is silent, ConfigError or Misfit for one unfit."""
    ours = here()
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        asked = {host.name: pool.submit(ask, host, topology, ours) for host in topology.hosts}
        return {name: each.result() for name, each in asked.items()}


def ask(host: Host, topology: Topology, ours: Found) -> Found:
    """What one host has."""
    folder = [] if topology.autotune is None else [str(topology.autotune)]
    words = [host.python, "-m", "engine.cluster.found", host.address, *folder]
    try:
        done = subprocess.run(remote(host, topology.security, {}, words), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=ANSWER_S)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"host {host.name}: no answer within {ANSWER_S:.0f} s; is it up, and its sshd?") from None
    except FileNotFoundError:
        raise ConfigError("over: got ssh, and there is no ssh on this machine; install it", field="over") from None
    if done.returncode == REFUSED:
        raise Unavailable(f"host {host.name}: {_advice(done.stderr)}")
    try:
        found = told(done.stdout.strip().rpartition("\n")[2])
    except (ValueError, TypeError):
        raise ConfigError(f"host {host.name}: {shown(host.python)} there has no Serac of this version (exit code "
                          f"{done.returncode}); set python in its [[host]]", field="python") from None  # fmt: skip
    if differ := differing(ours, found):
        raise Misfit(f"host {host.name}: versions differ: {', '.join(differ)}; install the same on all hosts")
    return found


def commands(
    topology: Topology, found: Mapping[str, Found], environ: Mapping[str, str] | None = None
) -> dict[tuple[str, int], Command]:
    """How to start each process, by lane and rank. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    made = {}
    for each in placed(topology):
        one = command(topology, each, found[each.host.name], each.host.python, worker(topology, each))
        there = {**passed_on(environ), **one.environment}
        made[each.slot] = Command(
            remote(each.host, topology.security, there, one.arguments), dict(environ), each.host.name, away=True
        )
    return made


def remote(host: Host, security: Security, environment: Mapping[str, str], words: Iterable[str]) -> list[str]:
    """What runs `words` on a host: every word quoted, since its shell reads them."""
    options = dict(OPTIONS)
    if security.known_hosts is not None:
        options["UserKnownHostsFile"] = _path(security.known_hosts)
    if host.key is not None:
        options |= {"IdentityFile": _path(host.key), "IdentitiesOnly": "yes"}
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    given += ["-p", str(host.port), *(["-l", host.user] if host.user else [])]
    there = ["exec", "env", *(f"{name}={value}" for name, value in sorted(environment.items())), *words]
    return ["ssh", "-T", *given, "--", host.address, shlex.join(there)]


def _path(path: Path) -> str:
    """As an option of ssh, which takes a space for the end of one."""
    return f'"{path}"' if " " in str(path) else str(path)


def _advice(text: str) -> str:
    """What is wrong and what to change, by what ssh said; not its own words, which hold the address."""
    return next((words for said, words in SAID.items() if said in text), "ssh failed; try it by hand from here")
