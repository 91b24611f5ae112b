"""`serac convert`: from a Hugging Face folder to an Orbax checkpoint with a manifest of digests.

    OUT.incomplete-NNNN/  checkpoint, small files, comparison with the source, seal, fsync  --rename--> OUT/

Tensors keep their Hugging Face names, shapes and dtypes, so that they restore onto any mesh and Orbax itself can
read them. What is written is compared with the source bit by bit; a rename makes all of it visible at once.

Cost: the model's bytes are read twice, written once and hashed once; memory: what Orbax has in flight.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from engine.errors import ConfigError, ModelError
from engine.models.config import ModelConfig, from_hf
from engine.weights.files import read_bytes
from engine.weights.layout import parameters
from engine.weights.load import check_finite
from engine.weights.manifest import (
    CHECKPOINT,
    INCOMPLETE,
    SLICE_BYTES,
    Manifest,
    StoredTensor,
    describe_file,
    write_manifest,
)
from engine.weights.safetensors_files import SafetensorsFiles
from engine.weights.source import ModelFolder
from engine.weights.tensors import check_tensors

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
LEAST_CHUNK_BYTES = 1 << 20  # a tensor whose sizes have no fitting divisor is one file, not a hundred thousand
MOST_SMALL_BYTES = 256 << 20


def convert(
    source: ModelFolder,
    out: Path,
    *,
    allow_non_finite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Writes the artifact `out` of a Hugging Face folder.

    progress  is told (bytes compared, bytes in all) while what was written is read back
    Raises ConfigError when `out` exists, ModelError when the source cannot be served.
    """
    if source.artifact:
        raise ConfigError(f"{source.path}: an artifact already; expected a Hugging Face folder", field="model")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists; expected a path where nothing is yet", field="out")
    config = from_hf(source.config())
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = SafetensorsFiles(source.path, source.root)
    try:
        check_tensors(tensors, config)
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}{INCOMPLETE}", dir=out.parent))
        try:
            manifest = _write(source, tensors, config, partial, allow_non_finite, progress)
            tensors.finish()
            _sync(partial)
            partial.rename(out)
            _sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        tensors.close()
    return manifest


def _write(
    source: ModelFolder,
    tensors: SafetensorsFiles,
    config: ModelConfig,
    out: Path,
    allow_non_finite: bool,
    progress: Callable[[int, int], None] | None,
) -> Manifest:
    names = list(dict.fromkeys(part.name for row in parameters(config, 1) for part in row.parts))
    _save({name: tensors.mapped(name) for name in names}, out / CHECKPOINT)
    for name in SMALL_FILES:
        if (source.path / name).exists():
            (out / name).write_bytes(read_bytes(source.path / name, source.root, MOST_SMALL_BYTES))
    stored = {name: _stored(tensors, name, out / CHECKPOINT / name) for name in names}
    files = sorted(path for path in out.rglob("*") if path.is_file())
    manifest = Manifest(
        source.revision, stored, {path.relative_to(out).as_posix(): describe_file(path) for path in files}
    )
    total, done = sum(stored[name].chunk_bytes for name, _, _ in manifest.chunks()), 0
    for name, at, file in manifest.chunks():
        _compare(tensors, name, stored[name], at, out / file, allow_non_finite)
        done += stored[name].chunk_bytes
        if progress is not None:
            progress(done, total)
    write_manifest(out, manifest)
    return manifest


def _save(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """One folder a tensor, one uncompressed file a chunk: what is on disk is the tensor's own bytes."""
    largest = max(array.nbytes for array in arrays.values())
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, use_compression=False, save_concurrent_gb=1 + math.ceil(largest / 1e9)
    )
    arguments = {name: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(array)) for name, array in arrays.items()}
    with _quiet(logging.getLogger("absl")), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays, save_args=arguments))


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Orbax warns of every save that has no OCDBT files; here that is what was asked for."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _chunk_bytes(array: np.ndarray) -> int | None:
    """The limit to give Orbax, which cuts the largest axis by its divisors; None keeps the tensor whole."""
    if array.nbytes <= SLICE_BYTES:
        return None
    size = max(array.shape)
    pieces = next(n for n in range(1, size + 1) if size % n == 0 and array.nbytes // n <= SLICE_BYTES or n == size)
    return SLICE_BYTES if array.nbytes // pieces >= LEAST_CHUNK_BYTES else None


def _stored(tensors: SafetensorsFiles, name: str, folder: Path) -> StoredTensor:
    """How Orbax stored a tensor; raises ModelError when it is not as plain as was asked for."""
    found = tensors.described[name]
    layout = json.loads((folder / ".zarray").read_bytes())
    dtype = found.dtype if found.dtype == "bfloat16" else np.dtype(found.dtype).str
    wanted = {"shape": list(found.shape), "dtype": dtype, "order": "C", "compressor": None, "filters": None}
    wanted["dimension_separator"] = "."
    if different := [key for key, value in wanted.items() if layout.get(key) != value]:
        raise ModelError(
            f"{name}: this orbax-checkpoint stores {different[0]} as {layout.get(different[0])}", field=name
        )
    return StoredTensor(found.shape, found.dtype, tuple(layout["chunks"]))


def _compare(
    tensors: SafetensorsFiles,
    name: str,
    stored: StoredTensor,
    at: tuple[int, ...],
    file: Path,
    allow_non_finite: bool,
) -> None:
    """Raises ModelError unless a chunk on disk is the source's, bit for bit, and finite."""
    cut = tuple(slice(place * step, (place + 1) * step) for place, step in zip(at, stored.chunk, strict=True))
    wanted = tensors.read(name, cut)
    if file.read_bytes() != wanted.tobytes():
        raise ModelError(f"{name}: what was written to {file.name} is not what was read", field=name)
    if not allow_non_finite:
        check_finite(wanted, name)


def _sync(folder: Path) -> None:
    """Puts every file below `folder` on the disk, then the folders that name them."""
    for path in _below(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _below(folder: Path) -> Iterator[Path]:
    for base, _, files in os.walk(folder, topdown=False):
        yield from (Path(base, name) for name in files)
        yield Path(base)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
