"""The house: its layout, its sizes, and what may stand nowhere in it."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("engine", "sharding", "pallas_kernels", "bench")
LAYOUT = {"pyproject.toml", "README.md", "LICENSE", "engine", "sharding", "pallas_kernels", "tests", "bench"}
BUILT = re.compile(r"\.|build$|dist$|.*\.egg-info$|__pycache__$")  # what git ignores, and dotfiles
GENERATED = ("_pb2.py", "_pb2_grpc.py")
FILES = [p for top in TOPS for p in sorted((ROOT / top).rglob("*.py")) if not p.name.endswith(GENERATED)]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CLUSTERS = {Path(name) for name in ("sim", "faults", "hosts", "gateway")}  # of a whole cluster, not of a package

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "_pickle"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.load",
    "jax.experimental.serialize_executable",
}


def trees(files: list[Path]) -> Iterator[tuple[str, ast.Module]]:
    for path in files:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def lengths_of_functions() -> dict[str, int]:
    return {
        f"{name}::{node.name}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name, tree in trees(FILES)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def lengths_of_files() -> dict[str, int]:
    return {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in FILES}


def ninth_tenth(values: dict[str, int]) -> int:
    return sorted(values.values())[int(0.9 * len(values))]


def test_the_top_level_holds_what_the_design_names():
    found = {path.name for path in ROOT.iterdir() if not BUILT.match(path.name)}
    assert found <= LAYOUT, found - LAYOUT
    assert found >= {"pyproject.toml", "README.md", "LICENSE", "engine", "sharding", "pallas_kernels", "tests"}


def test_files_are_short():
    lengths = lengths_of_files()
    assert not {name: length for name, length in lengths.items() if length > 450}
    assert ninth_tenth(lengths) <= 250


def test_functions_are_short():
    lengths = lengths_of_functions()
    limit = {name: 150 if name.startswith("pallas_kernels/") else 80 for name in lengths}
    assert not {name: length for name, length in lengths.items() if length > limit[name]}
    assert ninth_tenth(lengths) <= 30


def test_every_module_says_what_it_is():
    assert not [name for name, tree in trees(FILES) if tree.body and not ast.get_docstring(tree)]


def test_a_broad_except_stands_at_the_edges_alone():
    """The turn of the loop, the RPC and the HTTP handler answer the client and count; others pass it on.

    A process of a lane that spans several says what happened to the others, and ends with them.
    """
    edges = {"engine/replica/lane.py", "engine/replica/replica.py", "engine/serve/edge.py", "engine/serve/http.py"}
    edges |= {"engine/replica/followers.py", "engine/replica/follower.py"}
    broad = {
        name
        for name, tree in trees(FILES)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and ast.unparse(node.body[-1]) != "raise"
    }
    assert broad <= edges, broad - edges


def test_nothing_in_the_tree_can_run_code_from_data():
    found = []
    for name, tree in trees([*FILES, *TESTS]):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                bad = {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
            elif isinstance(node, ast.ImportFrom):
                names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
                bad = names & (FORBIDDEN_MODULES | FORBIDDEN_CALLS)
            elif isinstance(node, ast.Call):
                bad = {ast.unparse(node.func)} & FORBIDDEN_CALLS
            elif isinstance(node, ast.keyword):
                bad = {node.arg} & {"allow_pickle"}
            else:
                continue
            found += [f"{name}:{getattr(node, 'lineno', 0)} {word}" for word in bad]
    assert not found


def test_tests_mirror_the_packages():
    """A folder of tests has a package of its name and no `__init__.py`, which would make `engine` mean tests."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS} - CLUSTERS
    assert not [folder for folder in folders if not (ROOT / folder).is_dir()]
    assert not [path for path in TESTS if path.name == "__init__.py"]


def test_every_test_can_fail():
    """A test asserts, expects an error or calls something named for checking, itself or by a function beside it."""
    said = re.compile(r"\bassert|raises|warns|check|expect|equal|close|verify|agree|fail")
    silent = []
    for name, tree in trees(TESTS):
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        bodies = {function.name: ast.unparse(function.body) for function in functions}
        telling = {function for function, body in bodies.items() if said.search(body)}
        for _ in bodies:
            telling |= {f for f, body in bodies.items() if any(re.search(rf"\b{t}\(", body) for t in telling)}
        silent += [f"{name}::{function}" for function in bodies.keys() - telling if function.startswith("test_")]
    assert not silent


def test_the_packed_protocol_and_model_are_what_the_project_declares():
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = {"engine/embedded": packed["engine.embedded"], "engine/serve": packed["*"]}
    for folder, wanted in patterns.items():
        data = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".json", ".safetensors", ".proto", ".jinja")]
        assert data and all(any(path.match(pattern) for pattern in wanted) for path in data)


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_an_extra_of_a_dependency_is_one_that_it_provides():
    named = [re.match(r"([\w-]+)\[([\w-]+)\]", row) for rows in extras().values() for row in rows]
    pairs = [match.groups() for match in named if match]
    assert pairs and all(extra in (metadata(name).get_all("Provides-Extra") or []) for name, extra in pairs)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="asks a package index; runs where CI=true")
@pytest.mark.parametrize("extra", sorted(extras()))
def test_every_extra_resolves(extra):
    """Costs up to half a minute and the network: pip looks up what an extra brings, and installs nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--retries", "1"]
    done = subprocess.run([*command, *extras()[extra]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"extra {extra!r} does not resolve, or there is no network: {done.stderr[-1500:]}"
