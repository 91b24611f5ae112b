import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from engine import embedded
from engine.errors import ConfigError, ModelError, NotFound
from engine.weights import files, hub
from engine.weights.load import load
from engine.weights.source import cache_folder, open_tensors, resolve
from sharding.mesh import MeshSpec, lane_meshes

SHA = "0123456789abcdef0123456789abcdef01234567"
FLOAT32 = np.dtype(np.float32)


def lane(tp):
    return lane_meshes(MeshSpec(1, tp), 8, 2)[0]


@pytest.fixture
def folder(folders, tmp_path):
    return folders.write(tmp_path / "model", num_hidden_layers=1)


@pytest.fixture
def cache(folders, tmp_path):
    """A cache as huggingface_hub leaves it: files are links from the snapshot into blobs."""
    repository = tmp_path / "hub" / "models--org--tiny"
    plain = folders.write(tmp_path / "plain", files=2)
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    for number, file in enumerate(plain.iterdir()):
        file.rename(repository / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob{number}")
    return tmp_path / "hub"


def test_a_name_is_found_in_the_local_cache_and_its_commit_is_the_revision(folders, cache):
    model = resolve("org/tiny", {"HF_HUB_CACHE": str(cache)})
    assert (model.name, model.revision, model.short_revision) == ("org/tiny", SHA, SHA[:12])
    weights = load(model, folders.config(), lane(2), FLOAT32)
    np.testing.assert_array_equal(weights["final_norm_D"], folders.tensors(folders.config())["model.norm.weight"])
    assert resolve(str(model.path), {}).revision == SHA


def test_the_cache_is_where_hugging_face_has_it():
    assert cache_folder({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert cache_folder({"HF_HOME": "/b"}) == Path("/b/hub")
    assert cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert cache_folder({}) == Path("~/.cache/huggingface/hub").expanduser()


def test_a_name_that_is_not_there_is_not_found_and_nothing_is_fetched(tmp_path):
    with pytest.raises(NotFound, match=r"model: got 'org/none'; no such folder, .*'embedded'.*--download"):
        resolve("org/none", {"HF_HOME": str(tmp_path)})


def test_download_happens_only_when_asked_for(cache):
    asked = []
    resolve("org/tiny", {"HF_HUB_CACHE": str(cache)})
    resolve("org/tiny", {"HF_HUB_CACHE": str(cache)}, download=asked.append)
    assert asked == ["org/tiny"]


def test_download_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(hub, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'serac\[hub\]'"):
        hub.download("org/tiny")


def test_an_interrupted_download_is_incomplete(cache):
    (cache / "models--org--tiny" / "refs" / "main").write_text("f" * 40)
    with pytest.raises(ModelError, match="incomplete: refs/main names"):
        resolve("org/tiny", {"HF_HUB_CACHE": str(cache)})


def test_the_embedded_model_goes_by_its_name(monkeypatch, folder):
    monkeypatch.setattr(embedded, "folder", lambda: folder)
    assert resolve("embedded", {}).name == "embedded"


def test_the_revision_of_a_folder_follows_its_content(folders, folder, tmp_path):
    first = resolve(str(folder)).revision
    assert len(first) == 64 and resolve(str(folder)).revision == first
    tuned = folders.tensors(folders.config(num_hidden_layers=1), seed=1)
    other = folders.write(tmp_path / "tuned", tuned, num_hidden_layers=1)
    assert resolve(str(other)).revision != first
    folders.write(folder, num_hidden_layers=1, rope_theta=2e4)
    assert resolve(str(folder)).revision != first


def test_a_link_out_of_the_cache_is_refused(cache, tmp_path):
    snapshot = cache / "models--org--tiny" / "snapshots" / SHA
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    with pytest.raises(ModelError, match=r"config\.json: not a regular file in .*leads outside"):
        resolve("org/tiny", {"HF_HUB_CACHE": str(cache)}).config()


def test_a_link_out_of_a_plain_folder_is_refused(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a regular file in"):
        resolve(str(folder))


def test_a_link_that_leads_nowhere_a_fifo_and_a_device_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.unlink()
    weights.symlink_to("nothing")
    with pytest.raises(ModelError, match=r"model\.safetensors: dangling symlink"):
        resolve(str(folder))
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a regular file"):
        resolve(str(folder))
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a regular file"):
        resolve(str(folder))


def test_what_is_no_folder_is_said_with_the_cause(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    cases = {
        "empty": "the folder is empty",
        "model/config.json": "a file; expected a model folder",
        "dangling": "dangling symlink",
        "no where/at all": "no such folder",
    }
    for path, message in cases.items():
        with pytest.raises(ModelError, match=message) as caught:
            resolve(str(tmp_path / path))
        assert path in str(caught.value)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(folder))


def test_what_may_not_be_read_is_said_with_the_cause(folder, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Root may read everything, so the refusal of the kernel is played.
    monkeypatch.setattr(files.os, "open", denied)
    with pytest.raises(ModelError, match=r"config\.json: Permission denied"):
        resolve(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is refused: pickled weights"):
        resolve(str(folder))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "not JSON: .* at line 1 column 2"),
        (b"[1]", "a JSON list; expected an object"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b'{"a": 1, "a": 2}', "not JSON: key 'a' is given twice"),
        (b'{"a":' * 100_000, "not JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(folder, content, message):
    model = resolve(str(folder))
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        model.config()


def spoil(change):
    """Rewrites the header of a folder's weights, keeping the data."""

    def apply(path: Path):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def entry(**changes):
    return spoil(lambda header: header["lm_head.weight"].update(changes))


def shift(header):
    """The second tensor takes the bytes of the first."""
    first, second = sorted((v["data_offsets"], k) for k, v in header.items() if k != "__metadata__")[:2]
    size = second[0][1] - second[0][0]
    header[second[1]]["data_offsets"] = [0, size]


def gap(header):
    for value in header.values():
        value["data_offsets"] = [offset + 8 for offset in value["data_offsets"]]


FILES = [
    (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        r"truncated: the tensor ends at byte \d+, the file has \d+",
    ),
    (
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        r"truncated or padded: \d+ bytes, its header describes",
    ),
    (lambda path: path.write_bytes(b""), "0 bytes are too few for the header"),
    (lambda path: path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}"), "header claims 9223372036854775808 bytes"),
    (lambda path: path.write_bytes(struct.pack("<Q", 200 << 20) + b"{}"), "header claims 209715200 bytes"),
    (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{x"), "header: not JSON"),
    (entry(dtype="Q7"), r"lm_head\.weight in model\.safetensors: dtype 'Q7'"),
    (entry(shape=[-1, 5]), r"lm_head\.weight in model\.safetensors: shape"),
    (entry(shape=[1 << 62, 1 << 62]), r"lm_head\.weight in model\.safetensors: \d+ bytes for shape"),
    (entry(shape=[61, 25]), r"lm_head\.weight in model\.safetensors: 5856 bytes for shape \[61, 25\]"),
    (
        entry(data_offsets=[1 << 40, (1 << 40) + 5856]),
        r"in model\.safetensors: (truncated|offsets: it leaves a gap)",
    ),
    (entry(data_offsets=[5856, 0]), r"lm_head\.weight in model\.safetensors: -5856 bytes"),
    (entry(data_offsets="all"), r"lm_head\.weight in model\.safetensors: data_offsets 'all'"),
    (spoil(lambda header: {"lm_head.weight": 3}), r"lm_head\.weight in model\.safetensors: header: expected dtype"),
    (spoil(gap), r"in model\.safetensors: (truncated|offsets: it leaves a gap)"),
    (spoil(shift), r"in model\.safetensors: (\d+ bytes for shape|offsets: it overlaps)"),
]


@pytest.mark.parametrize("break_it, message", FILES, ids=range(len(FILES)))
def test_a_broken_file_is_refused_by_file_and_tensor(folder, break_it, message):
    break_it(folder / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        resolve(str(folder))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (
            lambda index: index["weight_map"].update({"lm_head.weight": "../x.safetensors"}),
            "got '../x.safetensors'",
        ),
        (
            lambda index: index["weight_map"].update({"lm_head.weight": "no.safetensors"}),
            r"no\.safetensors: missing",
        ),
        (
            lambda index: index["weight_map"].update({"absent": "model-00001-of-00003.safetensors"}),
            r"absent: missing in model-00001-of-00003\.safetensors",
        ),
    ],
)
def test_a_broken_index_is_refused(folders, tmp_path, change, message):
    folder = folders.write(tmp_path / "sharded", files=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        resolve(str(folder))


def test_a_file_replaced_or_written_to_during_the_load_is_noticed(folders, folder):
    config, weights = folders.config(num_hidden_layers=1), folder / "model.safetensors"

    def replaced():
        (folder / "new").write_bytes(weights.read_bytes())
        (folder / "new").rename(weights)

    def cut():
        os.truncate(weights, 5000)

    for change in (replaced, cut):
        calls = []

        def once(done, total, change=change, calls=calls):
            calls or change()
            calls.append(done)

        model = resolve(str(folder))
        with pytest.raises(ModelError, match=r"model\.safetensors: changed during load"):
            load(model, config, lane(2), FLOAT32, progress=once)


def test_files_are_closed_after_a_load_and_after_a_refusal(folders, folder):
    before = len(os.listdir("/proc/self/fd"))
    load(resolve(str(folder)), folders.config(num_hidden_layers=1), lane(2), FLOAT32)
    tensors = open_tensors(resolve(str(folder)))
    tensors.close()
    (folder / "model.safetensors").write_bytes(b"short")
    for _ in range(3):
        with pytest.raises(ModelError):
            resolve(str(folder))
    assert len(os.listdir("/proc/self/fd")) == before
