"""The whole engine on the device that JAX finds: are its tokens those of a CPU, and how fast does it answer?

    tokens   the embedded model: each way of numbers beside float32 on a CPU; and all at once beside one by one
    speed    the shape of a model with random weights, asked through the offline door: rows x (prompt, answer)

Each way has a process of its own; those of `tokens` run at the same time, as nothing is timed there. Only the
network is missing: admission, scheduler, programs and text are those of a server. A step is the slope between a
short and a long answer of all rows together. Its floor is reading the weights and the keys of the rows once, at the
bandwidth of the device's data sheet; `waits` is the share of the time in which the host waits for the device.
Cost: a minute each on a GPU, most of it compiling.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
from jax.sharding import Mesh

from bench.decode import shape_of
from bench.kernels_process import surroundings
from bench.kernels_step import config_of
from bench.record import ROOT, parser, record, show
from engine.llm import LLM, Completion
from engine.models.config import ModelConfig
from engine.planning import DEVICES, weights_bytes
from engine.replica import build
from engine.runner.buckets import Bucket, buckets
from engine.runner.runner import Runner
from engine.weights.drawn import random_weights

WORD = "SERVE "  # before what a process tells
ON_CPU = {"dtype": "float32", "numerics": "invariant"}
WAYS: tuple[Mapping[str, str], ...] = (
    {"dtype": "float32", "numerics": "fast"},
    {"dtype": "float32", "numerics": "invariant"},
    {"dtype": "bfloat16", "numerics": "fast"},
    {"dtype": "bfloat16", "numerics": "invariant"},
    {"dtype": "bfloat16", "numerics": "fast", "kv_dtype": "int8"},
    {"dtype": "bfloat16", "numerics": "fast", "kv_dtype": "fp8"},
)
PROMPTS = (
    "def read(self, path):\n",
    "import os\nimport sys\n\n\nclass Reader:\n",
    "    for name in names:\n        if name",
    'def main():\n    """',
) + tuple("# a long beginning\nimport json\n" * times for times in (3, 5, 8, 12))
ASKED = ({"temperature": 0.0}, {"temperature": 1.0, "seed": 7})
ANSWER = 48
SIZES = {"max_num_seqs": 16, "max_model_len": 512}
FEW = (3, 1)  # decode shapes, mixed ones
KV_BYTES = 1 << 28  # of `tokens`, whose processes share a device
SHORT, LONG = 32, 160  # tokens of the answers whose difference is a step
WHOLE_8B = 32  # layers


def tokens(way: Mapping[str, Any]) -> dict[str, object]:
    """What the embedded model says, all asked at once and one by one."""
    with only(lambda bucket: bucket.full):  # log-probabilities are asked for
        llm = LLM("embedded", mesh="tp=1", max_num_batched_tokens=128, kv_memory=KV_BYTES, **SIZES, **way)
    together, alone = [], []
    for asked in ASKED:
        options = {**asked, "max_tokens": ANSWER, "ignore_eos": True, "logprobs": 1}
        together += llm.generate(PROMPTS, **options)
        alone += [llm.generate(prompt, **options)[0] for prompt in PROMPTS]
    llm.replica.stop()
    facts: dict[str, Any] = llm.replica.describe
    return {
        "device": facts["device"],
        "programs": facts["programs"],
        "compile s": facts["compile_seconds"],
        "together": [_said(each) for each in together],
        "alone": [_said(each) for each in alone],
    }


def _said(completion: Completion) -> list[tuple[int, float]]:
    return [(each.token_id, each.logprob) for each in completion.logprobs]


def beside(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, object]:
    """How one way's tokens stand to the reference's, and to its own one by one."""
    pairs = list(zip(found["together"], reference["together"], strict=True))
    same = [_same(a, b) for a, b in pairs]
    gaps = [abs(a[k][1] - b[k][1]) for (a, b), n in zip(pairs, same, strict=True) for k in range(n)]
    return {
        "answers": len(pairs),
        "equal": sum(n == ANSWER for n in same),
        "same tokens": sum(same) / (ANSWER * len(same)),
        "logprob gap": max(gaps, default=0.0),
        "same alone": sum(a == b for a, b in zip(found["together"], found["alone"], strict=True)),
        "programs": found["programs"],
        "compile s": found["compile s"],
    }


def _same(some: Sequence, other: Sequence) -> int:
    """How many tokens are equal before the first that is not."""
    pairs = enumerate(zip(some, other, strict=True))
    return next((k for k, (a, b) in pairs if a[0] != b[0]), len(some))


def model(name: str) -> ModelConfig:
    """`llama-8b`, or what `bench decode` knows."""
    if name != "llama-8b":
        return shape_of(name, None)
    return dataclasses.replace(config_of(small=False), num_layers=WHOLE_8B, windows=(None,) * WHOLE_8B)


@contextmanager
def only(wanted: Callable[[Bucket], bool]) -> Iterator[None]:
    """Few programs, of which only those that are needed are compiled."""

    def few(rows: int, most_tokens: int, most: object) -> tuple[Bucket, ...]:
        return tuple(bucket for bucket in buckets(rows, most_tokens, FEW) if wanted(bucket))

    with patch.object(build, "buckets", few):
        yield


@contextmanager
def drawn(config: ModelConfig) -> Iterator[None]:
    """The embedded model's folder stands for one of this shape."""

    def load(folder: object, config: ModelConfig, mesh: Mesh, dtype: np.dtype, **rest: object) -> Mapping:
        return random_weights(config, mesh, dtype)

    with (
        patch.object(build, "from_hf", lambda folder: config),
        patch.object(build, "load", load),
        only(lambda bucket: not bucket.full),
    ):
        yield


def speed(asked: Mapping[str, Any]) -> list[dict[str, object]]:
    """Figures of one shape, for each number of rows."""
    config, most = model(asked["model"]), max(asked["rows"])
    began = time.perf_counter()
    with drawn(config):
        length = asked["prompt"] + LONG + 1
        settings = {"max_num_seqs": most, "max_model_len": length, "prefix_cache": False, "mesh": "tp=1"}
        llm = LLM("embedded", dtype=asked["dtype"], kv_dtype=asked["kv_dtype"], **settings)
    facts: dict[str, Any] = llm.replica.describe
    start = {"start s": time.perf_counter() - began, "programs": facts["programs"]}
    start["compile s"] = facts["compile_seconds"]
    rows = [one(llm, config, asked, number) | start for number in asked["rows"]]
    llm.replica.stop()
    return rows


def one(llm: LLM, config: ModelConfig, asked: Mapping[str, Any], rows: int) -> dict[str, object]:
    """Figures of so many rows at once; the first asking is for nothing."""
    rng = np.random.default_rng(rows)
    ask(llm, rng, config, rows, 8, 2)
    first, _ = ask(llm, rng, config, rows, asked["prompt"], 1)
    short, _ = ask(llm, rng, config, rows, asked["prompt"], SHORT)
    long, waited = ask(llm, rng, config, rows, asked["prompt"], LONG)
    step = (long - short) / (LONG - SHORT)
    facts: dict[str, Any] = llm.replica.describe
    floor = floor_s(config, facts, rows * (asked["prompt"] + (SHORT + LONG) / 2))
    return {
        "model": asked["model"],
        "dtype": facts["dtype"],
        "kv": facts["kv_dtype"],
        "rows": rows,
        "prompt": asked["prompt"],
        "first ms": first * 1e3,
        "step ms": step * 1e3,
        "floor ms": None if floor is None else floor * 1e3,
        "of floor": None if floor is None else floor / step,
        "tok/s": rows / step,
        "whole tok/s": rows * LONG / long,
        "prompt tok/s": rows * asked["prompt"] / first,
        "waits": waited / long,
    }


def floor_s(config: ModelConfig, facts: Mapping[str, Any], positions: float) -> float | None:
    """Seconds to read the weights and so many positions once; None on a device without a data sheet here."""
    known = {device.target.kind: device.bytes_per_s for device in DEVICES.values()}
    if (bandwidth := known.get(facts["device"])) is None:
        return None
    itemsize = np.dtype(facts["dtype"]).itemsize
    weights = weights_bytes(config, 1, itemsize)
    if not config.tied:
        weights -= config.vocab * config.width * itemsize  # of which a step looks up a few rows
    return (weights + positions * facts["kv_bytes"] / facts["num_blocks"] / facts["block_size"]) / bandwidth


def ask(
    llm: LLM, rng: np.random.Generator, config: ModelConfig, rows: int, prompt: int, answer: int
) -> tuple[float, float]:
    """Seconds until all rows have answered, and those in which the host waited for the device."""
    prompts = rng.integers(8, min(config.vocab, 1000), (rows, prompt)).tolist()
    waited, collect = 0.0, Runner.collect

    def timed(runner: Runner) -> object:
        nonlocal waited
        began = time.perf_counter()
        try:
            return collect(runner)
        finally:
            waited += time.perf_counter() - began

    with patch.object(Runner, "collect", timed):
        began = time.perf_counter()
        answers = llm.generate(prompts, max_tokens=answer, ignore_eos=True, temperature=0.0)
        took = time.perf_counter() - began
    assert all(len(each.token_ids) == answer for each in answers)
    return took, waited


def elsewhere(what: str, asked: object, **environment: str) -> Any:
    """What a process of its own answers. Raises RuntimeError with the end of what it said."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.serve", what, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings(environment))
    told = [line for line in done.stdout.splitlines() if line.startswith(WORD)]
    if done.returncode or not told:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-20:]))
    return json.loads(told[-1].removeprefix(WORD))


def tokens_rows() -> list[dict[str, Any]]:
    """Every way beside the CPU."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with ThreadPoolExecutor(len(WAYS) + 1) as pool:
        on_cpu = pool.submit(elsewhere, "tokens", ON_CPU, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
        asked = [pool.submit(elsewhere, "tokens", dict(way), **shared) for way in WAYS]
        rows = []
        for way, answer in zip(WAYS, asked, strict=True):
            try:
                rows.append({**way, **beside(answer.result(), on_cpu.result())})
            except RuntimeError as error:
                rows.append({**way, "error": str(error)})
                print(f"bench serve: {way}: {error}", file=sys.stderr)
    return rows


def main(arguments: list[str]) -> int:
    """Both parts, or one; 1 where something failed or invariant rows differ alone."""
    options = parser("serve", __doc__)
    options.add_argument("--only", choices=("tokens", "speed"), help="one part")
    options.add_argument("--models", default="qwen3-0.6b,llama-8b", help="shapes; weights are random")
    options.add_argument("--rows", default="1,8,64,256")
    options.add_argument("--prompt", type=int, default=1024, help="tokens (default 1024)")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--kv-dtype", default="auto")
    chosen = options.parse_args(arguments)
    device = elsewhere("device", None)
    kept, failed = record("serve", arguments), False
    if chosen.only != "speed":
        rows = [{"part": "tokens", "device": device, **row} for row in tokens_rows()]
        show(f"tokens of the embedded model on {device} beside float32 on a CPU, of {ANSWER} an answer", rows)
        kept.append(rows, chosen.out)
        failed |= any("error" in row for row in rows)
        failed |= any(row.get("same alone", 0) < row["answers"] for row in rows if row["numerics"] == "invariant")
    for name in chosen.models.split(",") if chosen.only != "tokens" else ():
        asked = {"model": name, "rows": [*map(int, chosen.rows.split(","))], "prompt": chosen.prompt}
        asked |= {"dtype": chosen.dtype, "kv_dtype": chosen.kv_dtype}
        try:
            rows = [{"part": "speed", "device": device, **row} for row in elsewhere("speed", asked)]
        except RuntimeError as error:
            print(f"bench serve: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        show(f"{name} on {device}", rows)
        kept.append(rows, chosen.out)
    return int(failed)


def device_kind(_: None) -> str:
    """Of the first device."""
    return str(jax.devices()[0].device_kind)


def child(what: str, asked: str) -> None:
    """The process of one way."""
    jobs: dict[str, Callable[[Any], object]] = {"tokens": tokens, "speed": speed, "device": device_kind}
    print(WORD + json.dumps(jobs[what](json.loads(asked))), flush=True)


if __name__ == "__main__":
    child(*sys.argv[1:])
