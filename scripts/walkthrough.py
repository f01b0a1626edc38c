"""One task through the whole method, with its numbers: python -m scripts.walkthrough (under a minute on two cores).

Read it beside README's eight equations. Every step calls the function that training calls, then does the same by hand
in plain Python, and asserts that the two agree. Order: sample a group, mask, rewards (1), advantages (2), log-probs
(3), the loss of one token (4) to (8), one update, replay.
"""
import sys

if __package__ != "scripts":
    print("error: start this from the repository's folder as: python -m scripts.walkthrough", file=sys.stderr)
    sys.exit(2)

import math
import random
from statistics import fmean, pstdev

import torch

from eval_gaia import LIMITS
from executor import Executor
from grpo import LOSSES, Group, GRPOConfig, group_advantages, grpo_loss, make_optimizer, token_logps, update
from machinery.cli import OneLineParser, exit_status
from machinery.sample_queue import SampleQueue
from policy import Policy, load_policy
from reward import Judge, compute_rewards
from rollout import Sampling, Trajectory, rollout
from tasks import BUILTIN_TOOLS, builtin_tasks


def say(title: str, *rows):
    print(f"\n{title}")
    for row in rows:
        print("   ", row)


def sampled_group(policy: Policy, executor: Executor, cfg: GRPOConfig, sampling: Sampling) -> Group:
    """The first held-out task whose eight trajectories carry signal; its group with rewards (1), advantages (2)."""
    for task in builtin_tasks("heldout", 100, 0):
        trajectories = rollout(policy, [task], executor, BUILTIN_TOOLS, sampling, 8, seed=0)[0]
        group = Group(task, trajectories, step=1, rewards=compute_rewards([task], [trajectories], Judge())[0])
        found = group_advantages(group.rewards, cfg)
        if found is not None and len({len(t.turns) for t in trajectories}) > 1:
            group.advantages, group.std = found
            return group
    raise AssertionError("no task with signal: was the built-in model changed?")


def show_mask(policy: Policy, t: Trajectory):
    """A trajectory in the pieces that its mask cuts it into: 1 was sampled, 0 was forced."""
    pieces, start = [], 0
    for i in range(1, len(t.ids) + 1):
        if i == len(t.ids) or t.mask[i] != t.mask[start]:
            pieces.append(f"mask {t.mask[start]}, {i - start:3d} tokens: {policy.tokenizer.decode(t.ids[start:i])!r}")
            start = i
    say("A trajectory: what the policy wrote has mask 1, what came back has mask 0", *pieces)
    assert sum(t.mask[:t.prompt_length]) == 0 and len(t.ids) == len(t.mask) == len(t.logps)


def show_advantages(group: Group, cfg: GRPOConfig):
    totals = [r.total for r in group.rewards]
    mean, std = fmean(totals), pstdev(totals)
    by_hand = [(total - mean) / max(std, cfg.std_floor) for total in totals]
    rows = [f"answer {t.answer!r:12} r_answer {r.answer:.0f}  r_exec {r.execution:.2f}  R {r.total:.3f}  A {a:+.3f}"
            for t, r, a in zip(group.trajectories, group.rewards, by_hand)]
    say(f"(1) reward, (2) advantage = (R - {mean:.3f}) / {max(std, cfg.std_floor):.3f}", *rows)
    assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(by_hand, group.advantages))
    for r in group.rewards:
        assert math.isclose(r.total, r.answer + 0.1 * r.execution)


def logps_now(policy: Policy, t: Trajectory) -> torch.Tensor:
    """(T,): log pi of every sampled token under the policy as it is, 0 elsewhere."""
    with torch.no_grad():
        found, _ = token_logps(policy.model, torch.tensor([t.ids]), torch.tensor([t.mask]).bool())
    return found[0]


def show_loss(policy: Policy, t: Trajectory, advantage: float, cfg: GRPOConfig, title: str):
    """(3) to (8) for the sampled token with the lowest log-prob, in Python's own numbers; then the function's loss."""
    l = logps_now(policy, t)
    with policy.reference():
        l_ref = logps_now(policy, t)
    at = min((i for i, sampled in enumerate(t.mask) if sampled), key=lambda i: t.logps[i])
    n, A, (low, high) = sum(t.mask), advantage, LOSSES[cfg.loss].clip
    by_hand = {}
    for i in (i for i, sampled in enumerate(t.mask) if sampled):
        r = math.exp(0.0)                                       # (4): at the first optimiser step l_old is l
        c = min(math.exp(l[i].item() - t.logps[i]), cfg.truncation)                                         # (5)
        s = min(r * A, min(max(r, 1 - low), 1 + high) * A)                                                  # (6)
        s = max(s, cfg.dual_clip * A) if A < 0 else s
        d = l_ref[i].item() - l[i].item()
        k = math.exp(d) - d - 1                                                                             # (7)
        by_hand[i] = r, c, s, k, c * (cfg.beta * k - s) / n                                                 # (8)
    r, c, s, k, term = by_hand[at]
    say(f"{title}: the token {policy.tokenizer.decode([t.ids[at]])!r}, which the sampler drew with log-prob "
        f"{t.logps[at]:.3f}",
        f"(3) l = {l[at]:.3f} now, under the reference {l_ref[at]:.3f}", f"(4) r = exp(l - l_old) = {r:.3f}",
        f"(5) c = min(exp(l_old - l_behaviour), {cfg.truncation}) = {c:.3f}", f"(6) s = {s:+.3f}, with A = {A:+.3f}",
        f"(7) k = {k:.5f}", f"(8) its term of the loss = c (beta k - s) / {n} = {term:+.5f}")
    columns = [x[None] for x in (l, l, torch.tensor(t.logps), l_ref)]                           # (1, T) each
    loss, _ = grpo_loss(*columns, torch.tensor([[A]]), torch.tensor([t.mask]).bool(), cfg, torch.tensor([[float(n)]]))
    assert math.isclose(loss.item(), sum(row[-1] for row in by_hand.values()), rel_tol=1e-4, abs_tol=1e-5)


def show_update(policy: Policy, group: Group, cfg: GRPOConfig):
    """One optimiser step on the group: what was right becomes likelier, what was wrong less likely."""
    before = [logps_now(policy, t).sum().item() for t in group.trajectories]
    stats = update(policy, make_optimizer(policy, lr=1e-3), group.batch(), cfg)
    after = [logps_now(policy, t).sum().item() for t in group.trajectories]
    rows = [f"A {a:+.3f}  log pi of the trajectory {b:8.3f} -> {c:8.3f}"
            for a, b, c in zip(group.advantages, before, after)]
    say(f"One update: loss {stats.loss:+.4f}, gradient norm {stats.grad_norm:.3f}, {stats.tokens} tokens", *rows)
    assert sum(a * (c - b) for a, b, c in zip(group.advantages, before, after)) > 0
    assert stats.mismatch_mean < 1e-4           # sampler and scorer agree on what was just sampled


def show_replay(policy: Policy, group: Group, cfg: GRPOConfig):
    """The group comes back from the queue some steps later: the policy has moved, so c is not 1 any more."""
    queue = SampleQueue(capacity=8, half_life=4.0, max_age=8, max_uses=4, max_off_policy=0.3)
    queue.admit(group, group.std, any_right=True, step=1)
    priority = queue.priority(queue.entries[0], step=3)
    assert math.isclose(priority, group.std * 2 ** (-2 / 4.0) / (1 + 1))
    entry = queue.draw(1, step=3, rng=random.Random(0))[0]
    say(f"The queue: spread {group.std:.3f}, age 2, uses 1: priority {priority:.3f}. It is drawn, and trained on again")
    t, a = entry.group.batch()[0]
    show_loss(policy, t, a, cfg, "Replayed")
    stats = update(policy, make_optimizer(policy, lr=1e-4), entry.group.batch(), cfg, fresh=[False] * 8)
    say(f"off-policy tokens {stats.off_policy:.3f}: |l_old - l_behaviour| > log(1 + eps_high) = {math.log(1.28):.3f}")


def walk(argv=None):
    OneLineParser(prog="-m scripts.walkthrough", description="One task through the whole method.").parse_args(argv)
    policy, cfg = load_policy("tiny"), GRPOConfig(truncation=2.0)
    known = policy.preset.settings
    limits = {name: known[name] for name in LIMITS}
    with Executor("auto") as executor:
        group = sampled_group(policy, executor, cfg, Sampling(**limits))
    say(f"Task {group.task.id}: {group.task.question}", f"expected {group.task.answer!r}")
    show_mask(policy, group.trajectories[0])
    show_advantages(group, cfg)
    show_loss(policy, group.trajectories[0], group.advantages[0], cfg, "The first trajectory, fresh")
    show_update(policy, group, cfg)
    show_replay(policy, group, cfg)


def main(argv=None) -> int:
    return exit_status(lambda: walk(argv))


if __name__ == "__main__":
    sys.exit(main())
