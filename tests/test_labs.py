"""LABS.md: its commands run, the lines that it changes exist, its figures are those of results/labs.jsonl."""
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from grpo import LOSSES, GRPOConfig
from reward import Reward
from tests import lab_losses, labs

ROOT = Path(__file__).resolve().parent.parent
TEXT, ARMS = labs.sections(), labs.arms()
EDITS = {lab: labs.edits("".join(labs.blocks(text, "diff"))) for lab, text in TEXT.items()}


def patched(monkeypatch, lab: int, file: str) -> types.ModuleType:
    """The file as a module, with the lab's change."""
    source = (ROOT / file).read_text()
    for edit in EDITS[lab]:
        if edit.file == file:
            source = source.replace(edit.old + "\n", edit.new + "\n")
    module = types.ModuleType("patched")
    monkeypatch.setitem(sys.modules, "patched", module)         # dataclasses look their module up
    exec(compile(source, file, "exec"), vars(module))
    return module


# ------------------------------------------------------------------------------------------- what the page says
def test_each_line_to_change_is_in_its_file_once_and_few_are_typed():
    for lab in range(1, 6):
        assert EDITS[lab], lab
        for edit in EDITS[lab]:
            assert (ROOT / edit.file).read_text().count(edit.old + "\n") == 1, edit
        assert sum(len(set(edit.new.splitlines()) - set(edit.old.splitlines())) for edit in EDITS[lab]) <= 2
    assert not EDITS[6], "lab 6 is flags alone"


def test_the_figures_are_those_of_the_commands_as_they_stand():
    by_name = {arm.name: arm for arm in ARMS}
    assert len(labs.lines()) > 10
    for line in labs.lines():
        arm = by_name[line["arm"]]
        assert line["command"] == " ".join(arm.arguments), line["arm"]
        assert bool(line["change"]) == bool(arm.change), line["arm"]    # not its text: names may change


@pytest.mark.parametrize("lab", (1, 2, 3, 5, 6))
def test_a_lab_has_its_table_and_says_what_does_not_show_or_is_not_finished(lab):
    table = labs.table(lab)
    finished = all(len(labs.values(arm.name, "right")) == len(labs.SEEDS) for arm in ARMS if arm.lab == lab)
    shows = any(text.endswith(": shows") for row in table.splitlines() for text in row.split(" | "))
    assert table in TEXT[lab] or table.count("\n") == 1             # no run yet
    assert ("Not finished" in TEXT[lab]) == (not finished)
    assert ("does not show in three seeds" in TEXT[lab]) == (finished and not shows)


def test_the_arms_of_a_lab_sample_equally_many_trajectories():
    for lab in (1, 2, 3, 5, 6):
        assert len({x["online"] for arm in ARMS if arm.lab == lab for x in labs.lines() if x["arm"] == arm.name}) <= 1


def test_whether_an_effect_shows_by_hand(monkeypatch):
    def results(second):
        runs = {"a": (0.5, 0.4, 0.6), "b": second}
        return [{"arm": arm, "seed": i, "right": x} for arm in runs for i, x in enumerate(runs[arm])]
    for second, mean, error, shows in (
            ((0.7, 0.5, 0.9), 0.2, 0.1 / 3 ** 0.5, True),               # differences 0.2, 0.1, 0.3
            ((0.6, 0.5, 1.5), 11 / 30, 4 / 15, False),                  # 0.1, 0.1, 0.9: one sign, and too uneven
            ((0.6, 0.5, 0.6), 2 / 30, 1 / 30, False)):                  # 0.1, 0.1, 0.0
        monkeypatch.setattr(labs, "lines", lambda second=second: results(second))
        assert labs.effect("a", "b") == pytest.approx((mean, error, shows))


# ------------------------------------------------------------------------------------ what each change does
def test_lab_1_puts_every_token_after_the_prompt_in_the_mask(monkeypatch):
    rollout = patched(monkeypatch, 1, "rollout.py")
    task = types.SimpleNamespace(id="t")
    episode = rollout.Episode(task=task, sample=0, seed=0, group=0, prompt=[7, 7], chat=None, executor=None, tools=[],
                              sampling=None)
    t = episode.trajectory([7, 7, 1, 2, 9, 9, 3], [0, 0, 1, 1, 0, 0, 1], [0.0] * 7, 0.1)
    assert t.mask == [0, 0, 1, 1, 1, 1, 1]


def test_lab_2_gives_an_advantage_to_a_group_that_differs_in_execution_alone(monkeypatch):
    grpo = patched(monkeypatch, 2, "grpo.py")
    wrong = [Reward(total, 0.0, 10 * total, "heuristic", False, False) for total in (0.1, 0.0)]
    cfg = GRPOConfig(std_floor=1e-4)
    assert grpo.group_advantages(wrong, cfg)[0] == pytest.approx([1.0, -1.0])
    assert grpo.group_advantages([wrong[0]] * 2, cfg) is None


@pytest.mark.parametrize("lab", [1, 3])
def test_labs_1_and_3_make_c_one(monkeypatch, lab):
    grpo = patched(monkeypatch, lab, "grpo.py")
    l = torch.tensor([[-1.0]], requires_grad=True)
    old, behaviour, advantage = torch.tensor([[-1.0]]), torch.tensor([[-9.0]]), torch.tensor([[0.5]])
    loss, _ = grpo.grpo_loss(l, old, behaviour, None, advantage, torch.tensor([[True]]), GRPOConfig(), 1.0)
    loss.backward()
    assert l.grad.item() == pytest.approx(-0.5)                         # with c = C = 2 it is -1


def test_lab_4_adds_leave_one_out(monkeypatch):
    rloo = patched(monkeypatch, 4, "grpo.py").LOSSES["rloo"]
    rewards = [1.1, 0.1, 0.05, 0.0]
    mean = sum(rewards) / 4
    others = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert rloo.advantage([r - mean for r in rewards], 0.1) == pytest.approx(others)


def test_lab_4_only_some_losses_are_the_same_up_to_a_scale(monkeypatch):
    """What python -m tests.lab_losses prints, on five groups of one seed."""
    monkeypatch.setitem(LOSSES, "rloo", LOSSES["dr_grpo"]._replace(
        advantage=lambda deviations, std: [d * len(deviations) / (len(deviations) - 1) for d in deviations]))
    policy = lab_losses.load_policy("tiny", seed=0)
    groups = lab_losses.sampled(policy, 0, 5)
    one = next(pair for pair in groups if lab_losses.lengths_differ(pair[0]))
    batch, alone = lab_losses.compare(policy, groups), lab_losses.compare(policy, [one])
    for found in (batch, alone):
        assert found["rloo"] == pytest.approx((1.0, 8 / 7), abs=1e-4)
    assert alone["dapo"][0] == pytest.approx(1.0, abs=1e-5)
    assert max(batch["dapo"][0], batch["grpo"][0], alone["grpo"][0]) < 0.9995


def test_lab_5_gives_every_group_one_priority(monkeypatch):
    queue = patched(monkeypatch, 5, "queue.py").SampleQueue(8, 4.0, 32, 8, 0.3)
    for spread, step in ((0.5, 1), (0.05, 9)):
        queue.admit(object(), spread, True, step)
    assert [queue.priority(entry, 10) for entry in queue.entries] == [1.0, 1.0]
    assert len(queue.draw(2, 10, random.Random(0))) == 2


# ------------------------------------------------------------------------------------------- the commands
@pytest.fixture(scope="module")
def cold(tmp_path_factory) -> Path:
    """The cold start, made by the page's command."""
    copy = labs.changed("", tmp_path_factory.mktemp("cold") / "tree")
    (copy / "cold").is_symlink() and (copy / "cold").unlink()
    command = next(line for line in TEXT[0].splitlines() if line.startswith("python -c "))
    subprocess.run(command, shell=True, cwd=copy, check=True, capture_output=True)
    assert (copy / "cold" / "config.json").exists()
    return copy / "cold"


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm.lab}-{arm.name}")
def test_every_command_runs_with_its_change(arm, cold, tmp_path):
    """Two steps of each instead of 12 to 36, and few tasks to evaluate."""
    tree = labs.changed(arm.change, tmp_path / "tree")
    if not (tree / "cold").exists():
        (tree / "cold").symlink_to(cold)
    found = labs.read(labs.train(arm, 0, tree, "--steps", "2", "--eval-tasks", "1"))
    assert len(found["steps"]) == 2 and found["online"] == (64 if "--online-groups" in arm.arguments else 192)


@pytest.mark.slow
def test_the_command_of_lab_4_prints_the_table_of_the_page(tmp_path):
    tree = labs.changed("".join(labs.blocks(TEXT[4], "diff")), tmp_path / "tree")
    done = subprocess.run([sys.executable, "-m", "tests.lab_losses"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "`rloo`" in done.stdout and done.stdout in TEXT[4]
