"""Trains the embedded model and writes its folder: `python -m engine.embedded.train --out DIR --minutes N`.

    collect sources -> train the BPE -> pack windows -> train under a deadline -> model.safetensors

The learning rate follows a cosine over the elapsed time, so that a slow machine ends at the same rate.
Windows grow with the time as well: short ones are cheap and teach most, long ones teach far positions. Every few
minutes the weights are written in their final form, so that a run cut short leaves a model that works.
Cost: about 4000 tokens per second on two CPU cores with bfloat16 units.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from engine.embedded.corpus import collect, standard_library
from engine.embedded.files import read_weights, train_tokenizer, write_description, write_weights
from engine.embedded.network import Shape, Weights, initial_weights, mean_loss, project_bfloat16
from engine.embedded.windows import batches, cut, encode

TOKENS_PER_STEP = 4096
# The share of the time until which windows of this length are trained.
WINDOW_PHASES = ((0.55, 256), (0.8, 512), (1.0, 1024))
WARMUP_STEPS = 40
PROGRESS_STEPS = 25
ONWARD_RATE = 0.6
SAVE_EVERY_S = 300.0
HELD_OUT_WINDOW = 512


def optimizer() -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms, at their highest rates."""

    def dimensions(weights: Weights) -> dict[str, MuonDimensionNumbers | None]:
        inner = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        return {name: inner if name.endswith("_proj.weight") else None for name in weights}

    rule = muon(
        learning_rate=0.02,
        weight_decay=0.1,
        adam_learning_rate=0.003,
        adam_b1=0.9,
        adam_b2=0.95,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def rate_at(step: int, elapsed_share: float) -> float:
    """The share of the highest learning rate: a short linear rise over steps, a cosine fall over time."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    return rise * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, elapsed_share))))


def window_at(elapsed_share: float) -> int:
    """The length of the windows to train now."""
    return next((length for until, length in WINDOW_PHASES if elapsed_share < until), WINDOW_PHASES[-1][1])


def make_step(shape: Shape, rule: optax.GradientTransformation) -> Callable:
    """The compiled step: (weights, state, windows_BS, rate) -> (weights, state, loss)."""

    def step(weights: Weights, state: optax.OptState, windows_BS: jax.Array, rate: jax.Array):
        loss, grads = jax.value_and_grad(mean_loss)(weights, windows_BS, shape, project_bfloat16)
        updates, state = rule.update(grads, state, weights)
        updates = {name: update * rate for name, update in updates.items()}
        return optax.apply_updates(weights, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def make_held_out(shape: Shape, stream: np.ndarray) -> Callable[[Weights], float]:
    """A function that gives the mean loss over the held-out stream, for the weights as they are saved."""
    rows = cut(stream, HELD_OUT_WINDOW)
    size = 8
    loss_of = jax.jit(partial(mean_loss, shape=shape, project=project_bfloat16))

    def measure(weights: Weights) -> float:
        rounded = {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in weights.items()}
        starts = range(0, len(rows) - size + 1, size)
        return float(np.mean([loss_of(rounded, rows[start : start + size]) for start in starts]))

    return measure


def prepare(out: Path, seed: int, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Writes all of the folder but the weights, and returns the training and the held-out stream of tokens."""
    corpus = collect(standard_library(), seed)
    tokenizer = train_tokenizer(corpus.training, shape.vocab_size)
    write_description(out, shape, tokenizer)
    stream, held_out = encode(tokenizer, corpus.training), encode(tokenizer, corpus.held_out)
    characters = sum(map(len, corpus.held_out))
    print(f"training tokens {len(stream)}, held-out tokens {len(held_out)} ({characters} characters)", flush=True)
    return stream, held_out


def train(
    out: Path, minutes: float, seed: int, shape: Shape, clock: Callable[[], float], onward_from: Path | None = None
) -> Weights:
    """Trains until `minutes` have passed on `clock` (seconds), and leaves the model's folder at `out`.

    onward_from  a folder whose weights to go on from, at `ONWARD_RATE` of the highest rate; None starts anew
    """
    stream, held_out = prepare(out, seed, shape)
    measure = make_held_out(shape, held_out)
    weights = initial_weights(shape, seed) if onward_from is None else read_weights(onward_from)
    highest, rule = 1.0 if onward_from is None else ONWARD_RATE, optimizer()
    state, run_step = rule.init(weights), make_step(shape, rule)
    rng = np.random.default_rng(seed + (onward_from is not None))  # other windows come first than before
    sources = {length: batches(stream, length, TOKENS_PER_STEP // length, rng) for _, length in WINDOW_PHASES}
    started_at = saved_at = clock()
    step, losses = 0, []
    while (elapsed_share := (clock() - started_at) / (60.0 * minutes)) < 1.0:
        windows_BS = next(sources[window_at(elapsed_share)])
        rate = highest * rate_at(step, elapsed_share)
        weights, state, loss = run_step(weights, state, windows_BS, jnp.float32(rate))
        losses.append(float(loss))
        step += 1
        if step % PROGRESS_STEPS == 0:
            text = f"step {step} window {windows_BS.shape[1] - 1} rate {rate:.3f} loss {np.mean(losses):.3f}"
            print(f"{text} tokens {step * TOKENS_PER_STEP} time {clock() - started_at:.0f} s", flush=True)
            losses.clear()
        if clock() - saved_at > SAVE_EVERY_S:
            write_weights(out, weights)
            print(f"saved at step {step}, held-out loss {measure(weights):.4f}", flush=True)
            saved_at = clock()
    write_weights(out, weights)
    print(f"done: {step} steps, {step * TOKENS_PER_STEP} tokens, held-out loss {measure(weights):.4f}", flush=True)
    return weights


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.embedded.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time, compilation included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--onward-from", type=Path, help="a folder whose weights to go on from")
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.seed, Shape(), time.monotonic, arguments.onward_from)


if __name__ == "__main__":
    main()
