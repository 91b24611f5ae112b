"""The decoder computes what transformers computes; what that is was recorded by record_golden.py."""

import zlib

import numpy as np
import pytest

from engine.weights.drawn import draw
from engine.weights.layout import parameters

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VARIANTS = ("llama_yarn", "llama_linear")
SEED = 7
CLOSE = 1e-4  # of the largest logit


def unpadded(rows):
    return [row[row >= 0].astype(int) for row in rows]


def largest_error(lane, stored, prompts, chunk):
    """Largest difference of any logit at any position, over the largest logit."""
    got = np.concatenate([lane.logits(prompt, chunk) for prompt in prompts])
    want = stored["logits"][: len(got)]
    assert (got[:, want.shape[1] :] == -np.inf).all()  # ids that only pad the vocabulary
    return np.abs(got[:, : want.shape[1]] - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", FAMILIES + VARIANTS)
def test_weights_are_drawn_as_they_were_recorded(golden, name):
    config, stored = golden(name)
    parts = sorted({part.name: part.shape for row in parameters(config, 1) for part in row.parts}.items())
    crc = 0
    for tensor, shape in parts:
        crc = zlib.crc32(draw(SEED, tensor, shape, np.float32).tobytes(), crc)
    assert crc == stored["crc"]


@pytest.mark.parametrize(
    ("name", "tp"),
    [("llama", 1), ("mistral", 4), ("qwen2", 4), ("qwen3", 4), ("llama_yarn", 1), ("llama_linear", 2)],
)
def test_logits_equal_the_oracle_at_every_position(golden, lane, name, tp):
    config, stored = golden(name)
    assert largest_error(lane(config, tp), stored, unpadded(stored["scored"]), chunk=19) <= CLOSE


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_invariant_logits_equal_the_oracle(golden, lane, name):
    config, stored = golden(name)
    assert largest_error(lane(config, 4, "invariant"), stored, unpadded(stored["scored"])[:1], chunk=16) <= CLOSE


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tp", [1, 4])
def test_greedy_tokens_equal_the_oracle(golden, lane, name, tp):
    config, stored = golden(name)
    prompts = unpadded(stored["prompts"])
    got = lane(config, tp, num_rows=len(prompts)).greedy(prompts, stored["tokens"].shape[1], chunk=9)
    assert (got == stored["tokens"]).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recorded_outputs_react_to_one_token_of_the_prompt(golden, name):
    _, stored = golden(name)
    prompts, tokens = stored["prompts"], stored["tokens"]
    assert ((prompts[::2] != prompts[1::2]).sum(axis=1) == 1).all()
    assert ((tokens[::2] != tokens[1::2]).any(axis=1)).mean() > 0.8
