"""Opening the files of a model folder without trusting them.

A path is resolved once; what it leads to must be a regular file inside `root` (the folder, or the whole local
Hugging Face cache when the folder is a snapshot in it, whose files are links into `blobs/`). Files stay open while
they are read, so that a rename cannot swap them halfway; `check_unchanged` compares them with the path at the end.
Reads are `preadv` into numpy: a file cut short gives an error, where a memory map would give a signal.
"""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import ModelError, shown

MOST_JSON_BYTES = 64 << 20
ONE_READ = 1 << 30  # the kernel moves at most 2 GiB in one call


class OpenFile(NamedTuple):
    """An open regular file and what it was when it was opened."""

    path: Path
    descriptor: int
    size: int
    identity: tuple[int, ...]

    def read_into(self, target: np.ndarray, offset: int) -> None:
        """Fills the contiguous uint8 array `target` from `offset` on."""
        view, done = memoryview(target), 0
        while done < len(view):
            moved = os.preadv(self.descriptor, [view[done : done + ONE_READ]], offset + done)
            if not moved:
                raise ModelError(f"{self.path}: changed during load: it ends before byte {offset + len(view)}")
            done += moved

    def check_unchanged(self) -> None:
        """Raises ModelError when the path leads elsewhere now, or the file was written to."""
        try:
            same = _identity(os.stat(self.path)) == self.identity == _identity(os.fstat(self.descriptor))
        except FileNotFoundError:
            same = False
        if not same:
            raise ModelError(f"{self.path}: changed during load; load it again once nothing writes to it")

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self.descriptor)


def open_file(path: Path, root: Path) -> OpenFile:
    """Opens a regular file inside `root`; raises ModelError with the path and the cause."""
    try:
        real = path.resolve(strict=True)
    except OSError as error:
        cause = "dangling symlink" if path.is_symlink() else (error.strerror or "cannot be resolved")
        raise ModelError(f"{path}: {cause}", field=path.name) from None
    except RuntimeError:
        raise ModelError(f"{path}: a symlink that leads to itself", field=path.name) from None
    if not real.is_relative_to(root.resolve()):
        raise ModelError(f"{path}: not a regular file in {root}: a symlink leads outside of it", field=path.name)
    try:
        # A FIFO or a device would block or never end: open without waiting, then look at what it is.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", field=path.name) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ModelError(f"{path}: not a regular file", field=path.name)
    return OpenFile(path, descriptor, status.st_size, _identity(status))


def read_bytes(path: Path, root: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The whole of a small file."""
    file = open_file(path, root)
    try:
        if file.size > most:
            raise ModelError(f"{path}: {file.size} bytes; expected at most {most}", field=path.name)
        content = np.empty(file.size, np.uint8)
        file.read_into(content, 0)
        return content.tobytes()
    finally:
        file.close()


def read_json(path: Path, root: Path) -> dict:
    """The JSON object of a small file; raises ModelError with the path and the line of the mistake."""
    return parse_json(read_bytes(path, root), str(path))


def parse_json(content: bytes, origin: str) -> dict:
    """The JSON object in `content`; a key given twice is a mistake, and so is anything but an object."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ModelError(f"{origin}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{origin}: not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        cause = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ModelError(f"{origin}: not JSON: {cause}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{origin}: a JSON {type(value).__name__}; expected an object")
    return value


def bare(name: str) -> str:
    """A name for a message: escaped and cut as by `shown`, without quotes."""
    return shown(name)[1:-1]


def check_folder(path: Path) -> None:
    """Raises ModelError unless `path` is a folder that can be listed and holds something."""
    if path.is_symlink() and not path.exists():
        raise ModelError(f"{path}: dangling symlink; expected a model folder")
    if not path.exists():
        raise ModelError(f"{path}: no such folder")
    if not path.is_dir():
        raise ModelError(f"{path}: a file; expected a model folder")
    try:
        empty = next(path.iterdir(), None) is None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    if empty:
        raise ModelError(f"{path}: the folder is empty")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {shown(key)} is given twice")
        result[key] = value
    return result
