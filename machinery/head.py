"""Logits in fp32, and the log-probs of chosen tokens without keeping their logits (152,064 of them for Qwen2.5)."""
import torch


def exact_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(..., H), (V, H) -> (..., V) in fp32 at least. In bf16 logits of 16 to 32 would be rounded by up to 0.06."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        rows = torch.mm(hidden.reshape(-1, hidden.shape[-1]), weight.T, out_dtype=torch.float32)    # (n, V)
        return rows.view(*hidden.shape[:-1], -1)
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


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
            logp = exact_logits(h, weight).div_(temperature).log_softmax(-1)            # (n, V)
            p = logp.exp()
            logps.append(logp.gather(1, y[:, None])[:, 0])
            entropies.append(-logp.mul_(p).sum(-1))             # in place: a chunk is large
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


def head_logps(causal, states: torch.Tensor, targets: torch.Tensor, temperature: float, chunk: int | None = None):
    """(log-probs, entropies) of the targets (N,), given the hidden states (N, H) before them: both (N,).

    causal: the language model without its PEFT wrapping. chunk: positions whose logits exist at one time.
    """
    head = causal.get_output_embeddings()
    assert not head.weight.requires_grad and head.bias is None, "HeadLogps has no gradient for the head"
    chunk = chunk or max(1, 2**26 // len(head.weight))          # 256 MiB of logits
    return HeadLogps.apply(states, head.weight, targets, temperature, chunk)
