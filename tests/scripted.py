"""Scripted trajectories: stand-ins for rollout.Episode whose turns and observations have lengths chosen beforehand.

The engine and the oracle sample them in tests/test_rollout.py and in `scripts/bench.py rollout`: the tokens are the
model's own, but every run does the same amount of work.
"""
import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """How many trajectories, and between which bounds their lengths are chosen (log-uniform: many short, few long)."""
    groups: int                     # of 8 trajectories each
    turns: int
    sampled: tuple[int, int]        # tokens per turn
    observed: tuple[int, int]       # tokens per observation
    prompt: int                     # tokens, the same for all trajectories of a group
    context: int
    slots: tuple[int, ...] = ()     # numbers of slots that bench_rollout measures
    system: int = 0                 # first tokens of the prompt that all groups share


class Scripted:
    """Stands in for rollout.Episode. A turn ends at its chosen length, and the observation is random tokens."""

    def __init__(self, group: int, sample: int, prompt: list[int], work: Workload, rng, vocabulary, latency):
        self.group, self.prompt, self.seed, self.turn = group, prompt, [group, sample], 0

        def length(low, high):
            return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
        self.lengths = [length(*work.sampled) for _ in range(work.turns)]
        self.observations = [rng.integers(vocabulary, size=length(*work.observed)).tolist()
                             for _ in self.lengths[1:]] + [[]]
        self.latencies = rng.uniform(*latency, size=work.turns)                         # seconds

    @property
    def turn_tokens(self) -> int:
        return self.lengths[self.turn]

    def uniforms(self, n: int) -> np.ndarray:
        return np.random.default_rng(self.seed).random(n)

    def ended(self, turn: list[int]) -> bool:
        return len(turn) == self.turn_tokens

    def close_turn(self, turn: list[int], limit: str) -> None:
        self.turn += 1

    def act(self) -> None:
        time.sleep(self.latencies[self.turn - 1])

    def observe(self, result, space: int) -> list[int]:
        """The next observation; none after the last turn, and none if the context is too short for it."""
        observation = self.observations[self.turn - 1]
        return observation if len(observation) < space else []

    def fail(self, error: Exception) -> None:
        raise error

    def close(self) -> None:
        """No session to close."""


def scripted(work: Workload, vocabulary: int, latency=(0.0, 0.0)) -> list[Scripted]:
    """The episodes of a workload. latency: bounds of the seconds that a turn's code takes."""
    rng = np.random.default_rng(0)
    system = rng.integers(vocabulary, size=work.system).tolist()
    prompts = [system + rng.integers(vocabulary, size=work.prompt - work.system).tolist() for _ in range(work.groups)]
    return [Scripted(g, i, prompt, work, rng, vocabulary, latency)
            for g, prompt in enumerate(prompts) for i in range(8)]
