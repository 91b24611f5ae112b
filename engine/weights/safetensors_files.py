"""The tensors of a folder of safetensors files, read slice by slice.

    file: | 8 bytes: length of the header | header, JSON: name -> dtype, shape, [begin, end) | the bytes |

A header is believed only after every sum adds up: its own length, shapes against offsets, offsets against the size
of the file, no overlap and no gap. A slice is read row by row where it is not contiguous, so a device of a
row-parallel weight reads its columns and nothing beside them.

Cost: one pass over the headers; then one `preadv` per contiguous run. Source: the format's own README.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from engine.errors import ModelError, shown
from engine.weights.files import OpenFile, bare, open_file, parse_json, read_json
from engine.weights.layout import Index
from engine.weights.tensors import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 64 << 20
MOST_AXES = 8
DTYPES = {  # name in a header -> (name in numpy, bytes of an element)
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


class Place(NamedTuple):
    """Where the bytes of a tensor are."""

    file: OpenFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsFiles:
    """`Tensors` of an ordinary Hugging Face folder.

    Opened once, read any number of times; `headers` (name of the file -> its header's bytes) identify the content.
    """

    def __init__(self, folder: Path, root: Path):
        self.headers: dict[str, bytes] = {}
        self.files: list[OpenFile] = []
        self._places: dict[str, Place] = {}
        self._described: dict[str, Tensor] = {}
        weight_map = _weight_map(folder, root)
        try:
            for name in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
                self._open(folder / name, root)
            for name, file in (weight_map or {}).items():
                if name not in self._places:
                    raise ModelError(f"{bare(name)}: missing in {file}, where {INDEX} says it is", field=name)
        except BaseException:
            self.close()
            raise

    @property
    def described(self) -> Mapping[str, Tensor]:
        return self._described

    def read(self, name: str, cut: Index) -> np.ndarray:
        return read_slice(self._places[name], cut)

    def mapped(self, name: str) -> np.ndarray:
        """A whole tensor as a read-only map of its file, for a writer that would else hold all of them at once."""
        place = self._places[name]
        return np.memmap(place.file.path, place.dtype, "r", place.offset, place.shape)

    def settle(self) -> None:
        """Nothing is kept between reads."""

    def finish(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        while self.files:
            self.files.pop().close()

    def _open(self, path: Path, root: Path) -> None:
        file = open_file(path, root)
        self.files.append(file)
        header, start = _header(file)
        self.headers[path.name] = header
        entries = parse_json(header, f"{path}: header")
        entries.pop("__metadata__", None)
        end = start
        for name, entry in sorted(entries.items(), key=lambda item: _begin(item[1])):
            if name in self._places:
                raise ModelError(f"{bare(name)}: in {path.name} and in {self._described[name].origin}", field=name)
            place = _place(file, name, entry, start, end)
            end = place.offset + math.prod(place.shape) * place.dtype.itemsize
            self._places[name] = place
            self._described[name] = Tensor(place.shape, place.dtype.name, path.name)
        if end != file.size:
            raise ModelError(f"{path}: truncated or padded: {file.size} bytes, its header describes {end}")


def read_slice(place: Place, cut: Index) -> np.ndarray:
    """The slice `cut` of the tensor at `place`; what is not contiguous in the file is read run by run."""
    extent = [piece.stop - piece.start for piece in cut]
    part = np.empty(extent, place.dtype)
    if not part.size:
        return part
    # Past the last axis that is cut, everything is contiguous; that axis and the rest make one run.
    last = max((axis for axis, size in enumerate(extent) if size != place.shape[axis]), default=0)
    strides = [math.prod(place.shape[axis + 1 :]) for axis in range(len(extent))]
    run = math.prod(extent[last:])
    raw = part.reshape(-1, run).view(np.uint8) if extent else part.reshape(1, 1).view(np.uint8)
    inner = cut[last].start * strides[last] if extent else 0
    for row, outer in zip(raw, np.ndindex(*extent[:last]), strict=True):
        first = sum((cut[axis].start + step) * strides[axis] for axis, step in enumerate(outer)) + inner
        place.file.read_into(row, place.offset + first * place.dtype.itemsize)
    return part


def _weight_map(folder: Path, root: Path) -> dict[str, str] | None:
    """tensor -> file by the index; None when one file holds all. Raises ModelError when neither is there."""
    names = {entry.name for entry in folder.iterdir()}
    if SINGLE in names:
        return None
    if INDEX not in names:
        raise ModelError(_why_none(folder, names))
    weight_map = read_json(folder / INDEX, root).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{folder / INDEX}: no weight_map; expected an object of tensor -> file", field="weight_map"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{folder / INDEX}: {bare(name)}: got {shown(file)}; expected a .safetensors beside it"
            )
        if file not in names:
            raise ModelError(f"{folder / file}: missing; {INDEX} says that it holds {bare(name)}", field=file)
    return weight_map


def _why_none(folder: Path, names: set[str]) -> str:
    pickled = sorted(name for name in names if Path(name).suffix in (".bin", ".pkl", ".pt", ".pth", ".ckpt"))
    if pickled:
        return (
            f"{folder}: {bare(pickled[0])} is refused: pickled weights can run code; "
            f"expected {SINGLE} or {INDEX} (convert with the safetensors library)"
        )
    return f"{folder}: no weights; expected {SINGLE}, {INDEX} or an artifact of `serac convert`"


def _header(file: OpenFile) -> tuple[bytes, int]:
    """The header's bytes and where the data starts."""
    if file.size < 8:
        raise ModelError(f"{file.path}: {file.size} bytes are too few for the header of a safetensors file")
    length = np.zeros(8, np.uint8)
    file.read_into(length, 0)
    size = int(length.view("<u8")[0])
    if size > min(MOST_HEADER_BYTES, file.size - 8):
        raise ModelError(
            f"{file.path}: truncated, or its header is wrong: the header claims {size} bytes, "
            f"the file has {file.size}; expected a header of at most {MOST_HEADER_BYTES}"
        )
    header = np.empty(size, np.uint8)
    file.read_into(header, 8)
    return header.tobytes(), 8 + size


def _begin(entry: object) -> int:
    """Where an entry starts, for sorting; nonsense sorts first and is refused by `_place`."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1


def _place(file: OpenFile, name: str, entry: object, start: int, end: int) -> Place:
    """Checks one entry of a header whose data starts at `start` and whose previous tensor ended at `end`."""
    at = f"{bare(name)} in {file.path.name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{at}: header: expected dtype, shape and data_offsets", field=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"{at}: dtype {shown(dtype)}; expected one of {', '.join(DTYPES)}", field=name)
    if not _sizes(shape) or len(shape) > MOST_AXES:
        raise ModelError(f"{at}: shape {shown(shape)}; expected up to {MOST_AXES} sizes", field=name)
    if not _sizes(offsets) or len(offsets) != 2:
        raise ModelError(f"{at}: data_offsets {shown(offsets)}; expected two positions", field=name)
    numpy_name, itemsize = DTYPES[dtype]
    wanted = math.prod(shape) * itemsize
    begin, stop = (start + offset for offset in offsets)
    if stop - begin != wanted:
        raise ModelError(f"{at}: {stop - begin} bytes for shape {shape} of {dtype}; expected {wanted}", field=name)
    if stop > file.size:
        raise ModelError(f"{at}: truncated: the tensor ends at byte {stop}, the file has {file.size}", field=name)
    if begin != end:
        how = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
        raise ModelError(f"{at}: offsets: it {how} (starts at byte {begin}, expected {end})", field=name)
    return Place(file, begin, tuple(shape), np.dtype(getattr(jnp, numpy_name) if dtype != "BOOL" else bool))


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
