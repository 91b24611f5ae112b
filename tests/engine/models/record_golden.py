"""Records what transformers computes for small random models: golden/NAME.npz for each of golden/models.json.

    python tests/engine/models/record_golden.py        (torch and transformers installed; about three minutes)

The tests do not run this; they read what it wrote. Weights are not stored: both sides draw them with numpy from the
name of each tensor (`draw` here repeats `engine.weights.drawn.draw`), and `crc` proves that they drew the same.

    prompts    int16 [64, 61]  a prompt a row, -1 behind its end; prompt 2i + 1 is prompt 2i with one token changed,
                               the middle one, or the farthest one that a sliding window shows
    tokens     int16 [64, 64]  their greedy continuations
    scored     int16 [3, 61]   prompts whose logits are stored
    logits     float32 [positions, V]   at every position of `scored`, one prompt after the other
    crc        of all weights

Two things are asserted while recording. The output reacts: a changed prompt token changes most continuations, else
a broken cache would pass. No choice is close: prompts whose smallest greedy margin is under 1e-4 of the largest
logit are drawn anew, so that the order of additions decides nothing.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (6, 13, 22, 31, 40, 47, 54, 61)
PAIRS = 4  # for each length
NEW = 64
SEED = 7
MARGIN = 1e-4


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a model's folder; as `engine.weights.drawn.draw` makes it."""
    rng = np.random.Generator(np.random.PCG64([SEED, zlib.crc32(name.encode())]))
    values = rng.standard_normal(math.prod(shape), dtype=np.float32)
    if len(shape) > 1:
        values *= 0.9 / math.sqrt(shape[1])
    else:
        values *= 0.1
        values += float(name.endswith("norm.weight"))
    return values.reshape(shape)


def build(values: dict) -> tuple[torch.nn.Module, int]:
    """The model with drawn weights, and the crc of them in the order of their names."""
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    crc = 0
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            drawn = draw(name, tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(drawn))
            crc = zlib.crc32(drawn.tobytes(), crc)
    return model, crc


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits at every position of equally long prompts, without any cache."""
    return model(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()


def greedy(model: torch.nn.Module, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Continuations, and the smallest margin of each over its largest logit."""
    tokens, margin = prompts, np.full(len(prompts), np.inf)
    for _ in range(NEW):
        last = logits_of(model, tokens)[:, -1]
        second, first = np.sort(last, axis=1)[:, -2:].T
        margin = np.minimum(margin, (first - second) / np.abs(last).max(axis=1))
        tokens = np.concatenate([tokens, last.argmax(axis=1)[:, None]], axis=1)
    return tokens[:, prompts.shape[1] :], margin


def pairs(
    model: torch.nn.Module, rng: np.random.Generator, length: int, values: dict
) -> tuple[np.ndarray, np.ndarray]:
    """`PAIRS` pairs of prompts that differ in one token, with continuations of safe margins."""
    vocab, window = values["vocab_size"], values.get("sliding_window", length)
    changed = max(length // 2, length - window)
    prompts, tokens = [], []
    while len(prompts) < 2 * PAIRS:
        ones = rng.integers(0, vocab, (PAIRS, length))
        others = ones.copy()
        others[:, changed] = (others[:, changed] + rng.integers(1, vocab, PAIRS)) % vocab
        both = np.stack([ones, others], axis=1).reshape(2 * PAIRS, length)
        after, margin = greedy(model, both)
        for i in range(0, 2 * PAIRS, 2):
            if margin[i : i + 2].min() > MARGIN:
                prompts += list(both[i : i + 2])
                tokens += list(after[i : i + 2])
    return np.stack(prompts[: 2 * PAIRS]), np.stack(tokens[: 2 * PAIRS])


def padded(prompts: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.pad(p, (0, max(LENGTHS) - len(p)), constant_values=-1) for p in prompts]).astype(np.int16)


def record(name: str, values: dict) -> None:
    model, crc = build(values)
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    prompts, tokens = [], []
    for length in LENGTHS:
        some, after = pairs(model, rng, length, values)
        prompts += list(some)
        tokens += list(after)
    tokens = np.stack(tokens).astype(np.int16)
    changed = (tokens[::2] != tokens[1::2]).mean(axis=1)
    share, outputs = changed.mean(), (changed > 0).mean()
    print(f"{name}: one other prompt token changes {share:.0%} of the tokens and {outputs:.0%} of the outputs")
    assert outputs > 0.8, "the output hardly reacts to the prompt: a broken cache would pass"
    scored = [prompts[i] for i in (20, 40, 56)]
    logits = np.concatenate([logits_of(model, prompt[None])[0] for prompt in scored])
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        prompts=padded(prompts),
        tokens=tokens,
        scored=padded(scored),
        logits=logits,
        crc=crc,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    for name, values in json.loads((GOLDEN / "models.json").read_text()).items():
        record(name, values)
