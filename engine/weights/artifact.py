"""The tensors of an artifact of `serac convert`, each chunk checked against its digest before it is used.

    read(name, cut) --> chunks that `cut` touches --read, sha256--> kept until settle() --> the slice

Orbax restores a changed byte as a changed weight without a word; so the files of its checkpoint are read here, as
the raw boxes they are, by `preadv` and with our own digests. Whatever a device does not need it does not read.

Cost: that of safetensors plus sha256, chunks in parallel; host memory: the chunks of one array.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from engine.weights.files import OpenFile, open_file
from engine.weights.layout import Index
from engine.weights.manifest import (
    CHECKPOINT,
    MANIFEST,
    SEAL,
    Manifest,
    check_digests,
    check_files,
    chunk_file,
    read_manifest,
)
from engine.weights.tensors import DTYPES, Tensor

WORKERS = 4
TRACES = (MANIFEST, SEAL, CHECKPOINT, "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "commit_success.txt")


def is_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact, or what is left of one or of a bare Orbax checkpoint."""
    return any((folder / name).exists() for name in TRACES)


def open_manifest(folder: Path) -> Manifest:
    """The manifest, once every file is there and all but the tensors' data is intact; else ModelError."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return manifest


class Artifact:
    """`Tensors` of an artifact."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = open_manifest(folder)
        self._seal = open_file(folder / SEAL, folder)
        self._described = {
            name: Tensor(stored.shape, stored.dtype, f"{CHECKPOINT}/{name}")
            for name, stored in self.manifest.tensors.items()
        }
        self._lock = threading.Lock()
        self._chunks: dict[str, Future[np.ndarray]] = {}
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="chunks")

    @property
    def described(self) -> Mapping[str, Tensor]:
        return self._described

    def read(self, name: str, cut: Index) -> np.ndarray:
        stored = self.manifest.tensors[name]
        touched = [
            range(piece.start // step, -(-piece.stop // step))
            for piece, step in zip(cut, stored.chunk, strict=True)
        ]
        chunks = {at: self._chunk(name, at) for at in product(*touched)}
        if len(chunks) == 1:
            ((at, chunk),) = chunks.items()
            corners = [place * step for place, step in zip(at, stored.chunk, strict=True)]
            within = zip(cut, corners, strict=True)
            return chunk.result()[tuple(slice(piece.start - c, piece.stop - c) for piece, c in within)]
        part = np.empty([piece.stop - piece.start for piece in cut], DTYPES[stored.dtype])
        for at, chunk in chunks.items():
            box = [
                (max(piece.start, place * step), min(piece.stop, (place + 1) * step), place * step, piece.start)
                for piece, place, step in zip(cut, at, stored.chunk, strict=True)
            ]
            source = tuple(slice(first - corner, last - corner) for first, last, corner, _ in box)
            target = tuple(slice(first - start, last - start) for first, last, _, start in box)
            part[target] = chunk.result()[source]
        return part

    def settle(self) -> None:
        with self._lock:
            self._chunks.clear()

    def finish(self) -> None:
        """A conversion replaces whole folders, so the seal tells whether this is still the one that was opened."""
        self._seal.check_unchanged()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._seal.close()

    def _chunk(self, name: str, at: tuple[int, ...]) -> "Future[np.ndarray]":
        """One reader fetches a chunk, the others wait for it."""
        file = chunk_file(name, at)
        with self._lock:
            if file not in self._chunks:
                self._chunks[file] = self._pool.submit(self._fetch, name, file)
            return self._chunks[file]

    def _fetch(self, name: str, file: str) -> np.ndarray:
        stored, tensor = self.manifest.files[file], self.manifest.tensors[name]
        opened = open_file(self.folder / file, self.folder)
        try:
            content = _content(opened, stored.size)
        finally:
            opened.close()
        check_digests(content, stored, f"{name}: its file {file}")
        return content.view(DTYPES[tensor.dtype]).reshape(tensor.chunk)


def _content(file: OpenFile, size: int) -> np.ndarray:
    content = np.empty(size, np.uint8)
    file.read_into(content, 0)
    return content
