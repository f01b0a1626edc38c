"""The memory plan: what a card of some GiB holds, before anything is loaded.

Owns `plan_memory` (for --vram). Read in this order: `memory`, `fit`, `plan_memory`.
"""
from dataclasses import dataclass

from machinery.cli import UserError
from policy import (
    LORA_R, QWEN25, head_size, in_nf4, linear_shapes, model_config, parameter_counts, preset_for)

GIB = 2**30


def memory(config, nf4: bool, slots: int, token_budget: int, context: int) -> dict:
    """{part: GiB (while sampling, in the update)} for a base in NF4 or bf16 and an adapter in fp32.

    The activations' factors were measured: a test compares them with the bytes that live in a real update.
    """
    linear, embeddings = parameter_counts(config)
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    blocks = config.num_hidden_layers
    # NF4 with double quantisation: 4 bits, for 64 weights an 8-bit scale, for 256 scales an fp32 one
    weights = linear * (0.5 + 1 / 64 + 4 / (64 * 256) if nf4 else 2) + 2 * embeddings
    adapter = blocks * LORA_R * sum(a + b for a, b in linear_shapes(config))
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
    token_budget: int               # padded tokens a micro-batch
    context_tokens: int
    parts: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        peak = tuple(sum(column) for column in zip(*self.parts.values()))
        rows = [f"{part:<38}{a:>9.2f}{b:>9.2f}" for part, (a, b) in (self.parts | {"peak": peak}).items()]
        chosen = (f"{self.slots} slots of {self.context_tokens} tokens of context, micro-batches of "
                  f"{self.token_budget} tokens")
        return "\n".join([f"{'memory plan, GiB':<38}{'sampling':>9}{'update':>9}", *rows, chosen])


def fit(model: str, room: float, quantize: str, context: int | None = None, slots: int | None = None,
        token_budget: int | None = None) -> Plan | None:
    """What is given stays; the rest is the longest context (the preset's, its half or quarter), then
    the most slots (one a trajectory of a step), then the most tokens. None if even the least does not fit."""
    config = model_config(model)
    parameters = sum(parameter_counts(config))
    nf4, preset = in_nf4(quantize, parameters, on_gpu=True), preset_for(parameters)

    def fits(slots, tokens, context):
        return max(map(sum, zip(*memory(config, nf4, slots, tokens, context).values()))) <= room
    for context in [context] if context else [preset.context_tokens // n for n in (1, 2, 4)]:
        least = max(token_budget or 0, context)             # a trajectory longer than the budget goes alone
        if fits(slots or 1, least, context):
            slots = slots or max(n for n in range(1, preset.groups * preset.group_size + 1)
                                 if fits(n, least, context))
            budget = token_budget or max(n for n in range(context, max(16384, context) + 1, 1024)
                                         if fits(slots, n, context))
            return Plan(slots, budget, context, memory(config, nf4, slots, max(budget, context), context))
    return None


def plan_memory(model: str, vram: float, quantize: str = "auto", **given) -> Plan:
    """How to use a card of `vram` GiB, of which 8 % stay free. given: the context, slots or token_budget that
    the user asks for; where it is None the plan chooses. UserError, saying what fits, if this does not."""
    room, given = 0.92 * vram, {name: value for name, value in given.items() if value}
    if plan := fit(model, room, quantize, **given):
        return plan
    others = [(model, quantize, {"context": given.get("context")}), (model, quantize, {}),
              *((other, "nf4", {}) for other in (model, *reversed(QWEN25)))]
    fitting = [f"{other} (--quantize {kind}) with {plan.slots} slots, a context of {plan.context_tokens} and "
               f"micro-batches of {plan.token_budget} tokens does"
               for other, kind, kept in others if (plan := fit(other, room, kind, **kept))]
    asked = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    raise UserError(f"{model} (--quantize {quantize}) with {asked or '2048 or more tokens of context'} does "
                    f"not fit {vram:g} GiB; {(fitting or ['no Qwen2.5 model does'])[0]}")
