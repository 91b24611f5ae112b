"""The clients of a simulated life, and the judge of what they got.

Prompts share beginnings, choices, salts and seeds vary. The judge knows what each sequence draws when nothing else
exists (`alone`), and holds every event of the front against it: each token is the next of its choice, each choice
has one terminal, a whole answer is the lone one, a cut one is a beginning of it.
"""

import random
from dataclasses import dataclass, field, replace

from engine.core.journeys import Drawn, Ended, Event, Journey, Scored, Track
from engine.core.request import Request, Sampling, Stopping
from engine.core.sequence import Part, sequences
from engine.errors import DeviceError
from engine.sim.faults import Faults
from engine.sim.runner import alone

VOCAB, EOS, CONTEXT = 997, 996, 64


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to come, and when its client leaves or stops reading, if it does. It may leave one choice only."""

    at: float
    request: Request
    seed: int
    cancel_at: float | None
    leaves: slice  # the choices that it leaves
    hold_at: float | None


def draw_requests(rng: random.Random, faults: Faults, count: int) -> list[Asked]:
    """`count` requests spread over the faulty time."""
    stems = [rng.choices(range(VOCAB - 1), k=40) for _ in range(3)]
    asked: list[Asked] = []
    for number in range(count):
        at = rng.uniform(0.0, 0.6 * faults.heal_at)
        if asked and rng.random() < 0.25:
            before = rng.choice(asked)
            at, ids, salt = before.at + rng.uniform(0.2, 2.0), said(before), before.request.salt
        else:
            ids, salt = _prompt(rng, stems), rng.choice([b"", b"", b"x"])
        request = Request(
            f"r{number}",
            ids,
            Sampling(
                n=rng.choice([1, 1, 1, 2]),
                seed=rng.randrange(1000),
                prompt_logprobs=rng.choice([None, None, None, 1]),
            ),
            Stopping(max_tokens=min(rng.randint(1, 14), CONTEXT - len(ids)), ignore_eos=rng.random() < 0.5),
            deadline_at=at + rng.uniform(0.01, 6.0) if rng.random() < faults.deadlines else None,
            salt=salt,
        )
        cancel_at = at + rng.uniform(0.0, rng.choice([0.3, 3.0])) if rng.random() < faults.cancels else None
        leaves = rng.choice([slice(None), slice(1), slice(1, None)])
        hold_at = at + rng.uniform(0.0, 1.0) if rng.random() < faults.holds else None
        asked.append(Asked(at, request, 0, cancel_at, leaves, hold_at))
    return asked


def _prompt(rng: random.Random, stems: list[list[int]]) -> tuple[int, ...]:
    """A beginning that others share, often cut just past a block's end, and something of its own."""
    cut = rng.choice([rng.randint(1, 40), 4 * rng.randint(1, 9) + 1])
    own = rng.choices(range(VOCAB - 1), k=rng.choice([0, 0, rng.randint(1, 6)]))
    return tuple(rng.choice(stems)[:cut] + own)


def said(before: Asked) -> tuple[int, ...]:
    """A conversation's next prompt: prompt and answer of `before`, cut just past a block's end.

    A lane that answered `before` has all its KV but that of the last token, and the router does not know it.
    """
    whole = before.request.prompt_ids + tuple(lone(Track(Journey(before.request, before.seed), 0)))
    return whole[: (len(whole) - 1) // 4 * 4 + 1]


@dataclass(slots=True)
class Judge:
    """Checks what the front says of each choice; raises AssertionError with the request's name."""

    steps_fail: bool
    got: dict[Track, list[int]] = field(default_factory=dict)
    scored: dict[Track, int] = field(default_factory=dict)
    ended: dict[Track, str] = field(default_factory=dict)

    def hear(self, event: Event) -> None:
        """One event, in order."""
        if isinstance(event, Drawn):
            for k, track in event.entries:
                assert track not in self.ended, f"{track.journey.request.request_id}: a token after the terminal"
                self.got.setdefault(track, []).append(int(event.emission.tokens[k]))
        elif isinstance(event, Scored):
            self._judge_scores(event)
        elif isinstance(event, Ended):
            name = event.track.journey.request.request_id
            assert event.track not in self.ended, f"{name}: two terminals"
            self.ended[event.track] = event.reason
            self._judge(event, name)

    def _judge_scores(self, event: Scored) -> None:
        prompt, scores = event.track.journey.request.prompt_ids, event.scores
        assert scores.first == self.scored.get(event.track, 0) + 1, "a score is said twice or missing"
        self.scored[event.track] = scores.first + len(scores.logprob) - 1
        told = prompt[scores.first : scores.first + len(scores.logprob)]
        assert [-token / 100 for token in told] == scores.logprob.tolist(), "scores of other tokens"

    def _judge(self, event: Ended, name: str) -> None:
        got = self.got.get(event.track, [])
        assert got == event.track.tokens, f"{name}: the router counts other tokens than the client got"
        want = lone(event.track)
        assert got == want[: len(got)], f"{name}: wrong token at {_first_difference(got, want)}"
        if event.reason in ("length", "stop"):
            assert got == want, f"{name}: ended after {len(got)} tokens of {len(want)}"
            request = event.track.journey.request
            if request.sampling.prompt_logprobs is not None and event.track.choice == 0:
                assert self.scored.get(event.track, 0) == len(request.prompt_ids) - 1, f"{name}: scores are missing"
        elif not (self.steps_fail and isinstance(event.error, DeviceError)):  # its lone step was hit again
            assert event.reason in ("abort", "deadline"), f"{name}: ended by {event.reason}: {event.error}"


def lone(track: Track) -> list[int]:
    """What the choice draws when nothing else exists, its EOS included."""
    request = track.journey.request
    part = Part(1, track.choice)
    (sequence,) = sequences(request, (part,), track.journey.seed, CONTEXT, (EOS,), b"")
    count = sequence.limit - sequence.prompt_length
    tokens = alone(list(request.prompt_ids), replace(sequence.draw, choice=track.choice), count, VOCAB)
    stops = [k for k, token in enumerate(tokens) if token in sequence.stop_ids]
    return tokens[: stops[0] + 1] if stops else tokens


def _first_difference(got: list[int], want: list[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
