"""README, MEASUREMENTS, CONTRIBUTING and LABS name only what exists: files, functions, tests, flags, keys, minutes."""
import ast
import importlib
import json
import re
from pathlib import Path

import pytest

import ask
import eval_gaia
import report
import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "MEASUREMENTS.md", "CONTRIBUTING.md", "LABS.md")}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
MADE = {"metrics.jsonl", "trajectories.jsonl", "tokens.jsonl", "run.json", "results.json", "settings.json",
        "submission.jsonl", "adapter_model.safetensors", "adapter_config.json",     # by a run
        "train.jsonl", "my_tools.py"}                                               # by you


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def names_in(body: list) -> set[str]:
    """Functions, classes and assigned names of a module or class, with those of its classes as Class.name."""
    found = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner}" for inner in names_in(node.body)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


# ------------------------------------------------------------------------------------------- what is named exists
@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in PAGES[page].splitlines() if line.startswith("#")}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists() if path else anchor in headings, link
    assert links


def test_every_file_that_is_named_exists():
    named = re.findall(r"`([\w./-]+\.(?:py|md|svg|jsonl|json|toml|txt|safetensors))\b", ALL)
    named += re.findall(r"(?:^|\s)(tests/[\w./-]+\.\w+)", ALL, re.M)
    for name in set(named) - MADE:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    assert len(set(named)) > 30


def test_every_function_that_is_named_exists():
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", ALL)
    for file, name in named:
        assert name in names_in(tree(file).body), f"{file}: {name}"
    assert len(named) > 40


def test_every_test_that_is_named_exists():
    named = re.findall(r"\b(test_\w+\.py)::(test_\w+)", ALL)
    for file, name in named:
        assert name in names_in(tree(f"tests/{file}").body), f"{file}::{name}"
    assert len(named) > 20


def test_every_file_of_the_repository_is_in_the_file_map():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("machinery/*.py"), *ROOT.glob("scripts/*.py")]:
        if file.name != "__init__.py":
            assert f"`{file.relative_to(ROOT)}`" in README, file


def test_the_minutes_are_those_of_the_lines():
    """12 s per line of code and text. "up to `f`": the lines before f; "then `C`": those of C; "all"; "`C`"."""
    rows = re.findall(r"^\| `(\w+\.py)` \|[^|]+\| ([^|]+) \| (\d+) \|$", README, re.M)
    for file, read, minutes in rows:
        lines = (ROOT / file).read_text().splitlines()
        nodes = {node.name: node for node in tree(file).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        chosen = set(range(len(lines))) if read == "all" else set()
        if end := re.search(r"up to `(\w+)`", read):
            chosen |= set(range(nodes[end[1]].lineno - 1))
        for name in re.findall(r"`(\w+)`", re.sub(r"up to `\w+`", "", read)):
            chosen |= set(range(nodes[name].lineno - 1, nodes[name].end_lineno))
        needed = 0.2 * sum(bool(lines[i].strip()) for i in chosen)
        assert int(minutes) == pytest.approx(needed, rel=0.15), f"{file}: {minutes} minutes, by its lines {needed:.0f}"
    assert len(rows) == 10 and sum(int(minutes) for *_, minutes in rows[:5]) <= 240, "the method is one evening"


def test_the_loops_figure_names_files_that_exist_and_no_currentcolor():
    figure = (ROOT / "figures" / "loop.svg").read_text()
    named = set(re.findall(r"\b(\w+\.py)\b", figure))
    assert {"tasks.py", "rollout.py", "executor.py", "tools.py", "reward.py", "grpo.py", "queue.py"} <= named
    assert all((ROOT / name).exists() for name in named) and "currentColor" not in figure


# ----------------------------------------------------------------------------------------------------- commands
def commands() -> list[tuple[str, list[str], list[str]]]:
    """(module, its flags, all its arguments) of every python command on the pages, in code blocks and in `...`."""
    found = []
    for line in re.findall(r"(?:python|torchrun) [^`\n]+", ALL):
        script = re.search(r"(?:-m (scripts\.\w+)|(?<!\S)(\w+)\.py)(?: (.*))?$", line.partition("  #")[0])
        if script and "pytest" not in line:
            arguments = (script[3] or "").split()
            found.append((script[1] or script[2], [a for a in arguments if a.startswith("--")], arguments))
    return found


def test_every_command_names_a_script_and_flags_that_it_knows(monkeypatch, capsys):
    known, found = {}, commands()
    for module, flags, arguments in found:
        section = arguments[:1] if module == "scripts.bench" else []
        if (module, *section) not in known:
            monkeypatch.setattr("sys.argv", [module, *section, "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(module).main()
            known[module, *section] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert set(flags) <= known[module, *section], f"{module}: {flags}"
    scripts = {f"scripts.{file.stem}" for file in ROOT.glob("scripts/*.py")} - {"scripts.__init__"}
    scripts -= {"scripts.bench_step", "scripts.measure"}        # parts of bench
    assert {module for module, *_ in found} == {"train", "eval_gaia", "ask", "report", *scripts}


def test_every_flag_that_the_text_names_exists(monkeypatch, capsys):
    known = {"--security-opt", "--enable-lora"}                 # Docker's, vLLM's
    scripts = [importlib.import_module(f"scripts.{name}") for name in ("data", "bench", "study_queue", "warm_start")]
    for module in (train, eval_gaia, ask, report, *scripts):
        benchmarks = (["executor"], ["rollout"], ["update"], ["step"])
        for section in benchmarks if module.__name__ == "scripts.bench" else ([],):
            monkeypatch.setattr("sys.argv", ["x", *section, "--help"])
            with pytest.raises(SystemExit):
                module.main()
            known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[\w-]+)", ALL)) <= known


# ----------------------------------------------------------------------------------------------------- the glossary
def keys(value) -> set[str]:
    """All keys at any depth, but those that are data: families, levels, suffixes, categories, pass@k's k."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    if not isinstance(value, dict):
        return set()
    data = {"heldout_families", "levels", "attachments", "categories", "tool_outcomes", "pass_at_k", "maj_at_k"}
    inner = [keys(list(v.values()) if k in data and isinstance(v, dict) else v) for k, v in value.items()]
    return set(value).union(*inner)


def test_the_glossary_has_every_key_of_a_real_run(tmp_path):
    out, evaluation = tmp_path / "out", tmp_path / "evaluation"
    assert train.main(["--out", str(out), "--steps", "1", "--groups", "2", "--group-size", "4", "--eval-tasks", "1",
                       "--temperature", "1.3", "--deterministic"]) == 0
    assert eval_gaia.main(["--ckpt", str(out), "--limit", "2", "--samples", "2", "--out", str(evaluation)]) == 0
    written = []
    logs = [out / name for name in ("metrics.jsonl", "trajectories.jsonl", "tokens.jsonl")]
    for file in (*logs, evaluation / "trajectories.jsonl"):
        written += [json.loads(line) for line in file.read_text().splitlines()]
    written += [json.loads((evaluation / name).read_text()) for name in ("results.json", "settings.json")]
    run = json.loads((out / "run.json").read_text())
    written.append(dict.fromkeys(run))
    sampling = keys(run["sampling"])                            # named in train.py's --help
    explained = set(re.findall(r"`([^`\n]+)`", PAGES["MEASUREMENTS.md"].partition("# Glossary")[2]))
    assert keys(written) - sampling <= explained
    metrics = keys([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    table = PAGES["MEASUREMENTS.md"].partition("## Every key of `metrics.jsonl`")[2].partition("\n## ")[0]
    named = {key for row in re.findall(r"^\| (`[^|]+) \|", table, re.M) for key in re.findall(r"`(\w+)`", row)}
    assert named <= metrics, "the glossary explains a key that no run writes"
