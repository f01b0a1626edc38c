"""Layers with fewer calls and exact logits, while sampling.

LoRA: y = W x + (scale B) (A x). PEFT's own forward clones, casts, scales and adds in separate calls, in every linear
layer and for every token, which is most of the host's time per decoded token. Here A and scale * B are cast once per
rollout; the result is PEFT's up to rounding. The head: on a GPU in bf16 logits are rounded by up to 0.06; here they are
added and returned in fp32. `fast_layers` swaps the forwards and restores them on leaving, also after Ctrl-C.
"""
import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from peft.tuners.lora import LoraLayer

from machinery.head import exact_logits


@contextlib.contextmanager
def fast_layers(model) -> Iterator[None]:
    """Inside, and without gradients, the LoRA layers and the head of `model` compute the forwards of this file."""
    swapped, head = [], model.get_output_embeddings()
    try:
        for layer in model.modules():
            forward = fused_forward(layer) if isinstance(layer, LoraLayer) else None
            if layer is head and head.bias is None and head.weight.is_cuda:
                forward = partial(exact_logits, weight=head.weight)
            if forward is not None:
                layer.forward = forward             # on the instance: it hides the class's own
                swapped.append(layer)
        yield
    finally:
        for layer in swapped:
            del layer.forward


def fused_forward(layer) -> Callable | None:
    """The forward of one layer with its adapter as it is now; None for a kind of LoRA that is not plain."""
    base = layer.get_base_layer()
    if layer.disable_adapters:                      # the reference policy
        return base.forward
    name, = layer.active_adapters
    plain = (isinstance(base, torch.nn.Linear) and not layer.merged and name in layer.lora_A
             and not layer.use_dora.get(name, False) and not layer.lora_bias.get(name, False))
    if not plain:
        return None
    kind = getattr(base, "compute_dtype", None) or base.weight.dtype    # of NF4 layers, else the weight's
    a = layer.lora_A[name].weight.T.to(kind)                                        # (in, r)
    b = (layer.lora_B[name].weight.T * layer.scaling[name]).to(kind)                # (r, out)

    def forward(x: torch.Tensor) -> torch.Tensor:                                   # (..., in) -> (..., out)
        y = base(x)
        rows = x.reshape(-1, x.shape[-1]).to(kind)                                  # (n, in)
        y.view(-1, y.shape[-1]).addmm_(rows @ a, b)
        return y
    return forward
