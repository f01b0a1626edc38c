"""Lab 4 of LABS.md: the gradient of every row of LOSSES on the same trajectories, beside that of dr_grpo.

    python -m tests.lab_losses [SEED ...]

The built-in model samples 12 groups of 8 once per seed. Each loss then gives a gradient of the adapter, without KL
penalty, in one optimiser step (so r = 1, and no clip acts). Printed per loss, a number per seed: the cosine to
dr_grpo's gradient, of the whole batch and of its first group with signal and trajectories of different lengths; and how
many times as long it is. A cosine of 1: the two are the same up to a scale.
"""
import sys

import torch

import grpo
from executor import Executor
from grpo import GRPOConfig, accumulate, group_advantages, in_loss, micro_batches, split_groups
from policy import load_policy
from reward import Judge, compute_rewards
from rollout import Sampling, rollout
from tasks import BUILTIN_TOOLS, builtin_tasks

LIMITS = Sampling(max_turns=4, turn_tokens=96, context_tokens=512, observation_tokens=64, deterministic=True)


def sampled(policy, seed: int, n: int = 12) -> list[tuple]:
    """(trajectories, rewards) of each of n groups that carries signal."""
    tasks = builtin_tasks("train", n, seed)
    with Executor("auto") as executor:
        groups = rollout(policy, tasks, executor, BUILTIN_TOOLS, LIMITS, 8, seed)
    judged = compute_rewards(tasks, groups, Judge())
    return [pair for pair in zip(groups, judged) if group_advantages(pair[1], GRPOConfig())]


def gradient(policy, groups: list[tuple], loss: str) -> torch.Tensor:
    """Of all the adapter's parameters, flat, in float64."""
    cfg = GRPOConfig(loss=loss, beta=0.0)
    batch = []
    for trajectories, rewards in groups:
        advantages, _ = group_advantages(rewards, cfg)
        batch += zip(trajectories, advantages)
    rows = split_groups(batch, 1, seed=0)[0]
    micros = micro_batches(batch, rows, cfg.token_budget, policy.device)
    tokens = sum(int(micro.mask.sum()) for micro in micros)
    token_limit = LIMITS.max_turns * LIMITS.turn_tokens
    accumulate(policy, micros, cfg, 1.0, token_limit, tokens, len(rows))
    return torch.cat([p.grad.flatten() for p in policy.trainable()]).double()


def compare(policy, groups: list[tuple]) -> dict[str, tuple[float, float]]:
    """loss -> (cosine to dr_grpo's gradient, its length / dr_grpo's)."""
    base = gradient(policy, groups, "dr_grpo")
    found = {}
    for loss in grpo.LOSSES:
        other = gradient(policy, groups, loss)
        cosine = torch.cosine_similarity(other, base, dim=0)
        found[loss] = (cosine.item(), (other.norm() / base.norm()).item())
    return found


def lengths_differ(trajectories: list) -> bool:
    return len({sum(t.mask) for t in trajectories if in_loss(t)}) > 1


def main(seeds: list[int]) -> None:
    torch.set_num_threads(1)
    rows = {loss: ([], [], []) for loss in grpo.LOSSES}
    for seed in seeds:
        policy = load_policy("tiny", seed=seed)
        groups = sampled(policy, seed)
        one = next(pair for pair in groups if lengths_differ(pair[0]))
        batch, alone = compare(policy, groups), compare(policy, [one])
        for loss, columns in rows.items():
            for column, value in zip(columns, (batch[loss][0], alone[loss][0], batch[loss][1])):
                column.append(f"{value:.3f}")
    print("| loss | cosine, whole batch | cosine, one group | times as long, whole batch |", "|---" * 4 + "|", sep="\n")
    for loss, columns in rows.items():
        print(f"| `{loss}` | " + " | ".join(", ".join(column) for column in columns) + " |")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
