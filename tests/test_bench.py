"""scripts/bench.py, scripts/bench_step.py: what a benchmark measures is what it says."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import grpo
from scripts.bench import WORKLOADS, built_in_batch, host_time, works_by_slots
from scripts.bench_step import WORKLOADS as STEPS
from scripted import scripted

ROOT = Path(__file__).resolve().parent.parent


def test_a_real_shape_on_a_gpu_is_not_sampled_with_one_slot():
    """Many trajectories in few slots of a 7B model would take a quarter of an hour."""
    work = WORKLOADS["w", False]
    on_gpu = works_by_slots(work, True, "Qwen2.5-7B")
    assert list(on_gpu) == [8, 34, 64] and all(8 * some.groups <= 2 * n for n, some in on_gpu.items())
    assert works_by_slots(work, False, "small") == {32: work, 64: work}


def test_the_hosts_time_is_measured_in_both_ways():
    found = host_time()
    assert list(found) == ["host_ms_peft", "host_ms_fast"] and all(0 < ms < 1000 for ms in found.values())


@pytest.mark.parametrize("turns", STEPS)
def test_each_side_of_a_step_samples_what_the_workload_says(turns):
    """TRL's in the environments that have it."""
    sides, sampled = ["ours"], sum(sum(episode.lengths) for episode in scripted(STEPS[turns], 512))
    if importlib.util.find_spec("trl"):
        sides.append("TRL")
    for side in sides:
        command = [sys.executable, "-m", "scripts.bench", "step", "--quick", "--turns", str(turns), "--side", side]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["sampled"] == sampled and found["seconds"] > 0 and found["gib"] > 0.1


def test_groups_of_a_step_share_the_system_prompt_and_siblings_the_question():
    for work in STEPS.values():
        prompts = [episode.prompt for episode in scripted(work, 512)]
        assert all(prompt[:work.system] == prompts[0][:work.system] for prompt in prompts)
        assert prompts[0] == prompts[7] != prompts[8] and len(prompts[8]) == work.prompt


def test_trajectories_of_the_built_in_model_share_most_of_their_tokens():
    """What the update computes once: at most a quarter of what it computes with padding."""
    policy, batch = built_in_batch()
    rows = [i for i, (trajectory, _) in enumerate(batch) if grpo.in_loss(trajectory)]
    padded = sum(micro.ids.numel() for micro in grpo.micro_batches(batch, rows, 2048, policy.device))
    tree = sum(len(micro.tree.ids) for micro in grpo.micro_batches(batch, rows, 2048, policy.device, trees=True))
    assert len(rows) > 80 and 4 * tree < padded
