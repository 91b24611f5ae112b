"""The embedded model, whole: every accepted field changes what it should, and nothing is cut or capped."""

import numpy as np
import pytest

from engine.errors import InvalidArgument, NotFound
from engine.llm import LLM

PROMPT = "def read(self, path):\n    "
LONG = "import os\nimport sys\n\n\nclass Reader:\n" * 3


@pytest.fixture(scope="module")
def llm():
    return LLM("embedded", mesh="tp=2", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256)


def one(llm, prompt=PROMPT, **options):
    [completion] = llm.generate([prompt], **({"temperature": 0.0, "max_tokens": 12} | options))
    return completion


def drawn(llm, **options):
    """Token ids of a draw at temperature 1 with seed 1."""
    return one(llm, **({"temperature": 1.0, "seed": 1, "max_tokens": 24} | options)).token_ids


def test_greedy_decoding_repeats_itself_and_is_the_model_s_own(llm):
    first = one(llm)
    assert first.token_ids == one(llm).token_ids and first.text == llm.replica.text.decode(first.token_ids)
    assert first.finish_reason == "length" and len(first.token_ids) == 12


def test_prompts_of_a_batch_draw_what_they_draw_alone(llm):
    prompts = [PROMPT, LONG, "x = [", "class A:\n", "for k in range(", "try:\n    import"]
    together = llm.generate(prompts, temperature=0.8, seed=5, max_tokens=16)
    alone = [llm.generate([prompt], temperature=0.8, seed=5, max_tokens=16)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 5.0},
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"top_k": 1},
        {"top_p": 0.05},
        {"min_p": 0.9},
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"logit_bias": ((300, 60.0),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_sampling_field_changes_the_draw(llm, change):
    assert drawn(llm, **change) != drawn(llm)


def test_top_k_1_and_a_tiny_top_p_are_greedy(llm):
    greedy = one(llm, max_tokens=24).token_ids
    assert drawn(llm, top_k=1) == drawn(llm, top_p=1e-6) == drawn(llm, min_p=1.0) == greedy


def test_a_bias_of_minus_100_bans_a_token(llm):
    banned = one(llm).token_ids[0]
    assert banned not in one(llm, logit_bias=((banned, -100.0),)).token_ids


def test_n_gives_that_many_different_choices(llm):
    completions = llm.generate([LONG], n=3, temperature=1.0, seed=3, max_tokens=16)
    assert len({tuple(c.token_ids) for c in completions}) == 3 and [c.index for c in completions] == [0, 1, 2]
    assert completions[1].usage.cached_tokens >= 16


def test_logprobs_are_those_of_a_distribution_and_agree_with_the_rank(llm):
    scores = one(llm, logprobs=20, temperature=1.0, seed=1).logprobs
    assert len(scores) == 12 and all(len(score.top) == 20 for score in scores)
    for score in scores:
        values = [value for _, value in score.top]
        assert values == sorted(values, reverse=True) and np.exp(values).sum() <= 1 + 1e-5
        if score.rank <= 20:
            assert score.top[score.rank - 1] == (score.token_id, score.logprob)
    assert one(llm, logprobs=0).logprobs[0].top == () and one(llm).logprobs == []


def test_prompt_logprobs_cover_the_prompt(llm):
    completion = one(llm, LONG, prompt_logprobs=2)
    assert len(completion.prompt_logprobs) == completion.usage.prompt_tokens
    assert completion.prompt_logprobs[0] is None and len(completion.prompt_logprobs[1].top) == 2
    assert one(llm, LONG).prompt_logprobs == []


def test_stop_strings_stop_ids_and_include_stop(llm):
    whole = one(llm)
    stop = whole.text[3:5]
    cut = one(llm, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.stop == stop and cut.finish_reason == "stop"
    assert one(llm, stop=[stop], include_stop=True).text == cut.text + stop
    token = whole.token_ids[4]
    ended = one(llm, stop_token_ids=[token])
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1] and ended.stop == token


def test_min_tokens_masks_what_would_stop(llm):
    token = one(llm).token_ids[0]
    held = one(llm, stop_token_ids=[token], min_tokens=6)
    assert token not in held.token_ids[:6] and len(held.token_ids) >= 6


def test_eos_ends_a_sequence_unless_it_is_ignored(llm):
    eos = llm.replica.info.eos_ids[0]
    forced = ((eos, 100.0),)
    assert one(llm, logit_bias=forced).token_ids == [eos] and one(llm, logit_bias=forced).finish_reason == "stop"
    assert one(llm, logit_bias=forced, ignore_eos=True).token_ids == [eos] * 12


def test_special_tokens_are_shown_when_asked_for(llm):
    eos = llm.replica.info.eos_ids[0]
    options = {"logit_bias": ((eos, 100.0),), "ignore_eos": True, "max_tokens": 2}
    assert one(llm, **options).text == "" and "<|" in one(llm, skip_special_tokens=False, **options).text


def test_max_tokens_defaults_to_the_rest_of_the_context(llm):
    completion = one(llm, LONG, max_tokens=None, ignore_eos=True)
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens == 256


def test_salt_keeps_prefixes_apart(llm):
    one(llm, LONG, salt=b"first")
    assert one(llm, LONG, salt=b"first").usage.cached_tokens > 0
    assert one(llm, LONG, salt=b"second").usage.cached_tokens == 0


def test_an_adapter_that_is_not_loaded_is_refused(llm):
    with pytest.raises(NotFound, match="adapter"):
        one(llm, adapter="mine")


def test_nothing_is_cut_or_capped_in_silence(llm):
    with pytest.raises(InvalidArgument, match="context length 256"):
        one(llm, "x" * 5000)
    with pytest.raises(InvalidArgument, match="max_tokens: got 250; expected an integer >= 1"):
        one(llm, max_tokens=250)
    with pytest.raises(InvalidArgument, match="option: got 'temprature'"):
        one(llm, temprature=1.0)


def test_a_chat_is_answered_through_the_template(llm):
    [answer] = llm.chat([{"role": "user", "content": "Write the function read."}], temperature=0.0, max_tokens=12)
    assert answer.token_ids and answer.usage.prompt_tokens > 8


def test_no_program_was_compiled_after_ready(llm):
    assert llm.replica.load()["compilations_after_ready"] == 0
    assert llm.replica.load()["blocks_available"] == llm.replica.load()["blocks"]
