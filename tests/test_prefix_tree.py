"""machinery/prefix_tree.py: the tree itself, and that nothing but the time changes against the padded definition."""
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo import GRPOConfig, token_logps, update
from machinery.engine import attention
from meter import LiveBytes
from machinery.prefix_tree import cut_long, make_tree, pack, prefix_tree, tree_logps
from policy import Policy, Preset, new_adapter
from rollout import Trajectory
from test_grpo import Keep, stirred
from test_policy import make_model

# Few tokens, so that prefixes are shared in every way: identical, one inside another, nothing in common.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=40), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model")))


def exact(folder, **options):
    """The small model in float64, with an adapter that does something. Its norms compute in float32 otherwise."""
    policy = stirred(folder, dtype=torch.float64, **options)
    policy.model.double()
    for module in policy.model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":
            module.forward = lambda x, m=module: torch.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    return policy


# ------------------------------------------------------------------------------------------------------- the tree
@given(SEQUENCES, st.integers(1, 12), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_every_token_of_every_sequence_lies_in_one_segment_of_its_path(sequences, shortest, longest):
    segments = cut_long(prefix_tree(sequences, shortest), longest)
    assert all(s.end - s.start <= longest for s in segments if s.parent is not None)
    for i, sequence in enumerate(sequences):
        mine = [s for s in segments if i in s.members]
        assert [t for s in mine for t in sequences[s.members[0]][s.start:s.end]] == sequence
        for before, after in zip([None, *mine], mine):
            parent = None if after.parent is None else segments[after.parent]
            assert parent is before and after.start == (before.end if before else 0)
    for i, segment in enumerate(segments):
        assert segment.parent is None or segment.parent < i        # parents first
    distinct = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    tokens = sum(s.end - s.start for s in segments)
    if shortest == 1:
        assert tokens == len(distinct)                              # each distinct prefix once
    assert len(distinct) <= tokens <= sum(map(len, sequences))


def test_a_tree_by_hand():
    """A prompt, two first turns, one of them with two observations."""
    prompt, a, b, c, d = [1] * 10, [2] * 9, [3] * 9, [4] * 3, [5] * 8
    segments = prefix_tree([prompt + a + c, prompt + b, prompt + a + d, prompt + b])
    found = [(sorted(s.members), s.start, s.end, s.parent) for s in segments]
    assert sorted(found) == [([0], 19, 22, 1 if found[1][1:3] == (10, 19) and 0 in found[1][0] else 2),
                             ([0, 1, 2, 3], 0, 10, None), ([0, 2], 10, 19, 0), ([1, 3], 10, 19, 0),
                             ([2], 19, 27, next(i for i, s in enumerate(found) if s[0] == [0, 2]))]


@given(SEQUENCES, st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_parts_keep_the_budget_of_tree_tokens(sequences, budget):
    parts = pack(sequences, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(sequences)))
    for part in parts:
        prefixes = {tuple(sequences[i][:n]) for i in part for n in range(1, len(sequences[i]) + 1)}
        assert len(part) == 1 or len(prefixes) <= budget


# ------------------------------------------------------------------------------------------- log-probs, gradients
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_log_probs_entropies_and_gradients_equal_the_padded_ones(folder, dtype, bound):
    policy = exact(folder) if dtype == torch.float64 else stirred(folder)
    assert policy.model.config.num_attention_heads == 2 * policy.model.config.num_key_value_heads

    @given(SEQUENCES, st.integers(0, 2**32), st.integers(1, 9), st.integers(3, 50))
    @settings(max_examples=40, deadline=None)
    def check(sequences, seed, shortest, longest):
        g = torch.Generator().manual_seed(seed)
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        mask = torch.rand(ids.shape, generator=g) < 0.6
        for i, s in enumerate(sequences):
            mask[i, len(s):] = False
        mask[:, 0], mask[0, 1] = False, True
        weight = torch.randn(ids.shape, generator=g, dtype=dtype)
        results = []
        for way in ("padded", "tree"):
            policy.model.zero_grad()
            tree = make_tree(sequences, ids.device, width, shortest, longest)
            with attention(policy.model, "prefix_tree"):
                if way == "tree":
                    logp, entropy = tree_logps(policy.model, tree, mask, 0.7)
                    (logp * weight).sum().backward()
            if way == "padded":
                logp, entropy = token_logps(policy.model, ids, mask, 0.7)
                (logp * weight).sum().backward()
            results.append([logp.detach(), entropy.detach(), *(p.grad.clone() for p in policy.trainable())])
        scale = max(p.abs().max().item() for p in results[0][2:])
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound * (scale if i > 1 else 1.0))
    check()


# -------------------------------------------------------------------------------------------------- whole updates
def tree_batch(policy, seed: int):
    """Groups as rollouts make them: a common system prompt, questions, shared first turns, identical siblings, one
    inside another, overlong ones, a replayed group (another seed, older log-probs) and one of its own."""
    rng, batch = random.Random(seed), []

    def tokens(n):
        return [rng.randrange(3, 250) for _ in range(n)]
    system = tokens(20)
    for group in range(4):
        prompt = system + tokens(rng.randint(3, 9)) if group < 3 else tokens(15)
        turns = [tokens(rng.randint(4, 14)) for _ in range(2)]
        siblings = [prompt + rng.choice(turns) for _ in range(4)]
        siblings[1] = siblings[0] + tokens(4) + tokens(6)
        siblings[3] = list(siblings[2])
        for i, ids in enumerate(siblings):
            mask = [0] * len(prompt) + [int(rng.random() < 0.7) for _ in ids[len(prompt):]]
            mask[len(prompt)] = 1
            stop = "length" if (group, i) == (1, 0) else "answer"
            t = Trajectory(f"task{group}", i, int(group == 2), ids, mask, [], len(prompt), [], None, stop, 0.0)
            batch.append((t, rng.gauss(0, 1)))
    for t, _ in batch:
        ids, mask = torch.tensor([t.ids]), torch.tensor([t.mask]).bool()
        with torch.no_grad():
            logp, _ = token_logps(policy.model, ids, mask)
        t.logps[:] = (logp[0] - 0.3 * mask[0] * (t.seed == 1)).tolist()
    return batch


CASES = {
    "one step": {}, "grpo": {"loss": "grpo"}, "dr_grpo": {"loss": "dr_grpo"}, "small budget": {"token_budget": 40},
    "each alone": {"token_budget": 1}, "minibatches": {"minibatches": 3}, "two epochs": {"epochs": 2, "minibatches": 2},
    "no reference": {"beta": 0.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["float64", "float32", "nf4", "checkpointed"])
def test_an_update_equals_the_padded_update(folder, case, kind):
    cfg = replace(GRPOConfig(beta=0.05, max_grad_norm=1e9), **CASES[case])
    bound = 1e-9 if kind == "float64" else 1e-5
    results = []
    for plain in (True, False):
        policy = exact(folder) if kind == "float64" else stirred(folder, quantize="nf4" if kind == "nf4" else "none")
        if kind == "checkpointed":
            policy.model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = Keep(policy.trainable(), lr=1e-3)
        stats = update(policy, optimizer, tree_batch(policy, 0), cfg, plain=plain, seed=3)
        results.append((optimizer.seen, stats))
    (expected, old), (found, new) = results
    assert len(found) == len(expected) == cfg.epochs * cfg.minibatches
    for one, two in zip(expected, found):
        scale = max(g.abs().max().item() for g in one)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=10 * bound * scale)
    for name in ("loss", "kl", "entropy", "clip_fraction", "off_policy", "grad_norm", "tokens", "off_policy_each"):
        a, b = getattr(old, name), getattr(new, name)
        assert a == b or a == pytest.approx(b, rel=10 * bound, abs=10 * bound), name


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_updates_over_random_trees_equal_the_padded_ones(folder, dtype, bound):
    """Identical siblings, one inside another, nothing in common, dropped and replayed ones, in every mixture."""
    policy = exact(folder) if dtype == torch.float64 else stirred(folder)
    start = [p.detach().clone() for p in policy.trainable()]

    @given(SEQUENCES, st.integers(0, 2**32), st.sampled_from(sorted(CASES)))
    @settings(max_examples=25, deadline=None)
    def check(sequences, seed, case):
        cfg, rng, batch = replace(GRPOConfig(beta=0.05, max_grad_norm=1e9), **CASES[case]), random.Random(seed), []
        for i, ids in enumerate(sequences):
            mask = [0, 1] + [int(rng.random() < 0.6) for _ in ids[2:]]
            logps = [-rng.uniform(3, 7) * m for m in mask]
            stop = rng.choice(["answer", "answer", "answer", "length"])
            t = Trajectory(f"task{i // 3}", i, i % 2, ids, mask, logps, 1, [], None, stop, 0.0)
            batch += [(t, rng.gauss(0, 1))] if rng.random() < 0.9 else []
        seen = []
        for plain in (True, False):
            with torch.no_grad():
                for p, value in zip(policy.trainable(), start):
                    p.copy_(value)
            optimizer = Keep(policy.trainable(), lr=1e-3)
            stats = update(policy, optimizer, batch, cfg, plain=plain, seed=seed)
            numbers = [stats.loss or 0.0, stats.kl or 0.0, stats.entropy or 0.0, *stats.off_policy_each]
            seen.append([torch.tensor(numbers), *sum(optimizer.seen, [])])
        scale = max([g.abs().max().item() for g in seen[0][1:]], default=1.0)
        for i, (a, b) in enumerate(zip(*seen, strict=True)):
            torch.testing.assert_close(a, b, rtol=max(bound, 1e-6 * (i == 0)), atol=10 * bound * (scale if i else 1.0))
    check()


@pytest.mark.parametrize("lengths, common", [([1500], 0), ([1500, 1400], 200), ([900] * 3, 500)])
def test_long_trajectories_take_no_more_memory_than_padded(lengths, common):
    """A mask of a segment times its depth, per query head, would be the largest tensor of the update."""
    config = Qwen2Config(hidden_size=512, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
                         intermediate_size=1024, vocab_size=256)
    network = new_adapter(Qwen2ForCausalLM(config).requires_grad_(False))
    network.activation_checkpointing_enable({"use_reentrant": False})
    policy, rng, batch = Policy(network, None, network.device, "random weights", Preset()), random.Random(0), []
    begin = [rng.randrange(256) for _ in range(common)]
    for i, n in enumerate(lengths):
        ids, mask = begin + [rng.randrange(256) for _ in range(n - common)], [0] * (n - 100) + [1] * 100
        logps = [-5.5 * m for m in mask]
        batch.append((Trajectory("task", i, 0, ids, mask, logps, common, [], None, "answer", 0.0), 1.0))
    peaks = []
    for plain in (True, False):
        with LiveBytes([*network.parameters(), *network.buffers()]) as live:
            update(policy, Keep(policy.trainable(), lr=0.0), batch, GRPOConfig(token_budget=10**6), plain=plain)
        peaks.append(live.peak)
    assert peaks[1] < 1.15 * peaks[0]


def test_siblings_stay_in_one_minibatch(folder):
    from grpo import split_groups
    policy = stirred(folder)
    batch = tree_batch(policy, 0)
    parts = split_groups(batch, 3, seed=1)
    places = {}
    for k, rows in enumerate(parts):
        for row in rows:
            places.setdefault((batch[row][0].task_id, batch[row][0].seed), set()).add(k)
    assert all(len(found) == 1 for found in places.values()) and len(places) == 4
    assert sum(map(len, parts)) == 15                               # without the overlong one
