"""GRPO: every equation of the method, in plain PyTorch.

Owns advantages, loss, log-probs, the update (over one or several processes) and the early warnings. Knows
nothing of files, prompts or the training loop. Reading order: group_advantages, grpo_loss (the heart),
HeadLogps, update.

Symbols: l = log pi(token) at the sampling temperature; l_old the same at the start of the batch; l_behaviour
as the sampler recorded it; l_ref with the adapter off; A advantage, r ratio, c importance weight, k KL
penalty. Shapes: B trajectories of T tokens, N of them sampled, H hidden size, V vocabulary.

Sources: PPO (arXiv 1707.06347); GRPO (DeepSeekMath, 2402.03300); DAPO (2503.14476); Dr. GRPO (2503.20783);
dual clip (1912.09729); k3 (Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html);
truncated importance sampling (Ionides, "Truncated Importance Sampling", 2008).

Departures from GRPO as published: a group counts only if its answers differ; std is at least 0.1;
clip-higher, the mean over tokens and overlong masking are DAPO's; c corrects for replay and for the sampler's
rounding.
"""
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from policy import Policy
from reward import Reward
from rollout import Trajectory
from machinery.cli import UserError

Batch = Sequence[tuple[Trajectory, float]]      # trajectories and their advantages


@dataclass(frozen=True)
class GRPOConfig:
    loss: str = "dapo"              # advantage, normaliser and clip of "dapo", "grpo" or "dr_grpo"
    eps_low: float = 0.2
    eps_high: float | None = None   # None: 0.28 for dapo (clip-higher), 0.2 for the others
    truncation: float = 2.0         # C, the bound on c
    dual_clip: float = 3.0
    beta: float = 1e-3              # weight of the KL penalty; 0 skips the reference pass
    temperature: float = 1.0        # the sampler's
    epochs: int = 1                 # passes over a batch
    minibatches: int = 1            # optimiser steps a pass
    token_limit: int = 1024         # sampled tokens a trajectory may have: dr_grpo's constant normaliser
    token_budget: int = 8192        # padded tokens a micro-batch: bounds memory, changes no result
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.loss not in ("dapo", "grpo", "dr_grpo"):
            raise UserError(f"--loss {self.loss}: it is dapo, grpo or dr_grpo")

    @property
    def clip_high(self) -> float:
        return self.eps_high if self.eps_high is not None else 0.28 if self.loss == "dapo" else 0.2


# -------------------------------------------------------------------------------------------------- equations
def group_advantages(rewards: Sequence[Reward], loss: str) -> list[float | None] | None:
    """A_i = (R_i - mean) / max(std, 0.1) in one group (GRPO section 4.1.2; Dr. GRPO does not divide).

    None for a trajectory that could not be judged: it is in no mean. None for a group without signal: fewer
    than two valid ones, or all equally right. A spread that comes from r_exec alone is no signal, else the
    bonus becomes the task. Failed trajectories stay in: without them the baseline is biased.
    """
    valid = [r for r in rewards if r.total is not None]
    if len(valid) < 2 or max(r.answer for r in valid) - min(r.answer for r in valid) < 1e-6:
        return None
    mean = sum(r.total for r in valid) / len(valid)
    std = math.sqrt(sum((r.total - mean) ** 2 for r in valid) / len(valid))
    scale = 1.0 if loss == "dr_grpo" else max(std, 0.1)
    return [None if r.total is None else (r.total - mean) / scale for r in rewards]


def grpo_loss(logp, logp_old, logp_behaviour, logp_ref, advantage, loss_mask, cfg: GRPOConfig, normaliser):
    """The loss of a micro-batch: a pure function of tensors, differentiable in `logp` alone.

    logp, logp_old, logp_behaviour, logp_ref (or None: no KL) and loss_mask (bool): (B, T). advantage and
    normaliser (see `normalisers`): (B, 1). The losses of micro-batches add up to that of the optimiser step.
    Returns (loss, stats): stats holds sums over loss_mask, for the log.
    """
    def select(x):                              # (B, T); never mask * x, for 0 * nan is nan
        return torch.where(loss_mask, x, 0.0)   # outside l = 0 and A = 0, so loss and gradient are 0
    l, l_old, l_behaviour = select(logp), select(logp_old.detach()), select(logp_behaviour.detach())
    A = select(advantage)                                                               # (B, T)
    # c = min(pi_old / pi_behaviour, C): a truncated importance weight, a constant   (Ionides)
    c = (l_old - l_behaviour).clamp(max=math.log(cfg.truncation)).exp()
    # r = pi / pi_old                                                                (PPO section 3)
    r = (l - l_old).clamp(-20, 20).exp()
    # s = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)                             (PPO eq. 7, DAPO 3.1)
    s = torch.min(r * A, r.clamp(1 - cfg.eps_low, 1 + cfg.clip_high) * A)
    # s = max(s, dual_clip A) where A < 0: bounds what one bad sample can do         (dual clip)
    s = torch.where(A < 0, torch.max(s, cfg.dual_clip * A), s)
    # k = exp(d) - d - 1, d = l_ref - l: its value estimates KL(pi || ref); its gradient, (1 - exp d) grad l,
    # is in expectation that of KL(ref || pi)                                        (k3; GRPO eq. 4)
    d = torch.zeros_like(l) if logp_ref is None else (select(logp_ref.detach()) - l).clamp(-5, 5)
    k = d.exp() - d - 1
    loss = (c * (cfg.beta * k - s) / normaliser).sum()
    clipped = (A > 0) & (r > 1 + cfg.clip_high) | (A < 0) & ((r < 1 - cfg.eps_low) | (r > cfg.dual_clip))
    off_policy = (l_old - l_behaviour).abs() > math.log(1 + cfg.clip_high)
    return loss, {"kl": k.detach().sum(), "clipped": clipped.sum(), "off_policy": off_policy.sum()}


def normalisers(cfg: GRPOConfig, lengths: torch.Tensor, tokens: float, sequences: float) -> torch.Tensor:
    """What each trajectory's tokens are divided by, (B, 1). lengths (B, 1): its loss tokens. tokens,
    sequences: of the WHOLE optimiser step, on all ranks; never of a micro-batch."""
    if cfg.loss == "grpo":
        return sequences * lengths          # the mean of a sequence, then that of the sequences (GRPO eq. 3)
    if cfg.loss == "dapo":
        return torch.full_like(lengths, tokens)                         # the mean over all tokens (DAPO 3.3)
    return torch.full_like(lengths, sequences * cfg.token_limit)        # a constant (Dr. GRPO 3.2)


class HeadLogps(torch.autograd.Function):
    """log softmax(W h / temperature)[target] and its entropy, holding one chunk of logits at a time.

    A log-prob depends on its own h alone, so its gradient is one vector, known in the forward pass already:
        d logp / d h = W^T (onehot(target) - softmax) / temperature      (H,)
    Keeping that costs what keeping h costs. Checkpointing would compute all logits again; this takes two
    matrix products, as many as the naive way. It needs a frozen head, and under LoRA the head is frozen.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):                      # (N, H), (V, H), (N,)
        logps, entropies, jacobians = [], [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):                     # (n, H), (n,)
            logp = (h @ weight.T).float().div_(temperature).log_softmax(-1)        # (n, V); bf16: off by 0.07
            p = logp.exp()
            logps.append(logp.gather(1, y[:, None])[:, 0])
            entropies.append(-torch.bmm(p[:, None], logp[:, :, None])[:, 0, 0])
            del logp
            if ctx.needs_input_grad[0]:
                p.neg_()[torch.arange(len(y), device=y.device), y] += 1    # in fp32: p near 1 cancels exactly
                jacobians.append((p.to(weight.dtype) @ weight) / temperature)           # (n, H)
        if jacobians:
            ctx.save_for_backward(torch.cat(jacobians))
        logp, entropy = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy                                                            # (N,), (N,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, _):
        jacobian, = ctx.saved_tensors
        return (grad_logp[:, None] * jacobian).to(jacobian.dtype), None, None, None, None


def token_logps(model, ids: torch.Tensor, mask: torch.Tensor, temperature=1.0, chunk: int | None = None):
    """(log-probs, entropies) of the sampled tokens: both (B, T), fp32, aligned with ids, 0 outside of mask.

    ids (B, T), padded on the right: causal attention hides padding from all that stands before it, so there
    is no attention mask. mask (B, T): True = sampled. chunk: positions whose logits exist at one time.
    """
    causal = model.get_base_model()                     # the adapter lies in its layers
    head = causal.get_output_embeddings()
    assert not head.weight.requires_grad and head.bias is None, "HeadLogps has no gradient for the head"
    hidden = causal.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state        # (B, T-1, H)
    rows, t = mask[:, 1:].nonzero(as_tuple=True)        # (N,): the state at t predicts the token at t + 1
    chunk = chunk or max(1, 2**26 // len(head.weight))  # 256 MiB of logits
    found = HeadLogps.apply(hidden[rows, t], head.weight, ids[rows, t + 1], temperature, chunk)
    return tuple(torch.zeros(ids.shape, device=ids.device).index_put((rows, t + 1), x) for x in found)


# ----------------------------------------------------------------------------------------------------- update
@dataclass
class MicroBatch:
    """B trajectories that go through the network together: (B, T), padded on the right with 0."""
    rows: list[int]                     # their places in the batch
    ids: torch.Tensor
    mask: torch.Tensor                  # bool: True = sampled
    behaviour: torch.Tensor
    advantage: torch.Tensor             # (B, 1)
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None

    def halves(self) -> list["MicroBatch"]:
        n = (len(self.rows) + 1) // 2
        parts = [slice(0, n), slice(n, None)][:len(self.rows)]      # one row cannot be halved
        return [replace(self, **{k: v[p] for k, v in vars(self).items() if v is not None}) for p in parts]


@dataclass
class UpdateStats:
    """Means over the loss tokens of all ranks; None where there are none, and for kl where beta is 0."""
    loss: float | None = None           # mean of the optimiser steps' losses, each of its whole step
    kl: float | None = None
    entropy: float | None = None
    clip_fraction: float | None = None
    off_policy: float | None = None     # share of tokens with |l_old - l_behaviour| > log(1 + eps_high)
    grad_norm: float | None = None      # before clipping, the largest of the optimiser steps
    mismatch_mean: float | None = None  # |l_old - l_behaviour| on this rank's fresh tokens
    mismatch_p99: float | None = None
    off_policy_each: list[float] = field(default_factory=list)     # by place in the batch; out of the loss: 0
    optimiser_steps: int = 0
    tokens: int = 0                     # trained on, over all optimiser steps
    token_budget: int = 0               # half of the configured one after an out-of-memory
    notes: list[str] = field(default_factory=list)                 # for a person: what was skipped or retried


def in_loss(trajectory: Trajectory) -> bool:
    """Overlong masking (DAPO 3.4): what a token limit cut might have come right, so it is baseline only."""
    return trajectory.stop_reason not in ("length", "context_limit") and any(trajectory.mask)


def micro_batches(batch: Batch, rows: Sequence[int], token_budget: int, device) -> list[MicroBatch]:
    """Those rows, longest first, up to token_budget padded tokens together; a longer one goes alone."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda i: len(batch[i][0].ids), reverse=True):
        if groups and (len(groups[-1]) + 1) * len(batch[groups[-1][0]][0].ids) <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])

    def pad(group, name, dtype):                                                        # (B, T)
        tensors = [torch.tensor(getattr(batch[i][0], name), dtype=dtype) for i in group]
        return pad_sequence(tensors, batch_first=True).to(device)
    return [MicroBatch(g, pad(g, "ids", torch.long), pad(g, "mask", torch.bool), pad(g, "logps", torch.float),
                       torch.tensor([[batch[i][1]] for i in g], device=device)) for g in groups]


@torch.no_grad()
def score(policy: Policy, minibatch: list[MicroBatch], cfg: GRPOConfig, several_steps: bool):
    """l_old (if the batch takes several optimiser steps) and l_ref (if beta > 0), before the first step."""
    for micro in minibatch:
        if several_steps:
            micro.old, _ = token_logps(policy.model, micro.ids, micro.mask, cfg.temperature)
        if cfg.beta:
            with policy.reference():
                micro.ref, _ = token_logps(policy.model, micro.ids, micro.mask, cfg.temperature)


def accumulate(policy: Policy, minibatch: list[MicroBatch], cfg: GRPOConfig, tokens: float, sequences: float):
    """This rank's gradients of an optimiser step: (sums over its loss tokens, rows that are not finite)."""
    policy.model.zero_grad(set_to_none=True)            # so that it can run again after a failure
    sums, bad = Counter(), []
    for micro in minibatch:
        logp, entropy = token_logps(policy.model, micro.ids, micro.mask, cfg.temperature)     # (B, T), (B, T)
        if cfg.epochs * cfg.minibatches == 1:
            micro.old = logp.detach()                   # the only step: l_old is this very forward pass
        normaliser = normalisers(cfg, micro.mask.sum(1, keepdim=True).float(), tokens, sequences)     # (B, 1)
        loss, stats = grpo_loss(logp, micro.old, micro.behaviour, micro.ref, micro.advantage, micro.mask, cfg,
                                normaliser)
        loss.backward()
        stats |= {"loss": loss.detach(), "entropy": entropy.sum(), "tokens": micro.mask.sum()}
        sums.update({name: value.item() for name, value in stats.items()})
        numbers = logp.detach() + micro.old + micro.behaviour + micro.advantage             # (B, T)
        numbers = numbers if micro.ref is None else numbers + micro.ref
        finite = (numbers.isfinite() | ~micro.mask).all(1).tolist()
        bad += [row for row, ok in zip(micro.rows, finite) if not ok]
    return sums, bad


def halving(run: Callable, minibatches: list[list[MicroBatch]], k: int, stats: UpdateStats):
    """run(minibatches[k]). After an out-of-memory it runs once more, with micro-batches of half the size, as
    all minibatches have from then on: what was too large once is not tried again."""
    try:
        return run(minibatches[k])
    except torch.OutOfMemoryError:
        stats.notes.append("out of memory in the update: tried again with micro-batches of half the size")
    torch.cuda.empty_cache()            # not in the except block, where the traceback still holds the tensors
    stats.token_budget //= 2
    minibatches[:] = [[half for micro in minibatch for half in micro.halves()] for minibatch in minibatches]
    return run(minibatches[k])


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, cfg: GRPOConfig,
           fresh: Sequence[bool] | None = None, seed: int = 0, progress=None) -> UpdateStats:
    """Train on a batch: cfg.epochs passes, each of cfg.minibatches optimiser steps.

    Under torch.distributed each rank brings its share of the batch, maybe none; the result is that of one
    process on the whole. fresh: which ones were just sampled (default: all). seed: of the split in
    minibatches. progress: a tqdm bar, one a trajectory and pass. An optimiser step with a number that is not
    finite is skipped, on all ranks, and noted.
    """
    stats, sums, parameters = UpdateStats(token_budget=cfg.token_budget), Counter(), policy.trainable()
    several_steps = cfg.epochs * cfg.minibatches > 1
    rows = [i for i, (trajectory, _) in enumerate(batch) if in_loss(trajectory)]
    random.Random(seed).shuffle(rows)
    minibatches = [micro_batches(batch, rows[k::cfg.minibatches], cfg.token_budget, policy.device)
                   for k in range(cfg.minibatches)]
    policy.model.train()                                # there is no dropout; it only turns checkpointing on
    for k in range(cfg.minibatches):
        halving(lambda m: score(policy, m, cfg, several_steps), minibatches, k, stats)
    for k in list(range(cfg.minibatches)) * cfg.epochs:
        masks = [micro.mask for micro in minibatches[k]]
        counts = {"tokens": sum(int(m.sum()) for m in masks), "sequences": sum(map(len, masks))}
        counts = total(counts, policy.device)
        if counts["tokens"] == 0:
            continue                                    # a step would only move Adam's momentum
        found, bad = halving(lambda m: accumulate(policy, m, cfg, **counts), minibatches, k, stats)
        if progress is not None:
            progress.update(sum(map(len, masks)))
        all_reduce_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
        if math.isfinite(norm) and not total({"bad": len(bad)}, policy.device)["bad"]:   # clamp hides a nan
            optimizer.step()
            sums.update(found)
            stats.optimiser_steps += 1
            stats.grad_norm = max(norm, stats.grad_norm or 0.0)
        else:
            names = ", ".join(f"{batch[i][0].task_id} sample {batch[i][0].sample}" for i in bad)
            stats.notes.append(f"optimiser step skipped: not finite is {names or 'the gradient'}")
    policy.model.zero_grad(set_to_none=True)
    policy.model.eval()
    fill(stats, sums, policy.device, cfg)
    compare(stats, sum(minibatches, []), fresh or [True] * len(batch), cfg)
    return stats


def fill(stats: UpdateStats, sums: Counter, device, cfg: GRPOConfig):
    """Sums over this rank's tokens to means over all ranks'."""
    names = ("loss", "kl", "entropy", "clipped", "off_policy", "tokens")
    sums = total({name: sums[name] for name in names}, device)
    if n := sums["tokens"]:
        stats.tokens, stats.loss = int(n), sums["loss"] / stats.optimiser_steps
        stats.entropy, stats.off_policy = sums["entropy"] / n, sums["off_policy"] / n
        stats.clip_fraction = sums["clipped"] / n
        stats.kl = sums["kl"] / n if cfg.beta else None


def compare(stats: UpdateStats, micro_batches: list[MicroBatch], fresh: Sequence[bool], cfg: GRPOConfig):
    """|l_old - l_behaviour| by trajectory (staleness, for the queue) and over fresh ones (trap 5)."""
    stats.off_policy_each = [0.0] * len(fresh)
    fresh_gaps = [torch.zeros(0)]
    for micro in micro_batches:
        for row, old, behaviour, mask in zip(micro.rows, micro.old, micro.behaviour, micro.mask):
            gap = (old - behaviour)[mask].abs().cpu()                                   # (N,)
            within = gap <= math.log(1 + cfg.clip_high)         # nan is not, so it leaves the queue
            stats.off_policy_each[row] = 1 - within.float().mean().item()
            fresh_gaps += [gap[gap.isfinite()]] * fresh[row]
    if len(gap := torch.cat(fresh_gaps)):
        stats.mismatch_mean = gap.mean().item()
        stats.mismatch_p99 = gap.sort().values[int(0.99 * (len(gap) - 1))].item()


def make_optimizer(policy: Policy, lr: float) -> torch.optim.Optimizer:
    """AdamW on the adapter; on a GPU with 8-bit states that move to main memory when the card is full."""
    if policy.device.type == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit
        return PagedAdamW8bit(policy.trainable(), lr=lr, weight_decay=0.0)
    return torch.optim.AdamW(policy.trainable(), lr=lr, weight_decay=0.0)


# ------------------------------------------------------------------------------------------ several processes
def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside of torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(values: dict[str, float], device) -> dict[str, float]:
    """Each value summed over all ranks."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist()))


def all_reduce_gradients(parameters: Sequence[torch.nn.Parameter]):
    """Sum the gradients of all ranks, in one message: the normaliser is that of the whole step already."""
    if world()[1] == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # None: no trajectory
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


# --------------------------------------------------------------------------------------------- early warnings
BOUNDS = (      # (metric, what is wrong about its mean over the last three steps, in words)
    ("exec_rate", lambda now, then: now < then / 2, "tool use collapses: code ran {then:.0%} -> {now:.0%}"),
    ("entropy", lambda now, then: now < then / 10, "entropy collapses: {then:.3f} -> {now:.3f}; lower lr"),
    ("kl", lambda now, then: now > 0.5, "KL to the reference is {now:.2f} a token; raise beta or lower lr"),
    ("clip_fraction", lambda now, then: now > 0.3, "{now:.0%} of tokens are clipped; lower lr"),
    ("mismatch_mean", lambda now, then: now > 0.05, "sampler and scorer differ by {now:.3f} a token"),
    ("signal_share", lambda now, then: now == 0, "no group has both right and wrong answers"),
)


def bad_signs(history: Sequence[dict]) -> dict[str, str]:
    """{metric: what is wrong}; now is the mean of its last three steps, then that of its first three."""
    found = {}
    for key, wrong, text in BOUNDS:
        values = [m[key] for m in history if m.get(key) is not None]
        then, now = sum(values[:3]) / 3, sum(values[-3:]) / 3
        if len(values) >= 3 and wrong(now, then):
            found[key] = text.format(now=now, then=then)
    return found


def warnings_for(history: Sequence[dict]) -> list[str]:
    """What a practitioner should hear after the last step of `history` (metrics): each warning when it
    begins."""
    before = bad_signs(history[:-1])
    return [text for key, text in bad_signs(history).items() if key not in before]
