"""What a client asked for, and the domain of every field.

A request becomes `sampling.n` sequences (engine/core/sequence.py). Nothing is clamped: a value outside its domain
is refused by `check_request`, with the field, the value found and what was expected. Domains are rows of `NUMBERS`.
Source: vLLM's sampling parameters for meanings, RELIABILITY A rows for domains.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import InvalidArgument, wrong

MAX_SEED = 2**63 - 1
MAX_N = 128
MAX_LOGPROBS = 20
MAX_BIAS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 64  # stop_token_ids and every EOS id together


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from the logits. Defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1 is off; ties at the k-th value stay
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: one is drawn and recorded at admission
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over output only
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    logprobs: int | None = None  # best tokens to report beside the chosen one
    prompt_logprobs: int | None = None
    n: int = 1  # sequences that share the prompt


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a sequence ends."""

    max_tokens: int | None = None  # None: the rest of the context
    min_tokens: int = 0  # EOS and stop ids are masked, stop strings not matched, before
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a client, its prompt already token ids.

    deadline_at  seconds on the engine's clock, None for none.
    salt         keeps prefixes apart that must not share blocks.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    deadline_at: float | None = None
    salt: bytes = b""
    adapter: str = ""
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """What one lane can hold; `check_request` measures a request against it.

    pool_tokens  positions that all usable blocks of a pool hold together.
    """

    vocab: int
    context: int
    pool_tokens: int
    block_size: int
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Domain:
    """One number's domain: its type, a test and the words that describe what passes it."""

    field: str
    read: Callable[[Request], object]
    whole: bool
    holds: Callable[[float], bool]
    expected: str


NUMBERS = (
    Domain("temperature", lambda r: r.sampling.temperature, False, lambda x: 0 <= x <= 100,
           "a finite number in 0..100"),
    Domain("top_k", lambda r: r.sampling.top_k, True, lambda x: -1 <= x < 2**31,
           "an integer >= 1, or 0 or -1 for off"),
    Domain("top_p", lambda r: r.sampling.top_p, False, lambda x: 0 < x <= 1, "a finite number in (0, 1]"),
    Domain("min_p", lambda r: r.sampling.min_p, False, lambda x: 0 <= x <= 1, "a finite number in 0..1"),
    Domain("repetition_penalty", lambda r: r.sampling.repetition_penalty, False, lambda x: 0 < x <= 100,
           "a finite number > 0 and <= 100"),
    Domain("frequency_penalty", lambda r: r.sampling.frequency_penalty, False, lambda x: -2 <= x <= 2,
           "a finite number in -2..2"),
    Domain("presence_penalty", lambda r: r.sampling.presence_penalty, False, lambda x: -2 <= x <= 2,
           "a finite number in -2..2"),
    Domain("seed", lambda r: r.sampling.seed, True, lambda x: 0 <= x <= MAX_SEED, "an integer 0..2^63-1"),
    Domain("n", lambda r: r.sampling.n, True, lambda x: 1 <= x <= MAX_N, f"an integer in 1..{MAX_N}"),
    Domain("logprobs", lambda r: r.sampling.logprobs, True, lambda x: 0 <= x <= MAX_LOGPROBS,
           f"an integer in 0..{MAX_LOGPROBS}"),
    Domain("prompt_logprobs", lambda r: r.sampling.prompt_logprobs, True, lambda x: 0 <= x <= MAX_LOGPROBS,
           f"an integer in 0..{MAX_LOGPROBS}"),
    Domain("min_tokens", lambda r: r.stopping.min_tokens, True, lambda x: 0 <= x < 2**31, "an integer >= 0"),
)  # fmt: skip


def check_number(field: str, value: object, whole: bool, holds: Callable[[float], bool], expected: str) -> None:
    """Raise InvalidArgument when `value` is not a finite number of its type for which `holds`."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or not holds(value):
        raise InvalidArgument(wrong(field, value, expected), field=field)


def check_request(request: Request, limits: Limits) -> None:
    """Raise InvalidArgument, naming the field, when this lane can never serve `request` as it stands."""
    for row in NUMBERS:
        if (value := row.read(request)) is not None:
            check_number(row.field, value, row.whole, row.holds, row.expected)
    _check_prompt(request, limits)
    _check_lengths(request, limits)
    _check_bias(request, limits)
    _check_stops(request, limits)


def _check_ids(field: str, ids: tuple[int, ...], vocab: int) -> None:
    for k, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise InvalidArgument(
                wrong(f"{field}[{k}]", token, f"a token id in 0..V-1 = 0..{vocab - 1}"), field=field
            )


def _check_prompt(request: Request, limits: Limits) -> None:
    prompt = len(request.prompt_ids)
    if prompt == 0:
        raise InvalidArgument("prompt: got an empty prompt; expected at least one token", field="prompt")
    if prompt >= limits.context:
        expected = f"at most {limits.context - 1} (context length {limits.context}, one position left to generate)"
        raise InvalidArgument(wrong("prompt", f"{prompt} tokens", expected), field="prompt")
    _check_ids("prompt_ids", request.prompt_ids, limits.vocab)


def _check_lengths(request: Request, limits: Limits) -> None:
    prompt, stopping = len(request.prompt_ids), request.stopping
    room = limits.context - prompt
    if stopping.max_tokens is not None:
        expected = f"an integer >= 1, in 1..{room} (context length {limits.context} - prompt {prompt})"
        check_number("max_tokens", stopping.max_tokens, True, lambda x: 1 <= x <= room, expected)
    total = prompt + (room if stopping.max_tokens is None else stopping.max_tokens)
    needed = -(-(total - 1) // limits.block_size)  # the last token is never computed
    have = limits.pool_tokens // limits.block_size
    if needed > have:
        raise InvalidArgument(
            f"max_tokens: prompt and output of {total} tokens need {needed} KV blocks; the whole pool has {have}; "
            f"ask for at most {max(have * limits.block_size + 1 - prompt, 0)} tokens or enlarge --kv-memory",
            field="max_tokens",
        )
    if stopping.min_tokens > total - prompt:
        raise InvalidArgument(
            f"min_tokens: got {stopping.min_tokens}; expected at most max_tokens, which is {total - prompt}",
            field="min_tokens",
        )


def _check_bias(request: Request, limits: Limits) -> None:
    bias = request.sampling.logit_bias
    if len(bias) > MAX_BIAS:
        raise InvalidArgument(wrong("logit_bias", f"{len(bias)} entries", f"<= {MAX_BIAS}"), field="logit_bias")
    _check_ids("logit_bias", tuple(token for token, _ in bias), limits.vocab)
    if len({token for token, _ in bias}) < len(bias):
        raise InvalidArgument("logit_bias: a token id is given twice; expected each once", field="logit_bias")
    for token, value in bias:
        check_number(
            f"logit_bias[{token}]", value, False, lambda x: -100 <= x <= 100, "a finite number in -100..100"
        )
    if len(bias) == limits.vocab and all(value <= -100 for _, value in bias):
        raise InvalidArgument("logit_bias: every token is banned; no token left to draw", field="logit_bias")


def _check_stops(request: Request, limits: Limits) -> None:
    stopping = request.stopping
    if len(stopping.stop) > MAX_STOPS:
        raise InvalidArgument(wrong("stop", f"{len(stopping.stop)} strings", f"<= {MAX_STOPS}"), field="stop")
    for k, text in enumerate(stopping.stop):
        if not text:
            raise InvalidArgument(f"stop[{k}]: got an empty string; expected at least one character", field="stop")
        if len(text) > MAX_STOP_CHARS:
            raise InvalidArgument(
                wrong(f"stop[{k}]", f"{len(text)} characters", f"<= {MAX_STOP_CHARS}"), field="stop"
            )
    _check_ids("stop_token_ids", stopping.stop_token_ids, limits.vocab)
    count = len({*stopping.stop_token_ids, *limits.eos_ids})
    if count > MAX_STOP_IDS:
        raise InvalidArgument(
            wrong("stop_token_ids", f"{count} with EOS ids", f"<= {MAX_STOP_IDS}"), field="stop_token_ids"
        )
