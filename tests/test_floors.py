"""The dependency rule, as a table: a package may import itself, the standard library and what is named here."""

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("engine", "sharding", "pallas_kernels", "bench")
OPEN = {"engine.errors", "engine.clock", "engine.config", "engine.observe"}  # to every floor of engine from 2 up
DEVICE = {"engine.models", "engine.weights", "sharding", "pallas_kernels", "jax", "flax", "numpy"}
GRPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google"}
BUILT = {
    "engine.core",
    "engine.environment",
    "engine.lanes",
    "engine.movers",
    "engine.planning",
    "engine.text",
    "engine.replica",
    "engine.runner",
    "prometheus_client",
}
CLUSTER = {"engine.environment", "engine.lanes", "engine.movers.addresses"}
STORES = {"flax", "orbax", "safetensors", "huggingface_hub"}
MAY_IMPORT: dict[str, set[str]] = {  # the longest matching prefix wins
    "engine": set(),
    "engine.errors": set(),
    "engine.clock": {"engine.errors"},
    "engine.config": {"engine.errors", "engine.clock"},
    "engine.lanes": {"engine.errors", "engine.core.roles"},
    "engine.core": {"engine.errors", "engine.clock", "numpy"},
    "engine.text": {"engine.errors", "engine.clock", "tokenizers", "jinja2", "llguidance"},
    "engine.observe": {"engine.errors", "engine.clock", "prometheus_client"},
    "engine.observe.plan_bytes": {"engine.errors", "engine.core.plan", "msgpack", "numpy"},
    "engine.observe.plan_log": {"engine.errors", "engine.core.plan", "engine.observe", "msgpack", "numpy"},
    "engine.observe.plan_writer": {"engine.errors", "engine.core.plan", "engine.observe", "numpy"},
    "pallas_kernels": {"jax", "numpy"},
    "sharding": {"jax", "numpy"},
    "engine.models": OPEN | {"pallas_kernels", "sharding", "jax", "flax", "numpy"},
    "engine.weights": OPEN | STORES | {"engine.models", "engine.embedded", "sharding", "jax", "numpy"},
    "engine.runner": OPEN | DEVICE | {"engine.core.plan", "msgpack"},
    "engine.planning": OPEN | DEVICE | {"engine.runner"},
    "engine.movers": OPEN | {"engine.core", "numpy", "grpc", "msgpack", "xxhash"},
    "engine.movers.nixl": OPEN | {"engine.movers.staging", "numpy", "nixl"},
    "engine.movers.local": OPEN | {"engine.core.handoff", "engine.movers", "numpy", "jax"},
    "engine.replica": OPEN | {"engine.core", "engine.text", "engine.movers", "numpy", "msgpack"},
    "engine.replica.build": OPEN | DEVICE | BUILT,
    "engine.replica.build_lane": OPEN | DEVICE | BUILT,
    "engine.serve": OPEN | GRPC | {"engine.replica", "engine.text", "engine.core.request"},
    "engine.serve.vllm_engine": OPEN
    | GRPC
    | {"engine.serve", "engine.core.blocks", "engine.core.request", "engine.text", "smg_grpc_proto"}
    | {"engine.replica.pairing"},
    "engine.cluster.certs": OPEN | {"cryptography"},
    "engine.cluster": OPEN | CLUSTER | {"engine.core", "engine.serve.client", "grpc", "msgpack"},
    "engine.cluster.ray": OPEN | {"engine.cluster", "ray"},
    "engine.sim": OPEN | {"engine.core", "engine.replica", "numpy"},
    # The files of the embedded model, which its package names, and the scripts that made and judge them.
    "engine.embedded": {"jax", "numpy", "tokenizers", "safetensors", "optax"},
}
QUICK = {
    f"engine.{part}"
    for part in (
        *("cli", "options", "banner", "demo", "environment", "progress", "tables", "talk", "top"),
        *("hello", "starter", "certificates", "reception", "status", "restart"),
    )
}
TOP = {
    f"engine.{part}"
    for part in (
        *("launch", "front", "worker", "plan_lanes", "plan_report", "replay_report", "llm", "launch_cluster"),
        *("doctor_report", "allreduce", "rolling"),
    )
}
ANYTHING = QUICK | TOP | {"bench"}
LATE = ("engine.cli",)  # imports inside functions, so that --help is instant
# Of an extra: a module may go on without it.
OPTIONAL = ("huggingface_hub", "matplotlib", "cryptography", "ray", "smg_grpc_proto")
UNDECLARED = ("nixl",)  # its metadata demands torch, which it does not import: its page says how to install it
JAXLESS = ("core", "text", "observe", "replica", "serve", "sim", "cluster", "errors", "clock", "config")
NEEDS_JAX = ("engine.replica.build", "engine.replica.build_lane")

GENERATED = ("_pb2.py", "_pb2_grpc.py")
FILES = sorted(p for top in TOPS for p in (ROOT / top).rglob("*.py") if not p.name.endswith(GENERATED))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in FILES}


def under(name: str, tops: Iterable[str]) -> bool:
    return any((name + ".").startswith(top + ".") for top in tops)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, and the column where: `from engine.core import plan` is engine.core.plan.

    What stands below `if TYPE_CHECKING` is imported by nobody who runs it, and is told by the column -1.
    """
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typed = {node for block in blocks for node in block.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, -1 if node in typed else node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else node.module or "", -1 if node in typed else node.col_offset


def ours(path: Path) -> set[str]:
    """The modules of the project that running this file imports."""
    return {module for module, column in imports(path) if module in NAMES and column >= 0}


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_module_imports_only_what_its_floor_may(path):
    name = dotted(path)
    assert path.stem not in sys.stdlib_module_names, "a script beside this file would import it for the stdlib's"
    homes = [home for home in MAY_IMPORT if under(name, [home]) and (home != "engine" or name == "engine")]
    anything = under(name, ANYTHING)
    assert homes or anything, f"{name} stands on no floor: give it a line in MAY_IMPORT"
    home = max(homes, key=len, default="")
    allowed = MAY_IMPORT.get(home, set()) | {home} | sys.stdlib_module_names
    for module, column in imports(path):
        early = column <= 0 or name in LATE or under(module, (*OPTIONAL, *UNDECLARED))
        assert early, f"{module}: imports stand at the top of the file"
        assert anything or under(module, allowed), f"{home} may not import {module}"


def test_only_the_top_floor_imports_the_builder():
    """engine/replica/build.py knows every class: who imports it imports JAX."""
    free = {name for name in NAMES if under(name, ANYTHING)} | {"engine.replica.build_lane"}
    assert not {dotted(p) for p in FILES if "engine.replica.build" in ours(p)} - free


def test_no_modules_import_each_other_in_a_circle():
    edges = {dotted(path): ours(path) - {dotted(path)} for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_no_rooms_import_each_other_in_a_circle():
    """Rooms are the packages below engine, and the other tops."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[: 2 if name.startswith("engine.") else 1])

    edges: dict[str, set[str]] = {}
    for path in FILES:
        here = room(dotted(path))
        edges.setdefault(here, set()).update({room(name) for name in ours(path)} - {here})
    while free := [name for name, others in edges.items() if not others & edges.keys()]:
        for name in free:
            del edges[name]
    assert not edges, f"among these rooms some need each other: {sorted(edges)}"


@pytest.mark.parametrize("top", ["sharding", "pallas_kernels"])
def test_the_lower_floors_raise_value_errors_alone(top):
    """ValueError or a class of theirs that is one; engine turns it into its own."""
    nodes = [node for p in FILES if under(dotted(p), [top]) for node in ast.walk(ast.parse(p.read_text()))]
    own = {
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["ValueError"]
    }
    raised = [node.exc for node in nodes if isinstance(node, ast.Raise) and node.exc is not None]
    assert {ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in raised} <= own | {"ValueError"}


def requirements(rows: Iterable[str]) -> set[str]:
    """The names in rows of requirements, spelled alike wherever they come from."""
    names = {row.split("[")[0].split(">")[0].split("=")[0].strip() for row in rows}
    return {name.lower().replace("_", "-") for name in names}


packages = functools.cache(packages_distributions)  # reads every installed file list


def distributions(module: str) -> set[str]:
    """The distributions that may have brought a module; their metadata cannot tell those that share a name."""
    google = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}
    known = [distribution for prefix, distribution in google.items() if under(module, [prefix])]
    return requirements(known or packages().get(module.split(".")[0], []))


def test_every_foreign_module_comes_from_a_declared_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        "bench": "bench",
        "engine.embedded": "train",
        "engine.weights.hub": "hub",
        "engine.cluster.certs": "certs",
    }
    extras["engine.serve.vllm_engine"] = "smg"
    extras["engine.cluster.ray"] = "ray"
    foreign = {
        (dotted(path), module)
        for path in FILES
        for module, _ in imports(path)
        if not under(module, (*TOPS, *UNDECLARED)) and not under(module, sys.stdlib_module_names)
    }
    for name, module in sorted(foreign):
        rows = list(project["dependencies"])
        for top, extra in extras.items():
            rows += project["optional-dependencies"][extra] if under(name, [top]) else []
        found = distributions(module)
        installed = found or under(module, OPTIONAL)
        assert installed, f"{name} imports {module}, which is not installed"
        assert not found or found & requirements(rows), f"{name} imports {module} of {found}, which is not declared"


def python(script: str) -> str:
    """What a fresh interpreter prints for `script`."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


LOADED = "import sys; print(sorted({'jax', 'jaxlib', 'flax', 'torch'} & set(sys.modules)))"


@pytest.mark.parametrize("room", JAXLESS)
def test_what_decides_and_what_serves_never_loads_jax(room):
    names = [name for name in sorted(NAMES) if under(name, [f"engine.{room}"]) and not under(name, NEEDS_JAX)]
    assert python(f"import {', '.join(['engine', *names])}; {LOADED}") == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["generate", "--help"], ["demo", "--help"]])
def test_the_command_lines_help_never_loads_jax(arguments):
    script = (
        f"import contextlib, io, {', '.join(sorted(QUICK & NAMES))}\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        f"    engine.cli.main({arguments})\n"
        "assert 'usage' in out.getvalue().lower(), out.getvalue()\n"
    )
    assert python(script + LOADED) == "[]"


def test_importing_the_packages_leaves_the_environment_as_it_was():
    """JAX may set variables of its own; we add none to them."""
    seen = "import os; before = set(os.environ.items()); import {}; print(sorted(set(os.environ.items()) ^ before))"
    assert python(seen.format("engine, sharding, pallas_kernels")) == "[]"
    assert python(seen.format("sharding.rules, pallas_kernels.dispatch")) == python(seen.format("jax"))


def test_every_module_can_be_imported():
    generated = {dotted(p) for top in TOPS for p in (ROOT / top).rglob("*.py") if p.name.endswith(GENERATED)}
    names = sorted(name for name in NAMES | generated if not name.endswith("__main__"))
    script = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\nprint('all')"
    assert python(script) == "all"
