"""report.py: what the page of a real run holds, in Python; what it shows and that nothing in it acts, in Chromium."""
import base64
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_gaia
import report
import train
from grpo import GRPOConfig, grpo_loss, k3
from machinery import checkpoint

SMALL = ["--groups", "3", "--group-size", "4", "--eval-tasks", "1", "--eval-every", "2", "--deterministic",
         "--temperature", "1.3"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a real run of four steps, with its page."""
    out = tmp_path_factory.mktemp("report") / "out"
    assert train.main(["--out", str(out), "--steps", "4", *SMALL]) == 0
    return out


@pytest.fixture(scope="module")
def evaluated(finished) -> Path:
    out = finished.parent / "evaluation"
    assert eval_gaia.main(["--ckpt", str(finished), "--limit", "22", "--samples", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The same folder, to be spoiled. Not the model: the page does not need it."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("state", "best", "*.safetensors"))
    return out


def rewrite(file: Path, change):
    rows = lines(file)
    for i, row in enumerate(rows):
        change(i, row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def held(page: Path) -> dict:
    """The data of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


# ------------------------------------------------------------------------------------------------ what the page holds
def test_the_page_holds_the_run(finished):
    data, metrics, sampled = held(finished / "report.html"), *map(lines, (
        finished / "metrics.jsonl", finished / "trajectories.jsonl"))
    assert data["metrics"] == metrics and data["steps"] == 4
    rows = [(group, row) for group in data["groups"] for row in group["rows"]]
    assert len(rows) == len(sampled) == metrics[-1]["online_trajectories"]
    for (group, row), line in zip(rows, sampled):
        assert (group["step"], group["task"], group["question"], group["expected"], row["sample"]) == (
            line["step"], line["task"], line["question"], line["expected"], line["sample"])
        assert row["answer"] == line["answer"] and row["stop"] == line["stop_reason"]
        assert [turn["text"] for turn in row["turns"]] == [turn["text"] for turn in line["steps"]]
        assert row["reward"][0] == pytest.approx(line["reward"]["total"], abs=1e-5)
        assert (row["outcome"] == "right") == (line["reward"]["answer"] == 1)
    assert {group["family"] for group, _ in rows} >= {"tower"}


def test_the_tokens_are_those_that_the_sampler_recorded(finished):
    """Against the queue in the checkpoint, which holds ids, masks and log-probs as tensors."""
    state = checkpoint.latest_state(finished)
    tensors, entries = load_file(state / "queue-0.safetensors"), json.loads((state / "queue-0.json").read_text())
    kept = {(row["sampled"], row["seed"], row["task"], row["sample"]): row for row in lines(finished / "tokens.jsonl")}
    compared = 0
    for i, entry in enumerate(entries["entries"]):
        columns = [tensors[f"{i}.{key}"].split(entry["lengths"]) for key in ("ids", "mask", "logps")]
        for t, ids, mask, logps in zip(entry["trajectories"], *columns):
            if row := kept.get((entry["step"], t["seed"], t["task_id"], t["sample"])):
                assert row["ids"] == ids.tolist() and row["mask"] == mask.tolist()
                torch.testing.assert_close(torch.tensor(row["logps"], dtype=torch.float64), logps, rtol=0, atol=1e-6)
                turn = "".join(text for text, bit in zip(row["texts"], row["mask"]) if bit)
                assert turn.startswith(t["steps"][0]["text"].split("```")[0])
                compared += 1
    assert compared >= 8


def test_r_c_and_k_are_those_of_the_loss():
    """One token at a time through grpo_loss: with A = -1 and no KL the loss is c r, and with A = 0 it is c beta k."""
    behaviour, old, now, ref = ([-1.0, -3.0, -0.5, -2.0], [-1.1, -2.0, -0.5, -2.5], [-0.9, -2.2, -0.4, -2.5],
                                [-1.0, -9.0, -0.4, 4.0])
    line = {"ids": [7, 8, 9, 10, 11], "mask": [0, 1, 1, 1, 1], "logps": [0.0, *behaviour], "now": [0.0, *now],
            "old": [0.0, *old], "ref": [0.0, *ref], "entropy": [0.0, 0.1, 0.2, 0.3, 0.4]}
    found = report.token_columns(line, truncation=2.0)
    assert found["sampled"] == [1, 2, 3, 4] and found["entropy"] == [0.1, 0.2, 0.3, 0.4]
    for i in range(4):
        l, l_old, l_behaviour, l_ref = (torch.tensor([[values[i]]]) for values in (now, old, behaviour, ref))
        c_r, _ = grpo_loss(l, l_old, l_behaviour, None, torch.tensor([[-1.0]]), torch.tensor([[True]]),
                           GRPOConfig(beta=0.0, eps_low=0.0, eps_high=9.0), 1.0)
        c_k, _ = grpo_loss(l, l_old, l_behaviour, l_ref, torch.tensor([[0.0]]), torch.tensor([[True]]),
                           GRPOConfig(beta=1.0), 1.0)
        r, c, k = (found[name][i] for name in ("ratio", "weight", "kl"))
        assert c == pytest.approx(min(2.0, math.exp(old[i] - behaviour[i])), rel=1e-5)
        assert c * max(r, 1.0) == pytest.approx(c_r.item(), rel=1e-4)         # (6): for A < 0 the larger of r and clip
        assert c * k == pytest.approx(c_k.item(), rel=1e-4) and k == pytest.approx(k3(l_ref - l).item(), rel=1e-4)


def test_which_tokens_are_kept(finished):
    """All of the first step, of every tenth and of the last; of another one the best and the worst."""
    kept, sampled = lines(finished / "tokens.jsonl"), lines(finished / "trajectories.jsonl")
    for step in (1, 4):
        fresh = [row for row in kept if row["step"] == row["sampled"] == step]
        assert len(fresh) == sum(line["step"] == step for line in sampled)
    for step in (2, 3):
        rated = sorted((line["reward"]["total"], line["advantage"], line["task"], line["sample"])
                       for line in sampled if line["step"] == step and line["advantage"] is not None)
        best = {rated[0][:2], rated[-1][:2]}
        found = {(line["reward"]["total"], line["advantage"]) for row in kept for line in sampled if row["step"] == step
                 if (line["step"], line["task"], line["sample"]) == (step, row["task"], row["sample"])}
        assert found == best and sum(row["step"] == step for row in kept) == 2
    data = held(finished / "report.html")
    in_loss = [record for record in data["tokens"] if "now" in record]
    assert in_loss and all(len(record["ratio"]) == len(record["sampled"]) for record in in_loss)
    marks = [(group["step"], row["mark"]) for group in data["groups"] for row in group["rows"] if "mark" in row]
    assert sorted(marks) == [(step, mark) for step in (1, 2, 3, 4) for mark in ("best", "worst")]


def test_replays_and_fates(finished):
    data, metrics = held(finished / "report.html"), lines(finished / "metrics.jsonl")
    assert any(metrics[step]["replayed"] for step in range(1, 5))
    for row in metrics[1:]:
        assert len(row["replayed_groups"]) == row["replayed"]
        assert sum(row["step"] in group["replayed"] for group in data["groups"]) == row["replayed"]
    for group in data["groups"]:
        assert all(use > group["step"] for use in group["replayed"])


def test_families_with_their_intervals(finished):
    data, metrics = held(finished / "report.html"), lines(finished / "metrics.jsonl")
    by_name = {row["family"]: row for row in data["families"]}
    assert by_name["all core families"]["greedy"][1][0] == pytest.approx(metrics[-1]["heldout_greedy"], abs=1e-4)
    assert by_name["all hard families"]["sampled"][0][0] == pytest.approx(metrics[0]["heldout_hard_sampled"], abs=1e-4)
    for name, figures in metrics[-1]["heldout_families"].items():
        p, low, high = by_name[name]["greedy"][1]
        assert p == figures["greedy"] and low <= p <= high
    assert by_name["arithmetic"]["hard"] and not by_name["lookup"]["hard"]
    assert report.families([{"heldout_families": {"x": {"n": 50, "greedy": 0.9, "sampled": 0.5}}}], ())[1][
        "greedy"][0] == pytest.approx([0.9, 0.7864, 0.9565], abs=1e-4)         # Wilson, by hand


def test_settings_that_differ_from_the_defaults(finished):
    differ = {row[0]: row[1:] for row in held(finished / "report.html")["settings"] if len(row) == 3}
    assert differ["temperature"] == [1.3, 1.0] and differ["groups"] == [3, 12] and "lr" not in differ


def test_a_run_of_an_older_version_has_a_page(copy):
    (copy / "tokens.jsonl").unlink()
    rewrite(copy / "metrics.jsonl", lambda i, row: [row.pop(key, None) for key in ("replayed_groups", "warnings")])
    rewrite(copy / "trajectories.jsonl", lambda i, row: row.pop("family"))
    settings = json.loads((copy / "run.json").read_text())
    del settings["defaults"]
    (copy / "run.json").write_text(json.dumps(settings))
    data = held(report.write(copy))
    assert data["tokens"] == [] and data["groups"] and all(row["turns"] for row in data["groups"][0]["rows"])


def test_tokens_without_what_the_update_saw(copy):
    rewrite(copy / "tokens.jsonl", lambda i, row: [row.pop(key, None) for key in ("now", "old", "ref", "entropy")])
    data = held(report.write(copy))
    assert data["tokens"] and all(record.keys() == {"step", "ids", "sampled", "behaviour"} for record in data["tokens"])


def test_half_a_line_and_numbers_that_are_not_finite(copy):
    with (copy / "trajectories.jsonl").open("a") as file:
        file.write('{"step": 4, "ta')                            # a kill
    before = len(held(copy / "report.html")["groups"])
    rewrite(copy / "metrics.jsonl", lambda i, row: row.update(kl=float("nan")))
    data = held(report.write(copy))
    assert len(data["groups"]) == before and data["metrics"][1]["kl"] is None


def test_a_large_run_leaves_out_the_least_telling(copy, monkeypatch):
    whole = held(copy / "report.html")["not_shown"]
    assert whole["texts"] == whole["trajectories"]
    monkeypatch.setattr(report, "BUDGET", 12_000)
    data = held(report.write(copy))
    rows = [row for group in data["groups"] for row in group["rows"]]
    assert 0 < data["not_shown"]["texts"] < len(rows) == data["not_shown"]["trajectories"]
    assert all(row["turns"] for row in rows if "mark" in row)
    monkeypatch.setattr(report, "BUDGET", 40_000)
    data = held(report.write(copy))
    assert data["not_shown"]["texts"] == len(rows) and 0 < data["not_shown"]["tokens"] < whole["tokens"]
    assert all(row["tokens"] for group in data["groups"] for row in group["rows"] if "mark" in row)


def test_a_page_that_cannot_be_written_does_not_end_the_run(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "report.html").unlink()
    (out / "report.html").mkdir()                                # a folder cannot be replaced by a file
    assert train.main(["--out", str(out), "--resume", "--steps", "5"]) == 0
    assert "no report.html: IsADirectoryError" in capsys.readouterr().out
    assert lines(out / "metrics.jsonl")[-1]["step"] == 5


def test_the_page_takes_a_twentieth_of_the_time(copy):
    class Run:
        main, ended, out, report_seconds, history = True, False, copy, 5.1, [{"step": 10}]
        elapsed = staticmethod(lambda: 100.0)

    def written(**changes) -> bool:
        (copy / "report.html").unlink(missing_ok=True)
        run = Run()
        vars(run).update(changes)
        report.refresh(run)
        return (copy / "report.html").exists()
    assert not written()
    assert written(report_seconds=4.9) and written(ended=True)
    assert not written(report_seconds=0.0, history=[{"step": 11}]) and not written(report_seconds=0.0, main=False)
    assert written(report_seconds=0.0, history=[{"step": 11, "heldout_greedy": 0.5}])


def test_a_folder_that_holds_no_run_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2 and "no run.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_spoilt_line_is_named(copy, capsys):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write("not JSON\n")
    assert report.main([str(copy)]) == 2 and "metrics.jsonl, byte" in capsys.readouterr().err


def test_the_policy_names_the_hash_of_the_one_script_and_of_the_one_style(finished):
    page = (finished / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
        assert len(re.findall(rf"<{tag}[ >]", page)) == (2 if tag == "script" else 1)      # and the data
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy


def test_data_cannot_leave_their_element():
    hostile = "</script><!-- <script> ]]> \u2028 \u2029 \ud800 & &lt; {{data}} \0"
    written = report.escaped({hostile: hostile})
    assert written.isascii() and not set("<>&") & set(written) and json.loads(written) == {hostile: hostile}
    assert report.html({"text": hostile}).count("</script>") == 2
