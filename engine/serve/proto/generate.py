"""Generates the Python code of `serac.v1` and makes its imports ours: `python -m engine.serve.proto.generate`.

The code is made by one old, pinned grpcio-tools in an environment that lives for the run, because generated code
refuses a protobuf runtime older than its generator: gencode 6.31 imports under protobuf 6.31 and later, and 7. Only
messages are generated; handlers come from descriptors (engine/serve/edge.py), so that nothing pins grpcio.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
TOOL = "grpcio-tools==1.76.0"
PACKAGE = "serac/v1"
IMPORT = re.compile(r"^from serac\.v1 import", re.MULTILINE)
OURS = "from engine.serve.proto.serac.v1 import"


def install(folder: Path) -> Path:
    """A Python with the pinned generator, in `folder`. Raises CalledProcessError when it cannot be installed."""
    ours = importlib.util.find_spec("pip") is not None
    venv.create(folder, with_pip=not ours, clear=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", python] if ours else [python, "-m", "pip"]
    command = [*pip, "install", "--quiet", "--disable-pip-version-check", "--no-compile", TOOL]
    subprocess.run(command, check=True, capture_output=True)
    return python


def generate(python: Path, out: Path) -> list[Path]:
    """Write `*_pb2.py` and `*_pb2.pyi` of every .proto file under `out`/serac/v1; returns the files."""
    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / PACKAGE).glob("*.proto"))
    flags = [f"-I{HERE}", f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run([python, "-m", "grpc_tools.protoc", *flags, *sources], check=True, cwd=HERE)
    files = sorted((out / PACKAGE).glob("*_pb2.py*"))
    for path in files:
        path.write_text(IMPORT.sub(OURS, path.read_text()))
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate in place, or under --out."""
    parser = argparse.ArgumentParser(prog="python -m engine.serve.proto.generate", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets serac/v1/*_pb2.py")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="serac-proto-") as folder:
        for path in generate(install(Path(folder)), options.out.resolve()):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
