import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import embedded
from engine.errors import InvalidArgument, ModelError
from engine.text import Text


@pytest.fixture(scope="module")
def text(make_folder):
    return Text(make_folder())


def test_the_embedded_model_encodes_and_decodes():
    text = Text(embedded.folder())
    source = "def double(x):\n    return 2 * x\n"
    assert text.decode(text.encode(source)) == source
    assert text.has_chat and text.eos_ids and max(text.eos_ids) < text.vocab


def test_the_text_of_a_special_token_in_a_prompt_is_text(text):
    ids = text.encode("a<|im_end|>b", add_special=False)
    assert not {1, 2} & set(ids)
    assert text.decode(ids) == "a<|im_end|>b"


def test_add_special_adds_what_the_post_processor_adds(text):
    assert text.encode("x") == [0, *text.encode("x", add_special=False)]


def test_vocab_lies_above_added_tokens_too(text):
    assert text.vocab == max(text.encode("<think>", add_special=False)) + 1


@settings(deadline=None)  # machines under load are slow, not wrong
@given(prompt=st.text(max_size=40))
def test_any_text_comes_back_as_it_was_control_characters_included(text, prompt):
    assert text.decode(text.encode(prompt)) == prompt


def test_a_lone_surrogate_is_refused(text):
    with pytest.raises(InvalidArgument, match="prompt: a lone surrogate at character 1"):
        text.encode("a\ud800")


def test_a_prompt_is_neither_cut_nor_padded(make_folder, tokenizers):
    folder = make_folder()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(Text(folder).encode("abcdefgh " * 20)) > 20


def test_threads_encode_alike(text):
    prompts = [f"def f{k}(): return {k}" for k in range(50)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text.encode, prompts)) == [text.encode(prompt) for prompt in prompts]


def test_a_token_gives_its_bytes(text):
    assert b"".join(text.token(i) for i in text.encode("🙂", add_special=False)) == "🙂".encode()
    assert text.token(2) == b"<|im_end|>"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "not a tokenizer: EOF"),
        ("{}", "not a tokenizer: Model missing"),
        ("[1]", "not a tokenizer: invalid type"),
    ],
)
def test_a_broken_tokenizer_file_is_named(make_folder, content, cause):
    folder = make_folder()
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"tokenizer.json: {cause}"):
        Text(folder)


def test_a_missing_folder_file_or_a_file_instead_of_a_folder_is_named(make_folder, tmp_path):
    with pytest.raises(ModelError, match="nowhere: missing; expected a model folder"):
        Text(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="tokenizer.json: missing"):
        Text(tmp_path)
    with pytest.raises(ModelError, match="tokenizer.json: not a folder"):
        Text(make_folder() / "tokenizer.json")


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(make_folder):
    folder = make_folder()
    (folder / "config.json").write_text('{"vocab_size": 7}')
    with pytest.raises(ModelError, match=r"ids reach 3\d\d; expected ids below vocab_size 7 of config.json"):
        Text(folder)
