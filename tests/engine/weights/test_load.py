import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from engine.errors import ModelError
from engine.weights.layout import parameters
from engine.weights.load import assemble, check_finite, load
from engine.weights.safetensors_files import SafetensorsFiles
from engine.weights.source import resolve
from engine.weights.tensors import check_tensors, check_vocabulary, choose_dtype
from sharding.mesh import MeshSpec, lane_meshes

FLOAT32 = np.dtype(np.float32)


def lane(tp):
    return lane_meshes(MeshSpec(1, tp), 8, 2)[0]


class Spy:
    """Tensors that remember which slices were asked for."""

    def __init__(self, tensors):
        self.tensors, self.asked = tensors, []
        self.described, self.settle = tensors.described, tensors.settle

    def read(self, name, cut):
        self.asked.append((name, tuple((piece.start, piece.stop) for piece in cut)))
        return self.tensors.read(name, cut)


@pytest.fixture(scope="module")
def model(folders, tmp_path_factory):
    return resolve(str(folders.write(tmp_path_factory.mktemp("model"), files=3)))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_weights_on_any_mesh_are_those_of_the_files(folders, model, tp):
    config, files = folders.config(), folders.tensors(folders.config())
    weights = load(model, config, lane(tp), FLOAT32)
    at, kv = "model.layers.1.", min(2, tp)
    q_NHD, k_KHD, v_KHD = (files[f"{at}self_attn.{name}_proj.weight"].reshape(-1, 8, 24) for name in "qkv")
    shards = np.split(np.asarray(weights["layers"][1]["wqkv_DX"]), tp, axis=1)
    for shard, columns_DX in enumerate(shards):
        group = shard * kv // tp
        wanted = np.concatenate(
            [np.split(q_NHD, tp)[shard], np.split(k_KHD, kv)[group], np.split(v_KHD, kv)[group]]
        )
        np.testing.assert_array_equal(columns_DX, wanted.reshape(-1, 24).T)
    np.testing.assert_array_equal(weights["layers"][1]["wo_XD"], files[f"{at}self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(np.asarray(weights["head_DV"])[:, :61], files["lm_head.weight"].T)
    np.testing.assert_array_equal(np.asarray(weights["embed_VD"])[:61], files["model.embed_tokens.weight"])
    assert (
        not np.asarray(weights["embed_VD"])[61:].any() and not np.asarray(weights["layers"][0]["wd_FD"])[37:].any()
    )


def test_each_device_reads_only_its_own_slices(folders, model):
    tensors = Spy(SafetensorsFiles(model.path, model.root))
    assemble(tensors, folders.config(), lane(8), FLOAT32)
    asked = {name: sorted(cut for other, cut in tensors.asked if other == name) for name, _ in tensors.asked}
    at = "model.layers.0."
    assert asked[f"{at}self_attn.q_proj.weight"] == [((8 * s, 8 * s + 8), (0, 24)) for s in range(8)]
    assert asked[f"{at}self_attn.k_proj.weight"] == [((8 * (s // 4), 8 * (s // 4) + 8), (0, 24)) for s in range(8)]
    assert asked[f"{at}self_attn.o_proj.weight"] == [((0, 24), (8 * s, 8 * s + 8)) for s in range(8)]
    # 37 columns in shares of 5: the last device has two of its own and pads the rest.
    assert asked[f"{at}mlp.down_proj.weight"] == [((0, 24), (5 * s, min(5 * s + 5, 37))) for s in range(8)]
    assert asked[f"{at}input_layernorm.weight"] == [((0, 24),)]


def test_no_byte_of_the_file_beside_a_slice_is_read(folders, model, monkeypatch):
    tensors = SafetensorsFiles(model.path, model.root)
    name = "model.layers.0.self_attn.o_proj.weight"
    place = tensors._places[name]
    ranges = []
    monkeypatch.setattr(
        type(place.file), "read_into", lambda file, target, offset: ranges.append((offset, target.nbytes))
    )
    tensors.read(name, (slice(3, 6), slice(16, 24)))
    assert ranges == [(place.offset + 4 * (64 * row + 16), 4 * 8) for row in (3, 4, 5)]
    ranges.clear()
    tensors.read(name, (slice(3, 6), slice(0, 64)))
    assert ranges == [(place.offset + 4 * 64 * 3, 4 * 64 * 3)]


def test_the_embedding_of_a_tied_model_is_read_once_and_a_stored_head_is_ignored(folders, tmp_path):
    config = folders.config(tie_word_embeddings=True)
    files = folders.tensors(config)
    head = {
        "lm_head.weight": np.zeros((61, 24), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4),
    }
    model = resolve(str(folders.write(tmp_path / "tied", files | head, tie_word_embeddings=True)))
    weights = load(model, config, lane(2), FLOAT32)
    assert "embed_VD" not in weights
    np.testing.assert_array_equal(np.asarray(weights["head_DV"])[:, :61], files["model.embed_tokens.weight"].T)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_to_the_dtype_that_is_served(folders, tmp_path, stored, served):
    files = {
        name: value.astype(np.dtype(stored))
        for name, value in folders.tensors(folders.config(num_hidden_layers=1)).items()
    }
    model = resolve(str(folders.write(tmp_path / "model", files, num_hidden_layers=1)))
    weights = load(model, folders.config(num_hidden_layers=1), lane(2), np.dtype(served))
    wanted = files["model.layers.0.self_attn.o_proj.weight"].T.astype(np.dtype(served))
    assert weights["layers"][0]["wo_XD"].dtype == np.dtype(served)
    np.testing.assert_array_equal(weights["layers"][0]["wo_XD"], wanted)


def test_host_memory_holds_one_array_beside_the_weights(folders, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 512}
    model, config = resolve(str(folders.write(tmp_path / "model", **sizes))), folders.config(**sizes)
    load(model, config, lane(4), FLOAT32)
    tracemalloc.start()
    weights = load(model, config, lane(4), FLOAT32)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = jax.tree.leaves(weights)
    # What is read of one array, and that array before its device holds it; all of them are eight times as much.
    assert peak - held < 2 * max(array.nbytes for array in arrays) + (64 << 10)


def test_progress_counts_every_byte_on_the_devices(folders, model):
    seen = []
    weights = load(
        model, folders.config(), lane(8), FLOAT32, progress=lambda done, total: seen.append((done, total))
    )
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(weights) for shard in leaf.addressable_shards)
    assert seen[-1] == (held, held)
    assert len(seen) == len(parameters(folders.config(), 8))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(folders, tmp_path, value):
    files = folders.tensors(folders.config(num_hidden_layers=1))
    files["model.layers.0.self_attn.k_proj.weight"][15, 23] = value
    model = resolve(str(folders.write(tmp_path / "model", files, num_hidden_layers=1)))
    config = folders.config(num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_proj\.weight: non-finite .*--allow-non-finite"):
        load(model, config, lane(8), FLOAT32)
    weights = load(model, config, lane(8), FLOAT32, allow_non_finite=True)
    assert not np.isfinite(np.asarray(weights["layers"][0]["wqkv_DX"])).all()


def test_a_value_too_large_for_the_dtype_that_is_served_is_refused(folders, tmp_path):
    files = folders.tensors(folders.config(num_hidden_layers=1))
    files["model.norm.weight"][5] = 70000.0
    model = resolve(str(folders.write(tmp_path / "model", files, num_hidden_layers=1)))
    with pytest.raises(ModelError, match=r"model\.norm\.weight: non-finite values in float16"):
        load(model, folders.config(num_hidden_layers=1), lane(1), np.dtype(np.float16))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finiteness_is_judged_by_the_bits(dtype):
    fine = np.array(
        [0.0, -0.0, float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).smallest_subnormal)], dtype
    )
    check_finite(np.concatenate([fine, -fine]), "w")
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        with pytest.raises(ModelError, match="w: non-finite"):
            check_finite(np.append(fine, np.array(bad, dtype)), "w")


BROKEN = [
    (lambda files: files.pop("model.norm.weight"), r"model\.norm\.weight: missing"),
    (
        lambda files: files.update({"model.odd": np.zeros(3, np.float32)}),
        r"model\.odd: unexpected in model\.safetensors",
    ),
    (
        lambda files: files.update({"lm_head.weight": np.zeros((24, 61), np.float32)}),
        r"lm_head\.weight in model\.safetensors: got shape \[24, 61\] \(it is transposed\); .* \[61, 24\]",
    ),
    (
        lambda files: files.update({"lm_head.weight": np.zeros((61, 24), np.int8)}),
        r"lm_head\.weight in model\.safetensors: got dtype int8; expected float32, bfloat16, float16",
    ),
]


@pytest.mark.parametrize("spoil, message", BROKEN, ids=["missing", "unexpected", "shape", "dtype"])
def test_tensors_that_do_not_fit_the_config_are_named(folders, tmp_path, spoil, message):
    files = folders.tensors(folders.config())
    spoil(files)
    tensors = SafetensorsFiles(folders.write(tmp_path / "model", files), tmp_path)
    with pytest.raises(ModelError, match=message):
        check_tensors(tensors, folders.config())


def test_many_missing_tensors_make_a_short_message(folders, tmp_path):
    tensors = SafetensorsFiles(
        folders.write(tmp_path / "model", {"model.norm.weight": np.ones(24, np.float32)}), tmp_path
    )
    with pytest.raises(ModelError, match=r"and 20 more: missing; 1 tensors are there"):
        check_tensors(tensors, folders.config())


def test_a_tokenizer_may_know_fewer_ids_than_there_are_rows_but_not_more(folders):
    check_vocabulary(61, folders.config())
    check_vocabulary(50, folders.config())
    with pytest.raises(ModelError, match="62 tokens but the model only 61 embedding rows"):
        check_vocabulary(62, folders.config())
    with pytest.raises(ModelError, match="0 tokens and the model 61"):
        check_vocabulary(0, folders.config())


def test_the_dtype_comes_from_the_flag_or_from_the_config():
    assert choose_dtype("float32", {"torch_dtype": "bfloat16"}) == np.float32
    assert choose_dtype("auto", {"torch_dtype": "bfloat16"}).name == "bfloat16"
    assert choose_dtype("auto", {"dtype": "float16"}) == np.float16
    assert choose_dtype("auto", {}) == np.float32
    with pytest.raises(Exception, match="dtype: got 'int8'; expected auto, float32, bfloat16, float16"):
        choose_dtype("int8", {})
    with pytest.raises(ModelError, match="torch_dtype: got 'float8'"):
        choose_dtype("auto", {"torch_dtype": "float8"})
