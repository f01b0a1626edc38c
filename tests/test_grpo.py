"""grpo.py: the equations against numbers made by hand and by slow loops, then the update that is built of them.

Traps of DESIGN.md section 4 that are guarded here: 1, 5, 6, 7, 8 (with test_policy.py) and 9.
"""
import copy
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import grpo
from grpo import LOSSES as TABLE, GRPOConfig, Group, group_advantages, grpo_loss, k3, token_logps, update
from machinery.console import warnings_for
from machinery.head import head_logps
from meter import LiveBytes
from policy import load_policy
from reward import Reward
from rollout import Trajectory
from test_policy import make_model, stir
from machinery.cli import UserError

LOSSES = ("dapo", "grpo", "dr_grpo")


# --------------------------------------------------------------------------------------------------------- advantages


def reward(answer, execution=0.0):
    total = None if answer is None else answer + 0.1 * execution
    return Reward(total, answer, execution, "heuristic", False, False)


def advantages(group, loss):
    """The advantages alone; None without signal."""
    found = group_advantages(group, GRPOConfig(loss=loss))
    return found and found[0]


def test_advantages_by_hand():
    # R = 1.1, 0.1, 0, 0: mean 0.3, deviations 0.8, -0.2, -0.3, -0.3, variance (0.64 + 0.04 + 0.09 + 0.09) / 4 = 0.215
    group = [reward(1.0, 1.0), reward(0.0, 1.0), reward(0.0), reward(0.0)]
    std = math.sqrt(0.215)
    assert advantages(group, "dapo") == pytest.approx([0.8 / std, -0.2 / std, -0.3 / std, -0.3 / std])
    assert advantages(group, "grpo") == advantages(group, "dapo")
    assert advantages(group, "dr_grpo") == pytest.approx([0.8, -0.2, -0.3, -0.3])
    assert group_advantages(group, GRPOConfig(std_floor=2.0)) == (
        pytest.approx([0.4, -0.1, -0.15, -0.15]), pytest.approx(std))


def test_a_small_deviation_is_not_blown_up():
    group = [reward(0.52), reward(0.5)]  # std 0.01
    assert advantages(group, "dapo") == pytest.approx([0.1, -0.1])


def test_only_answers_that_differ_are_signal():
    assert advantages([reward(0.0, 1.0), reward(0.0, 0.0)], "dapo") is None  # the bonus alone
    assert advantages([reward(1.0, 1.0), reward(1.0, 0.5)], "dapo") is None
    assert advantages([reward(1.0)], "dapo") is None  # trap 6: a group of one has no baseline
    assert advantages([reward(1.0), reward(None)], "dapo") is None
    assert advantages([], "dapo") is None


def test_failures_of_the_judge_take_no_part_and_failures_of_the_model_do():  # trap 6
    judged = advantages([reward(1.0), reward(0.0), reward(0.0)], "dr_grpo")
    with_failure = advantages([reward(1.0), reward(None), reward(0.0), reward(0.0)], "dr_grpo")
    assert with_failure == [judged[0], None, judged[1], judged[2]] and judged[0] == pytest.approx(2 / 3)


def test_a_group_gives_the_batch_what_was_judged_and_the_queue_what_was_better():
    group = Group("task", ["a", "b", "c", "d"], 0, advantages=[0.5, None, 0.0, -0.5])
    assert group.batch() == [("a", 0.5), ("c", 0.0), ("d", -0.5)]
    assert group.positive().batch() == [("a", 0.5)] and group.advantages == [0.5, None, 0.0, -0.5]


def test_the_settings_where_nothing_is_said():
    settings = {f.name: f for f in fields(GRPOConfig)}
    assert {name: f.default for name, f in settings.items()} == {
        "loss": "dapo", "beta": 1e-3, "epochs": 1, "minibatches": 1, "token_budget": 8192, "eps_low": None,
        "eps_high": None, "dual_clip": 3.0, "truncation": 2.0, "std_floor": 0.1, "max_grad_norm": 1.0}
    assert [name for name, f in settings.items() if f.metadata["zero"]] == ["beta"]    # all others are more than 0
    assert [name for name, f in settings.items() if f.metadata["flag"]] == [
        "loss", "beta", "epochs", "minibatches", "token_budget"]
    assert {name: GRPOConfig(loss=name).clip for name in LOSSES} == {
        "dapo": (0.2, 0.28), "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2)}
    assert GRPOConfig(eps_low=0.1, eps_high=0.5).clip == (0.1, 0.5)


def test_an_unknown_loss_is_refused():  # trap 11: it would silently be another one
    with pytest.raises(UserError, match="ppo.*dapo, grpo, dr_grpo"):
        GRPOConfig(loss="ppo")


# --------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_by_hand():
    """Two trajectories, A = 1 and A = -1; no KL; dapo: eps 0.2 / 0.28, dual clip 3, C = 2, N = 5 tokens.

    r        c     A    s = clipped r A                      -c s
    1.5      1     1    min(1.5, 1.28)            =  1.28    -1.28    the gain is cut at 1 + eps_high
    0.5      1     1    min(0.5, 0.8)             =  0.5     -0.5     a loss is not cut
    4        1    -1    max(min(-4, -1.28), -3)   = -3        3       dual clip
    1        2    -1    -1                                    2       pi_old / pi_behaviour = 5, cut at C = 2
    1        0.5  -1    -1                                    0.5
    """
    log = torch.tensor
    old = torch.full((2, 3), -2.0)
    ratio = torch.tensor([[1.5, 0.5, 9.0], [4.0, 1.0, 1.0]])
    weight = torch.tensor([[1.0, 1.0, 9.0], [1.0, 5.0, 0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantage, normaliser = log([[1.0], [-1.0]]), torch.full((2, 1), 5.0)
    loss, stats = grpo_loss(
        old + ratio.log(), old, old - weight.log(), None, advantage, mask, GRPOConfig(beta=0.0), normaliser
    )
    assert loss.item() == pytest.approx((-1.28 - 0.5 + 3 + 2 + 0.5) / 5)
    assert stats["clipped"] == 2 and stats["off_policy"] == 2 and stats["kl"] == 0


def test_the_edges_of_the_loss_by_hand():
    """One token each: l - l_old is cut at 20 and at -20; what counts as clipped."""
    def one(log_ratio, A, **settings):
        zero = torch.zeros(1, 1)
        cfg = GRPOConfig(beta=0.0, **settings)
        loss, stats = grpo_loss(zero + log_ratio, zero, zero, None, zero + A, zero == 0, cfg, zero + 1)
        return loss.item(), int(stats["clipped"])
    assert one(-25.0, 1.0) == (pytest.approx(-math.exp(-20)), 0)
    assert one(25.0, -1.0, dual_clip=1e12) == (pytest.approx(math.exp(20), rel=1e-5), 0)
    assert one(math.log(2), -1.0) == (pytest.approx(2), 0)             # between the clip and the dual clip
    assert one(math.log(0.5), -1.0) == (pytest.approx(0.8), 1)
    assert one(math.log(1.5), 1.0) == (pytest.approx(-1.28), 1)
    assert one(math.log(4), 0.0) == one(math.log(0.1), 0.0) == (0, 0)
    assert one(0.0, 1.0, eps_high=0.0) == (pytest.approx(-1), 0)       # at the bound: not clipped


def test_the_kl_by_hand():
    # pi = 0.5, ref = 0.25: d = -log 2, k = 0.5 + log 2 - 1; gradient 1 - exp(d) = 0.5.  With A = 0 only beta k remains.
    logp = torch.tensor([[math.log(0.5)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, stats = grpo_loss(
        logp, logp.detach(), logp.detach(), torch.tensor([[math.log(0.25)]]), 0 * one, one.bool(),
        GRPOConfig(beta=0.1), one,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * (0.5 + math.log(2) - 1))
    assert stats["kl"].item() == pytest.approx(0.5 + math.log(2) - 1)
    assert logp.grad.item() == pytest.approx(0.1 * 0.5)


def test_the_kl_continues_as_its_tangent_and_its_gradient_never_dies():
    d = torch.tensor([-40.0, -7.0, 0.0, 4.9, 5.0, 6.0, 40.0], dtype=torch.float64, requires_grad=True)
    k = k3(d)
    k.sum().backward()
    tangent = [math.exp(5) - 6 + (math.exp(5) - 1) * x for x in (1, 35)]
    expected = [math.exp(x) - x - 1 for x in (-40, -7, 0, 4.9, 5)] + tangent
    assert k.tolist() == pytest.approx(expected)
    slopes = [math.exp(x) - 1 for x in (-40, -7, 0, 4.9, 5, 5, 5)]
    assert d.grad.tolist() == pytest.approx(slopes) and k.isfinite().all()
    far = torch.tensor([1e4], requires_grad=True)
    k3(far).sum().backward()
    assert far.grad.item() == pytest.approx(math.exp(5) - 1)


def test_rloo_is_one_more_row(monkeypatch):
    """Leave-one-out: R_i minus the mean of the others is n / (n - 1) (R_i - mean). A row of the table is tested."""
    def leave_one_out(deviations, std):
        return [d * len(deviations) / (len(deviations) - 1) for d in deviations]
    monkeypatch.setitem(TABLE, "rloo", TABLE.get("rloo", TABLE["dr_grpo"]._replace(advantage=leave_one_out)))
    assert advantages([reward(1.0), reward(0.0), reward(0.0)], "rloo") == pytest.approx([1.0, -0.5, -0.5])


def slow_loss(l, old, behaviour, ref, advantage, mask, cfg, token_limit):
    """The same equations, token by token in Python, written from the papers; no line shared with grpo.py."""
    high = {"dapo": 0.28, "grpo": 0.2, "dr_grpo": 0.2}[cfg.loss]
    tokens = [sum(row) for row in mask.tolist()]
    total = torch.zeros((), dtype=l.dtype)
    for b in range(l.shape[0]):
        sequence = torch.zeros((), dtype=l.dtype)
        for t in range(l.shape[1]):
            if not mask[b, t]:
                continue
            a = advantage[b].item()
            ratio = torch.exp(l[b, t] - old[b, t])
            bounded = ratio if 0.8 <= ratio.item() <= 1 + high else torch.tensor(0.8 if ratio < 0.8 else 1 + high)
            objective = ratio * a if (ratio * a).item() <= (bounded * a).item() else bounded * a
            if a < 0 and objective.item() < 3 * a:
                objective = torch.tensor(3 * a, dtype=l.dtype)
            weight = min(math.exp(old[b, t].item() - behaviour[b, t].item()), 2.0)
            penalty = 0.0
            if ref is not None:
                gap = ref[b, t] - l[b, t]
                penalty = cfg.beta * (torch.exp(gap) - gap - 1)
            sequence = sequence - weight * (objective - penalty)
        total = total + (sequence / tokens[b] if cfg.loss == "grpo" else sequence)
    return total / {"dapo": sum(tokens), "grpo": l.shape[0], "dr_grpo": l.shape[0] * token_limit}[cfg.loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_loss_and_its_gradient_equal_a_slow_reference(loss, beta):
    cfg = GRPOConfig(loss=loss, beta=beta)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)

        def noise(scale, shape=(5, 9)):
            return torch.randn(shape, generator=g, dtype=torch.float64) * scale
        old = -noise(1.0).abs() - 0.1
        behaviour, ref, advantage = old + noise(0.6), old + noise(0.5) if beta else None, noise(1.0, (5, 1))
        mask = noise(1.0) > -0.3
        mask[:, 0] = True
        ours = (old + noise(0.8)).requires_grad_()
        slow = ours.detach().clone().requires_grad_()
        divisor = TABLE[loss].normaliser(mask.sum(1, keepdim=True).double(), mask.sum().item(), 5, 50)
        value, _ = grpo_loss(ours, old, behaviour, ref, advantage, mask, cfg, divisor)
        value.backward()
        expected = slow_loss(slow, old, behaviour, ref, advantage, mask, cfg, 50)
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-6, atol=1e-6)


def test_nothing_outside_of_the_mask_matters_not_even_nan():  # trap 1
    mask = torch.tensor([[False, True, False]])
    good, bad = torch.full((1, 3), -1.0), torch.full((1, 3), math.nan).masked_fill(mask, -1.0)
    one = torch.ones(1, 1)
    grads = []
    for x in (good, bad):
        logp = x.clone().requires_grad_()
        loss, stats = grpo_loss(logp, x, x, x, one, mask, GRPOConfig(), one)
        loss.backward()
        assert loss.item() == -1.0 and stats["kl"] == 0
        grads.append(logp.grad)
    assert torch.equal(*grads) and grads[0].count_nonzero() == 1


def test_on_policy_the_gradient_is_that_of_reinforce():
    logp = torch.randn(2, 4, dtype=torch.float64).requires_grad_()
    advantage, mask = torch.tensor([[2.0], [-1.0]], dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    loss, _ = grpo_loss(logp, logp, logp, None, advantage, mask, GRPOConfig(), torch.full((2, 1), 8.0))
    loss.backward()
    torch.testing.assert_close(logp.grad, (-advantage / 8).expand(2, 4))


# ---------------------------------------------------------------------------------------------------------- log-probs


@pytest.fixture(params=[True, False], ids=["plain", "tree"])
def plain(request):
    """Each update in both ways: padded, and every distinct prefix once."""
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {tied: str(make_model(root / str(tied), tied=tied)) for tied in (True, False)}


def stirred(folder, **options):
    policy = load_policy(folder, **options)
    stir(policy)
    return policy


def plain_logps(model, ids, temperature):
    """(B, T) log-probs and entropies from the full logits."""
    logp = (model(ids).logits[:, :-1].float() / temperature).log_softmax(-1)  # (B, T-1, V)
    chosen = logp.gather(-1, ids[:, 1:, None])[..., 0]
    pad = torch.nn.functional.pad
    return pad(chosen, (1, 0)), pad(-(logp.exp() * logp).sum(-1), (1, 0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_log_probs_and_gradients_equal_a_plain_forward(folders, tied, quantize, chunk):
    policy = stirred(folders[tied], quantize=quantize)
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(300, (3, 30), generator=g), torch.rand(3, 30, generator=g) < 0.5
    mask[:, 0] = False
    weight = torch.randn(3, 30, generator=g)
    results = []
    for ours in (True, False):
        policy.model.zero_grad()
        if ours:
            logp, entropy = token_logps(policy.model, ids, mask, 0.7, chunk)
        else:
            logp, entropy = plain_logps(policy.model, ids, 0.7)
        logp, entropy = torch.where(mask, logp, 0), torch.where(mask, entropy, 0)
        (logp * weight).sum().backward()
        results.append([logp, entropy, *(p.grad for p in policy.trainable())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_padding_is_invisible(folders):
    policy = stirred(folders[True])
    ids, mask = torch.randint(300, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    mask[:, 0] = mask[1, 12:] = False
    expected, _ = token_logps(policy.model, ids[1:, :12], mask[1:, :12])
    for filler in (0, 299):
        ids[1, 12:] = filler
        found, _ = token_logps(policy.model, ids, mask)
        torch.testing.assert_close(found[1:, :12], expected, rtol=1e-5, atol=1e-5)
        assert (found[1, 12:] == 0).all()


def test_no_more_than_a_chunk_of_logits_is_ever_alive(tmp_path):  # trap 7, forward and backward together
    policy = stirred(str(make_model(tmp_path, vocabulary=50_000)))
    ids, mask = torch.randint(300, (4, 65)), torch.ones(4, 65, dtype=torch.bool)
    all_logits = 4 * 64 * 50_000 * 4
    peaks = {}
    for name, run in {
        "chunked": lambda: token_logps(policy.model, ids, mask, chunk=8)[0],
        "naive": lambda: plain_logps(policy.model, ids, 1.0)[0],
    }.items():
        with LiveBytes([*policy.model.parameters(), *policy.model.buffers()]) as live:
            run().sum().backward()
        peaks[name] = live.peak
    assert peaks["naive"] > 2 * all_logits  # the meter sees what it should
    chunk = 8 * 50_000 * 4
    blocks = 4 * 64 * 2 * (32 * 64 + 18 * 128) * 4  # activations of the two blocks, generously
    assert peaks["chunked"] < 3 * chunk + blocks < all_logits / 2


def test_log_probs_in_bf16_are_normalised_in_fp32():  # trap 7: a logsumexp in bf16 is off by up to 0.07
    head = torch.nn.Linear(64, 30_000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    causal = SimpleNamespace(get_output_embeddings=lambda: head)
    states, targets = 8 * torch.randn(20, 64, dtype=torch.bfloat16), torch.randint(30_000, (20,))
    found, _ = head_logps(causal, states, targets, 1.0)
    exact = (states @ head.weight.T).double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- update


def make_batch(policy, n=12, seed=0, temperature=1.0):
    """n trajectories of random tokens, with the log-probs that the sampler would have recorded."""
    g = torch.Generator().manual_seed(seed)
    batch = []
    for i in range(n):
        length = int(torch.randint(12, 60, (1,), generator=g))
        ids = torch.randint(256, (1, length), generator=g)
        mask = torch.rand(1, length, generator=g) < 0.6
        mask[:, :4], mask[:, 4] = False, True
        with torch.no_grad():
            logps = torch.where(mask, plain_logps(policy.model, ids, temperature)[0], 0.0)
        batch.append((
            Trajectory(f"task{i // 4}", i % 4, 0, ids[0].tolist(), mask[0].int().tolist(), logps[0].tolist(), 4, [],
                       None, "answer", 0.0),
            float(torch.randn(1, generator=g)),
        ))  # fmt: skip
    return batch


class Keep(torch.optim.SGD):
    """Plain gradient descent that remembers the gradients of every step."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, lr=lr)
        self.seen = []

    def step(self):
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        super().step()


def run_update(folder, cfg, batch=None, **options):
    """(gradients of every optimiser step, stats, parameters afterwards) of one update on a fresh policy."""
    policy = stirred(folder)
    optimizer = Keep(policy.trainable())
    stats = update(policy, optimizer, make_batch(policy) if batch is None else batch, cfg, **options)
    return optimizer.seen, stats, policy.trainable()


@pytest.mark.parametrize("loss", LOSSES)
def test_any_split_in_micro_batches_gives_the_gradient_and_the_loss_of_the_whole(folders, loss):  # trap 9
    cfg = GRPOConfig(loss=loss, beta=0.05, max_grad_norm=1e9)
    results = [run_update(folders[True], replace(cfg, token_budget=budget)) for budget in (100_000, 150, 1)]
    for (grads,), stats, _ in results[1:]:
        for a, b in zip(grads, results[0][0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * results[0][1].grad_norm)
        for name in ("loss", "kl", "entropy", "grad_norm", "off_policy", "clip_fraction", "mismatch_mean"):
            assert getattr(stats, name) == pytest.approx(getattr(results[0][1], name), rel=1e-4, abs=1e-6), name


def test_the_update_equals_the_equations_on_one_padded_batch(folders):
    """The whole path, against the plain forward and the slow loss."""
    for loss in LOSSES:
        cfg = GRPOConfig(loss=loss, beta=0.05, max_grad_norm=1e9, token_budget=200)
        policy = stirred(folders[True])
        batch = make_batch(policy, temperature=0.8)
        (grads,), stats, _ = run_update(folders[True], cfg, batch, temperature=0.8, token_limit=70)
        reference = stirred(folders[True])
        width = max(len(t.ids) for t, _ in batch)

        def pad(rows):
            return torch.stack([torch.tensor(row + [0] * (width - len(row))) for row in rows])
        ids, mask = pad([t.ids for t, _ in batch]), pad([t.mask for t, _ in batch]).bool()
        logp, entropy = plain_logps(reference.model, ids, 0.8)
        with torch.no_grad(), reference.reference():
            ref, _ = plain_logps(reference.model, ids, 0.8)
        behaviour, advantage = pad([t.logps for t, _ in batch]), torch.tensor([[a] for _, a in batch])
        expected = slow_loss(logp, logp.detach(), behaviour, ref, advantage, mask, cfg, 70)
        expected.backward()
        assert stats.loss == pytest.approx(expected.item(), rel=1e-4)
        assert stats.entropy == pytest.approx(entropy[mask].mean().item(), rel=1e-5)  # over sampled tokens, not padding
        assert stats.tokens == mask.sum()
        for a, p in zip(grads, reference.trainable(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5 * stats.grad_norm)


def test_what_an_update_takes_where_nothing_is_said(folders):
    cfg = GRPOConfig(loss="dr_grpo", minibatches=3)
    silent, said, other = (run_update(folders[True], cfg, **options)[2] for options in (
        {}, {"temperature": 1.0, "token_limit": 1024, "seed": 0, "fresh": [True] * 12, "plain": False}, {"seed": 1}))
    assert all(torch.equal(a, b) for a, b in zip(silent, said, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(silent, other, strict=True))


def test_micro_batches_by_hand():
    sequences = [[0] * n for n in (2, 5, 3, 2)]
    assert grpo.pack_padded(sequences, 10) == [[1, 2], [0, 3]]          # 2 rows of 5, then 2 of 2
    assert grpo.pack_padded(sequences, 9) == [[1], [2, 0, 3]]           # 3 rows of 3
    assert grpo.pack_padded(sequences, 1) == [[1], [2], [0], [3]] and grpo.pack_padded([], 10) == []
    rows = torch.arange(5)[:, None]
    whole = grpo.MicroBatch([0, 1, 2, 3, 4], rows, rows, rows, rows)
    assert [half.rows for half in whole.halves()] == [[0, 1, 2], [3, 4]]
    assert [half.rows for half in whole.halves()[1].halves()] == [[3], [4]]
    assert [half.ids.tolist() for half in whole.halves()[1].halves()[0].halves()] == [[[3]]]


def test_one_thread_is_bit_equal(folders):
    cfg = GRPOConfig(minibatches=3, epochs=2)
    first, second = (run_update(folders[True], cfg, seed=5)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_observations_are_read_and_not_learned(folders):  # trap 1
    policy = stirred(folders[True])
    batch = make_batch(policy)
    nan_where_forced = [
        (replace(t, logps=[x if m else math.nan for x, m in zip(t.logps, t.mask)]), a) for t, a in batch
    ]
    _, stats, expected = run_update(folders[True], GRPOConfig(), batch)
    _, _, found = run_update(folders[True], GRPOConfig(), nan_where_forced)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert stats.tokens == sum(sum(t.mask) for t, _ in batch)


def test_what_was_cut_leaves_the_loss(folders):
    policy = stirred(folders[True])
    batch = make_batch(policy)
    for reason in ("length", "context_limit"):
        cut = [(replace(t, stop_reason=reason) if i in (2, 5) else t, a) for i, (t, a) in enumerate(batch)]
        kept = [pair for i, pair in enumerate(batch) if i not in (2, 5)]
        for loss in LOSSES:
            (cut_grads,), stats, _ = run_update(folders[True], GRPOConfig(loss=loss), cut)
            (kept_grads,), _, _ = run_update(folders[True], GRPOConfig(loss=loss), kept)
            assert all(torch.equal(a, b) for a, b in zip(cut_grads, kept_grads, strict=True))
            assert len(stats.off_policy_each) == 12
    out_of_turns = [(replace(t, stop_reason="turn_limit") if i in (2, 5) else t, a) for i, (t, a) in enumerate(batch)]
    (turn_limit_grads,), _, _ = run_update(folders[True], GRPOConfig(), out_of_turns)      # wrong, and learned from
    (all_grads,), _, _ = run_update(folders[True], GRPOConfig(), batch)
    assert all(torch.equal(a, b) for a, b in zip(turn_limit_grads, all_grads, strict=True))


def test_several_steps_share_one_l_old(folders):
    cfg = GRPOConfig(minibatches=3, epochs=2)
    with tqdm(disable=True) as bar:
        bar.update = (counted := []).append
        grads, stats, _ = run_update(folders[True], cfg, progress=bar)
    assert len(grads) == stats.optimiser_steps == 6 and sum(counted) == 2 * 12
    assert stats.tokens == 2 * run_update(folders[True], GRPOConfig())[1].tokens
    assert stats.clip_fraction > 0 and stats.mismatch_mean < 1e-5  # r moves away from 1; l_old does not move
    assert run_update(folders[True], GRPOConfig())[1].clip_fraction == 0  # one step: r is 1


def test_the_log_probs_of_chosen_trajectories_are_those_of_a_plain_forward(folders, plain):
    """Two epochs: l_old before the first step, l before the second, l_ref of the base; one number per token."""
    policy = stirred(folders[True])
    batch = make_batch(policy)
    batch[5] = (replace(batch[5][0], stop_reason="length"), batch[5][1])

    def forward(row):
        ids, mask = torch.tensor([batch[row][0].ids]), torch.tensor(batch[row][0].mask).bool()
        with torch.no_grad():
            return torch.where(mask, plain_logps(policy.model, ids, 0.7)[0][0], 0.0)
    before = {row: forward(row) for row in (0, 7)}
    with policy.reference():
        reference = {row: forward(row) for row in (0, 7)}
    two = GRPOConfig(epochs=2, token_budget=150)
    update(policy, Keep(policy.trainable()), batch, replace(two, epochs=1), temperature=0.7)
    between = {row: forward(row) for row in (0, 7)}
    assert (between[7] - before[7]).abs().max() > 1e-3
    for cfg, now in ((two, between), (replace(two, epochs=1, beta=0.0), before)):
        policy = stirred(folders[True])
        stats = update(policy, Keep(policy.trainable()), batch, cfg, temperature=0.7, plain=plain, show=[7, 0, 5])
        assert sorted(stats.shown) == [0, 7]                            # number 5 was cut: it is not in the loss
        for row, found in stats.shown.items():
            assert len(found.now) == len(batch[row][0].ids)
            torch.testing.assert_close(torch.tensor(found.now), now[row], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.tensor(found.old), before[row], rtol=1e-5, atol=1e-5)
            if cfg.beta:
                torch.testing.assert_close(torch.tensor(found.ref), reference[row], rtol=1e-5, atol=1e-5)
            else:
                assert found.ref is None and found.now == found.old
    assert not run_update(folders[True], GRPOConfig())[1].shown         # nobody asked


def test_each_optimiser_step_begins_with_no_gradient(folders):
    policy = stirred(folders[True])
    optimizer = Keep(policy.trainable(), lr=0.0)
    update(policy, optimizer, make_batch(policy), GRPOConfig(epochs=2))
    for first, second in zip(*optimizer.seen, strict=True):
        torch.testing.assert_close(first, second)


def test_sampler_and_scorer_are_compared_on_fresh_trajectories_only(folders):  # trap 5
    policy = stirred(folders[True])
    batch = make_batch(policy)
    _, stats, _ = run_update(folders[True], GRPOConfig(), batch)
    assert stats.mismatch_p99 < 1e-5 and stats.off_policy == 0
    _, stats, _ = run_update(folders[True], GRPOConfig(), batch, temperature=0.5)  # sampled at 1, scored at 0.5
    assert stats.mismatch_mean > 0.05 and stats.off_policy > 0.1
    stale = [(replace(t, logps=[x - 0.5 * m for x, m in zip(t.logps, t.mask)]), a) for t, a in batch[:4]] + batch[4:]
    _, stats, _ = run_update(folders[True], GRPOConfig(), stale, fresh=[False] * 4 + [True] * 8)
    assert stats.mismatch_p99 < 1e-5 and stats.off_policy_each == [1.0] * 4 + [0.0] * 8
    share = sum(sum(t.mask) for t, _ in batch[:4]) / sum(sum(t.mask) for t, _ in batch)
    assert stats.off_policy == pytest.approx(share)


def test_beta_0_makes_no_reference_pass(folders, monkeypatch):
    policy = stirred(folders[True])
    calls = []
    disable = policy.model.disable_adapter
    monkeypatch.setattr(policy.model, "disable_adapter", lambda: calls.append(1) or disable())
    batch = make_batch(policy)
    assert update(policy, Keep(policy.trainable()), batch, GRPOConfig(beta=0.0)).kl is None and not calls
    assert update(policy, Keep(policy.trainable()), batch, GRPOConfig(beta=0.01)).kl > 0 and calls


def test_a_nan_skips_the_step_and_names_the_trajectory(folders):
    policy = stirred(folders[True])
    batch = make_batch(policy)
    sick = copy.deepcopy(batch)
    sick[6][0].logps[4] = math.nan
    before = [p.clone() for p in policy.trainable()]
    optimizer = grpo.make_optimizer(policy, 1e-2)
    stats = update(policy, optimizer, sick, GRPOConfig())
    assert stats.optimiser_steps == 0 and stats.loss is None
    assert len(stats.notes) == 1 and "task1 sample 2" in stats.notes[0] and "task0" not in stats.notes[0]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable(), strict=True))
    assert not optimizer.state
    assert stats.off_policy_each[6] > 0 and stats.mismatch_mean < 1e-5  # so the queue drops it; no nan in the log
    assert update(policy, optimizer, batch, GRPOConfig()).optimiser_steps == 1


def test_an_infinite_gradient_skips_the_step_although_every_number_is_finite(folders):
    policy = stirred(folders[True])
    batch, optimizer = make_batch(policy), grpo.make_optimizer(policy, 1e-2)
    hook = policy.trainable()[0].register_hook(lambda gradient: gradient * math.inf)
    stats = update(policy, optimizer, batch, GRPOConfig())
    assert stats.optimiser_steps == 0 and stats.notes == ["optimiser step skipped: not finite is the gradient"]
    assert not optimizer.state
    hook.remove()
    assert update(policy, optimizer, batch, GRPOConfig()).optimiser_steps == 1


def test_a_nan_of_the_reference_is_named_and_one_outside_of_the_mask_is_not(folders, monkeypatch):
    policy = stirred(folders[True])
    batch = make_batch(policy)
    for t, _ in batch:
        t.logps[0] = math.nan  # forced: nobody reads it
    real, calls = grpo.token_logps, []

    def sick_reference(model, ids, *rest):
        calls.append(ids)
        logp, entropy = real(model, ids, *rest)
        return (logp * math.nan if len(calls) == 1 else logp), entropy
    monkeypatch.setattr(grpo, "token_logps", sick_reference)
    stats = update(policy, Keep(policy.trainable()), batch, GRPOConfig(token_budget=1), plain=True)
    longest = max((t for t, _ in batch), key=lambda t: len(t.ids))
    assert len(stats.notes) == 1 and stats.notes[0].endswith(f" is {longest.task_id} sample {longest.sample}")


@pytest.mark.parametrize("failing_call", [0, 4, 7, 9])  # of 6: scoring; then in the first and in the second step
def test_an_out_of_memory_is_tried_again_with_half_and_loses_nothing(folders, monkeypatch, failing_call, plain):
    cfg = GRPOConfig(minibatches=2, token_budget=130, beta=0.0)
    _, clean, expected = run_update(folders[True], cfg, plain=plain)
    name = "token_logps" if plain else "tree_logps"
    real, calls = getattr(grpo, name), []

    def fails_once(model, ids, *rest):
        calls.append(torch.is_grad_enabled())
        if len(calls) == failing_call + 1:
            raise torch.OutOfMemoryError("scripted: a CPU cannot be made to raise it")
        return real(model, ids, *rest)
    policy = stirred(folders[True])
    batch = make_batch(policy)
    monkeypatch.setattr(grpo, name, fails_once)
    stats = update(policy, Keep(policy.trainable()), batch, cfg, plain=plain)
    assert calls[failing_call] == (failing_call >= 6)
    assert len(stats.notes) == 1 and "memory" in stats.notes[0] and stats.token_budget == 65
    assert stats.optimiser_steps == 2 and stats.tokens == clean.tokens
    for a, b in zip(policy.trainable(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_out_of_memory_halves_all_minibatches_once(folders, monkeypatch):
    """On a card that really is too small, the second minibatch and the second pass must not fail again."""
    cfg = GRPOConfig(minibatches=3, epochs=2, token_budget=240)
    _, clean, expected = run_update(folders[True], cfg, plain=True)
    real, state = grpo.token_logps, torch.get_rng_state()

    def small_card(model, ids, *rest):
        if ids.numel() > 140:
            raise torch.OutOfMemoryError("scripted: a CPU cannot be made to raise it")
        return real(model, ids, *rest)
    policy = stirred(folders[True])
    optimizer = torch.optim.AdamW(policy.trainable(), lr=0.0)
    batch = make_batch(policy)
    monkeypatch.setattr(grpo, "token_logps", small_card)
    stats = update(policy, optimizer, batch, cfg, plain=True)
    assert len(stats.notes) == 1 and stats.token_budget == 120
    assert {int(values["step"]) for values in optimizer.state.values()} == {6} and stats.optimiser_steps == 6
    assert torch.equal(torch.get_rng_state(), state)
    stats = update(policy := stirred(folders[True]), Keep(policy.trainable()), batch, cfg, plain=True)
    for a, b in zip(policy.trainable(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in ("loss", "kl", "entropy", "grad_norm", "tokens", "optimiser_steps", "off_policy_each"):
        assert getattr(stats, name) == pytest.approx(getattr(clean, name), rel=1e-4, abs=1e-6), name


def test_a_second_out_of_memory_is_not_hidden(folders, monkeypatch, plain):
    def fails(*_):
        raise torch.OutOfMemoryError("scripted")
    policy = stirred(folders[True])
    batch = make_batch(policy)
    monkeypatch.setattr(grpo, "token_logps" if plain else "tree_logps", fails)
    with pytest.raises(torch.OutOfMemoryError):
        update(policy, Keep(policy.trainable()), batch, GRPOConfig(), plain=plain)


def test_an_empty_batch_moves_nothing(folders):
    policy = stirred(folders[True])
    cut = [(replace(t, stop_reason="length"), a) for t, a in make_batch(policy)]
    for batch in ([], cut):
        stats = update(policy, grpo.make_optimizer(policy, 1.0), batch, GRPOConfig(minibatches=2))
        assert stats.optimiser_steps == 0 and stats.loss is None and stats.off_policy_each == [0.0] * len(batch)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_was_good_becomes_likelier_and_what_was_bad_less_likely(folders, loss, quantize):
    policy = stirred(folders[True], quantize=quantize)
    good, bad = make_batch(policy, n=2)
    batch = [(good[0], 1.0), (bad[0], -1.0)]
    optimizer = grpo.make_optimizer(policy, 3e-3)
    for _ in range(5):
        stats = update(policy, optimizer, batch, GRPOConfig(loss=loss, minibatches=1, epochs=2))
    with torch.no_grad():
        for trajectory, advantage in batch:
            ids, mask = torch.tensor([trajectory.ids]), torch.tensor([trajectory.mask]).bool()
            now, _ = token_logps(policy.model, ids, mask)
            assert (now.sum() - sum(trajectory.logps)) * advantage > 0
    assert stats.kl > 0 and not policy.model.training


def test_gradient_checkpointing_changes_no_gradient(folders):
    policy, checkpointed = stirred(folders[True]), stirred(folders[True])
    checkpointed.model.activation_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(policy)
    optimizers = [Keep(p.trainable()) for p in (policy, checkpointed)]
    for p, optimizer in zip((policy, checkpointed), optimizers):
        update(p, optimizer, batch, GRPOConfig())
    for a, b in zip(optimizers[0].seen[0], optimizers[1].seen[0], strict=True):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------------------- early warnings


def metrics(**changes):
    healthy = {"exec_rate": 0.9, "entropy": 0.5, "kl": 0.01, "clip_fraction": 0.01, "mismatch_mean": 1e-3,
               "signal_share": 0.6}  # fmt: skip
    return healthy | changes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exec_rate": 0.3}, "tool use"), ({"entropy": 0.01}, "entropy"), ({"kl": 1.0}, "KL"),
        ({"clip_fraction": 0.5}, "clipped"), ({"mismatch_mean": 0.2}, "sampler and scorer"),
        ({"signal_share": 0.0}, "right and wrong"),
    ],
)  # fmt: skip
def test_each_warning_is_said_once_when_it_begins(change, words):
    start = [{"step": 0, "heldout_greedy": 0.3}]  # the evaluation before any update has none of these metrics
    history = start + [metrics() for _ in range(6)]
    assert warnings_for(history) == [] == warnings_for(start) == warnings_for([])
    said = []
    for _ in range(6):
        history.append(metrics(**change))
        said += warnings_for(history)
    assert len(said) == 1 and words in said[0]


def test_missing_metrics_raise_no_warning():
    assert warnings_for([metrics(kl=None, entropy=None)] * 5) == []
