"""The naive way to update, as short as it goes: one padded batch, all its logits, autograd through log_softmax.

`scripts/bench.py update` measures grpo.update against it.
"""
import numpy as np
import torch

import grpo
from rollout import Trajectory


def random_batch(vocabulary: int, lengths: list[int]) -> list[tuple[Trajectory, float]]:
    """(trajectory, advantage) of random tokens. The first half of each trajectory is forced, the second sampled."""
    rng, batch = np.random.default_rng(0), []
    for i, n in enumerate(lengths):
        ids, mask = rng.integers(vocabulary, size=n).tolist(), [int(t >= n // 2) for t in range(n)]
        logps = [-np.log(vocabulary) * m for m in mask]
        trajectory = Trajectory("bench", i, 0, ids, mask, logps, n // 2, [], None, "answer", 0.0)
        batch.append((trajectory, float(rng.normal())))
    return batch


def siblings(vocabulary: int, system: int, question: int, sampled: int) -> list[tuple[Trajectory, float]]:
    """4 groups of 8 trajectories of random tokens: a common system prompt, a question per group, sampled tokens."""
    rng, batch = np.random.default_rng(0), []

    def tokens(n):
        return rng.integers(vocabulary, size=n).tolist()
    prefix = tokens(system)
    for group in range(4):
        prompt = prefix + tokens(question)
        mask = [0] * len(prompt) + [1] * sampled
        for i in range(8):
            logps = [-np.log(vocabulary) * m for m in mask]
            trajectory = Trajectory(f"task{group}", i, 0, prompt + tokens(sampled), mask, logps, len(prompt), [], None,
                                    "answer", 0.0)
            batch.append((trajectory, float(rng.normal())))
    return batch


def naive_logps(hidden, head, ids) -> torch.Tensor:
    """(B, T, H), (V, H), (B, T) -> (B, T - 1)"""
    logits = (hidden @ head.T).float()                                                          # (B, T, V)
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def naive_update(policy, optimizer, batch, cfg) -> float:
    """One optimiser step of the default loss (dapo: divided by all tokens of the step); returns the loss."""
    micro, = grpo.micro_batches(batch, range(len(batch)), 10**9, policy.device)
    base = policy.model.get_base_model()
    logp = naive_logps(base.model(micro.ids).last_hidden_state, base.lm_head.weight, micro.ids)
    mask = micro.mask[:, 1:]
    normaliser = mask.sum().float().expand(len(batch), 1)                                       # (B, 1)
    loss, _ = grpo.grpo_loss(logp, logp, micro.behaviour[:, 1:], None, micro.advantage, mask, cfg, normaliser)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
