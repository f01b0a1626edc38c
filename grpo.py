"""GRPO: every equation of the method, in plain PyTorch.

Owns advantages, loss, log-probs and the update. Knows nothing of files, prompts or the training loop.
Reading order: Group, group_advantages, grpo_loss (it holds the equations), LOSSES, token_logps, update.

    (1)  R   = r_answer + w_exec r_exec                         reward of a trajectory: see reward.py
    (2)  A_i = (R_i - mean R) / max(std R, 0.1)                 advantage: compared with its group
    (3)  l   = log softmax(z / temperature)[token]              log-prob of a sampled token, z its logits
    (4)  r   = exp(l - l_old)                                   ratio to the policy at the start of the batch
    (5)  c   = min(exp(l_old - l_behaviour), C)                 truncated importance weight, a constant
    (6)  s   = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)   clipped objective; where A < 0 at least dual_clip A
    (7)  k   = exp(d) - d - 1,  d = l_ref - l                   KL penalty; above d = 5 its tangent
    (8)  L   = sum of c (beta k - s) / N                        loss; N (dapo): all loss tokens of the optimiser step

Four policies have a log-prob l for each sampled token: the current one, pi_old (at the start of the batch),
pi_behaviour (which sampled the token, perhaps steps ago: the sampler recorded l_behaviour), and pi_ref (the base
model, adapter off). pi_old and pi_behaviour are two policies as in decoupled PPO (Hilton et al., arXiv 2110.00641):
the clip of r in (6) limits one update, c in (5) corrects for the policy that sampled.

Why the clip does not act by default from 0.3B on: with one minibatch and one epoch a batch takes one optimiser
step. Then l_old is the same forward pass as l, so r = exp(0) = 1. 1 lies within the clip's bounds, and
min(A, A) = A; where A < 0, max(A, dual_clip A) = A. The gradient of r is that of l: REINFORCE with the weight c.

Sources: PPO (arXiv 1707.06347); GRPO (DeepSeekMath, 2402.03300); DAPO (2503.14476); Dr. GRPO (2503.20783); dual clip
(1912.09729); k3 (Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html); truncated importance
sampling (Ionides, "Truncated Importance Sampling", 2008).

Departures from GRPO as published: a group counts only if some are right and some wrong; std is at least 0.1; the
default loss is DAPO's (clip-higher, mean over tokens, no overlong trajectories), with a KL penalty; k goes on as its
tangent above d = 5; c corrects for replay and for the sampler's rounding.
"""
import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from machinery.cli import UserError, option
from machinery.engine import attention, refusal
from machinery.head import head_logps
from machinery.memory import halving
from machinery.prefix_tree import Tree, make_tree, pack, tree_logps
from machinery.ranks import sum_gradients, sum_over_ranks
from machinery.update_stats import UpdateStats
from policy import Policy
from reward import Reward
from rollout import Trajectory

Batch = Sequence[tuple[Trajectory, float]]      # trajectories and their advantages


@dataclass
class GRPOConfig:
    loss: str = option("dapo", "advantage, normaliser and clip: dapo, grpo or dr_grpo (LOSSES in grpo.py)")
    beta: float = option(1e-3, "weight of the KL penalty; 0 skips the reference pass", zero=True)
    epochs: int = option(1, "passes over a batch")
    minibatches: int = option(1, "optimiser steps per pass")
    token_budget: int = option(8192, "tokens per micro-batch: bounds memory, changes no result")
    eps_low: float | None = option(None, "lower clip bound, 1 - eps_low; default: the loss's", flag=False)
    eps_high: float | None = option(None, "upper clip bound, 1 + eps_high; default: the loss's", flag=False)
    dual_clip: float = option(3.0, "where A < 0, the objective is at least dual_clip * A", flag=False)
    truncation: float = option(2.0, "C, the largest importance weight c", flag=False)
    std_floor: float = option(0.1, "the least std that an advantage is divided by", flag=False)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", flag=False)

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise UserError(f"--loss {self.loss}: it is one of {', '.join(LOSSES)}")

    @property
    def one_step(self) -> bool:
        """Whether a batch takes a single optimiser step."""
        return self.epochs * self.minibatches == 1

    @property
    def clip(self) -> tuple[float, float]:
        """(eps_low, eps_high)"""
        low, high = LOSSES[self.loss].clip
        if self.eps_low is not None:
            low = self.eps_low
        if self.eps_high is not None:
            high = self.eps_high
        return low, high


# -------------------------------------------------------------------------------------------------- equation (2)
@dataclass
class Group:
    """The trajectories of one task, with their rewards and advantages."""
    task: object
    trajectories: list[Trajectory]
    step: int                                       # of the training loop, at which it was sampled
    rewards: list[Reward] = field(default_factory=list)
    advantages: list[float | None] | None = None    # None: no signal; None for one trajectory: not in batch()
    std: float = 0.0                                # of the rewards

    def batch(self) -> list[tuple[Trajectory, float]]:
        return [(t, a) for t, a in zip(self.trajectories, self.advantages) if a is not None]

    def positive(self) -> "Group":
        """What the queue keeps with --replay positive: the trajectories that were better than their group's mean."""
        better = [a if a is not None and a > 0 else None for a in self.advantages]
        return replace(self, advantages=better)


def group_advantages(rewards: Sequence[Reward], cfg: GRPOConfig) -> tuple[list[float | None], float] | None:
    """Equation (2): (advantages, population std of the rewards) of one group (GRPO section 4.1.2).

    Two filters act here. *Unjudged*: a trajectory without a reward is in no mean, and its advantage is None. *No
    signal*: the result is None for fewer than two judged trajectories, and where all are equally right. A spread
    that comes from r_exec alone is no signal, or running code would become the task. Wrong and cut trajectories
    stay in the mean: without them the baseline is biased.
    """
    judged = [r for r in rewards if r.total is not None]
    answers = [r.answer for r in judged]
    if len(judged) < 2:
        return None
    if max(answers) - min(answers) < 1e-6:
        return None
    mean = sum(r.total for r in judged) / len(judged)
    deviations = [r.total - mean for r in judged]
    std = math.sqrt(sum(d * d for d in deviations) / len(deviations))
    advantages = iter(LOSSES[cfg.loss].advantage(deviations, max(std, cfg.std_floor)))
    return [None if r.total is None else next(advantages) for r in rewards], std


# -------------------------------------------------------------------------------------- equations (4) to (8)
def grpo_loss(logp, logp_old, logp_behaviour, logp_ref, advantage, loss_mask, cfg: GRPOConfig, normaliser):
    """The loss of a micro-batch: a pure function of tensors, differentiable in `logp` alone.

    logp, logp_old, logp_behaviour, logp_ref (or None: no KL) and loss_mask (bool): (B, T). advantage and
    normaliser (see LOSSES): (B, 1). The losses of micro-batches add up to that of the optimiser step.
    Returns (loss, stats): stats holds sums over loss_mask, for the log.
    """
    def select(x):                              # (B, T); never mask * x, because 0 * nan is nan
        return torch.where(loss_mask, x, 0.0)   # outside l = 0 and A = 0, so loss and gradient are 0
    l = select(logp)
    l_old = select(logp_old.detach())
    l_behaviour = select(logp_behaviour.detach())
    A = select(advantage)                                                               # (B, T)
    eps_low, eps_high = cfg.clip
    # (4)  r = exp(l - l_old)                                                                    (PPO section 3)
    r = (l - l_old).clamp(-20, 20).exp()
    # (5)  c = min(exp(l_old - l_behaviour), C), a constant                                            (Ionides)
    c = (l_old - l_behaviour).clamp(max=math.log(cfg.truncation)).exp()
    # (6)  s = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)                             (PPO eq. 7, DAPO 3.1)
    s = torch.min(r * A, r.clamp(1 - eps_low, 1 + eps_high) * A)
    #      where A < 0: s = max(s, dual_clip A), which bounds what one bad sample can do               (dual clip)
    s = torch.where(A < 0, torch.max(s, cfg.dual_clip * A), s)
    # (7)  k = exp(d) - d - 1, d = l_ref - l. Its value estimates KL(pi || ref); its gradient, (1 - exp d) grad l,
    #      is in expectation that of KL(ref || pi)                                              (k3; GRPO eq. 4)
    k = torch.zeros_like(l)
    if logp_ref is not None:
        k = k3(select(logp_ref.detach()) - l)
    # (8)  L = sum of c (beta k - s) / N
    loss = (c * (cfg.beta * k - s) / normaliser).sum()
    clipped_above = (A > 0) & (r > 1 + eps_high)
    clipped_below = (A < 0) & ((r < 1 - eps_low) | (r > cfg.dual_clip))
    off_policy = (l_old - l_behaviour).abs() > math.log(1 + eps_high)
    return loss, {
        "kl": k.detach().sum(),
        "clipped": (clipped_above | clipped_below).sum(),
        "off_policy": off_policy.sum(),
    }


def k3(d: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1, above d = 5 its tangent: value and gradient stay finite, and the gradient never becomes 0."""
    near = d.clamp(max=5.0)
    tangent = math.exp(5.0) - 6 + (math.exp(5.0) - 1) * (d - 5.0)
    return torch.where(d > 5.0, tangent, near.exp() - near - 1)


# ------------------------------------------------------------------------------------------ the table of losses
def divided_by_std(deviations: list[float], std: float) -> list[float]:
    return [d / std for d in deviations]


def not_divided(deviations: list[float], std: float) -> list[float]:
    return deviations


def all_tokens(lengths, tokens: float, sequences: float, token_limit: int) -> torch.Tensor:
    return torch.full_like(lengths, tokens)                     # the mean over all tokens


def own_tokens(lengths, tokens: float, sequences: float, token_limit: int) -> torch.Tensor:
    return sequences * lengths                                  # the mean of a sequence, then of the sequences


def constant(lengths, tokens: float, sequences: float, token_limit: int) -> torch.Tensor:
    return torch.full_like(lengths, sequences * token_limit)    # the same for short and long sequences


class Loss(NamedTuple):
    """One estimator. Another one is another row of LOSSES.

    advantage: (deviations R_i - mean R of a group, max(std, std_floor)) -> advantages. normaliser: N in (8) for
    each trajectory, (B, 1), from lengths (B, 1), its loss tokens, and from the loss tokens and sequences of the WHOLE
    optimiser step on all ranks, never of a micro-batch. clip: eps_low, eps_high.
    """
    advantage: Callable[[list[float], float], list[float]]
    normaliser: Callable[..., torch.Tensor]
    clip: tuple[float, float]


LOSSES = {
    "dapo": Loss(divided_by_std, all_tokens, (0.2, 0.28)),      # DAPO 3.1 (clip-higher) and 3.3
    "grpo": Loss(divided_by_std, own_tokens, (0.2, 0.2)),       # GRPO eq. 3
    "dr_grpo": Loss(not_divided, constant, (0.2, 0.2)),         # Dr. GRPO 3.2
}


# -------------------------------------------------------------------------------------------------- equation (3)
def token_logps(model, ids: torch.Tensor, mask: torch.Tensor, temperature=1.0, chunk: int | None = None):
    """Equation (3): (log-probs, entropies) of the sampled tokens, both (B, T), fp32, aligned with ids, 0 elsewhere.

    ids (B, T), padded on the right: causal attention hides padding from all that stands before it, so there
    is no attention mask. mask (B, T): True = sampled. chunk: positions whose logits exist at one time.
    """
    causal = model.get_base_model()                     # the adapter lies in its layers
    hidden = causal.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state        # (B, T-1, H)
    rows, t = mask[:, 1:].nonzero(as_tuple=True)        # (N,): the state at t predicts the token at t + 1
    states, targets = hidden[rows, t], ids[rows, t + 1]                                 # (N, H), (N,)
    # log softmax(head(states) / temperature)[targets], a chunk of the N positions at a time
    logp, entropy = head_logps(causal, states, targets, temperature, chunk)             # (N,), (N,)
    zeros = logp.new_zeros(ids.shape)                                                   # (B, T)
    return zeros.index_put((rows, t + 1), logp), zeros.index_put((rows, t + 1), entropy)


# ----------------------------------------------------------------------------------------------------- update
@dataclass
class MicroBatch:
    """B trajectories that go through the network together: (B, T), padded on the right with 0."""
    rows: list[int]                     # their indices in the batch
    ids: torch.Tensor
    mask: torch.Tensor                  # bool: True = sampled
    behaviour: torch.Tensor
    advantage: torch.Tensor             # (B, 1)
    tree: Tree | None = None            # the same tokens, each distinct prefix once; None: padded
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    now: torch.Tensor | None = None     # l in the last optimiser step, before it
    entropy: torch.Tensor | None = None # of the same forward pass

    def logps(self, policy: Policy, temperature: float):
        """(log-probs, entropies), both (B, T)."""
        if self.tree is None:
            return token_logps(policy.model, self.ids, self.mask, temperature)
        return tree_logps(policy.model, self.tree, self.mask, temperature)

    def part(self, rows: slice) -> "MicroBatch":
        parts = {}
        for name, value in vars(self).items():
            if value is not None:
                parts[name] = value[rows]       # of lists, of tensors and of the tree
        return MicroBatch(**parts)

    def halves(self) -> list["MicroBatch"]:
        if len(self.rows) == 1:
            return [self]
        middle = (len(self.rows) + 1) // 2
        return [self.part(slice(None, middle)), self.part(slice(middle, None))]


def in_loss(trajectory: Trajectory) -> bool:
    """The filter *overlong* (DAPO 3.4): stopped by a token limit, so in the baseline but out of the loss."""
    return trajectory.stop_reason not in ("length", "context_limit") and any(trajectory.mask)


def micro_batches(batch: Batch, rows: Sequence[int], token_budget: int, device, trees=False) -> list[MicroBatch]:
    """Those rows in micro-batches of up to token_budget tokens; a longer trajectory goes alone.

    Padded, the longest first, and padding counts. Or as prefix trees (machinery/prefix_tree.py), in which every
    distinct prefix counts once.
    """
    sequences = [batch[row][0].ids for row in rows]
    parts = pack(sequences, token_budget) if trees else pack_padded(sequences, token_budget)
    made = []
    for part in parts:
        trajectories = [batch[rows[i]][0] for i in part]

        def padded(name, dtype, trajectories=trajectories):                             # (B, T)
            tensors = [torch.tensor(getattr(t, name), dtype=dtype) for t in trajectories]
            return pad_sequence(tensors, batch_first=True).to(device)
        ids = padded("ids", torch.long)
        advantages = [[batch[rows[i]][1]] for i in part]
        tree = None
        if trees:
            tree = make_tree([t.ids for t in trajectories], device, ids.shape[1])
        made.append(MicroBatch(
            [rows[i] for i in part],
            ids,
            padded("mask", torch.bool),
            padded("logps", torch.float),
            torch.tensor(advantages, device=device),                                    # (B, 1)
            tree))
    return made


def pack_padded(sequences: Sequence[Sequence[int]], token_budget: int) -> list[list[int]]:
    """Indices of the sequences, longest first, in parts of up to token_budget padded tokens."""
    parts: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True):
        longest = len(sequences[parts[-1][0]]) if parts else 0
        if parts and (len(parts[-1]) + 1) * longest <= token_budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


@torch.no_grad()
def score(policy: Policy, minibatch: list[MicroBatch], cfg: GRPOConfig, temperature: float):
    """l_old (if the batch takes several optimiser steps) and l_ref (if beta > 0), before the first step."""
    for micro in minibatch:
        if not cfg.one_step:
            micro.old, _ = micro.logps(policy, temperature)
        if cfg.beta:
            with policy.reference():
                micro.ref, _ = micro.logps(policy, temperature)


def accumulate(policy: Policy, minibatch: list[MicroBatch], cfg: GRPOConfig, temperature: float, token_limit: int,
               tokens: float, sequences: float):
    """This rank's gradients of an optimiser step: (sums over its loss tokens, rows that are *not finite*)."""
    policy.model.zero_grad(set_to_none=True)            # so that it can run again after a failure
    sums, not_finite = Counter(), []
    for micro in minibatch:
        logp, entropy = micro.logps(policy, temperature)     # (B, T), (B, T)
        micro.now, micro.entropy = logp.detach(), entropy.detach()
        if cfg.one_step:
            micro.old = micro.now                       # l_old is this very forward pass
        lengths = micro.mask.sum(1, keepdim=True).float()                                   # (B, 1)
        normaliser = LOSSES[cfg.loss].normaliser(lengths, tokens, sequences, token_limit)   # (B, 1)
        loss, stats = grpo_loss(
            logp, micro.old, micro.behaviour, micro.ref, micro.advantage, micro.mask, cfg, normaliser)
        loss.backward()
        stats["loss"] = loss.detach()
        stats["entropy"] = entropy.sum()
        stats["tokens"] = micro.mask.sum()
        sums.update({name: value.item() for name, value in stats.items()})
        numbers = micro.now + micro.old + micro.behaviour + micro.advantage             # (B, T)
        if micro.ref is not None:
            numbers = numbers + micro.ref
        finite = numbers.isfinite() | ~micro.mask                                           # (B, T)
        for row, ok in zip(micro.rows, finite.all(1).tolist()):
            if not ok:
                not_finite.append(row)
    return sums, not_finite


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    cfg: GRPOConfig,
    temperature: float = 1.0,
    token_limit: int = 1024,
    fresh: Sequence[bool] | None = None,
    seed: int = 0,
    progress=None,
    plain: bool = False,
    show: Sequence[int] = (),
) -> UpdateStats:
    """Train on a batch: cfg.epochs passes, each of cfg.minibatches optimiser steps.

    temperature: at which the batch was sampled. token_limit: sampled tokens that a trajectory may have (for dr_grpo).
    fresh: which trajectories were just sampled (default: all). seed: of the split in minibatches, which are made of
    whole groups, because siblings share prefixes. progress: a tqdm bar, one count per trajectory and pass. plain:
    padded; else every distinct prefix goes through the network once, with the same result. show: indices of the
    trajectories whose l, l_old and l_ref, per token, are wanted in UpdateStats.shown.
    Under torch.distributed each rank brings its share of the batch, maybe none; the result is that of one
    process on the whole. An optimiser step with a number that is *not finite* is skipped, on all ranks, and noted.
    """
    stats = UpdateStats(token_budget=cfg.token_budget)
    sums = Counter()
    trees = not plain and not refusal(policy.model)
    minibatches = []
    for rows in split_groups(batch, cfg.minibatches, seed):
        minibatches.append(micro_batches(batch, rows, cfg.token_budget, policy.device, trees))
    policy.model.train()                                # there is no dropout; it only turns checkpointing on
    with attention(policy.model, "prefix_tree") if trees else contextlib.nullcontext():
        for index in range(cfg.minibatches):            # halving: tries again with less after an out-of-memory
            halving(lambda m: score(policy, m, cfg, temperature), minibatches, index, stats)
        for index in list(range(cfg.minibatches)) * cfg.epochs:
            trajectories = sum(len(micro.rows) for micro in minibatches[index])
            tokens = sum(int(micro.mask.sum()) for micro in minibatches[index])
            n = sum_over_ranks({"tokens": tokens, "sequences": trajectories}, policy.device)
            if n["tokens"] == 0:
                continue                                # a step would only move Adam's momentum
            found, not_finite = halving(
                lambda m, n=n: accumulate(policy, m, cfg, temperature, token_limit, **n), minibatches, index, stats)
            if progress is not None:
                progress.update(trajectories)
            names = [f"{batch[i][0].task_id} sample {batch[i][0].sample}" for i in not_finite]
            if optimiser_step(policy, optimizer, cfg, stats, names):
                sums.update(found)
    policy.model.zero_grad(set_to_none=True)
    policy.model.eval()
    stats.means_over_ranks(sums, policy.device, with_kl=cfg.beta > 0)
    micros = sum(minibatches, [])
    stats.compare_policies(micros, fresh or [True] * len(batch), cfg.clip[1])
    stats.keep_tokens(micros, {row: len(batch[row][0].ids) for row in show})
    return stats


def split_groups(batch: Batch, minibatches: int, seed: int) -> list[list[int]]:
    """The rows of each minibatch: whole groups in random order, without what is not in the loss."""
    groups: dict[tuple, list[int]] = {}
    for row, (trajectory, _) in enumerate(batch):
        if in_loss(trajectory):
            groups.setdefault((trajectory.task_id, trajectory.seed), []).append(row)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    return [sum(order[first::minibatches], []) for first in range(minibatches)]


def optimiser_step(policy: Policy, optimizer, cfg: GRPOConfig, stats: UpdateStats, not_finite: list[str]) -> bool:
    """Sum the gradients of all ranks and step; False if a number is *not finite* on any rank: then nothing moves."""
    parameters = policy.trainable()
    sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    sick = sum_over_ranks({"trajectories": len(not_finite)}, policy.device)     # the clamps can hide a nan
    if sick["trajectories"] or not math.isfinite(norm):
        names = ", ".join(not_finite) or "the gradient"
        stats.notes.append(f"optimiser step skipped: not finite is {names}")
        return False
    optimizer.step()
    stats.optimiser_steps += 1
    stats.grad_norm = max(norm, stats.grad_norm or 0.0)
    return True


def make_optimizer(policy: Policy, lr: float) -> torch.optim.Optimizer:
    """AdamW on the adapter; on a GPU with 8-bit states. Not paged: they are 80 MB at 7B."""
    if policy.device.type == "cuda":
        from bitsandbytes.optim import AdamW8bit
        return AdamW8bit(policy.trainable(), lr=lr, weight_decay=0.0)
    return torch.optim.AdamW(policy.trainable(), lr=lr, weight_decay=0.0)
