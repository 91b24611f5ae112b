"""Checks a saved folder: its held-out loss in float32, and what it writes: `python -m engine.embedded.evaluate`.

Reads the safetensors, not the weights of a running training, so that the figures are those of the files that ship.
Cost: every sampled token is a full forward over a fixed window, fit for a look and nothing more.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from engine.embedded import folder
from engine.embedded.corpus import END_OF_TEXT, TURN_END, TURN_START, collect, standard_library
from engine.embedded.files import read_weights
from engine.embedded.network import Shape, logits, mean_loss, project_float32
from engine.embedded.windows import cut, encode

SAMPLE_WINDOW = 256
PROMPTS = (
    "def main(",
    "import os",
    "class Stack:\n",
    f"{TURN_START}user\nWrite the function is_empty.{TURN_END}\n{TURN_START}assistant\n",
    f"{TURN_START}user\nComplete: def read_lines(path):{TURN_END}\n{TURN_START}assistant\n",
)


def held_out_losses(model: Path, lengths: tuple[int, ...], seed: int) -> dict[int, float]:
    """Mean loss in nats over the held-out documents, for windows of each length."""
    tokenizer, weights = Tokenizer.from_file(str(model / "tokenizer.json")), read_weights(model)
    stream = encode(tokenizer, collect(standard_library(), seed).held_out)
    loss_of = jax.jit(partial(mean_loss, shape=Shape(), project=project_float32))
    losses = {}
    for length in lengths:
        rows, size = cut(stream, length), 4096 // length
        starts = range(0, len(rows) - size + 1, size)
        losses[length] = float(np.mean([loss_of(weights, rows[start : start + size]) for start in starts]))
    return losses


def sampler(model: Path) -> Callable[[str, int, float, float, int], str]:
    """A function (prompt, max_tokens, temperature, top_p, seed) -> the continuation; temperature 0 is greedy."""
    tokenizer, weights = Tokenizer.from_file(str(model / "tokenizer.json")), read_weights(model)
    ends = {tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)}
    scores_of = jax.jit(partial(logits, shape=Shape(), project=project_float32))

    def sample(prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int) -> str:
        rng, tokens = np.random.default_rng(seed), tokenizer.encode(prompt).ids
        num_prompt = len(tokens)
        while len(tokens) < min(num_prompt + max_tokens, SAMPLE_WINDOW):
            padded_BS = np.zeros((1, SAMPLE_WINDOW), np.int32)
            padded_BS[0, : len(tokens)] = tokens
            scores_V = np.asarray(scores_of(weights, jnp.asarray(padded_BS))[0, len(tokens) - 1], np.float64)
            tokens.append(choose(scores_V, temperature, top_p, rng))
            if tokens[-1] in ends:
                break
        return tokenizer.decode(tokens[num_prompt:])

    return sample


def choose(scores_V: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """One token: the best at temperature 0, else drawn from the fewest tokens whose probabilities reach `top_p`."""
    if temperature == 0.0:
        return int(np.argmax(scores_V))
    probs_V = np.exp((scores_V - scores_V.max()) / temperature)
    probs_V /= probs_V.sum()
    order = np.argsort(-probs_V)
    kept = order[: int(np.searchsorted(np.cumsum(probs_V[order]), top_p)) + 1]
    return int(rng.choice(kept, p=probs_V[kept] / probs_V[kept].sum()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.embedded.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=folder(), help="the folder to check")
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the sampling")
    arguments = parser.parse_args()
    for length, loss in held_out_losses(arguments.model, (256, 512, 1024, 2048), arguments.seed).items():
        print(f"held-out loss, windows of {length}: {loss:.4f}")
    sample = sampler(arguments.model)
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            text = sample(prompt, arguments.max_tokens, temperature, 0.95, arguments.seed)
            print(f"--- temperature {temperature}\n{prompt}{text}")


if __name__ == "__main__":
    main()
