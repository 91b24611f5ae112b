import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from engine import embedded
from engine.text import Text
from engine.text.detokenizer import byte_alphabet

KINDS = ["embedded", "byte_level", "byte_fallback"]


@pytest.fixture(scope="module")
def texts(make_folder):
    folders = {"byte_level": make_folder("byte_level"), "byte_fallback": make_folder("byte_fallback", {})}
    return {kind: Text(folders.get(kind) or embedded.folder()) for kind in KINDS}


def increments(text: Text, ids: list[int], sizes: list[int], prompt: list[int], skip_special: bool) -> list[str]:
    detokenizer = text.detokenizer(prompt, skip_special)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(detokenizer.step(ids[at : at + size]))
        at += size
    return [*pieces, detokenizer.step(ids[at:]), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)  # machines under load are slow, not wrong
@given(data=st.data())
def test_the_increments_of_any_ids_join_to_the_decoding_of_all(texts, kind, data):
    text = texts[kind]
    ids = data.draw(st.lists(st.integers(0, text.vocab + 3), max_size=24))  # some ids have no token
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=24))
    skip_special = data.draw(st.booleans())
    pieces = increments(text, ids, sizes, [], skip_special)
    assert "".join(pieces) == text.decode(ids, skip_special)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)  # machines under load are slow, not wrong
@given(prompt=st.text(min_size=1, max_size=12), answer=st.text(max_size=12))
def test_text_is_shown_whole_characters_at_a_time_and_continues_its_prompt(texts, kind, prompt, answer):
    text = texts[kind]
    before, both = text.encode(prompt, False), text.encode(prompt + answer, False)
    if both[: len(before)] != before or text.decode(both) != prompt + answer:
        return  # a token spans the seam, or this tokenizer does not keep the text
    pieces = increments(text, both[len(before) :], [1] * 60, before, True)
    assert "".join(pieces) == answer
    assert "\ufffd" in answer or not any("\ufffd" in piece for piece in pieces)


def test_the_byte_alphabet_is_that_of_the_tokenizers():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(ByteLevel.alphabet()) and sorted(alphabet.values()) == list(range(256))


def test_a_character_of_four_tokens_comes_out_with_its_last(texts):
    text = texts["byte_level"]
    ids = [byte_id(text, byte) for byte in "🙂".encode()]
    detokenizer = text.detokenizer()
    assert [detokenizer.step([i]) for i in ids] == ["", "", "", "🙂"]


def byte_id(text: Text, byte: int) -> int:
    return next(i for i in range(text.vocab) if text.token(i) == bytes([byte]))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_cut_off_at_the_end_is_flushed_as_the_replacement(texts, kind):
    text = texts[kind]
    ids = text.encode("🙂", False)[:-1]
    detokenizer = text.detokenizer()
    assert detokenizer.step(ids) + detokenizer.flush() == text.decode(ids)
    assert "\ufffd" in text.decode(ids)
    assert detokenizer.flush() == ""


def test_a_character_that_the_prompt_left_unfinished_is_finished_in_the_output(texts):
    text = texts["byte_level"]
    ids = [byte_id(text, byte) for byte in "é".encode()]
    assert text.detokenizer(ids[:1]).step(ids[1:]) == "é"


def test_the_first_word_of_an_answer_keeps_its_space(texts):
    text = texts["byte_fallback"]
    space_a = text.encode("b a", False)[-1]
    assert text.detokenizer(text.encode("b", False)).step([space_a]) == " a"
    assert text.detokenizer().step([space_a]) == text.decode([space_a]) == "a"


def test_special_tokens_are_hidden_or_shown_as_asked(texts):
    text = texts["byte_level"]
    ids = [2, *text.encode("x", False)]
    assert text.detokenizer(skip_special=True).step(ids) == "x"
    assert text.detokenizer(skip_special=False).step(ids) == "<|im_end|>x"
