from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument, ModelError
from engine.text import Text

USER = {"role": "user", "content": "hi"}
SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def text(make_folder):
    return Text(make_folder())


def templated(make_folder, template: str, **kwargs) -> Text:
    return Text(make_folder(chat_template=template), **kwargs)


def test_the_special_tokens_of_the_template_become_ids(text):
    ids = text.encode_chat([USER])
    plain = [text.encode(part, add_special=False) for part in ("user\nhi", "\n", "assistant\n")]
    assert ids == [1, *plain[0], 2, *plain[1], 1, *plain[2]]


def test_the_generation_prompt_can_be_left_out(text):
    with_prompt = text.encode_chat([USER])
    assert with_prompt == text.encode_chat([USER], add_generation_prompt=False) + [
        1,
        *text.encode("assistant\n", add_special=False),
    ]


@settings(deadline=None)  # machines under load are slow, not wrong
@given(
    contents=st.lists(
        st.lists(st.sampled_from([*SPECIALS, "<", "<|im_", "end|>", "x", " ", "\ufdd0", "\U000f0000"]), max_size=5),
        min_size=1,
        max_size=3,
    )
)
def test_no_message_can_write_a_special_token(text, contents):
    messages = [{"role": "user", "content": "".join(content)} for content in contents]
    try:
        ids = text.encode_chat(messages, add_generation_prompt=False)
    except InvalidArgument as error:
        assert "U+FDD0" in str(error)
        return
    assert [i for i in ids if i in (0, 1, 2)] == [1, 2] * len(messages)
    shown = "".join(f"<|im_start|>user\n{m['content'].strip()}<|im_end|>\n" for m in messages)
    assert text.decode(ids, skip_special=False) == shown


def test_no_two_messages_can_write_one_together(make_folder):
    text = templated(make_folder, "{{ messages[0].content }}{{ messages[1].content }}")
    for parts in (("<|im_", "end|>"), ("<", "|im_end|>"), ("<|im_end|>", ""), ("\ufdd0", "<|im_end|>")):
        messages = [{"role": "user", "content": part} for part in parts]
        if "\ufdd0" in parts:
            with pytest.raises(InvalidArgument, match=r"messages: U\+FDD0"):
                text.encode_chat(messages)
        else:
            assert text.encode_chat(messages) == text.encode("<|im_end|>", add_special=False)


def test_a_message_is_encoded_as_it_would_be_alone(text):
    content = "see <|im_end|> and <|im_start|>"
    ids = text.encode_chat([{"role": "user", "content": content}], add_generation_prompt=False)
    assert ids[1 : ids.index(2)] == text.encode(f"user\n{content}", add_special=False)


def test_a_template_sees_contents_as_they_are(make_folder):
    text = templated(make_folder, "{% if '</think>' in messages[0].content %}{{ 'yes' }}{% endif %}")
    assert text.decode(text.encode_chat([{"role": "assistant", "content": "<think>a</think>b"}])) == "yes"


def test_names_filters_and_functions_of_the_hugging_face_environment_work(make_folder):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "  {% generation %}{{ {'k': '<é>'} | tojson }}{% endgeneration %}\n"
        "{% endfor %}{{ strftime_now('%d %B %Y') }}{{ eos_token }}{{ unk_token }}{{ tools is none }}"
    )
    text = templated(make_folder, template, now=lambda: datetime(2026, 7, 4))
    ids = text.encode_chat([USER, USER])
    assert text.decode(ids, skip_special=False) == '<|bos|>  {"k": "<é>"}04 July 2026<|im_end|>True'
    assert (ids[0], [i for i in ids if i == 2]) == (0, [2])


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "no attribute"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "more than"),
    ],
)
def test_a_template_that_fails_refuses_the_messages(make_folder, template, cause):
    with pytest.raises(
        InvalidArgument, match=f"messages: the model's chat template refused them: .*{cause}"
    ) as caught:
        templated(make_folder, template).encode_chat([USER])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: got none"),
        ("hello", "messages: got none"),
        (["hello"], r"messages\[0\]: expected an object with role and content"),
        ([USER, {"role": "user"}], r"messages\[1\]: expected an object"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: got NoneType; expected a string"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role: got int; expected a string"),
        ([{"role": "user", "content": "\ud800"}], "messages: a lone surrogate"),
    ],
)
def test_messages_of_the_wrong_form_are_refused(text, messages, said):
    with pytest.raises(InvalidArgument, match=said):
        text.encode_chat(messages)


def test_a_model_without_a_template_refuses_a_chat(make_folder):
    text = Text(make_folder(config={}))
    assert not text.has_chat
    with pytest.raises(InvalidArgument, match="this model has no chat template"):
        text.encode_chat([USER])


def test_a_template_that_does_not_parse_is_named_with_its_line(make_folder):
    with pytest.raises(ModelError, match=r"chat_template.jinja: chat template, line 2: "):
        templated(make_folder, "\n{% if %}")


def test_a_space_that_only_starts_a_text_is_not_put_behind_special_tokens(make_folder):
    folder = make_folder("byte_fallback", {}, chat_template="<s>{{ messages[0].content }}</s>")
    text = Text(folder)
    ids = text.encode_chat([{"role": "user", "content": "a</s>"}])
    assert (ids[0], ids[-1], ids.count(2)) == (1, 2, 1)
    assert text.decode(ids, skip_special=False).replace(" ", "") == "<s>a</s></s>"
