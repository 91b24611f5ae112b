"""PyTorch's attention for the same cases: a process of `bench kernels` that loads torch and no JAX.

    sdpa     torch.nn.functional.scaled_dot_product_attention, grouped heads, contiguous keys
    flex     torch.nn.attention.flex_attention, compiled, for prefill

Each call is captured into a CUDA graph of several, so that no launch from Python is timed; the slope between two
graphs is one call. Calls take turns over copies of the keys, as ours do.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from types import ModuleType

from bench.kernels_cases import Case, Decode, Prefill, cases, small_cases
from bench.kernels_process import Job, Row, tell

COLD_BYTES = 1 << 29
COUNTS = (2, 10)
SLOPES = 9


def main(arguments: list[str]) -> int:
    """Do every job; an error is a row."""
    torch = importlib.import_module("torch")  # of no declared package: this machine has it or not
    work = json.loads(arguments[0])
    known = small_cases() if work["options"]["small"] else cases()
    for job in (Job(*words) for words in work["jobs"]):
        tell(job=job, began=True)
        case = known[int(job.piece)]
        try:
            for row in measure(torch, case, job.by):
                tell(job=job, row=row)
        except (RuntimeError, TypeError, ValueError) as error:
            if "CUDA error" in str(error):  # every later call would meet it
                raise
            tell(job=job, row={"error": " ".join(str(error).split())[:400]})
        tell(job=job, done=True)
    return 0


def measure(torch: ModuleType, case: Case, by: str) -> Iterator[Row]:
    """Rows of figures, one for each context, with the versions that made them."""
    if not torch.cuda.is_available():
        yield {"skipped": f"torch {torch.__version__} sees no GPU"}
        return
    heads = case.heads
    decode = isinstance(case, Decode)
    for context in case.contexts if decode else (case.longest,):
        B, T = (case.batch, 1) if decode else (1, case.tokens)
        moved = B * context * case.position_bytes
        copies = max(1, min(COLD_BYTES // moved, COUNTS[1]))

        def drawn(*shape: int):
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        q = drawn(B, heads.N, T, heads.H)
        keys = [(drawn(B, heads.K, context, heads.H), drawn(B, heads.K, context, heads.H)) for _ in range(copies)]
        took = seconds(torch, attention(torch, by, decode, T), q, keys)
        row = {"context": context, "us": 1e6 * took, "bytes": moved, "GB/s": moved / took / 1e9}
        if isinstance(case, Prefill):
            row |= {"flops": case.flops, "TFLOP/s": case.flops / took / 1e12}
        yield row | {"torch": torch.__version__, "cuda": torch.version.cuda}


def attention(torch: ModuleType, by: str, decode: bool, tokens: int) -> Callable:
    """One call of (q, k, v); decode sees all keys."""
    if by == "sdpa":
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda q, k, v: attend(q, k, v, is_causal=not decode, enable_gqa=True)
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention)
    mask = None
    if not decode:
        mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda")
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def seconds(torch: ModuleType, call: Callable, q, keys: list) -> float:
    """Of one call, by the slope between two graphs."""
    for k, v in keys[:2]:
        call(q, k, v)
    torch.cuda.synchronize()
    graphs = {count: graph(torch, call, q, keys, count) for count in COUNTS}
    slopes = []
    for _ in range(SLOPES):
        times = []
        for count in COUNTS:
            began = time.perf_counter()
            graphs[count].replay()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        slopes.append((times[1] - times[0]) / (COUNTS[1] - COUNTS[0]))
    return median(slopes)


def graph(torch: ModuleType, call: Callable, q, keys: list, count: int):
    """`count` calls, run once."""
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        for index in range(count):
            call(q, *keys[index % len(keys)])
    made.replay()
    torch.cuda.synchronize()
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
