"""From what a person calls a model to a folder on this machine; the network is never asked.

    MODEL --resolve--> ModelFolder --open_tensors--> Tensors
      'embedded'      the model that ships with Serac
      a folder        safetensors as Hugging Face writes them, or an artifact of `serac convert`
      'org/name'      the newest snapshot in the local Hugging Face cache

The revision names the content: the commit of a snapshot, the one written in an artifact, or else the sha256 of
config.json, every header, every file's size and sixteen pages sampled evenly from every file. That is cheap for any
size of model; two folders would share it only if they differed in no byte that a sample touches, which training
cannot do.

Cost: milliseconds. Source: the cache layout is the one huggingface_hub documents.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine import embedded
from engine.errors import ModelError, NotFound, shown
from engine.weights.artifact import Artifact, is_artifact, open_manifest
from engine.weights.files import OpenFile, check_folder, read_bytes, read_json
from engine.weights.safetensors_files import SafetensorsFiles
from engine.weights.tensors import Tensors

EMBEDDED = "embedded"
CONFIG = "config.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SAMPLES, PAGE = 16, 4096


class ModelFolder(NamedTuple):
    """A model on this machine."""

    path: Path
    name: str  # as a client may call it
    revision: str  # the whole id
    root: Path  # its files may be links, but not out of here
    artifact: bool  # written by `serac convert`

    @property
    def short_revision(self) -> str:
        """The twelve digits that are shown."""
        return self.revision[:12]

    def config(self) -> dict:
        """The parsed config.json; `engine.models.config.from_hf` says whether it can be served."""
        return read_json(self.path / CONFIG, self.root)


def resolve(
    model: str, environ: Mapping[str, str] = os.environ, download: Callable[[str], object] | None = None
) -> ModelFolder:
    """The folder that `model` names.

    download  fetches `org/name` into the cache first (`engine.weights.hub.download`); None asks no network
    Raises ModelError when a folder cannot be served, NotFound when there is no such model.
    """
    if model == EMBEDDED:
        return describe(embedded.folder(), EMBEDDED)
    path = Path(model).expanduser()
    if not (path.exists() or path.is_symlink()) and HUB_NAME.fullmatch(model):
        if download is not None:
            download(model)
        return describe(_snapshot(model, cache_folder(environ)), model)
    return describe(path, path.resolve().name)


def describe(path: Path, name: str) -> ModelFolder:
    """The model in the folder `path`; its config and the headers of its weights are read."""
    check_folder(path)
    path = Path(os.path.abspath(path))
    if is_artifact(path):
        return ModelFolder(path, name, open_manifest(path).revision, path, artifact=True)
    commit, root = _in_cache(path)
    if not (path / CONFIG).exists() and not (path / CONFIG).is_symlink():
        raise ModelError(f"{path}: no {CONFIG}; expected a Hugging Face model folder or an artifact", field=CONFIG)
    if commit is None:
        commit = _content_id(path, root)
    return ModelFolder(path, name, commit, root, artifact=False)


def open_tensors(folder: ModelFolder) -> Tensors:
    """The tensors of a model; the caller closes them."""
    if folder.artifact:
        return Artifact(folder.path)
    return SafetensorsFiles(folder.path, folder.root)


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the local Hugging Face cache is: HF_HUB_CACHE, HF_HOME/hub, or the usual place."""
    if hub := environ.get("HF_HUB_CACHE"):
        return Path(hub).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _snapshot(name: str, cache: Path) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    if not repository.is_dir():
        raise NotFound(
            f"model: got {shown(name)}; no such folder, and not in the local cache {cache}; "
            f"expected a folder, {EMBEDDED!r}, or a model fetched before (--download asks the hub)",
            field="model",
        )
    main = repository / "refs" / "main"
    snapshots = sorted(path.name for path in (repository / "snapshots").glob("*"))
    if main.is_file():
        commit = read_bytes(main, cache, most=PAGE).decode("ascii", "replace").strip()
        if commit not in snapshots:
            raise ModelError(
                f"{repository}: incomplete: refs/main names {shown(commit)}, which is not among its snapshots"
            )
        return repository / "snapshots" / commit
    if len(snapshots) != 1:
        raise ModelError(f"{repository}: incomplete: no refs/main and {len(snapshots)} snapshots; expected one")
    return repository / "snapshots" / snapshots[0]


def _in_cache(path: Path) -> tuple[str | None, Path]:
    """(commit, root) of a snapshot in a Hugging Face cache, or (None, the folder itself)."""
    repository = path.parent.parent
    if path.parent.name == "snapshots" and repository.name.startswith("models--"):
        return (path.name if COMMIT.fullmatch(path.name) else None), repository.parent
    return None, path


def _content_id(path: Path, root: Path) -> str:
    digest = hashlib.sha256(read_bytes(path / CONFIG, root))
    tensors = SafetensorsFiles(path, root)
    try:
        for file in tensors.files:
            digest.update(f"\0{file.path.name}\0{file.size}\0".encode())
            digest.update(tensors.headers[file.path.name])
            digest.update(_sample(file))
    finally:
        tensors.close()
    return digest.hexdigest()


def _sample(file: OpenFile) -> bytes:
    """Sixteen pages, the first and the last among them."""
    size = min(PAGE, file.size)
    pages = np.empty((SAMPLES, size), np.uint8)
    for number, page in enumerate(pages):
        file.read_into(page, (file.size - size) * number // (SAMPLES - 1))
    return pages.tobytes()
