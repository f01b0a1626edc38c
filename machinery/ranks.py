"""Several processes under torchrun: who they are, what they add up, how they end.

Owns every call of torch.distributed. In a single process `rank` is 0, `size` is 1, and nothing is sent.
"""
import os
import sys
import traceback
from collections.abc import Sequence

import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside of torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join() -> None:
    """Under torchrun: give each process its own GPU, and connect them. Gradients travel by nccl, objects by gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)


def leave(status: int) -> None:
    """End this process's part. After a failure (status not 0) one of several processes ends at once: taking leave in
    order would wait for peers that wait in a collective for this one. torchrun then ends them."""
    if not dist.is_initialized():
        return
    if status == 0:
        dist.destroy_process_group()
        return
    if sys.exc_info()[0] is not None:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def everyone(value) -> list:
    """`value` of every rank, in the order of ranks."""
    values = [value] * world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank has come here."""
    everyone(None)


def sum_over_ranks(values: dict[str, float], device) -> dict[str, float]:
    """Each value summed over all ranks."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist()))


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of all ranks in one message. The loss is divided by the whole step's N already."""
    if world()[1] == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]     # None: no trajectory
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
