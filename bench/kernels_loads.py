"""Does an executable that was compiled and written on a machine without a GPU load and run on one?

    python -m bench.kernels_loads KIND FOLDER NAME...      no GPU is seen: a file for each served row
    load(NAME, FOLDER)                                     on the GPU: read, run, compare with what it compiles

If it does, a cold start costs a download and a load. The driver, jaxlib and the tuning of products must agree; what
is said when they do not is the figure. Files come from this process's own parent alone: loading one runs its code.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench.ahead_compile import CONFIGS, lower_row, topology
from bench.kernels_check import decode_spans, mixed_spans
from bench.kernels_process import Row
from bench.kernels_scenes import judged
from pallas_kernels import served

ROWS = ("llama-8b decode 64", "llama-8b mixed 512", "llama-8b decode 64 invariant")


def target_name(kind: str) -> str | None:
    """The name in `served.TARGETS` of a kind of device that can be compiled for, None if it cannot."""
    names = (name for name, target in served.TARGETS.items() if target.kind == kind)
    return next((name for name in names if (CONFIGS / f"{name}.txtpb").exists()), None)


def file_of(name: str, folder: Path) -> Path:
    """Where the executable of a row stands."""
    return folder / (hashlib.sha256(name.encode()).hexdigest()[:16] + ".executable")


def main(arguments: Sequence[str]) -> int:
    """Compile rows for a kind of device that this process does not see."""
    kind, folder, *names = arguments
    jax.devices()
    device = topology(target_name(kind), 1)[0]
    for row in served.SERVED:
        if row.name in names:
            lowered = lower_row(row, device)
            file_of(row.name, Path(folder)).write_bytes(lowered.compile().runtime_executable().serialize())
    return 0


def load(name: str, folder: str) -> Row:
    """Load the row's executable, run it on a judged step and compare it with the program compiled here."""
    file = file_of(name, Path(folder))
    if not file.exists():
        return {"loads": "no", "reason": "it was not compiled ahead"}
    row = {row.name: row for row in served.SERVED}[name]
    rng = np.random.default_rng(0)
    scene = judged(rng, row, mixed_spans(rng, row) if row.rows else decode_spans(rng, row), row.tokens)
    rows = jax.tree.map(jnp.asarray, scene.rows)
    arguments = (scene.q_TNH, scene.k, scene.v, rows, jnp.int32(scene.base), None)
    program, _ = served.program(row)
    return compare(file.read_bytes(), program.lower(*arguments).compile()(*arguments), arguments)


def compare(data: bytes, wanted: jax.Array, arguments: tuple) -> Row:
    """What came of running a written executable beside what it should give."""
    device = jax.devices()[0]
    try:
        loaded = device.client.deserialize_executable(data, [device])
        outputs = loaded.execute_sharded(jax.tree.leaves(arguments)).disassemble_into_single_device_arrays()
    except (jax.errors.JaxRuntimeError, TypeError, ValueError, AttributeError) as error:
        return {"loads": "no", "reason": " ".join(str(error).split())[:400]}
    found, wanted = (np.asarray(each, np.float32) for each in (outputs[0][0], wanted))
    equal = np.array_equal(found, wanted, equal_nan=True)
    near = equal or float(np.nanmax(np.abs(found - wanted)))
    return {"loads": "yes", "bytes": len(data), "reason": "equal bits" if equal else f"off by {near:.2g} at most"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
