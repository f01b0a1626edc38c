"""The memory plan: what a card of some GiB holds, before anything is loaded; `halving`, where memory still runs out.

Owns `plan_memory` (for --vram). Read in this order: `memory`, `fit`, `plan_memory`, `halving`.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from machinery.cli import UserError
from machinery.ranks import world
from policy import LORA_RANK, QWEN25, head_size, in_nf4, linear_shapes, model_config, need_gpu, parameter_counts

GIB = 2**30
CONTEXTS = (8192, 4096, 2048)   # tokens, tried in this order
MOST_TOKENS = 16384             # of a micro-batch: more is not faster


def memory(config, nf4: bool, slots: int, token_budget: int, context: int, lora_rank: int = LORA_RANK) -> dict:
    """{part: GiB (while sampling, in the update)} for a base in NF4 or bf16 and an adapter in fp32.

    The activations' factors were measured: a test compares them with the bytes that live in a real update.
    """
    linear, embeddings = parameter_counts(config)
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    blocks = config.num_hidden_layers
    # NF4 with double quantisation: 4 bits, for 64 weights an 8-bit scale, for 256 scales an fp32 one
    weights = linear * (0.5 + 1 / 64 + 4 / (64 * 256) if nf4 else 2) + 2 * embeddings
    adapter = blocks * lora_rank * sum(a + b for a, b in linear_shapes(config))
    cache = slots * context * blocks * 2 * config.num_key_value_heads * head_size(config) * 2
    one_matrix = 2 * h * i if nf4 else 0                        # dequantised for its product
    sampling = (1024 + slots) * 12 * i + slots * v * 24 + one_matrix       # a chunk of prompt, fp64 sums of p
    kept = token_budget * blocks * 2 * h                        # the input of every block
    block = token_budget * (32 * h + 18 * i) + one_matrix       # one block computed again, and its gradients
    head = min(2**26, token_budget * v) * 8 + token_budget * 8 * h  # 2 chunks of logits; 2 hidden states
    parts = {"weights": (weights, weights),
             "adapter, gradients, 8-bit optimiser": (adapter * 6, adapter * 10),
             "runtime: CUDA context, fragmentation": (1.3 * GIB, 1.3 * GIB),
             "cache of keys and values": (cache, 0),
             "activations": (sampling, kept + max(block, head))}
    return {part: (a / GIB, b / GIB) for part, (a, b) in parts.items()}


@dataclass(frozen=True)
class Plan:
    slots: int                      # trajectories decoded at once
    token_budget: int               # tokens per micro-batch, each distinct prefix once
    context_tokens: int
    parts: dict[str, tuple[float, float]]

    @property
    def chosen(self) -> str:
        return (f"{self.slots} slots of {self.context_tokens} tokens of context, micro-batches of "
                f"{self.token_budget} tokens")

    @property
    def peaks(self) -> tuple[float, float]:
        """GiB, while sampling and in the update"""
        return tuple(sum(column) for column in zip(*self.parts.values()))

    def __str__(self) -> str:
        rows = [f"{part:<38}{a:>9.2f}{b:>9.2f}" for part, (a, b) in (self.parts | {"peak": self.peaks}).items()]
        return "\n".join([f"{'memory plan, GiB':<38}{'sampling':>9}{'update':>9}", *rows, self.chosen])


def fit(model: str, room: float, quantize: str, context: int | None = None, slots: int | None = None,
        token_budget: int | None = None, most_slots: int = 64, lora_rank: int = LORA_RANK) -> Plan | None:
    """A plan below `room` GiB, None if there is none. Context, slots and token budget stay where they are given;
    else they are the longest of CONTEXTS, then the most slots up to `most_slots`, then the most tokens."""
    config = model_config(model)
    nf4 = in_nf4(quantize, sum(parameter_counts(config)), on_gpu=True)

    def parts(slots, tokens, context):
        return memory(config, nf4, slots, tokens, context, lora_rank)

    def fits(slots, tokens, context):
        return max(map(sum, zip(*parts(slots, tokens, context).values()))) <= room
    for tokens in [context] if context else CONTEXTS:
        least = max(token_budget or 0, tokens)              # a trajectory longer than the budget goes alone
        if fits(slots or 1, least, tokens):
            slots = slots or max(n for n in range(1, most_slots + 1) if fits(n, least, tokens))
            budgets = range(tokens, max(MOST_TOKENS, tokens) + 1, 1024)
            budget = token_budget or max(n for n in budgets if fits(slots, n, tokens))
            return Plan(slots, budget, tokens, parts(slots, max(budget, tokens), tokens))
    return None


def plan_memory(model: str, vram: float, quantize: str = "auto", most_slots: int = 64, lora_rank: int = LORA_RANK,
                **given) -> Plan:
    """How to use a card of `vram` GiB, of which 8 % stay free. given: the context, slots or token_budget that
    the user asks for; where one is None the plan chooses. UserError, naming what would fit, if this does not."""
    room, given = 0.92 * vram, {name: value for name, value in given.items() if value}
    if plan := fit(model, room, quantize, most_slots=most_slots, lora_rank=lora_rank, **given):
        return plan
    others = [(model, quantize, {"context": given.get("context")}), (model, quantize, {}),
              *((other, "nf4", {}) for other in (model, *reversed(QWEN25)))]
    plans = ((other, kind, fit(other, room, kind, **kept)) for other, kind, kept in others)
    alternative = next((f"{other} (--quantize {kind}) with {plan.slots} slots, a context of {plan.context_tokens} "
                        f"and micro-batches of {plan.token_budget} tokens does" for other, kind, plan in plans if plan),
                       "no Qwen2.5 model does")
    asked = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    raise UserError(f"{model} (--quantize {quantize}) with {asked or '2048 or more tokens of context'} does "
                    f"not fit {vram:g} GiB; {alternative}")


def planned(cfg, vram: float, fixed: set[str]) -> Plan:
    """The plan of a run on a card of `vram` GiB; the settings in `fixed` stay as they are."""
    given = {name: getattr(cfg, name) for name in ("slots", "token_budget") if name in fixed}
    if "context_tokens" in fixed:
        given["context"] = cfg.context_tokens
    trajectories = (cfg.online_groups or cfg.groups) * cfg.group_size
    return plan_memory(cfg.model, vram, cfg.quantize, trajectories, cfg.lora_rank, **given)


def apply_plan(cfg, settled: set[str]):
    """With --vram: context, slots and token budget that fit the card, where they are not settled."""
    if cfg.vram is None:
        return
    plan = planned(cfg, cfg.vram, settled)
    cfg.context_tokens, cfg.slots, cfg.token_budget = plan.context_tokens, plan.slots, plan.token_budget
    if world()[0] == 0:
        print(plan)
    need_gpu(f"--vram {cfg.vram:g} plans for a GPU")


def halving(work: Callable, minibatches: list[list], k: int, stats):
    """work(minibatches[k]). After an out-of-memory it is done once more, with micro-batches of half the size, which
    all minibatches have from then on: what was too large once is not tried again."""
    try:
        return work(minibatches[k])
    except torch.OutOfMemoryError:
        stats.notes.append("out of memory in the update: tried again with micro-batches of half the size")
    torch.cuda.empty_cache()            # not in the except block, where the traceback still holds the tensors
    stats.token_budget //= 2
    minibatches[:] = [[half for micro in minibatch for half in micro.halves()] for minibatch in minibatches]
    return work(minibatches[k])
