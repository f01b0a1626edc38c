"""queue.py: the rule of the sample queue, and the name that it shares with the standard library's module."""
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from queue import SampleQueue
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import train
from grpo import Group
from machinery import checkpoint
from scripts import study_queue

ROOT = Path(__file__).resolve().parent.parent


def make_queue(**settings):
    defaults = {"capacity": 64, "half_life": 4.0, "max_age": 8, "max_uses": 4, "max_off_policy": 0.3}
    return SampleQueue(**defaults | settings)


def filled(spreads, step=0, **settings):
    queue = make_queue(**settings)
    for index, spread in enumerate(spreads):
        queue.admit(f"group {index}", spread, any_right=True, step=step)
    return queue


def test_admits_only_what_teaches():
    queue = make_queue()
    assert not queue.admit("no spread", 0.0, any_right=True, step=0)
    assert not queue.admit("nothing right", 0.5, any_right=False, step=0)
    assert queue.admit("good", 0.5, any_right=True, step=0)
    assert len(queue) == 1 and queue.counts["admitted"] == 1


def test_priority_by_hand():
    queue = filled([0.4], half_life=4.0)
    entry = queue.entries[0]
    assert entry.uses == 1                                        # the update right after sampling
    assert queue.priority(entry, step=0) == pytest.approx(0.4 / 2)
    assert queue.priority(entry, step=4) == pytest.approx(0.4 / 2 / 2)
    entry.uses = 3
    assert queue.priority(entry, step=8) == pytest.approx(0.4 / 4 / 4)
    younger = filled([0.4], step=4, half_life=4.0).entries[0]
    assert queue.priority(younger, step=8) == pytest.approx(0.4 / 2 / 2)    # 4 steps old, one use


@pytest.mark.parametrize("share, online, fresh, drawn", [
    (0.5, 12, 12, 0), (0.5, 12, 9, 3), (0.5, 12, 2, 6), (1.0, 12, 2, 10), (0.0, 12, 2, 0),
    (0.5, 4, 4, 8), (0.5, 4, 1, 8), (0.0, 4, 4, 8)])        # eight of twelve groups are not sampled
def test_replay_takes_the_places_not_sampled_or_at_most_its_share_of_those_without_signal(share, online, fresh, drawn):
    cfg = train.Config(replay_share=share, seed=0)
    state = SimpleNamespace(cfg=cfg, step=1, rank=0, rank_groups=12, rank_online=online, queue=filled([0.5] * 20))
    assert len(train.replay(state, fresh)) == drawn


def test_evicts_the_lowest_priority_and_on_a_tie_the_oldest():
    queue = filled([0.5, 0.1, 0.5], capacity=2)
    assert [e.group for e in queue.entries] == ["group 0", "group 2"]
    queue.admit({"not": "comparable"}, 0.5, any_right=True, step=0)    # equal priorities, no < between groups
    assert [e.group for e in queue.entries] == ["group 2", {"not": "comparable"}]
    assert not queue.admit("too weak", 0.01, any_right=True, step=0)
    assert queue.counts["evicted"] == 3


def test_draws_in_proportion_to_priority_without_replacement():
    rng, first = random.Random(0), Counter()
    for _ in range(4000):
        queue = filled([0.6, 0.3, 0.1])
        drawn = queue.draw(2, step=0, rng=rng)
        assert len({e.order for e in drawn}) == 2 and all(e.uses == 2 for e in drawn)
        first[drawn[0].group] += 1
    # binomial standard error at most 0.008
    assert first["group 0"] / 4000 == pytest.approx(0.6, abs=0.03)
    assert first["group 1"] / 4000 == pytest.approx(0.3, abs=0.03)


def test_equal_priorities_never_compare_the_groups():
    queue = make_queue()
    for _ in range(20):
        queue.admit({"a": 1}, 0.5, any_right=True, step=0)

    class AlwaysHalf:
        def random(self):
            return 0.5
    assert [e.order for e in queue.draw(3, 0, AlwaysHalf())] == [19, 18, 17]


def test_drops_old_used_up_and_off_policy():
    queue = filled([0.5, 0.4], max_age=2, max_uses=3)
    queue.admit("fresh", 0.5, any_right=True, step=3)
    queue.draw(0, step=3, rng=random.Random(0))
    assert [e.group for e in queue.entries] == ["fresh"] and queue.counts["too_old"] == 2
    for _ in range(2):
        assert len(queue.draw(1, step=3, rng=random.Random(0))) == 1
    assert queue.draw(1, step=3, rng=random.Random(0)) == [] and queue.counts["used_up"] == 1
    queue.admit("far", 0.5, any_right=True, step=3)
    entry = queue.draw(1, step=3, rng=random.Random(0))[0]
    queue.report_off_policy(entry, 0.2)
    assert len(queue) == 1
    queue.report_off_policy(entry, 0.9)
    assert len(queue) == 0 and queue.counts["off_policy"] == 1
    assert queue.stats(3)["queue_off_policy"] == 1


def test_stats_by_hand():
    queue = filled([0.5, 0.5], step=0)
    queue.admit("later", 0.5, any_right=True, step=3)
    queue.entries[0].uses = 4
    counts = {"queue_admitted": 3, "queue_evicted": 0, "queue_too_old": 0, "queue_used_up": 0, "queue_off_policy": 0}
    assert queue.stats(5) == {"queue_size": 3, "queue_age": (5 + 5 + 2) / 3, "queue_uses": (4 + 1 + 1) / 3, **counts}
    nothing = {"queue_size": 0, "queue_age": 0, "queue_uses": 0, **counts, "queue_admitted": 0}
    assert make_queue().stats(5) == nothing
    assert filled([0.5], step=0).stats(5)["queue_age"] == 5


def test_a_group_at_a_bound_stays():
    queue = filled([0.5], step=1, max_age=2, max_uses=2, capacity=1)
    queue.draw(0, step=3, rng=random.Random(0))                    # age 2
    queue.report_off_policy(queue.entries[0], 0.3)
    assert len(queue) == 1
    queue.draw(0, step=4, rng=random.Random(0))
    assert len(queue) == 0 and queue.counts["too_old"] == 1
    assert queue.draw(-1, step=4, rng=random.Random(0)) == []      # no place is free


def test_state_continues_where_it_was():
    one = filled([0.5, 0.4, 0.3], max_uses=9)
    one.draw(2, 0, random.Random(1))
    two = make_queue(max_uses=9)
    two.load_state_dict(one.state_dict())
    draws = [[e.order for e in q.draw(2, 1, random.Random(7))] for q in (one, two)]
    assert draws[0] == draws[1] and one.stats(1) == two.stats(1)


# -------------------------------------------------------------- few groups online, the rest of the batch replayed
def test_positive_replay_by_hand():
    """Better than the mean of their group: not equal to it, not worse, not unjudged; advantages as they were."""
    kept = Group("task", ["a", "b", "c", "d", "e"], 7, [], [0.5, -1.25, None, 0.0, 0.75], std=0.4).positive()
    assert kept.batch() == [("a", 0.5), ("e", 0.75)]
    assert (kept.task, kept.step, kept.std) == ("task", 7, 0.4)


FEW_ONLINE = ["--groups", 5, "--online-groups", 2, "--group-size", 4, "--resample", 0, "--max-uses", 3,
              "--eval-tasks", 1, "--replay", "positive", "--epochs", 2, "--temperature", 1.3, "--deterministic"]


def run_training(out, steps, *arguments):
    assert train.main([*map(str, ["--out", out, "--steps", steps, *arguments])]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_batch_of_few_online_groups(tmp_path, monkeypatch):
    """What each update is given: the groups sampled in its step, whole; and of older ones, from the queue, the positive
    trajectories alone, with the log-probs of their sampling, which are l_behaviour of the importance weight."""
    sampled, updates = {}, []

    def spy_sample(run, n, again=0):
        groups = sample(run, n, again)
        sampled.update({id(t): (run.step, list(t.logps)) for group in groups for t in group.trajectories})
        kept_alive.append(groups)
        return groups

    def spy_update(policy, optimizer, batch, *rest):
        updates.append(list(batch))
        return update(policy, optimizer, batch, *rest)
    kept_alive, sample, update = [], train.sample, train.grpo_update
    monkeypatch.setattr(train, "sample", spy_sample)
    monkeypatch.setattr(train, "grpo_update", spy_update)
    rows = run_training(tmp_path / "out", 5, *FEW_ONLINE)
    assert [row["online_trajectories"] for row in rows] == [0, 8, 16, 24, 32, 40]        # 2 groups of 4 a step
    replayed_in_all = 0
    for step, batch in enumerate(updates, 1):
        fresh = [(t, a) for t, a in batch if sampled[id(t)][0] == step]
        replayed = [(t, a) for t, a in batch if sampled[id(t)][0] < step]
        groups = len({(t.task_id, t.seed) for t, _ in replayed})
        assert len(fresh) % 4 == 0 and len(fresh) <= 8 and any(a < 0 for _, a in fresh) == bool(fresh)
        assert groups == rows[step]["replayed"] <= 3 and all(a > 0 for _, a in replayed)
        assert all(t.logps == sampled[id(t)][1] for t, _ in replayed)
        replayed_in_all += len(replayed)
    assert replayed_in_all > 0


def test_resumed_with_few_online_groups_equals_uninterrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_training(whole, 4, *FEW_ONLINE)
    run_training(parts, 2, *FEW_ONLINE)
    assert sum(row["replayed"] for row in run_training(parts, 4, "--resume") if row["step"] > 2) > 0
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "queue-0.safetensors"):
        a, b = (load_file(checkpoint.latest_state(out) / name) for out in (whole, parts))
        assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a), name


def test_more_online_groups_than_groups_is_refused(capsys, tmp_path):
    assert train.main(["--groups", "4", "--online-groups", "5", "--out", str(tmp_path / "out")]) == 2
    assert "--groups 4 --online-groups 5" in capsys.readouterr().err


def test_the_studys_measures_by_hand():
    curve = [{"online": 0, "sampled": 0.1, "greedy": 0.0, "wall": 0.0}, {"online": 96, "sampled": 0.4, "wall": 8.0},
             {"online": 192, "sampled": 0.6, "greedy": 0.8, "wall": 20.0}]
    line = {"curve": curve}
    assert study_queue.reached(line, "sampled", 0.5) == (pytest.approx(144), True)
    assert study_queue.reached(line, "sampled", 0.5, "wall") == (pytest.approx(14), True)
    assert study_queue.reached(line, "greedy", 0.7) == (pytest.approx(168), True)      # 0.7 / 0.8 of the way from 0
    assert study_queue.reached(line, "sampled", 0.7) == (192, False)                   # never: the whole run counts
    assert study_queue.at_the_end(line, "sampled") == pytest.approx(0.5)
    slower = {"curve": [point | {"online": 2 * point["online"]} for point in curve]}

    def to_half(x):
        return study_queue.reached(x, "sampled", 0.5)[0]
    assert study_queue.ratio({3: line, 4: line, 5: slower}, {3: slower, 4: slower, 6: line}, to_half) == "0.50, n 2"
    three = study_queue.ratio({3: line, 4: line, 5: line}, {3: slower, 4: slower, 5: line}, to_half)
    assert three == "0.63 [0.50, 1.00], n 3"                           # the cube root of 0.5 * 0.5 * 1


# ------------------------------------------------------------------------- the name: two modules called queue
CHECK = ("import pickle, queue; from queue import SampleQueue, Full, Queue, SimpleQueue, Empty\n"
         "q = Queue(1); q.put(1)\n"
         "try: q.put_nowait(2); raise SystemExit('no Full')\n"
         "except Full: pass\n"
         "assert pickle.loads(pickle.dumps(Full)) is Full is queue.Full\n"
         "assert pickle.loads(pickle.dumps(SampleQueue)) is SampleQueue\n"
         "import requests, concurrent.futures, logging.handlers\n"
         "assert len(SampleQueue(64, 4.0, 8, 4, 0.3)) == 0; print('fine')\n")
IMPORT_TRAIN = "import train\n" + CHECK


def python(*arguments, cwd=ROOT, **kwargs):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          timeout=120, **kwargs)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_python_dash_c_in_the_folder():
    assert "fine" in python("-c", CHECK)


def test_script_run_from_elsewhere(tmp_path):
    assert "--model" in python(ROOT / "train.py", "--help", cwd=tmp_path)


def test_import_train_where_the_standard_queue_came_first():
    assert "fine" in python("-c", "import sys; sys.path.remove(''); import queue, torch\n"
                                  "assert not hasattr(queue, 'SampleQueue'); sys.path.insert(0, '.')\n" + IMPORT_TRAIN)


def test_import_train_in_a_fresh_process():
    assert "fine" in python("-c", IMPORT_TRAIN)


def test_spawned_worker(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import multiprocessing as mp\n"
                      "def work(out):\n"
                      "    import train; from queue import SampleQueue; out.put(len(SampleQueue(64, 4.0, 8, 4, 0.3)))\n"
                      "if __name__ == '__main__':\n"
                      "    context = mp.get_context('spawn'); out = context.Queue()\n"
                      "    worker = context.Process(target=work, args=(out,)); worker.start()\n"
                      "    print('got', out.get(timeout=60)); worker.join(); assert worker.exitcode == 0\n")
    assert "got 0" in python(script, cwd=tmp_path)


@pytest.mark.parametrize("command", [["-m", "pytest"], [str(Path(sys.executable).with_name("pytest"))]])
def test_pytest_both_ways(command, tmp_path):
    arguments = command if command[0] == "-m" else [command[0]]
    done = subprocess.run([*([sys.executable] if command[0] == "-m" else []), *arguments, "-q", "-x",
                           "tests/test_queue.py::test_priority_by_hand"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_torchrun(tmp_path):
    script = tmp_path / "under_torchrun.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + IMPORT_TRAIN)
    out = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    assert out.count("fine") == 2


def test_standard_names_are_the_same_objects():
    out = python("-c", "import json, queue, _queue; print(json.dumps([queue.Empty is _queue.Empty, "
                       "queue.SimpleQueue is _queue.SimpleQueue, queue.Queue.__module__]))")
    assert json.loads(out) == [True, True, "queue"]
