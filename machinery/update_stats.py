"""What an update measures: means over its loss tokens, how far the behaviour policy is from the old one, and the
log-probs of every token of the trajectories that somebody wants to see."""
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from machinery.ranks import sum_over_ranks


class TokenLogps(NamedTuple):
    """The log-probs of one trajectory as the loss saw them: one number per token, 0 where the mask is 0."""
    now: list[float]            # l in the last optimiser step that the trajectory took part in, before that step
    old: list[float]            # l_old; with one optimiser step per batch the same numbers
    ref: list[float] | None     # l_ref; None with beta 0
    entropy: list[float]        # of the policy where it chose the token, in nats; of the same forward pass as now


@dataclass
class UpdateStats:
    """Means over the loss tokens of all ranks; None where there are none, and for kl where beta is 0."""
    loss: float | None = None           # mean of the optimiser steps' losses
    kl: float | None = None
    entropy: float | None = None
    clip_fraction: float | None = None
    off_policy: float | None = None     # share of tokens with |l_old - l_behaviour| > log(1 + eps_high)
    grad_norm: float | None = None      # before clipping, the largest of the optimiser steps
    mismatch_mean: float | None = None  # |l_old - l_behaviour| on this rank's fresh tokens
    mismatch_p99: float | None = None
    off_policy_each: list[float] = field(default_factory=list)     # per trajectory of the batch; out of the loss: 0
    optimiser_steps: int = 0
    tokens: int = 0                     # trained on, over all optimiser steps
    token_budget: int = 0               # half of the configured one after an out-of-memory
    notes: list[str] = field(default_factory=list)                 # for a person: what was skipped or retried
    shown: dict[int, TokenLogps] = field(default_factory=dict)     # by index in the batch, where asked and in the loss

    def means_over_ranks(self, sums: Counter, device, with_kl: bool):
        """From sums over this rank's loss tokens to means over all ranks' tokens."""
        names = ("loss", "kl", "entropy", "clipped", "off_policy", "tokens")
        sums = sum_over_ranks({name: sums[name] for name in names}, device)
        n = sums["tokens"]
        if n == 0:
            return
        self.tokens = int(n)
        self.loss = sums["loss"] / self.optimiser_steps
        self.entropy = sums["entropy"] / n
        self.off_policy = sums["off_policy"] / n
        self.clip_fraction = sums["clipped"] / n
        self.kl = sums["kl"] / n if with_kl else None

    def compare_policies(self, micro_batches: Sequence, fresh: Sequence[bool], eps_high: float):
        """|l_old - l_behaviour|: per trajectory, which tells the queue how stale it is; and over fresh tokens, where
        the two policies are one and only sampler and scorer can differ."""
        self.off_policy_each = [0.0] * len(fresh)
        gaps = [torch.zeros(0)]
        for micro in micro_batches:
            for row, old, behaviour, mask in zip(micro.rows, micro.old, micro.behaviour, micro.mask):
                gap = (old - behaviour)[mask].abs().cpu()                               # (N,)
                within = gap <= math.log(1 + eps_high)          # False for nan, so that it leaves the queue
                self.off_policy_each[row] = 1 - within.float().mean().item()
                if fresh[row]:
                    gaps.append(gap[gap.isfinite()])
        gap = torch.cat(gaps)
        if len(gap):
            self.mismatch_mean = gap.mean().item()
            self.mismatch_p99 = gap.sort().values[int(0.99 * (len(gap) - 1))].item()

    def keep_tokens(self, micro_batches: Sequence, lengths: dict[int, int]):
        """Fill `shown`. lengths: {index in the batch: tokens}; one that is not in the loss has no log-probs."""
        for micro in micro_batches:
            for i, row in enumerate(micro.rows):
                if row in lengths:
                    columns = (micro.now, micro.old, micro.ref, micro.entropy)          # (B, T) each
                    self.shown[row] = TokenLogps(*[x if x is None else x[i, :lengths[row]].tolist() for x in columns])
