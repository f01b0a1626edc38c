"""The update over several processes (gloo, CPU): N ranks with their shares equal one process with the whole batch."""
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grpo import GRPOConfig, update
from machinery.ranks import world
from test_grpo import Keep, make_batch, stirred
from test_policy import make_model
from test_prefix_tree import tree_batch

CASES = {  # what the two ranks bring, and the loss
    "uneven, dapo": "dapo", "uneven, grpo": "grpo", "uneven, dr_grpo": "dr_grpo", "one is empty": "dapo",
    "one is empty, one is cut": "dapo", "one has a nan": "dapo", "uneven, shared prefixes": "dapo",
}  # fmt: skip


def shares(batch, case):
    if case.startswith("uneven"):
        return [batch[:3], batch[3:]]
    if case == "one is empty":
        return [batch, []]
    if case == "one is empty, one is cut":
        return [[], [(replace(t, stop_reason="length"), a) for t, a in batch]]
    sick = [(replace(t, logps=[math.nan] * len(t.ids)), a) if i == 7 else (t, a) for i, (t, a) in enumerate(batch)]
    return [sick[:3], sick[3:]]


def run(folder, case, batch_of, plain=False):
    """(gradients, parameters afterwards, stats) of one update on a fresh policy."""
    policy = stirred(folder)
    optimizer = Keep(policy.trainable())
    cfg = GRPOConfig(loss=CASES[case], beta=0.05, token_budget=200)
    batch = tree_batch(policy, 0) if "shared" in case else make_batch(policy)
    stats = update(policy, optimizer, batch_of(shares(batch, case)), cfg, plain=plain)
    return optimizer.seen, policy.trainable(), stats


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert world() == (rank, 2)
    torch.save({case: run(folder, case, lambda s: s[rank]) for case in CASES}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder of the model, results of rank 0, of rank 1)."""
    folder = str(make_model(tmp_path_factory.mktemp("model")))
    mp.spawn(work, (folder,), nprocs=2)
    return folder, *(torch.load(f"{folder}/rank{r}.pt", weights_only=False) for r in (0, 1))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(ranks, case):
    folder, (grads, first, a), (_, second, b) = ranks[0], ranks[1][case], ranks[2][case]
    assert world() == (0, 1)
    whole_grads, whole, stats = run(folder, case, lambda s: s[0] + s[1], plain="shared" in case)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))  # the ranks never drift apart
    for x, y in zip(first, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert len(grads) == len(whole_grads) == (1 if case.startswith("uneven") or case == "one is empty" else 0)
    for x, y in zip(sum(grads, []), sum(whole_grads, []), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for name in ("loss", "kl", "entropy", "grad_norm", "clip_fraction", "off_policy", "tokens", "optimiser_steps"):
        expected = getattr(stats, name)
        assert getattr(a, name) == getattr(b, name)
        assert getattr(a, name) == (expected if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-6))
    if case == "one has a nan":  # skipped on both, named by the rank that has it
        assert "task1 sample 3" in b.notes[0] and "task1" not in a.notes[0]
