"""What an artifact of `serac convert` holds, with a digest of every byte of it.

    OUT/manifest.json      tensors (shape, dtype, chunks), files (bytes, sha256 of each 16 MiB slice), revision
    OUT/manifest.sha256    the digest of manifest.json, as sha256sum writes it; written last, so it means complete
    OUT/config.json ...    the model's own small files
    OUT/checkpoint/        the Orbax checkpoint: one folder a tensor, one raw file a chunk of it

A chunk is a box of at most 16 MiB of one tensor, stored plainly in row order: a device reads and checks the chunks
that its part touches. Whatever is not a chunk is checked when the artifact is opened.
Cost: sha256 at about 1.8 GB/s a core. Digests find damage; they are no signature.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from engine.errors import ModelError, shown
from engine.weights.files import bare, open_file, parse_json, read_bytes
from engine.weights.tensors import DTYPES

FORMAT, VERSION = "serac artifact", 1
MANIFEST, SEAL, CHECKPOINT = "manifest.json", "manifest.sha256", "checkpoint"
SLICE_BYTES = 16 << 20
INCOMPLETE = ".incomplete-"  # stands in the name of a folder that is being written


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor cut into equal boxes; box (i, j) is the file `checkpoint/NAME/i.j`."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """How many chunks stand along each axis."""
        return tuple(size // chunk for size, chunk in zip(self.shape, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """The size of each chunk's file."""
        return math.prod(self.chunk) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The size of a file and the sha256 of each 16 MiB of it."""

    size: int
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of an artifact; `files` are named by their path in it."""

    revision: str
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    def chunks(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(tensor, place in its grid, file) of every chunk."""
        for name, tensor in self.tensors.items():
            for at in np.ndindex(*tensor.grid):
                yield name, at, chunk_file(name, at)


def chunk_file(name: str, at: tuple[int, ...]) -> str:
    """The file of a chunk, by its path in the artifact."""
    return f"{CHECKPOINT}/{name}/{'.'.join(map(str, at))}"


def digests(content: np.ndarray | bytes) -> tuple[str, ...]:
    """The sha256 of each 16 MiB of `content`; of no bytes at all when it is empty."""
    view = memoryview(content).cast("B") if len(content) else memoryview(b"")
    starts = range(0, max(len(view), 1), SLICE_BYTES)
    return tuple(hashlib.sha256(view[start : start + SLICE_BYTES]).hexdigest() for start in starts)


def describe_file(path: Path) -> StoredFile:
    """The size and digests of a file that was just written."""
    with path.open("rb") as file:
        found = []
        while content := file.read(SLICE_BYTES):
            found.append(hashlib.sha256(content).hexdigest())
    return StoredFile(path.stat().st_size, tuple(found) or digests(b""))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest and then its seal."""
    value = {
        "format": FORMAT,
        "version": VERSION,
        "revision": manifest.revision,
        "slice_bytes": SLICE_BYTES,
        "tensors": {
            name: {"shape": tensor.shape, "dtype": tensor.dtype, "chunk": tensor.chunk}
            for name, tensor in manifest.tensors.items()
        },
        "files": {name: {"bytes": file.size, "sha256": file.digests} for name, file in manifest.files.items()},
    }
    content = (json.dumps(value, indent=1) + "\n").encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / SEAL).write_text(_seal(content))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact. Raises ModelError when the artifact is incomplete or was changed."""
    names = {entry.name for entry in folder.iterdir()}
    missing = [name for name in (MANIFEST, SEAL, CHECKPOINT) if name not in names]
    if missing or INCOMPLETE in folder.name:
        what = f"{', '.join(missing)} is missing" if missing else "its name says that it is being written"
        raise ModelError(f"{folder}: incomplete artifact: {what}; run `serac convert` again", field=MANIFEST)
    content = read_bytes(folder / MANIFEST, folder)
    if read_bytes(folder / SEAL, folder, most=1024) != _seal(content).encode():
        raise ModelError(f"{folder / MANIFEST}: corrupt: its digest is not the one in {SEAL}", field=MANIFEST)
    value = parse_json(content, str(folder / MANIFEST))
    if value.get("format") != FORMAT or value.get("version") != VERSION or value.get("slice_bytes") != SLICE_BYTES:
        raise ModelError(
            f"{folder / MANIFEST}: got {shown(value.get('format'))} version {shown(value.get('version'))}; "
            f"expected {FORMAT} version {VERSION}",
            field=MANIFEST,
        )
    try:
        manifest = _parse(value)
        contradiction = _contradiction(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / MANIFEST}: malformed: {type(error).__name__} {shown(str(error))}") from None
    if contradiction:
        raise ModelError(f"{folder / MANIFEST}: malformed: {contradiction}", field=MANIFEST)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises ModelError, naming file and tensor, unless every file has its size and all but chunks are intact."""
    chunks = {file: name for name, _, file in manifest.chunks()}
    for name, stored in manifest.files.items():
        what = f"{chunks[name]}: its file {name}" if name in chunks else name
        if not (folder / name).exists():
            raise ModelError(f"{what} is missing in {folder}", field=chunks.get(name, name))
        file = open_file(folder / name, folder)
        try:
            if file.size != stored.size:
                raise ModelError(
                    f"{what} in {folder} is corrupt: {file.size} bytes; expected {stored.size}",
                    field=chunks.get(name, name),
                )
            if name not in chunks:
                content = np.empty(file.size, np.uint8)
                file.read_into(content, 0)
                check_digests(content, stored, f"{name} in {folder}")
        finally:
            file.close()


def check_digests(content: np.ndarray, stored: StoredFile, what: str) -> None:
    """Raises ModelError unless `content` has the digests that were written down."""
    if digests(content) != stored.digests:
        raise ModelError(f"{what} is corrupt: its bytes are not those that were written", field=what)


def _seal(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n"


def _parse(value: dict) -> Manifest:
    tensors = {
        name: StoredTensor(tuple(entry["shape"]), entry["dtype"], tuple(entry["chunk"]))
        for name, entry in value["tensors"].items()
    }
    files = {name: StoredFile(entry["bytes"], tuple(entry["sha256"])) for name, entry in value["files"].items()}
    return Manifest(str(value["revision"]), tensors, files)


def _contradiction(manifest: Manifest) -> str | None:
    """What in a manifest cannot be true, or None."""
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            return f"the file {bare(name)} leads out of the artifact"
    for name, tensor in manifest.tensors.items():
        pairs = zip(tensor.shape, tensor.chunk, strict=True)
        if tensor.dtype not in DTYPES or any(chunk < 1 or size % chunk for size, chunk in pairs):
            return f"{bare(name)} has dtype {tensor.dtype}, shape {tensor.shape} and chunks of {tensor.chunk}"
    for name, _, file in manifest.chunks():
        if file not in manifest.files or manifest.files[file].size != manifest.tensors[name].chunk_bytes:
            return f"{bare(name)}: its file {file} is not listed with {manifest.tensors[name].chunk_bytes} bytes"
    return None
