"""eval_gaia.py: figures checked by hand; evaluations with the built-in model, killed, resumed, compared, refused."""
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval_gaia
from chat_server import Server
from eval_gaia import (Evaluation, announce, ask_llm, batches, category_of, choose_tasks, compare, main, parse_args,
                       read_records, record_of, summary, vote)
from gaia_folder import export_gaia
from machinery.statistics import mcnemar, paired_bootstrap, pass_at_k, wilson
from policy import Preset
from reward import Judge
from rollout import Sampling, Turn, Trajectory
from tasks import BUILTIN_TOOLS, Task, builtin_tasks, read_gaia
from machinery.cli import UserError
from tools import Call, load_tools, open_web

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------ statistics
@pytest.mark.parametrize("right, n, low, high", [    # Wilson 1927, as in Brown, Cai and DasGupta 2001 and R's prop.test
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0.0, 1.0)])
def test_wilson(right, n, low, high):
    assert wilson(right, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_wilson_ends_are_where_the_score_test_turns():
    for right, n in [(32, 165), (17, 165), (1, 53), (3, 7)]:
        for p in wilson(right, n):
            assert (right / n - p) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / n)


def test_pass_at_k_is_unbiased():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3) and pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 1, 4) == 1 and pass_at_k(4, 4, 1) == 1
    from itertools import combinations
    samples = [1, 0, 0, 1, 0, 0]
    groups = list(combinations(samples, 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(sum(any(g) for g in groups) / len(groups))


def test_mcnemar_exact():
    assert mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 1024) and mcnemar(1, 9) == mcnemar(9, 1)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0 and mcnemar(5, 0) == pytest.approx(2 / 32)


def test_bootstrap_agrees_with_the_normal_interval():
    assert paired_bootstrap([0.5] * 20, rounds=200) == (0.5, 0.5)
    differences = [1.0] * 30 + [0.0] * 120 + [-1.0] * 15                   # 165 questions, 30 gained, 15 lost
    mean = 15 / 165
    half = 1.96 * ((45 / 165 - mean ** 2) / 165) ** 0.5
    low, high = paired_bootstrap(differences, rounds=4000)
    assert low == pytest.approx(mean - half, abs=0.01) and high == pytest.approx(mean + half, abs=0.01)
    assert paired_bootstrap(differences, rounds=300) == paired_bootstrap(differences, rounds=300)


# ------------------------------------------------------------------------------------------------ records by hand
def rec(task, sample=0, official=False, answer="x", level="1", attachment="none", **more):
    return {"task_id": task, "sample": sample, "official": official, "answer": answer, "level": level,
            "attachment": attachment, "heuristic": "right" if official else "wrong", "llm": None,
            "category": "right" if official else "wrong", "steps": 2, "tokens": 10, "seconds": 1.0,
            "tool_calls": 1, "cache_hits": 0, **more}


def test_summary_by_hand():
    records = [rec("a", official=True, llm=True),
               rec("b", answer=None, level="2", attachment=".csv", category="step_limit"),
               rec("c", official=True, level="2", attachment=".pdf"),
               rec("d", level="3", heuristic="unsure", llm=True)]
    s = summary(records, 1)
    assert (s["accuracy"], s["n"], s["missing"], s["heuristic"], s["llm"]) == (0.5, 4, 1, 0.5, 0.5)
    assert s["agreement"] == {"unsure": 1, "official and heuristic": {"agree": 1.0, "n": 3},
                              "official and llm": {"agree": 0.5, "n": 2}, "heuristic and llm": {"agree": 1.0, "n": 1}}
    assert {k: (v["accuracy"], v["n"]) for k, v in s["levels"].items()} == {"1": (1.0, 1), "2": (0.5, 2), "3": (0.0, 1)}
    assert {k: v["n"] for k, v in s["attachments"].items()} == {".csv": 1, ".pdf": 1, "none": 2}
    assert s["text_only"]["accuracy"] == 0.5 and s["text_only"]["n"] == 2 and "pass_at_k" not in s
    assert s["categories"] == {"right": 2, "step_limit": 1, "wrong": 1}
    assert eval_gaia.share([rec("a", llm=True), rec("b"), rec("c", llm=False)])["llm"] == 1 / 3


def test_the_llm_judges_every_answer_beside_the_other_judges():
    task = Task("t", "Who?", "Charles Darwin")
    answers = ["Charles Darwin", "Newton", "Darwin", None]
    with Server(lambda said: "VERDICT: " + ("IN" * ("Newton" in said[1]["content"])) + "CORRECT") as server:
        judge = Judge(server.url, "m")
        found = [record_of(task, t, []) for t in [*(trajectory(answer=a) for a in answers),
                                                  trajectory("error", "Darwin")]]
        assert [r["llm"] for r in found] == [None] * 5
        ask_llm(judge, found)
        assert found.pop()["llm"] is None and len(server.requests) == 3
    assert [r["llm"] for r in found] == [True, False, True, None]
    assert [r["heuristic"] for r in found] == ["right", "unsure", "unsure", "wrong"]
    assert [r["official"] for r in found] == [True, False, False, False]
    assert [r["category"] for r in found] == ["right", "wrong", "format_only", "no_code"]


def test_a_record_by_hand():
    task = Task("t", "How many?", "17", files={"b/x.CSV": b"", "a.csv": b"", "Makefile": b""}, level="2")
    t = replace(trajectory(answer="17 km", steps=[OK, OK]), seconds=1.2345, mask=[0, 1, 1])
    noted = [Call("q", "visit", "{}", "ok", 2, 0.1), Call("q", "visit", "{}", "blocked", 1, 0.1)]
    record = record_of(task, t, noted)
    assert {key: record[key] for key in ("attachment", "official", "heuristic", "category", "steps", "tokens",
                                         "seconds", "tool_calls", "cache_hits", "tool_outcomes")} == {
        "attachment": ".csv other", "official": False, "heuristic": "unsure", "category": "wrong", "steps": 2,
        "tokens": 2, "seconds": 1.23, "tool_calls": 2, "cache_hits": 3,
        "tool_outcomes": {"visit ok": 1, "visit blocked": 1}}


def test_samples_are_means_over_questions_and_never_mixed_up():
    records = [rec("a", 0, True, "Paris"), rec("a", 1, True, "paris"), rec("a", 2, False, "Rome"),
               rec("a", 3, False, None), rec("b", 0, False, "1"), rec("b", 1, False, "1"), rec("b", 2, True, "2"),
               rec("b", 3, False, "3")]
    s = summary(records, 4)
    assert s["accuracy"] == pytest.approx((0.5 + 0.25) / 2) and s["n"] == 2                    # mean pass@1
    assert s["pass_at_k"] == {1: pytest.approx(0.375), 2: pytest.approx(((1 - 1 / 6) + 0.5) / 2), 4: 1.0}
    assert s["maj_at_k"] == {4: 0.5} and vote(records[:4]) and not vote(records[4:])
    assert not vote([rec("c", answer=None)])


def trajectory(stop="answer", answer=None, steps=((None, "", ""),)):
    made = [Turn("text", code, seen, status, 0.1) for code, seen, status in steps]
    return Trajectory("t", 0, 0, [1], [1], [0.0], 0, made, answer, stop, 0.1)


def calls(*outcomes, same=False):
    return [Call("q", "visit", "{}" if same else str(i), o, 0, 0.1) for i, o in enumerate(outcomes)]


OK, BAD, SYNTAX = ("x", "1", "ok"), ("x", "KeyError: 'a'", "error"), ("x", "SyntaxError: invalid", "error")
ABSENT = ("x", "NameError: name 'ask_image' is not defined", "error")
WAYS = {
    "right": (trajectory(answer="17", steps=[OK]), [], True, True),
    "wrong": (trajectory(answer="18", steps=[OK]), [], False, False),
    "format_only": (trajectory(answer="17 km", steps=[OK]), [], False, True),
    "infrastructure": (trajectory("error"), [], False, False),
    "no_code": (trajectory("turn_limit"), [], False, False),
    "syntax": (trajectory("turn_limit", steps=[OK, SYNTAX]), [], False, False),
    "runtime": (trajectory("turn_limit", steps=[OK, BAD]), [], False, False),
    "tool_unavailable": (trajectory("turn_limit", steps=[ABSENT]), [], False, False),
    "blocked": (trajectory("turn_limit", steps=[OK]), calls("ok", "blocked"), False, False),
    "cache_miss": (trajectory("turn_limit", steps=[OK]), calls("cache_miss"), False, False),
    "repeated_call": (trajectory("turn_limit", steps=[OK]), calls("ok", "ok", "ok", same=True), False, False),
    "step_limit": (trajectory("turn_limit", steps=[OK]), calls("ok", "ok", "ok"), False, False),
    "no_answer": (trajectory("", steps=[OK]), [], False, False),
    "context_limit": (trajectory("context_limit", steps=[OK]), [], False, False),
    "length": (trajectory("length", steps=[OK, (None, "", "")]), [], False, False),
    "timeout": (trajectory("turn_limit", steps=[("x", "", "timeout")]), [], False, False)}


@pytest.mark.parametrize("category", WAYS)
def test_what_became_of_a_trajectory(category):
    assert category_of(*WAYS[category]) == category


@pytest.mark.parametrize("stop", ["length", "context_limit"])
def test_a_limit_that_came_before_any_code_is_no_missing_code(stop):
    for steps in ([], [(None, "", "")], [(None, "", ""), (None, "", "")]):
        assert category_of(trajectory(stop, steps=steps), [], False, False) == stop
    assert category_of(trajectory(stop, steps=[BAD, (None, "", "")]), calls("blocked"), False, False) == "blocked"
    assert category_of(trajectory("turn_limit", steps=[(None, "", "")] * 6), [], False, False) == "no_code"


def test_batches_never_hold_a_question_twice():
    tasks = [Task(str(i), f"question {i % 4}", "") for i in range(8)]
    made = list(batches([(s, t) for s in (0, 1) for t in tasks]))
    assert sorted((s, t.id) for s, part in made for t in part) == sorted((s, t.id) for s in (0, 1) for t in tasks)
    assert [len(part) for _, part in made] == [4] * 4 and all(len({t.question for t in part}) == 4 for _, part in made)


def test_compare_by_hand(tmp_path):
    for name, right in (("base", "ab"), ("trained", "bcd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trajectories.jsonl").write_text(
            "".join(json.dumps(rec(t, official=t in right)) + "\n" for t in "abcdef"))
    c = compare(tmp_path / "base", tmp_path / "trained" / "trajectories.jsonl")
    assert (c["n"], c["gained"], c["lost"], c["mcnemar_p"]) == (6, ["c", "d"], ["a"], 1.0)
    assert c["difference"] == pytest.approx(1 / 6) and c["bootstrap95"][0] < 1 / 6 < c["bootstrap95"][1]
    for name, settings in (("base", {"model": "m", "adapter": "", "seed": 0}),
                           ("trained", {"model": "m", "adapter": "x", "seed": 1})):
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
    assert compare(tmp_path / "base", tmp_path / "trained")["settings_that_differ"] == ["seed"]
    retried = [rec("a", 1, official=True), rec("a", 0), rec("b", 0), rec("b", 1)]      # sample 0 was written late
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in retried))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(rec(t)) + "\n" for t in "ab"))
    assert compare(tmp_path / "d.jsonl", tmp_path / "c.jsonl")["gained"] == []
    (tmp_path / "trained" / "trajectories.jsonl").write_text(json.dumps(rec("z")) + "\n")
    with pytest.raises(UserError, match="6 only in .*base, 1 only in"):
        compare(tmp_path / "base", tmp_path / "trained")


def test_the_preflight_counts_web_calls(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tasks = [Task(name, "q", "1") for name in "abc"]
    for spec, wanted in [("record", "about 36 if every turn makes one (6 trajectories of 6 turns)"),
                         ("replay", "none")]:
        web = open_web(spec)
        args = parse_args(["--gaia-dir", "GAIA", "--samples", "2", "--no-preflight"])
        announce(Evaluation(args, tasks, SimpleNamespace(name="m"),
                            load_tools("web", web), [], web, None, Sampling(max_turns=6)), "none")
        out = capsys.readouterr().out
        assert f"  web calls: {wanted}\n" in out
        assert "  web_search   live\n" in out and "  ask_image    left out: " in out


def test_half_a_line_left_by_a_kill_is_no_record(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"a": 1}) + "\n" + '{"a": 2, "tr')
    assert read_records(file) == [{"a": 1}] and read_records(tmp_path / "none") == []
    assert read_records(file, repair=True) == [{"a": 1}] and file.read_text() == json.dumps({"a": 1}) + "\n"


# ------------------------------------------------------------------------------------------------ whole runs
@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gaia(folder, n=12):
    """A folder in GAIA's layout with real attachments, of held-out built-in tasks."""
    tasks = builtin_tasks("heldout", n, 5)
    assert any(t.files for t in tasks)
    export_gaia(tasks, folder)
    return read_gaia(folder)


def test_killed_in_the_middle_and_resumed(here):
    """kill -9 once the first record is written, while others are sampled: the same command does the rest, nothing
    twice."""
    tasks = gaia(here / "GAIA", 60)
    command = [sys.executable, ROOT / "eval_gaia.py", "--model", "tiny", "--gaia-dir", "GAIA", "--out", "ev",
               "--export"]
    file = here / "ev" / "trajectories.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 200
    while not (file.exists() and file.stat().st_size) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_records(file)
    assert 0 < len(before) < 60 and not (here / "ev" / "results.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed ev: {len(before)} of 60 are done" in done.stdout and "sandbox" in done.stdout
    after, result = read_records(file), json.loads((here / "ev" / "results.json").read_text())
    assert after[:len(before)] == before and Counter(r["task_id"] for r in after) == {t.id: 1 for t in tasks}
    assert result["n"] == 60 and result["accuracy"] == sum(r["official"] for r in after) / 60
    assert {k: v["n"] for k, v in result["levels"].items()} == Counter(t.level for t in tasks)
    assert result["accuracy"] > 0.05
    assert any(r["official"] for r in after if r["attachment"] == ".csv")              # it can read files
    assert "this is not the whole validation split" in done.stdout
    lines = [json.loads(x) for x in (here / "ev" / "submission.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and set(lines[0]) == {"task_id", "model_answer", "reasoning_trace"}
    saved = next(r for r in after if r["tool_calls"])["trajectory"]
    assert len(saved["ids"]) == len(saved["mask"]) and saved["steps"][0]["code"]


def test_built_in_tasks_and_an_evaluation_with_other_settings_moved_aside(here, capsys):
    assert main(["--limit", "6", "--samples", "2", "--out", "ev"]) == 0
    out = capsys.readouterr().out
    assert "NOT GAIA" in out and "pass@2" in out and "maj@2" in out and "Wilson" in out
    first = (here / "ev" / "trajectories.jsonl").read_text()
    records = read_records(here / "ev" / "trajectories.jsonl")
    assert Counter(r["sample"] for r in records) == {0: 6, 1: 6}
    one, other = ([r["trajectory"]["ids"] for r in records if r["sample"] == s] for s in (0, 1))
    assert one != other                                                    # each sample has a seed of its own
    assert main(["--limit", "6", "--samples", "2", "--out", "ev", "--export"]) == 0
    assert len((here / "ev" / "submission.jsonl").read_text().splitlines()) == 6       # the first sample of each
    assert "12 of 12 are done" in capsys.readouterr().out and (here / "ev" / "trajectories.jsonl").read_text() == first
    assert main(["--limit", "6", "--seed", "1", "--out", "ev"]) == 0
    assert "moved to ev.1" in capsys.readouterr().out and (here / "ev.1" / "trajectories.jsonl").read_text() == first
    assert main(["--compare", "ev.1", "ev"]) == 0 and '"mcnemar_p"' in capsys.readouterr().out


def test_verdicts_of_an_llm_are_kept_with_their_records(here):
    with Server(lambda said: "VERDICT: CORRECT") as server:
        assert main(["--limit", "4", "--judge", server.url, "--judge-model", "m", "--out", "ev"]) == 0
    records, asked = read_records(here / "ev" / "trajectories.jsonl"), len(server.requests)
    assert len(records) == 4 and sum(r["llm"] is True for r in records) == asked > 0
    assert json.loads((here / "ev" / "results.json").read_text())["llm"] == asked / 4


def test_web_tools_are_for_gaia_and_for_models_that_read_their_documentation(here, monkeypatch):
    tasks, tiny, names = gaia(here / "GAIA"), eval_gaia.load_policy("tiny"), {}
    monkeypatch.setattr(eval_gaia, "check_context", lambda *_: None)          # the tiny model has too few positions
    for prompt in ("short", "full"):
        policy = replace(tiny, preset=Preset(prompt, tiny.preset.settings))
        monkeypatch.setattr(eval_gaia, "load_policy", lambda *_, policy=policy, **__: policy)
        for where in ([], ["--gaia-dir", "GAIA"]):
            evaluation = eval_gaia.prepare(parse_args(where), eval_gaia.training_run(None), tasks)
            names[prompt, len(where)] = {tool.name for tool in evaluation.tools}
    assert names["short", 0] == names["short", 2] == names["full", 0] == {tool.name for tool in BUILTIN_TOOLS}
    assert {"visit", "find"} <= names["full", 2]


def test_the_settings_of_training_are_used_for_its_checkpoint(here, capsys):
    import torch
    from policy import load_policy, save_adapter
    policy = load_policy("tiny", seed=1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)                                 # an adapter that certainly changes answers
    save_adapter(policy, here / "out")
    sampling = {"temperature": 1.0, "max_turns": 2, "turn_tokens": 32, "context_tokens": 256, "observation_tokens": 16}
    (here / "mine.py").write_text("from tools import tool\n@tool\ndef extra(x: str) -> str:\n    'Do.'\n    return x\n")
    (here / "out" / "run.json").write_text(json.dumps(
        {"config": {"model": "tiny", "difficulty": 0}, "model": "tiny", "quantize": "none", "tools": "mine.py",
         "sampling": sampling}))
    assert main(["--ckpt", "out", "--limit", "6", "--out", "ev"]) == 0
    settings = json.loads((here / "ev" / "settings.json").read_text())
    assert settings["sampling"]["turn_tokens"] == 32 and settings["sampling"]["temperature"] == 0.0
    assert settings["adapter"]
    assert "extra" in capsys.readouterr().out
    records = read_records(here / "ev" / "trajectories.jsonl")
    assert max(r["steps"] for r in records) <= 2 and max(len(r["trajectory"]["ids"]) for r in records) <= 256
    assert main(["--limit", "6", "--out", "base"]) == 0
    base = read_records(here / "base" / "trajectories.jsonl")
    assert [r["trajectory"]["ids"] for r in base] != [r["trajectory"]["ids"] for r in records]
    (here / "out" / "run.json").unlink()                                   # an adapter that train.py did not write
    assert main(["--ckpt", "out", "--limit", "2", "--out", "foreign"]) == 0


@pytest.fixture
def small_disk():
    """No file may grow beyond 100 kB: writes fail as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_full_disk_is_one_line_and_the_same_command_does_the_rest(here, capsys, small_disk):
    command = ["--limit", "40", "--out", "ev"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cannot go on ([Errno 27]") and "the same command does the rest" in error
    small_disk()
    before = read_records(here / "ev" / "trajectories.jsonl")
    assert 0 < len(before) < 40 and main(command) == 0
    assert f"{len(before)} of 40 are done" in capsys.readouterr().out
    after = read_records(here / "ev" / "trajectories.jsonl")
    assert after[:len(before)] == before and len({r["task_id"] for r in after}) == len(after) == 40


def test_a_folder_that_cannot_be_written_is_one_line(here, capsys):
    (here / "file").write_text("")
    for out in ("file", "file/ev", "/proc/ev", "x" * 5000):
        assert main(["--limit", "1", "--out", out]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: cannot go on") and "mend the folder" in error


def test_the_bar_says_how_many_are_right(here, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(eval_gaia, "tqdm", partial(eval_gaia.tqdm, file=shown, mininterval=0))
    monkeypatch.setattr(shown, "isatty", lambda: True)
    assert main(["--limit", "8", "--out", "ev"]) == 0
    right = sum(r["official"] for r in read_records(here / "ev" / "trajectories.jsonl"))
    assert re.findall(r"right=(\d+)", shown.getvalue())[-1] == str(right)


def test_gaia_without_its_attachments_serves_the_questions_that_need_none(here, capsys):
    tasks = gaia(here / "GAIA")
    files = [file for task in tasks for file in task.files.values()]
    for file in files:
        file.unlink()
    assert main(["--gaia-dir", "GAIA", "--out", "ev"]) == 2
    error = capsys.readouterr().err
    assert f"{len(files)} attachments of these questions are missing" in error and "hf download" in error
    assert "--text-only" in error
    for flags in (["--text-only", "--limit", "2"], ["--ids", next(task.id for task in tasks if not task.files)]):
        assert main(["--gaia-dir", "GAIA", "--out", "ev", *flags]) == 0
        assert f"{len(files)} attachments of other questions are missing" in capsys.readouterr().out


def test_a_program_that_came_with_a_checkpoint_is_not_run(here, capsys):
    (here / "got").mkdir()
    code = "from tools import tool\n@tool\ndef extra(x: str) -> str:\n    'Do.'\n    return x\nopen('ran', 'w')\n"
    (here / "got" / "mine.py").write_text(code)
    stored = {"config": {"model": "tiny", "difficulty": 0}, "model": "tiny", "quantize": "none", "sampling": None}
    (here / "got" / "run.json").write_text(json.dumps(stored | {"tools": "got/mine.py"}))
    assert main(["--ckpt", "got", "--out", "ev"]) == 2 and not (here / "ran").exists()
    assert "run.json: it would run got/mine.py, which came with it" in capsys.readouterr().err


def test_host_failures_are_retried_and_never_written(here, monkeypatch, capsys):
    """The host fails twice for one question, always for another: the first gets its answer, the second is missing."""
    real, seen = eval_gaia.rollout, Counter()

    def failing(*args):
        def ended(t):
            seen[t.task_id] += 1
            if t.task_id == ids[0] and seen[t.task_id] <= 2 or t.task_id == ids[1]:
                t = replace(t, stop_reason="error", answer="1", error="the host")
            on_end(t)
        *args, on_end = args
        real(*args, ended)
    ids = [t.id for t in gaia(here / "GAIA", 4)]
    monkeypatch.setattr(eval_gaia, "rollout", failing)
    assert main(["--gaia-dir", "GAIA", "--out", "ev"]) == 0
    assert seen == {ids[0]: 3, ids[1]: 3, ids[2]: 1, ids[3]: 1}
    result = json.loads((here / "ev" / "results.json").read_text())
    assert {r["task_id"] for r in read_records(here / "ev" / "trajectories.jsonl")} == {ids[0], ids[2], ids[3]}
    assert result["n"] == 4 and result["categories"]["infrastructure"] == 1 and result["missing"] >= 1
    assert result["heuristic"] == result["accuracy"] == result["categories"].get("right", 0) / 4
    monkeypatch.setattr(eval_gaia, "rollout", real)
    assert main(["--gaia-dir", "GAIA", "--out", "ev"]) == 0                # the next run does what is missing
    assert len(read_records(here / "ev" / "trajectories.jsonl")) == 4


def test_choosing_questions(here):
    tasks = gaia(here / "GAIA", 24)

    def chosen(*flags):
        return [t.id for t in choose_tasks(parse_args(["--gaia-dir", "GAIA", *flags]), read_gaia("GAIA"))]
    assert chosen() == [t.id for t in tasks] and chosen("--limit", "5") == [t.id for t in tasks[:5]]
    assert chosen("--levels", "1", "3") == [t.id for t in tasks if t.level in "13"] != chosen()
    assert chosen("--text-only") == [t.id for t in tasks if not t.files] != chosen()
    assert chosen("--ids", tasks[7].id, tasks[2].id) == [tasks[2].id, tasks[7].id]


def test_without_access_to_gaia_the_message_says_how_to_get_it(here, monkeypatch, capsys):
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    assert issubclass(GatedRepoError, OSError) and issubclass(LocalEntryNotFoundError, OSError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    assert main(["--gaia-dir", "hub", "--out", "ev"]) == 2
    assert "Ask for access at https://huggingface.co/datasets/gaia-benchmark/GAIA" in capsys.readouterr().err


def test_the_test_split_is_exported_and_never_scored(here, capsys, monkeypatch):
    export_gaia(builtin_tasks("heldout", 6, 5), here / "GAIA")              # a copy with answers in it
    (here / "GAIA" / "2023" / "validation").rename(here / "GAIA" / "2023" / "test")
    monkeypatch.setattr(eval_gaia.Judge, "ask", lambda *_: pytest.fail("nothing is judged, so nothing is paid"))
    flags = ["--split", "test", "--out", "ev", "--export", "--judge", "local"]
    assert main(["--gaia-dir", "GAIA", *flags]) == 0
    assert "nothing is scored" in capsys.readouterr().out and not (here / "ev" / "results.json").exists()
    assert len((here / "ev" / "submission.jsonl").read_text().splitlines()) == 6
    records = read_records(here / "ev" / "trajectories.jsonl")
    assert any(r["answer"] for r in records) and {r["gold"] for r in records} == {"?"}
    assert not any(r["official"] or r["category"] == "right" for r in records)


@pytest.mark.parametrize("arguments, complaint", [
    (["--bogus"], "unrecognized"), (["--ckpt", "none"], "no such folder"), (["--ckpt", "empty"], "no adapter"),
    (["--gaia-dir", "none"], "no metadata"), (["--ids", "nobody"], "no question nobody"),
    (["--ids", "heldout-largest-0023", "heldout-lookup-0024"], "no question heldout-lookup-0024"),     # 264 = 11 x 24
    (["--limit", "0"], "no question is left"), (["--limit", "-1"], "at least 1"),
    (["--judge", "oracle"], "--judge oracle"), (["--cache", "replay:none"], "no such record"),
    (["--tools", "none.py"], "no such file"),
    (["--model", "no/such/model"], "unknown model"), (["--compare", "a", "b"], "holds no evaluation"),
    (["--compare", "run", "run"], "--compare takes folders of eval_gaia.py"),
    (["--tools", "search.py"], "two tools are called search"), (["--out", "full"], "not empty")])
def test_bad_input_is_one_line(here, capsys, arguments, complaint):
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "diary.txt").write_text("mine")
    (here / "run").mkdir()
    (here / "run" / "trajectories.jsonl").write_text('{"step": 1, "task": "x"}\n')    # as train.py writes them
    (here / "search.py").write_text(
        "from tools import tool\n@tool\ndef search(x: str) -> str:\n    'Do.'\n    return x\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and complaint in error
    assert (here / "full" / "diary.txt").read_text() == "mine" and os.listdir(here / "empty") == []
