"""What goes wrong in one simulated life, drawn from its seed: each kind of fault is there or not, mild or hard.

Drawing each fault's presence apart (swarm testing) reaches more states than mild doses of everything.
Source: Groce et al., "Swarm Testing" (ISSTA 2012); RELIABILITY.md 2.2 for the list.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances a message, or a step; counts a life. `heal_at` is when the last fault is over, in seconds."""

    drop: float
    double: float
    late: float  # chance of a delay up to `late_s`, which also reorders
    late_s: float
    damage: float  # a part whose bytes change on the way
    step_fails: float  # on the device: the pool is gone
    launch_fails: float  # before anything changed
    crashes: int
    pauses: int
    pause_s: float
    cuts: int  # links cut for a while, one way
    flips: int  # of a lane's role
    restarts: int  # of lanes, as an operator asks for them
    cancels: float  # of requests
    deadlines: float
    holds: float
    heal_at: float


def draw(rng: random.Random, calm: bool = False) -> Faults:
    """The faults of a life; none if `calm`."""

    def chance(most: float) -> float:
        return 0.0 if calm or rng.random() < 0.5 else rng.uniform(0.0, most)

    def count(most: int) -> int:
        return 0 if calm or rng.random() < 0.5 else rng.randint(1, most)

    return Faults(
        drop=chance(0.2),
        double=chance(0.2),
        late=chance(0.3),
        late_s=rng.choice([0.05, 0.5, 4.0]),
        damage=chance(0.3),
        step_fails=chance(0.03),
        launch_fails=chance(0.05),
        crashes=count(3),
        pauses=count(3),
        pause_s=rng.choice([0.3, 2.0, 8.0]),
        cuts=count(3),
        flips=count(4),
        cancels=chance(0.4),
        deadlines=chance(0.3),
        holds=chance(0.2),
        restarts=count(3),
        heal_at=rng.uniform(3.0, 10.0),
    )
