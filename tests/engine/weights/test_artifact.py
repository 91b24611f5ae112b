"""Artifacts: what goes in comes out on every mesh, and nothing that was damaged is served.

`SERAC_CORRUPTIONS=100 pytest tests/engine/weights/test_artifact.py` tries that many corruptions (25 by default).
"""

import hashlib
import json
import os
import random
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engine.errors import ConfigError, ModelError
from engine.weights import convert as converting
from engine.weights import manifest as manifests
from engine.weights.artifact import Artifact
from engine.weights.convert import convert
from engine.weights.files import OpenFile
from engine.weights.load import load
from engine.weights.manifest import digests, read_manifest, write_manifest
from engine.weights.source import open_tensors, resolve
from sharding.mesh import MeshSpec, lane_meshes

FLOAT32 = np.dtype(np.float32)
CORRUPTIONS = int(os.environ.get("SERAC_CORRUPTIONS", "25"))
Q = "model.layers.0.self_attn.q_proj.weight"


def lane(tp):
    return lane_meshes(MeshSpec(1, tp), 8, 2)[0]


@pytest.fixture(scope="module")
def source(folders, tmp_path_factory):
    return resolve(str(folders.write(tmp_path_factory.mktemp("source"), num_hidden_layers=1)))


@pytest.fixture(scope="module")
def sealed(source, tmp_path_factory):
    """An artifact whose larger tensors are cut into several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converting, "SLICE_BYTES", 2048)
        patch.setattr(converting, "LEAST_CHUNK_BYTES", 16)
        out = tmp_path_factory.mktemp("sealed") / "out"
        convert(source, out)
    return out


@pytest.fixture
def artifact(sealed, tmp_path):
    """A copy to break."""
    return shutil.copytree(sealed, tmp_path / "artifact")


def config(folders):
    return folders.config(num_hidden_layers=1)


def serve(folders, artifact, tp=4):
    model = resolve(str(artifact))
    return load(model, folders.config(num_hidden_layers=1), lane(tp), FLOAT32)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_an_artifact_gives_the_weights_of_its_source_on_every_mesh(folders, source, sealed, tp):
    wanted = load(source, config(folders), lane(tp), FLOAT32)
    jax.tree.map(np.testing.assert_array_equal, serve(folders, sealed, tp), wanted)


def test_an_artifact_keeps_revision_config_and_tokenizer(source, sealed):
    model = resolve(str(sealed))
    assert model.artifact and model.revision == source.revision and model.config() == source.config()
    assert (sealed / "tokenizer.json").read_bytes() == (source.path / "tokenizer.json").read_bytes()


def test_orbax_itself_restores_an_artifact_onto_any_mesh(folders, sealed):
    files = folders.tensors(config(folders))
    for tp in (2, 8):
        mesh = jax.make_mesh((tp,), ("tp",))
        target = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
            for name, value in files.items()
        }
        target[Q] = jax.ShapeDtypeStruct(
            files[Q].shape, files[Q].dtype, sharding=NamedSharding(mesh, PartitionSpec("tp", None))
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(sealed / "checkpoint", target)
        assert restored[Q].sharding == target[Q].sharding
        jax.tree.map(np.testing.assert_array_equal, restored, files)


def test_the_manifest_names_shape_dtype_and_the_digest_of_every_slice(folders, sealed):
    manifest, files = read_manifest(sealed), folders.tensors(config(folders))
    assert {name: (stored.shape, stored.dtype) for name, stored in manifest.tensors.items()} == {
        name: (value.shape, "float32") for name, value in files.items()
    }
    assert len([file for name, _, file in manifest.chunks() if name == Q]) > 2
    for name, at, file in manifest.chunks():
        step = manifest.tensors[name].chunk
        box = files[name][tuple(slice(i * s, (i + 1) * s) for i, s in zip(at, step, strict=True))]
        assert manifest.files[file].digests == (hashlib.sha256(box.tobytes()).hexdigest(),)
    on_disk = {path.relative_to(sealed).as_posix() for path in sealed.rglob("*") if path.is_file()}
    assert on_disk == set(manifest.files) | {"manifest.json", "manifest.sha256"}


def test_digests_are_of_fixed_slices(monkeypatch):
    monkeypatch.setattr(manifests, "SLICE_BYTES", 4)
    assert digests(b"abcdefghij") == tuple(hashlib.sha256(part).hexdigest() for part in (b"abcd", b"efgh", b"ij"))
    assert digests(b"") == (hashlib.sha256(b"").hexdigest(),)


def test_a_device_reads_and_checks_the_chunks_of_its_part_and_no_other(folders, sealed, monkeypatch):
    tensors, opened = Artifact(sealed), []
    read = OpenFile.read_into
    monkeypatch.setattr(
        OpenFile,
        "read_into",
        lambda file, target, offset: opened.append(file.path.name) or read(file, target, offset),
    )
    rows, columns = tensors.manifest.tensors[Q].chunk
    assert (rows, columns) == (16, 24)
    part = tensors.read(Q, (slice(20, 36), slice(3, 24)))
    assert sorted(opened) == ["1.0", "2.0"]
    np.testing.assert_array_equal(part, folders.tensors(config(folders))[Q][20:36, 3:])
    np.testing.assert_array_equal(
        tensors.read(Q, (slice(20, 30), slice(2, 9))), folders.tensors(config(folders))[Q][20:30, 2:9]
    )
    tensors.read(Q, (slice(32, 48), slice(0, 24)))
    assert sorted(opened) == ["1.0", "2.0"]
    tensors.settle()
    tensors.read(Q, (slice(32, 48), slice(0, 24)))
    assert sorted(opened) == ["1.0", "2.0", "2.0"]
    tensors.close()


def corrupt(artifact, dice) -> str:
    """One random bit flip, cut or deletion in a random file; says which."""
    path = dice.choice(sorted(path for path in artifact.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    how = dice.choice(["flip", "cut", "delete"]) if content else "delete"
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    else:
        bit = dice.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    return f"{how} {path.relative_to(artifact)}"


def test_every_random_corruption_is_caught_before_serving(folders, sealed, tmp_path):
    missed = []
    for seed in range(CORRUPTIONS):
        artifact = shutil.copytree(sealed, tmp_path / str(seed))
        what = corrupt(artifact, random.Random(seed))
        try:
            serve(folders, artifact)
        except ModelError:
            pass
        else:
            missed.append(f"seed {seed}: {what}")
        shutil.rmtree(artifact)
    assert not missed


def test_a_changed_value_is_refused_by_the_name_of_its_tensor(folders, artifact):
    path = artifact / "checkpoint" / Q / "1.0"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"q_proj\.weight: its file .*/1\.0 is corrupt: its bytes"):
        serve(folders, artifact)


def test_a_chunk_that_is_missing_or_short_is_refused_by_the_name_of_its_tensor(folders, artifact):
    path = artifact / "checkpoint" / Q / "1.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ModelError, match=r"q_proj\.weight: its file .*/1\.0 in .* is corrupt: 1535 bytes; expected 1536"
    ):
        resolve(str(artifact))
    path.unlink()
    with pytest.raises(ModelError, match=r"q_proj\.weight: its file .*/1\.0 is missing"):
        resolve(str(artifact))


@pytest.mark.parametrize(
    "name", ["checkpoint/_METADATA", "config.json", "tokenizer.json", f"checkpoint/{Q}/.zarray"]
)
def test_a_small_file_that_is_missing_or_changed_is_refused(artifact, name):
    path = artifact / name
    path.write_bytes(path.read_bytes().swapcase()[::-1])
    with pytest.raises(ModelError, match=rf"{name} in .* is corrupt"):
        resolve(str(artifact))
    path.unlink()
    with pytest.raises(ModelError, match=rf"{name} is missing"):
        resolve(str(artifact))


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_an_artifact_without_its_manifest_is_incomplete(artifact, name):
    (artifact / name).unlink()
    with pytest.raises(ModelError, match=rf"incomplete artifact: {name} is missing; run `serac convert` again"):
        resolve(str(artifact))


def test_a_bare_orbax_checkpoint_and_a_conversion_under_way_are_incomplete(artifact):
    with pytest.raises(
        ModelError, match="incomplete artifact: manifest.json, manifest.sha256, checkpoint is missing"
    ):
        resolve(str(artifact / "checkpoint"))
    under_way = artifact.rename(artifact.with_name("out.incomplete-abc"))
    with pytest.raises(ModelError, match="incomplete artifact: its name says"):
        resolve(str(under_way))


def rewrite(artifact, change):
    """Changes the manifest and seals it again, as an honest but mistaken writer would."""
    value = json.loads((artifact / "manifest.json").read_text())
    change(value)
    content = (json.dumps(value) + "\n").encode()
    (artifact / "manifest.json").write_bytes(content)
    (artifact / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


MANIFESTS = [
    (lambda value: value.update(version=2), "version 2; expected serac artifact version 1"),
    (lambda value: value["tensors"][Q].update(dtype="int8"), "malformed: .*has dtype int8"),
    (lambda value: value["tensors"][Q].update(shape=[64, 25]), "malformed: .*and chunks of"),
    (lambda value: value["tensors"][Q].update(dtype="float16"), "malformed: .*is not listed with 768 bytes"),
    (
        lambda value: value["files"].update({"../x": {"bytes": 1, "sha256": ["0"]}}),
        "malformed: the file ../x leads out",
    ),
    (lambda value: value["tensors"].update(more=3), "malformed: TypeError"),
    (lambda value: value.pop("revision"), "malformed: KeyError"),
]


@pytest.mark.parametrize("change, message", MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_refused(artifact, change, message):
    rewrite(artifact, change)
    with pytest.raises(ModelError, match=message):
        resolve(str(artifact))


def test_a_tensor_of_another_shape_than_the_config_wants_is_named(folders, artifact):
    def transpose(value):
        value["tensors"][Q].update(shape=[24, 64], chunk=[24, 16])
        files = value["files"]
        for number in range(1, 4):
            files[f"checkpoint/{Q}/0.{number}"] = files[f"checkpoint/{Q}/{number}.0"]
            shutil.copy(artifact / f"checkpoint/{Q}/{number}.0", artifact / f"checkpoint/{Q}/0.{number}")

    rewrite(artifact, transpose)
    with pytest.raises(ModelError, match=r"q_proj\.weight in .*: got shape \[24, 64\] \(it is transposed\)"):
        serve(folders, artifact)


def test_an_artifact_replaced_during_the_load_is_noticed(folders, artifact, sealed):
    tensors = open_tensors(resolve(str(artifact)))
    shutil.rmtree(artifact)
    shutil.copytree(sealed, artifact)
    with pytest.raises(ModelError, match="changed during load"):
        tensors.finish()
    tensors.close()


def test_a_conversion_leaves_all_or_nothing(folders, tmp_path, source, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there: exists"):
        convert(source, tmp_path / "there")
    broken = folders.tensors(config(folders))
    broken[Q][3, 3] = np.nan
    model = resolve(str(folders.write(tmp_path / "broken", broken, num_hidden_layers=1)))
    with pytest.raises(ModelError, match=r"q_proj\.weight: non-finite"):
        convert(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "there"]
    seen = []
    convert(model, tmp_path / "out", allow_non_finite=True, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(value.nbytes for value in broken.values())
    with pytest.raises(ConfigError, match="an artifact already"):
        convert(resolve(str(tmp_path / "out")), tmp_path / "again")


def test_what_is_written_is_compared_with_the_source(folders, tmp_path, source, monkeypatch):
    save = converting._save

    def careless(arrays, folder):
        save(arrays, folder)
        chunk = folder / Q / "0.0"
        chunk.write_bytes(chunk.read_bytes()[::-1])

    monkeypatch.setattr(converting, "_save", careless)
    with pytest.raises(ModelError, match=r"q_proj\.weight: what was written to 0\.0 is not what was read"):
        convert(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_size_without_divisors_makes_one_file_of_many_slices(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "SLICE_BYTES", 2048)
    monkeypatch.setattr(converting, "LEAST_CHUNK_BYTES", 1024)
    model = resolve(str(folders.write(tmp_path / "model", num_hidden_layers=1)))
    manifest = convert(model, tmp_path / "out")
    assert manifest.tensors["lm_head.weight"].chunk == (61, 24)
    assert manifest.tensors[Q].chunk == (16, 24)
    assert read_manifest(tmp_path / "out") == manifest


def test_the_manifest_survives_a_round_trip(tmp_path, sealed):
    manifest = read_manifest(sealed)
    (tmp_path / "checkpoint").mkdir()
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
