"""report.py: what the page of a real run holds, in Python; what it shows and that nothing in it acts, in Chromium."""
import base64
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
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
    """The folder of a real run of three steps, with its page."""
    out = tmp_path_factory.mktemp("report") / "out"
    assert train.main(["--out", str(out), "--steps", "3", *SMALL]) == 0
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
    assert data["metrics"] == metrics and data["steps"] == 3
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
    for step in (1, 3):
        fresh = [row for row in kept if row["step"] == row["sampled"] == step]
        assert len(fresh) == sum(line["step"] == step for line in sampled)
    rated = sorted((line["reward"]["total"], line["advantage"], line["task"], line["sample"]) for line in sampled
                   if line["step"] == 2 and line["advantage"] is not None)
    found = [(line["reward"]["total"], line["advantage"]) for row in kept for line in sampled if row["step"] == 2
             if (line["step"], line["task"], line["sample"]) == (2, row["task"], row["sample"])]
    assert len(found) == 2 and sorted(found) == [rated[0][:2], rated[-1][:2]]
    data = held(finished / "report.html")
    in_loss = [record for record in data["tokens"] if "now" in record]
    assert in_loss and all(len(record["ratio"]) == len(record["sampled"]) for record in in_loss)
    marks = [(group["step"], row["mark"]) for group in data["groups"] for row in group["rows"] if "mark" in row]
    assert sorted(marks) == [(step, mark) for step in (1, 2, 3) for mark in ("best", "worst")]


def test_replays_and_fates(finished):
    data, metrics = held(finished / "report.html"), lines(finished / "metrics.jsonl")
    assert any(row["replayed"] for row in metrics)
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
        file.write('{"step": 3, "ta')                            # a kill
    before = len(held(copy / "report.html")["groups"])
    rewrite(copy / "metrics.jsonl", lambda i, row: row.update(kl=float("nan")))
    data = held(report.write(copy))
    assert len(data["groups"]) == before and data["metrics"][1]["kl"] is None


def test_a_large_run_leaves_out_the_least_telling(copy, monkeypatch):
    whole = held(copy / "report.html")["not_shown"]
    assert whole["texts"] == whole["trajectories"]
    monkeypatch.setattr(report, "BUDGET", 50_000)
    data = held(report.write(copy))
    rows = [row for group in data["groups"] for row in group["rows"]]
    assert 6 < data["not_shown"]["texts"] < len(rows) == data["not_shown"]["trajectories"]
    assert 6 < data["not_shown"]["tokens"] < whole["tokens"]
    assert all(row["turns"] and row["tokens"] for row in rows if "mark" in row)
    assert (copy / "report.html").stat().st_size < 150_000


def test_a_page_that_cannot_be_written_does_not_end_the_run(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "report.html").unlink()
    (out / "report.html").mkdir()                                # a folder cannot be replaced by a file
    assert train.main(["--out", str(out), "--resume", "--steps", "4"]) == 0
    assert "no report.html: IsADirectoryError" in capsys.readouterr().out
    assert lines(out / "metrics.jsonl")[-1]["step"] == 4


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


# ------------------------------------------------------------------------------------------------------- in Chromium
@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        try:        # as root Chromium refuses its sandbox
            browser = p.chromium.launch(executable_path=system, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        except playwright.Error as error:
            pytest.skip(f"no Chromium (apt-get install chromium): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page; at the end of the test nobody has complained, asked for anything or opened anything."""
    noise, contexts = [], []

    def opened(file: Path, fragment: str = "run", width: int = 1600, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (noise.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("popup", lambda popup: noise.append(f"popup: {popup.url}"))
        page.on("request", lambda request: request.url.startswith(file.as_uri()) or noise.append(request.url))
        page.goto(f"{file.as_uri()}#{fragment}")
        return page
    yield opened
    for context in contexts:
        context.close()
    assert not noise


def show(page, fragment: str):
    if page.evaluate("location.hash") != f"#{fragment}":
        follow(page, lambda: page.evaluate("fragment => { location.hash = fragment; }", fragment))


def follow(page, act: Callable):
    """Do what leads to another view, and wait for it: the page's own handler was registered first, so it has run."""
    page.evaluate("""() => {
        window.followed = new Promise(done => addEventListener("hashchange", done, {once: true}));
    }""")
    act()
    page.evaluate("() => window.followed")


def text_of(page, selector: str) -> str:
    return page.locator(selector).inner_text()


@pytest.mark.browser
def test_charts_have_as_many_points_as_metrics_has_lines(finished, opened):
    page, metrics = opened(finished / "report.html"), lines(finished / "metrics.jsonl")
    keys = set(page.locator("circle[data-key]").evaluate_all("nodes => nodes.map(node => node.dataset.key)"))
    assert {"reward", "accuracy", "exec_rate", "entropy", "kl", "clip_fraction", "signal_share", "queue_size",
            "queue_age", "replayed", "tokens_per_second", "seconds_sampling", "heldout_greedy"} <= keys
    for key in keys:
        steps = page.locator(f"circle[data-key={key}]").evaluate_all("nodes => nodes.map(n => Number(n.dataset.step))")
        assert steps == [row["step"] for row in metrics if row.get(key) is not None], key
    chart = page.locator("figure", has_text="KL to the reference")         # the arrow keys visit every line
    chart.locator("svg[tabindex]").focus()
    page.keyboard.press("Home")
    for row in metrics:
        assert chart.locator("thead").inner_text().split()[:2] == ["step", str(row["step"])]
        shown = chart.locator("tbody td").first.inner_text()
        assert shown == "\N{EN DASH}" if row["kl"] is None else float(shown) == pytest.approx(row["kl"], rel=0.06)
        page.keyboard.press("ArrowRight")


@pytest.mark.browser
def test_hovering_a_chart_shows_the_numbers_of_its_step_in_all_charts(finished, opened):
    page, metrics = opened(finished / "report.html"), lines(finished / "metrics.jsonl")
    point = page.locator("circle[data-key=reward][data-step='2']").bounding_box()
    page.mouse.move(point["x"] + 1, point["y"] + 30)
    charts = {"Reward and accuracy": "reward", "Entropy": "entropy", "Groups in the queue": "queue_size"}
    for title, key in charts.items():
        chart = page.locator("figure", has_text=title)
        assert chart.locator("thead").inner_text().split()[:2] == ["step", "2"]
        assert float(chart.locator("tbody td").first.inner_text()) == pytest.approx(metrics[2][key], rel=1e-3)


@pytest.mark.browser
def test_from_the_run_to_a_group_to_a_trajectory_to_a_token(finished, opened):
    page, kept = opened(finished / "report.html"), lines(finished / "tokens.jsonl")
    follow(page, page.get_by_role("link", name="Groups").click)
    follow(page, page.locator(".list a").first.click)
    assert page.locator(".card").count() == 4
    sampled = lines(finished / "trajectories.jsonl")
    for card, line in zip(page.locator(".card").all(), sampled):
        assert f"reward R\n{line['reward']['total']:.4g}" in card.inner_text()
        assert f"stopped by\n{line['stop_reason']}" in card.inner_text()
    follow(page, page.locator(".card a").nth(1).click)
    assert page.locator(".t").count() == len(kept[1]["ids"])
    record = next(row for row in kept if (row["task"], row["sample"]) == (sampled[1]["task"], 1))
    places = [i for i, bit in enumerate(record["mask"]) if bit]
    for i in (places[0], places[5], places[-1]):
        page.locator(f".t[data-i='{i}']").hover()
        assert text_of(page, "[data-number=id]") == str(record["ids"][i])
        assert json.loads(text_of(page, ".inspector .answer")) == record["texts"][i]
        for name in ("behaviour", "now", "old", "ref", "entropy"):
            shown = float(text_of(page, f"[data-number={name}]").replace("\N{MINUS SIGN}", "-"))
            recorded = record["logps" if name == "behaviour" else name][i]
            assert shown == pytest.approx(recorded, rel=5e-4, abs=1e-7), name
        assert float(text_of(page, "[data-number=weight]")) == pytest.approx(1, abs=1e-3)        # fresh: c = 1
    page.locator(".t[data-i='0']").hover()
    assert text_of(page, "[data-number=mask]") == "0" and page.locator("[data-number=behaviour]").count() == 0
    assert "".join(page.locator(".t").all_text_contents()) == "".join(record["texts"])


@pytest.mark.browser
def test_every_colour_of_the_tokens(finished, opened):
    page, data = opened(finished / "report.html"), held(finished / "report.html")
    place = next(f"trajectory-{g}-{r}" for g, group in enumerate(data["groups"]) for r, row in enumerate(group["rows"])
                 if row["tokens"] and "now" in data["tokens"][row["tokens"][0]])
    show(page, place)
    colours = "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)"
    seen = set()
    for name in ("mask", "log-prob", "advantage \u00d7 weight", "entropy"):
        page.get_by_label(name).check()
        seen.add(tuple(page.locator(".t").evaluate_all(colours)))
    assert len(seen) == 4 and all(len(set(found)) > 1 for found in seen)
    assert len(set(page.locator(".block.forced .t").evaluate_all(colours))) == 1


@pytest.mark.browser
def test_a_replayed_trajectory_is_shown_at_each_of_its_updates(finished, opened):
    page, data = opened(finished / "report.html"), held(finished / "report.html")
    g, r, i, record = next((g, r, i, record) for g, group in enumerate(data["groups"])
                           for r, row in enumerate(group["rows"]) for i, use in enumerate(row["tokens"])
                           if (record := data["tokens"][use])["step"] in group["replayed"] and "now" in record)
    show(page, f"trajectory-{g}-{r}-{i}")
    assert re.search(rf"update of (step \d+, )*step {record['step']}\. It was replayed", text_of(page, "main"))
    assert any(abs(c - 1) > 1e-6 for c in record["weight"])                      # the policy has moved on
    j = max(range(len(record["weight"])), key=lambda j: abs(record["weight"][j] - 1))
    page.locator(f".t[data-i='{record['sampled'][j]}']").hover()
    assert float(text_of(page, "[data-number=weight]")) == pytest.approx(record["weight"][j], rel=1e-3)


@pytest.mark.browser
@pytest.mark.parametrize("metrics", [0, 1])
def test_the_page_of_a_run_that_has_just_begun(copy, opened, metrics):
    (copy / "trajectories.jsonl").unlink()
    (copy / "tokens.jsonl").unlink()
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("".join(row + "\n" for row in rows[:metrics]))
    page = opened(report.write(copy))
    assert "Settings" in text_of(page, "main") and page.locator("figure").count() == metrics
    for fragment in ("groups", "trajectory", "group-7", "trajectory-3-9", "nonsense-x"):
        show(page, fragment)
        assert text_of(page, "main")


@pytest.mark.browser
def test_search_and_filters(finished, opened):
    page, sampled = opened(finished / "report.html", "groups"), lines(finished / "trajectories.jsonl")

    def shows(rows: int):
        page.locator("main [role=status]", has_text=re.compile(rf"^{rows} traj")).wait_for(timeout=10_000)
    shows(len(sampled))
    word = sampled[0]["question"].split()[-1]
    page.locator("#search").fill(word.upper())
    found = sum(word.lower() in json.dumps(line).lower() for line in sampled)
    assert 0 < found < len(sampled)
    shows(found)
    page.locator("#search").fill("no such text anywhere")
    shows(0)
    assert page.locator(".list a").count() == 0
    page.get_by_role("button", name="Clear").click()
    page.locator("select[data-filter=outcome]").select_option("right")
    shows(sum(line["reward"]["answer"] == 1 for line in sampled))
    page.locator("select[data-filter=step]").select_option("2")
    shows(sum(line["reward"]["answer"] == 1 and line["step"] == 2 for line in sampled))
    page.get_by_role("button", name="Clear").click()
    for name, key in (("stop", "stop_reason"), ("family", "family")):
        page.locator(f"select[data-filter={name}]").select_option(sampled[0][key])
        shows(sum(line[key] == sampled[0][key] for line in sampled))
        page.get_by_role("button", name="Clear").click()
    page.locator("select[data-filter=tool]").select_option("lookup")
    shows(sum("lookup(" in "".join(step["code"] or "" for step in line["steps"]) for line in sampled))


@pytest.mark.browser
def test_with_a_keyboard_alone(finished, opened):
    page = opened(finished / "report.html")

    def tab_to(selector: str):
        for _ in range(200):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached")
    page.locator("body").press("Home")
    tab_to("figure svg")
    page.keyboard.press("ArrowLeft")
    assert "step 2" in text_of(page, "#status")
    page.reload()
    for selector in ("#nav-groups", ".list a", ".card a"):
        tab_to(selector)
        follow(page, lambda: page.keyboard.press("Enter"))
    tab_to(".t")
    first = int(text_of(page, "[data-number=position]"))
    page.keyboard.press("ArrowRight")
    assert int(text_of(page, "[data-number=position]")) == first + 1
    page.keyboard.press("End")
    assert int(text_of(page, "[data-number=position]")) == page.locator(".t").count() - 1
    assert page.locator(".t:focus").count() == 1


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_no_horizontal_scrolling(finished, evaluated, opened, width, scheme):
    for file in (finished / "report.html", evaluated / "report.html"):
        page = opened(file, "run", width, scheme)
        for fragment in ("run", "groups", "group-0", "trajectory-0-0", "trajectory-1-1"):
            show(page, fragment)
            page.locator("details").evaluate_all("nodes => nodes.forEach(node => { node.open = true; })")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, fragment


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(finished, opened, scheme):
    """WCAG AA: a contrast of at least 4.5 of every text colour on both backgrounds."""
    page = opened(finished / "report.html", scheme=scheme)
    colours = page.evaluate("""() => Object.fromEntries(["page", "panel", "ink", "muted", "blue", "orange", "purple",
        "green"].map(name => [name, getComputedStyle(document.documentElement).getPropertyValue("--" + name)]))""")

    def luminance(colour: str) -> float:
        colour = colour.strip("# ")
        colour = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(colour[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    for ground in ("page", "panel"):
        for ink in ("ink", "muted", "blue", "orange", "purple", "green"):
            low, high = sorted((luminance(colours[ground]), luminance(colours[ink])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, ink)


@pytest.mark.browser
def test_a_failure_category_leads_to_its_questions(evaluated, opened):
    page, records = opened(evaluated / "report.html"), lines(evaluated / "trajectories.jsonl")
    results = json.loads((evaluated / "results.json").read_text())
    assert f"{100 * results['accuracy']:.1f} %" in text_of(page, "main")
    for category, n in results["categories"].items():
        show(page, "run")
        follow(page, page.get_by_role("button", name=category, exact=True).click)
        assert text_of(page, "main [role=status]").startswith(f"{n} traj") and n == sum(
            record["category"] == category for record in records)
    show(page, "run")
    follow(page, page.get_by_role("button", name="level 2").click)
    assert int(text_of(page, "main [role=status]").split()[0]) == sum(record["level"] == "2" for record in records)
    follow(page, page.locator(".list a").first.click)
    follow(page, page.locator(".card a").first.click)
    assert page.locator(".t").count() > 40


# ------------------------------------------------------------------------------------------------------ hostile text
ACT = "window.pwned=1"
INJECTIONS = [
    f"<script>{ACT}</script>", f"<ScRiPt>{ACT}</sCrIpT>", f"</script><script>{ACT}</script>",
    f"</script ><script>{ACT}//", "<!--<script>", f"--><script>{ACT}</script>", "<!-- <script> <!-- </script>",
    f"]]><script>{ACT}</script>", f"<script type=module>{ACT}</script>",
    "<script src=http://127.0.0.1:9/x.js></script>", f"<img src=x onerror={ACT}>",
    "<img src=http://127.0.0.1:9/x.png>", f"<svg onload={ACT}>", f"<svg><script>{ACT}</script></svg>",
    f"<svg><animate onbegin={ACT} attributeName=x dur=1s>", f"<body onload={ACT}>", "<plaintext>", "<title>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'>", "<iframe src=javascript:parent.pwned=1>",
    "<object data=javascript:parent.pwned=1>", "<embed src=http://127.0.0.1:9/x.swf>",
    f"<a href=javascript:{ACT}>a</a>", f"javascript:{ACT}", "data:text/html,<script>opener.pwned=1</script>",
    f"[click](javascript:{ACT})", f"<details open ontoggle={ACT}>", f"<input autofocus onfocus={ACT}>",
    f"<video><source onerror={ACT}>", f"<math><mtext><style><img src=x onerror={ACT}></style>",
    "<style>*{display:none!important}</style>", "<style>@import 'http://127.0.0.1:9/x.css'</style>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>", "<base href=http://127.0.0.1:9/>",
    "<form action=http://127.0.0.1:9/><button>go</button></form>", f'" onmouseover="{ACT}',
    f"' autofocus onfocus='{ACT}", "`${" + ACT + "}`", "${" + ACT + "}",
    "{{constructor.constructor('" + ACT + "')()}}", "{{data}}", f"<% {ACT} %>", "{{hash of the script}}",
    f"\\u003cscript\\u003e{ACT}\\u003c/script\\u003e", "&lt;script&gt; &amp; &#x3c;b&#62;", f"\u2028{ACT}\u2029",
    f'\\"; {ACT}; //', "'\"><b>bold</b>", "__proto__", "constructor", "toString", "expression(1)",
    "\u202egnp.exe\u202c", "\u2066one\u2069 \u200ftwo\u200e", "a\u200bb\u200cc\u200dd\ufeff\u2060e",
    "soft\u00adhyphen", "tags \U000e0041\U000e007f", "half \ud800 of a pair \udfff",
    "\0 \x07 \x1b[31mred\x1b[0m \x7f \x85", "one\r\ntwo\rthree", "Z" + "\u0351\u0334" * 500, "\u3164\u115f",
    "cafe\u0301 caf\u00e9", "url(http://127.0.0.1:9/x)", "#trajectory-0-0", "[... 5 tokens left out ...]", "U+202E",
    "\n" * 300, "NaN", f"```python\n{ACT} # '''\n```", "\t\ta  b   c \n", "\uffff\ufdd0",
]
LONG = ["x" * 10_000_000, f"<img src=x onerror={ACT}>" * 330_000, "\u202e<b>" * 2_500_000]
RECOVERED = """([selector, encoded]) => {
    const walk = node => node.nodeType === 3 ? node.data
        : node.classList.contains("hidden") ? String.fromCodePoint(parseInt(node.textContent.slice(2), 16))
        : [...node.childNodes].map(walk).join("");
    return [...document.querySelectorAll(selector)].map(walk).join("\\u0000|").includes(JSON.parse(encoded));
}"""


@pytest.fixture(scope="module")
def hostile(finished, tmp_path_factory) -> Path:
    """The folder of a run in which every text is an injection: a group each, one sibling with tokens, one without."""
    out = tmp_path_factory.mktemp("hostile") / "out"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("state", "best", "*.safetensors"))
    base, record, metrics = (lines(out / name)[0] for name in ("trajectories.jsonl", "tokens.jsonl", "metrics.jsonl"))
    rows, records = [], []
    for i, whole in enumerate([*INJECTIONS, *LONG]):
        bad = whole[:5000]
        turn = base["steps"][0] | {"text": bad, "code": bad, "observation": whole, "status": bad}
        for sample in (0, 1):
            rows.append(base | {"task": bad[:200] + str(i), "task_id": bad[:200], "family": bad[:200], "question": bad,
                                "expected": bad, "answer": bad, "stop_reason": bad, "error": bad, "steps": [turn],
                                "sample": sample})
        texts = [bad if j % 40 == 39 else text for j, text in enumerate(record["texts"])]
        records.append(record | {"task": bad[:200] + str(i), "sample": 0, "sampled": base["step"], "seed": base["seed"],
                                 "texts": texts, "ids": [1000 * i + j for j in range(len(texts))]})
    (out / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    figures = {"n": 4, "greedy": 0.5, "sampled": 0.25, "pass@8": None}
    families = {"heldout_families": {bad: figures for bad in INJECTIONS}}
    (out / "metrics.jsonl").write_text("".join(json.dumps(metrics | families | {
        "step": step, "warnings": INJECTIONS, "replayed_groups": []}) + "\n" for step in (0, 1)))
    run = json.loads((out / "run.json").read_text())
    run["config"] |= {f"setting {i}": bad for i, bad in enumerate(INJECTIONS)}
    (out / "run.json").write_text(json.dumps(run | {"model": INJECTIONS[0], "defaults": {"setting 3": INJECTIONS[4]}}))
    report.write(out)
    return out


def nothing_acted(page):
    """No variable set, and in the document only elements and attributes that the template's script makes."""
    assert page.evaluate("window.pwned") is None
    tags, attributes, links = page.evaluate("""() => {
        const all = [...document.querySelectorAll("*")], names = all.flatMap(node => node.getAttributeNames());
        return [[...new Set(all.map(node => node.localName))], [...new Set(names)],
                all.filter(node => node.hasAttribute("href")).map(node => node.getAttribute("href"))];
    }""")
    assert not set(tags) & {"img", "iframe", "object", "embed", "base", "link", "video", "source", "math", "animate"}
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "action", "srcdoc")]
    assert all(re.fullmatch(r"#[a-z]+(-\d+)*", link) for link in links)
    assert page.evaluate("document.querySelectorAll('script, style, meta, form').length") <= 8
    assert not page.evaluate("""() => {                          // nothing unseen, nothing that turns the writing
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
        while (walker.nextNode()) found.push(walker.currentNode.data);
        const unseen = /[\\u202a-\\u202e\\u2066-\\u2069\\u200b-\\u200f\\u2060\\ufeff\\u00ad\\u0000\\u001b\\u3164]/;
        return unseen.test(found.join(""));
    }""")


@pytest.mark.browser
def test_hostile_text_is_shown_and_does_nothing(hostile, opened):
    assert len(INJECTIONS) >= 40
    page = opened(hostile / "report.html")
    page.wait_for_selector(".charts")
    encoded = [json.dumps(bad) for bad in INJECTIONS]
    for bad in encoded:
        for selector in (".warnings", ".shares", "details, table"):
            assert page.evaluate(RECOVERED, [selector, bad]), (selector, bad)
    nothing_acted(page)
    for i, bad in enumerate(encoded):
        show(page, f"group-{i}")
        assert page.evaluate(RECOVERED, ["h2", bad])
        nothing_acted(page)
        show(page, f"trajectory-{i}-0")
        for selector in ("h2", "dl", ".stream"):
            assert page.evaluate(RECOVERED, [selector, bad]), (selector, bad)
        page.locator(".t[data-i='39']").dispatch_event("pointerover")
        assert json.loads(text_of(page, ".inspector .answer") or '""') is not None
        nothing_acted(page)
        show(page, f"trajectory-{i}-1")
        assert page.evaluate(RECOVERED, [".block.sampled", bad]) and page.evaluate(RECOVERED, [".block.forced", bad])
        nothing_acted(page)
    show(page, "groups")
    page.locator("#search").fill("onerror")
    page.locator("main [role=status]", has_text=re.compile(" of ")).wait_for()            # not all are shown any more
    assert 0 < page.locator(".list a").count() < len(INJECTIONS)
    for name in ("family", "stop"):
        assert page.locator(f"select[data-filter={name}] option").count() > 40
    nothing_acted(page)


@pytest.mark.browser
def test_ten_megabytes_of_hostile_text_are_cut_where_it_is_told(hostile, opened):
    assert (hostile / "report.html").stat().st_size < 12e6
    page = opened(hostile / "report.html", width=360)
    for i, bad in enumerate(LONG, len(INJECTIONS)):
        show(page, f"trajectory-{i}-1")
        for part in (bad[:50_000], f"[... {len(bad) - 100_000} characters left out of this page ...]", bad[-50_000:]):
            assert page.evaluate(RECOVERED, [".block.forced", json.dumps(part)])
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        nothing_acted(page)


@pytest.mark.browser
def test_hostile_text_in_an_evaluation(evaluated, tmp_path, opened):
    out = tmp_path / "evaluation"
    shutil.copytree(evaluated, out)
    first = lines(out / "trajectories.jsonl")[0]
    fields = ("question", "gold", "answer", "level", "category", "attachment")
    rows = [first | {"task_id": bad + str(i)} | dict.fromkeys(fields, bad) for i, bad in enumerate(INJECTIONS)]
    (out / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = json.loads((out / "results.json").read_text())
    results |= {"categories": dict.fromkeys(INJECTIONS, 1), "levels": dict.fromkeys(INJECTIONS, results["text_only"])}
    (out / "results.json").write_text(json.dumps(results))
    page = opened(report.write(out))
    for bad in map(json.dumps, INJECTIONS):
        assert page.evaluate(RECOVERED, [".shares .name", bad])
    follow(page, page.locator(".shares button", has_text="<img src=x").last.click)
    assert page.locator(".list a").count() == 1
    nothing_acted(page)
    for i, bad in enumerate(map(json.dumps, INJECTIONS)):
        show(page, f"trajectory-{i}-0")
        assert page.evaluate(RECOVERED, ["dl", bad]), bad
        nothing_acted(page)


@pytest.mark.browser
def test_the_policy_stops_what_markup_would_do(browser, finished):
    """The last wall alone: even a script of the page that made markup of a text could not make it act."""
    page = browser.new_page()
    page.goto((finished / "report.html").as_uri())
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"http://127.0.0.1:{server.getsockname()[1]}"
        for attack in ("document.body.innerHTML = '<img src=x onerror=window.pwned=1>'",
                       "document.body.setAttribute('onclick', 'window.pwned=1'); document.body.click()",
                       "const s = document.createElement('script'); s.text = 'window.pwned=1'; document.body.append(s)",
                       f"const i = new Image(); i.src = '{there}/x.png'; document.body.append(i)",
                       "setTimeout('window.pwned=1')", f"fetch('{there}').catch(() => 0)",
                       f"const f = document.createElement('iframe'); f.src = '{there}'; document.body.append(f)",
                       f"document.body.style.cssText = 'background: url({there})'"):
            page.evaluate(f"() => {{ try {{ {attack} }} catch (error) {{ return String(error); }} }}")
        page.wait_for_timeout(500)
        assert page.evaluate("window.pwned") is None
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):                        # Chromium may connect ahead, but it asks for nothing
            while True:
                connection, _ = server.accept()
                connection.settimeout(0.5)
                assert not connection.recv(1)
    page.close()
