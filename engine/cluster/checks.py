"""What is wrong with one host before weights are loaded: facts in, findings out, nothing asked.

    Facts + Wanted  --of_host-->  ok | warn | fail, a finding for each check, with what to do

A warning is what costs speed or breaks later; a failure is what stops a start. Exit code: 69 where a host is
missing or cannot be reached, else 2 where anything failed, else 0. What several hosts must agree on stands in
agreement.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

MIB, GIB = 2**20, 2**30
CONFIGURATION, MISSING = 2, 69
LEAST_PYTHON = (3, 11)
SHM_LEAST, SHM_GOOD = 64 * MIB, GIB
NOFILE_LEAST, NOFILE_GOOD = 1024, 4096
MEMLOCK_GOOD = 64 * MIB
CLOCK_RATIO = 0.05  # how far monotonic and wall time may run apart
LOOPBACK, NAMED_HERE = "lo", ("address", "loopback", "another address")
OLDEST_S = 1_700_000_000  # a wall clock before November 2023 was never set
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([<>=!~0-9.,\s]*)$")
BOUND = re.compile(r"(>=|<|==|>|<=)\s*([\d.]+)")
HELD: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda has, want: has >= want,
    "<": lambda has, want: has < want,
    "==": lambda has, want: has == want,
    ">": lambda has, want: has > want,
    "<=": lambda has, want: has <= want,
}
Level = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """One line of the doctor: `todo` is what to do; `code` counts where it failed."""

    level: Level
    host: str
    what: str
    words: str
    todo: str = ""
    code: int = CONFIGURATION


@dataclass(frozen=True, slots=True)
class Facts:
    """What a host says of itself. Sizes in bytes; a limit of -1 is none."""

    versions: Mapping[str, str] = field(default_factory=dict)
    requires: Sequence[str] = ()  # what Serac declares, `jax<0.13,>=0.10.2`
    gpus: Sequence[str] = ()  # the kinds that the driver shows, in order
    gpu_problem: str = ""  # why JAX cannot use those
    driver: str = ""
    gpu_free: Sequence[float] = ()  # shares of memory that nobody holds
    memory_free: int = 0
    shm_free: int = 0
    nofile: int = -1
    memlock: int = -1
    clock_ratio: float = 1.0  # monotonic seconds per second of the wall clock
    wall_s: float = 0.0
    cache_problem: str = ""
    taken: Sequence[str] = ()  # settings whose port somebody has
    interface: str = ""  # which has the lane's address
    named: str = "address"  # where the host's own name leads: its address, loopback, nothing, or another


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a host is for. `spanning`: it talks with others on its address."""

    devices: Sequence[int] = ()
    on_gpus: bool = False
    spanning: bool = False
    listens: bool = False  # the front will


def code(findings: Sequence[Finding]) -> int:
    """The exit code of all."""
    codes = {each.code for each in findings if each.level == "fail"}
    return MISSING if MISSING in codes else max(codes, default=0)


def of_host(host: str, facts: Facts, wanted: Wanted) -> list[Finding]:
    """Every check of one host on its own."""
    checks = (python, packages, devices, memory, shared_memory, files, locked, ports, clock, cache, interface)
    found = (check(facts, wanted) for check in checks)
    return [each._replace(host=host) for each in found if each is not None]


def ok(what: str, words: str) -> Finding:
    return Finding("ok", "", what, words)


def warn(what: str, words: str, todo: str) -> Finding:
    return Finding("warn", "", what, words, todo)


def fail(what: str, words: str, todo: str) -> Finding:
    return Finding("fail", "", what, words, todo)


def python(facts: Facts, wanted: Wanted) -> Finding:
    """Its version."""
    version = facts.versions.get("python", "")
    if numbers(version) < LEAST_PYTHON:
        return fail("python", version or "unknown", "Serac needs 3.11 or later; set python in its [[host]]")
    return ok("python", version)


def packages(facts: Facts, wanted: Wanted) -> Finding:
    """Whatever Serac requires is there, in versions that it knows."""
    if problems := unmet(facts.requires, facts.versions):
        return fail("packages", ", ".join(problems), "pip install --upgrade serac, in a fresh environment")
    told = ("serac", "jax", "jaxlib", "grpcio")
    return ok("packages", ", ".join(f"{name} {facts.versions[name]}" for name in told if facts.versions.get(name)))


def unmet(requires: Sequence[str], versions: Mapping[str, str]) -> list[str]:
    """`jax 0.9.0, wants >=0.10.2`, for each requirement that is absent or out of bounds."""
    problems = []
    for requirement in requires:
        if (match := REQUIREMENT.fullmatch(requirement)) is None:
            continue  # of an extra or of another platform
        name, bounds = match[1], BOUND.findall(match[2])
        version = versions.get(name, "")
        if not version:
            problems.append(f"{name} is absent")
        elif not all(HELD[sign](numbers(version), numbers(bound)) for sign, bound in bounds):
            problems.append(f"{name} {version}, wants {match[2].strip()}")
    return problems


def numbers(version: str) -> tuple[int, ...]:
    """`0.10.2rc1` as 0, 10, 2."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def devices(facts: Facts, wanted: Wanted) -> Finding:
    """The GPUs that lanes take are there, usable and free."""
    if not wanted.on_gpus:
        return ok("devices", "runs on the CPU") if not facts.gpus else _idle(facts)
    if not facts.gpus:
        return fail("devices", "no GPU that the driver shows", "see nvidia-smi there, or device = cpu")
    if missing := [device for device in wanted.devices if device >= len(facts.gpus)]:
        words = f"has {len(facts.gpus)} GPUs, and lanes take device {missing[0]}"
        return fail("devices", words, "correct devices in its [[host]], or see nvidia-smi there")
    if facts.gpu_problem:
        return fail("devices", facts.gpu_problem, "make the GPUs usable, or device = cpu")
    busy = [device for device in wanted.devices if device < len(facts.gpu_free) and facts.gpu_free[device] < 0.9]
    kinds = ", ".join(sorted({facts.gpus[device] for device in wanted.devices}))
    words = f"{len(wanted.devices)} x {kinds}, driver {facts.driver or 'unknown'}"
    if busy:
        used = 1 - facts.gpu_free[busy[0]]
        return warn(
            "devices", f"{words}; others hold {used:.0%} of device {busy[0]}", "end them: see nvidia-smi there"
        )
    return ok("devices", words)


def _idle(facts: Facts) -> Finding:
    """GPUs that nothing will use."""
    why = facts.gpu_problem or "the settings say so"
    return warn(
        "devices", f"runs on the CPU beside {len(facts.gpus)} GPUs: {why}", "device = gpu where they are meant"
    )


def memory(facts: Facts, wanted: Wanted) -> Finding:
    """Of the host; what the model takes of it is known later."""
    words = f"{gib(facts.memory_free)} free"
    return ok("memory", words) if facts.memory_free >= GIB else warn("memory", words, "end what else runs there")


def shared_memory(facts: Facts, wanted: Wanted) -> Finding:
    """NCCL and the lanes of one host pass data through it."""
    words = f"/dev/shm has {gib(facts.shm_free)} free"
    todo = "mount it larger: --shm-size in Docker, an emptyDir of medium Memory in Kubernetes"
    if facts.shm_free < SHM_LEAST:
        return fail("shm", words, todo)
    return warn("shm", words, todo) if wanted.on_gpus and facts.shm_free < SHM_GOOD else ok("shm", words)


def files(facts: Facts, wanted: Wanted) -> Finding:
    """Each stream and each connection is an open file."""
    words = "unlimited" if facts.nofile < 0 else f"{facts.nofile:,} open files"
    todo = "ulimit -n 65536, LimitNOFILE= in systemd"
    if 0 <= facts.nofile < NOFILE_LEAST:
        return fail("nofile", words, todo)
    return warn("nofile", words, todo) if 0 <= facts.nofile < NOFILE_GOOD else ok("nofile", words)


def locked(facts: Facts, wanted: Wanted) -> Finding:
    """RDMA and pinned buffers lock memory."""
    words = "unlimited" if facts.memlock < 0 else f"{gib(facts.memlock)} may be locked"
    if wanted.on_gpus and 0 <= facts.memlock < MEMLOCK_GOOD:
        return warn("memlock", words, "ulimit -l unlimited, LimitMEMLOCK=infinity in systemd; RDMA needs it")
    return ok("memlock", words)


def ports(facts: Facts, wanted: Wanted) -> Finding | None:
    """The front's listeners find theirs free."""
    if not wanted.listens:
        return None
    if facts.taken:
        return fail("ports", f"taken: {', '.join(facts.taken)}", "end who has it (ss -ltnp), or choose another")
    return ok("ports", "free")


def clock(facts: Facts, wanted: Wanted) -> Finding:
    """Deadlines trust the monotonic clock, certificates the one on the wall."""
    if abs(facts.clock_ratio - 1) > CLOCK_RATIO:
        words = f"monotonic time runs at {facts.clock_ratio:.2f} of the wall clock's pace"
        return warn("clock", words, "let time be slewed, not stepped; check the clock source of a virtual machine")
    if facts.wall_s < OLDEST_S:
        return fail("clock", "was never set", "start its time service (chrony, systemd-timesyncd)")
    return ok("clock", "monotonic and wall time agree")


def cache(facts: Facts, wanted: Wanted) -> Finding:
    """Without it every start compiles anew; others who could write there could run code in ours."""
    if facts.cache_problem:
        todo = "chmod 700 it, or --compile-cache to a folder of one's own"
        return warn("cache", f"compiled programs: {facts.cache_problem}", todo)
    return ok("cache", "compiled programs are kept, for its owner alone")


def interface(facts: Facts, wanted: Wanted) -> Finding | None:
    """The host has the address at which others of its lane look for it, and its own name leads there."""
    if not wanted.spanning:
        return None
    if not facts.interface:
        words = "no interface has its address"
        return fail("interface", words, "correct address in its [[host]]; ip -br address shows them there")
    if not wanted.on_gpus and facts.named not in (NAMED_HERE if facts.interface == LOOPBACK else ("address",)):
        words = (
            f"its own name leads {facts.named if facts.named != 'loopback' else 'to loopback'}, where gloo listens"
        )
        return fail("interface", words, "map its name to its address in /etc/hosts there")
    return ok("interface", f"{facts.interface} has its address")


def gib(count: int) -> str:
    """A size for a person."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
