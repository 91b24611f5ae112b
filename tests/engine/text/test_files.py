import pytest

from engine.errors import ModelError
from engine.text import Text, files


def test_every_eos_id_of_both_files_counts_once_and_in_order(make_folder):
    folder = make_folder(generation_config={"eos_token_id": [2, 1]}, config={"eos_token": "<|bos|>"})
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    assert Text(folder).eos_ids == (2, 1)


def test_the_tokenizers_own_eos_counts_where_no_file_names_one(make_folder):
    assert Text(make_folder()).eos_ids == (2,)
    assert Text(make_folder(config={})).eos_ids == ()


@pytest.mark.parametrize("value", [-1, "2", True, [1, None], 1.5])
def test_an_eos_id_of_the_wrong_type_is_refused_by_file_and_key(make_folder, value):
    with pytest.raises(ModelError, match="generation_config.json: eos_token_id: got .*; expected a token id"):
        Text(make_folder(generation_config={"eos_token_id": value}))


def test_sampling_defaults_are_those_of_the_model(make_folder):
    stated = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "max_new_tokens": 9}
    assert Text(make_folder(generation_config=stated)).defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert Text(make_folder(generation_config={"do_sample": False})).defaults == {"temperature": 0.0}
    assert Text(make_folder()).defaults == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_k", 1.5), ("top_p", 0), ("min_p", "0.1"),
     ("repetition_penalty", True)],
)  # fmt: skip
def test_a_default_out_of_its_domain_is_refused_by_file_and_key(make_folder, key, value):
    with pytest.raises(ModelError, match=f"generation_config.json: {key}: got .*; expected a"):
        Text(make_folder(generation_config={key: value}))


def test_bos_is_known_by_its_name_in_either_file(make_folder):
    assert Text(make_folder()).bos_id == 0
    assert Text(make_folder(config={}, special_tokens_map={"bos_token": {"content": "<|bos|>"}})).bos_id == 0
    assert Text(make_folder(config={})).bos_id is None


def test_a_special_token_of_the_wrong_type_is_refused(make_folder):
    with pytest.raises(ModelError, match="tokenizer_config.json: bos_token: got 3; expected a string"):
        Text(make_folder(config={"bos_token": 3}))


def test_a_template_file_wins_and_of_several_templates_the_default(make_folder):
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    folder = make_folder(config={"chat_template": named})
    assert files.chat_template(folder) == (folder / "tokenizer_config.json", "b")
    (folder / "chat_template.jinja").write_text("c")
    assert files.chat_template(folder) == (folder / "chat_template.jinja", "c")


def test_a_template_of_the_wrong_type_is_refused(make_folder):
    with pytest.raises(ModelError, match="tokenizer_config.json: chat_template: got int; expected a string"):
        Text(make_folder(config={"chat_template": 1}))


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"{", "not JSON"), (b"[]", "got list; expected a JSON object"), (b"\xff", "not UTF-8 at byte 0"),
     (b"[" * 100_000, "not JSON")],
)  # fmt: skip
def test_a_broken_json_file_is_named_with_its_cause(tmp_path, content, cause):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"config.json: {cause}"):
        files.read_json(path)


def test_only_a_regular_file_is_read(tmp_path):
    with pytest.raises(ModelError, match="not a regular file"):
        files.read_bytes(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match="dangling: missing"):
        files.read_json(tmp_path / "dangling")
