"""Compiles programs for a GPU that is not there, and reads what came of them: a process of bench/ahead.py.

    names on the command line -> for each: "began" -> lower -> compile -> dumped files -> one JSON line of figures

A topology stands for the device: its target configuration is a text file of ahead_targets/. Pallas learns the
architecture from an abstract mesh (jax 0.11 and newer; before, from nothing: it takes Hopper). A kernel of the
wrong architecture aborts the process, so the name of what it begins goes out first.

    kernel       what is read                                          where
    both         registers, spills, warnings                           ptxas -v of the dumped .ptx
    Mosaic       shared memory: scratch, and 8 bytes a barrier         .resources.txt (jax 0.11 and newer)
    Triton       shared memory                                         thunk_sequence.txt
    the program  launches; command buffers (graphs of CUDA), what is   thunk_sequence*.txt
                 inside them, and calls that are left to the host

Cost: 4 s to start, about 2 s a kernel. Needs the packages that `bench.ahead` names.
Source: the options of XLA's debugging dumps, jaxlib/mosaic/gpu/dump.h.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding
from jax.stages import Compiled, Lowered

from bench import ahead_step
from pallas_kernels import served
from pallas_kernels.target import Target

WORD = "AHEAD "  # before what this process tells; other lines on standard output are the compiler's
CONFIGS = Path(__file__).parent / "ahead_targets"
ENTRY = re.compile(r"\.visible \.entry (\w+)\(")
MOSAIC = "_mosaic_gpu_kernel"
LAUNCH = re.compile(r"k(CustomKernel|Kernel|CustomCall|Copy|Memset|AllReduce|AllGather|\w+Collective|Gemm)\w* ")
BARRIER_BYTES = 8
HASH = re.compile(r'kernel_hash = "([^"]*)"')
Figures = dict[str, object]
Seen = dict[str, tuple[str, Figures]]  # Mosaic kernels of this process: name and figures by hash


def main(names: list[str]) -> int:
    """Compile what is named, one line of JSON a program. JAX_PLATFORMS must be cpu."""
    with tempfile.TemporaryDirectory(prefix="serac-ahead-") as folder:
        # Only the assembler's input is dumped of XLA's kernels: everything would cost 20 s a kernel.
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx --xla_dump_hlo_pass_re=NONE"
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        jax.devices()  # reads the flags, and the plugin registers its platform
        seen: Seen = {}
        for name in names:
            tell({"name": name, "began": True})
            tell({"name": name, **figures(name, Path(folder), seen)})
    return 0


def tell(line: Figures) -> None:
    """For the process that reads."""
    print(WORD + json.dumps(line), flush=True)


def figures(name: str, dump: Path, seen: Seen) -> Figures:
    """Lower and compile one program, and read it and the files that were dumped."""
    for file in dump.iterdir():
        file.unlink()
    if name.startswith(ahead_step.NAME):
        step = ahead_step.named(name)
        devices = topology("h200", ahead_step.TP, step.hosts)
        lower, options = lambda: ahead_step.step_lowered(step, devices), step.options
    else:
        row = {row.name: row for row in served.SERVED}[name]
        lower, options = lambda: lower_row(row, topology(row.target, 1)[0]), {}
    began = time.perf_counter()
    lowered = lower()
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    seconds = {"lower_s": middle - began, "compile_s": time.perf_counter() - middle}
    found = read(compiled, dump, seen) | {key: round(value, 2) for key, value in seconds.items()}
    if name.startswith(ahead_step.NAME):
        return found | ahead_step.facts(step, compiled)
    return found | {"by": [choice.name for choice in served.kernels(row)]}


def topology(target: str, size: int, hosts: int = 1) -> list[jax.Device]:
    """`size` devices of `target` in so many processes, none of which exist."""
    config = (CONFIGS / f"{target}.txtpb").read_text()
    return topologies.get_topology_desc(
        topology_name=target, platform="cuda", topology=f"1x{hosts}x{size // hosts}", target_config=config
    ).devices


def lower_row(row: served.Row, device: jax.Device | None = None) -> Lowered:
    """The attention of one served shape; for `device`, if it is to be compiled."""
    program, shapes = served.program(row)
    target = served.TARGETS[row.target]
    if device is not None:
        on = SingleDeviceSharding(device)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), shapes)
    with named_device(target):
        return program.trace(*shapes).lower(lowering_platforms=(target.platform,))


def named_device(target: Target) -> contextlib.AbstractContextManager:
    """Tells Pallas the architecture, which it would otherwise ask of a device."""
    if jax.__version_info__ < (0, 11) or target.platform != "cuda":
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind=target.kind, num_cores=target.cores, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def read(compiled: Compiled, dump: Path, seen: Seen) -> Figures:
    """Memory, launches and kernels of a program whose files were dumped."""
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    launches = (dump_file(dump, "thunk_sequence.txt") or "").splitlines()
    passed = (dump_file(dump, "thunk_sequence_after_thunk_passes.txt") or "").splitlines()
    found = mosaic_kernels(dump, text, seen) | triton_kernels(dump, text, launches)
    calls = text.count('custom_call_target="mosaic_gpu'), text.count('custom_call_target="__gpu$xla.gpu.triton"')
    return {
        "kernels": found,
        "calls": {"mosaic": calls[0], "triton": calls[1]},
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "launches": sum(map(is_launch, launches)),
        "buffers": sum("kCommandBuffer" in line for line in passed),
        "buffered_launches": sum(map(is_launch, in_buffers(passed))),
        "host_calls": sum(not line.startswith(" ") for line in passed or launches),
    }


def is_launch(line: str) -> bool:
    """Whether a line of a thunk sequence is work for the device, and not what holds others."""
    return bool(LAUNCH.search(line))


def in_buffers(lines: list[str]) -> list[str]:
    """The lines of a thunk sequence that stand, indented, below a command buffer."""
    found, depth = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if depth is not None and indent > depth:
            found.append(line)
        else:
            depth = indent if "kCommandBuffer" in line else None
    return found


def dump_file(dump: Path, ending: str) -> str | None:
    """The text of the one file that ends so."""
    files = sorted(dump.glob(f"*.{ending}"))
    return files[0].read_text() if files else None


def mosaic_kernels(dump: Path, text: str, seen: Seen) -> dict[str, Figures]:
    """Kernels that Mosaic compiled, by name.

    Equal kernels of a program are compiled once, and in jax 0.10 once in a process: `seen` has them by their hash.
    """
    hashes = list(dict.fromkeys(HASH.findall(text)))
    files = [file for file in dump.glob("*.ptx") if MOSAIC in file.read_text()]
    files.sort(key=lambda file: int(file.stem.rpartition("_")[2]))
    dumped = hashes if len(files) == len(hashes) else [one for one in hashes if one not in seen]
    for one, file in zip(dumped, files, strict=True):
        seen[one] = mosaic_kernel(file)
    found: dict[str, Figures] = {}
    for one in hashes:
        name, kernel = seen[one]
        found[fresh(name, found)] = kernel
    return found


def mosaic_kernel(file: Path) -> tuple[str, Figures]:
    """Name and figures of one kernel from its dumped assembly."""
    text = file.read_text()
    resources = file.with_suffix(".resources.txt")
    shared = mosaic_shared(resources.read_text()) if resources.exists() else None
    return ENTRY.search(text)[1].removesuffix(MOSAIC), assembled(file, text) | {"shared_bytes": shared}


def mosaic_shared(resources: str) -> int:
    """Bytes of shared memory of `Resources(smem_scratch_bytes=..., barrier_counts=Counter({Barrier(...): n}))`."""
    scratch = int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1])
    return scratch + BARRIER_BYTES * sum(map(int, re.findall(r"\): (\d+)", resources)))


def triton_kernels(dump: Path, text: str, launches: list[str]) -> dict[str, Figures]:
    """Kernels that Pallas's Triton lowering made, by name; XLA's own go through Triton too and are left out."""
    calls = [line for line in text.splitlines() if 'custom_call_target="__gpu$xla.gpu.triton"' in line]
    names = {name for line in calls for name in re.findall(r'\bname = "(\w+)"', line)}
    found = {}
    for file in sorted(dump.glob("module_*.ptx")):
        ptx = file.read_text()
        for entry in ENTRY.findall(ptx):
            if any(entry == name or re.fullmatch(rf"{name}_\d+", entry) for name in names):
                lines = [line for line in launches if re.search(rf"\b{entry} grid", line)]
                shared = int(re.search(r"shared_memory: (\d+)", lines[0])[1]) if lines else None
                found[fresh(entry, found)] = assembled(file, ptx) | {"shared_bytes": shared}
    return found


def fresh(name: str, taken: Mapping) -> str:
    """`name`, or with a number where another kernel has it."""
    count = sum(other == name or other.startswith(name + ".") for other in taken)
    return f"{name}.{count}" if count else name


def assembled(file: Path, ptx: str) -> Figures:
    """What the assembler says of one kernel, and the instructions that tell how it computes and copies."""
    arch = re.search(r"\.target (\w+)", ptx)[1]
    command = [assembler(), f"-arch={arch}", "-v", str(file), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill", said)]
    warned = re.findall(r"(?:warning\s*:|\(C\d+\)).*", said)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spill_bytes": sum(spills),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "warnings": sorted(set(warned)),
    }


def assembler() -> str:
    """The pinned ptxas of the wheels; any other counts registers its own way."""
    found = [Path(place) / "nvidia/cu13/bin/ptxas" for place in sys.path]
    wheel = next((str(file) for file in found if file.exists()), None)
    return wheel or shutil.which("ptxas") or "ptxas"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
