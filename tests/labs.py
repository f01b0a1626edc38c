"""Runs the labs of LABS.md: its commands, its changes, three seeds; one line of results/labs.jsonl per finished run.

    python -m tests.labs                        # all runs that are missing in the file; about a CPU-minute each
    python -m tests.labs 3                      # those of lab 3
    python -m tests.labs --read lab/a lab/b     # the measures of two runs that you made by hand
    python -m tests.labs --table                # every lab out of the file; runs nothing

Owns no command and no change: both are read from LABS.md, and a changed run takes place in a copy of the repository.
Reading order: this text, Arm, arms, changed, one_run, effect.

Written down before the first run. The settings are those of LABS.md, chosen before any result was seen. The main
measure is *right*: the share of right answers among all trajectories that a run samples, the mean over its steps. All
arms of a lab sample equally many trajectories, with one seed of the same tasks, so it says how soon a run learns. An
effect *shows* if the three paired differences (same seed) have one sign, and their mean is more than twice its standard
error. Three seeds are few: an effect that shows is a sign, no proof, and one that does not show may exist.
This file holds no test; tests/test_labs.py does.
"""
import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILE, SEEDS = ROOT / "results" / "labs.jsonl", (0, 1, 2)
OTHERS = {"code_ran": 3, "signal": 2, "kl": 3, "greedy": 2, "sampled": 2}         # measures beside `right`: digits


class Arm(NamedTuple):
    lab: int
    name: str                   # the folder that --out names
    arguments: list[str]        # of train.py, without --out and --seed
    change: str                 # the lab's diff, or nothing


class Edit(NamedTuple):
    file: str
    old: str
    new: str


# --------------------------------------------------------------------------------------------- what LABS.md says
def sections() -> dict[int, str]:
    """number of the lab -> its text; 0: what stands before the first."""
    parts = re.split(r"^## (\d)\. ", (ROOT / "LABS.md").read_text(), flags=re.M)
    return {0: parts[0]} | {int(n): text for n, text in zip(parts[1::2], parts[2::2])}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def edits(diff: str) -> list[Edit]:
    """The edits of a diff block: a file's name, then lines that begin with " ", "-" or "+"."""
    found = []
    for part in re.split(r"^(?=\w+\.py\n)", diff, flags=re.M)[1:]:
        file, *lines = part.splitlines()
        old = "\n".join(line[1:] for line in lines if line[:1] != "+")
        new = "\n".join(line[1:] for line in lines if line[:1] != "-")
        found.append(Edit(file, old, new))
    return found


def arms() -> list[Arm]:
    """Every command `python train.py ... --out lab/NAME` in the order of the page. "# changed": with the lab's diff."""
    text = sections()
    settings = dict(re.findall(r'^(\w+)="(.*)"$', text[0], re.M))
    found = []
    for lab in range(1, 7):
        diff = "".join(blocks(text[lab], "diff"))
        for line in re.findall(r"^python train\.py (.*)$", text[lab], re.M):
            command, _, comment = line.partition("#")
            while "$" in command:
                command = re.sub(r"\$(\w+)", lambda match: settings[match[1]], command)
            words = command.split()
            at = words.index("--out")
            name = words[at + 1].removeprefix("lab/")
            found.append(Arm(lab, name, words[:at] + words[at + 2:], diff if "changed" in comment else ""))
    return found


def changed(diff: str, copy: Path) -> Path:
    """The repository in `copy`, with the diff's edits."""
    skip = shutil.ignore_patterns(".git", "out*", "lab", "__pycache__", ".hypothesis", ".pytest_cache")
    shutil.copytree(ROOT, copy, ignore=skip, symlinks=True)
    for edit in edits(diff):
        source = (copy / edit.file).read_text()
        if source.count(edit.old + "\n") != 1:
            raise SystemExit(f"{edit.file} does not hold this exactly once:\n{edit.old}")
        (copy / edit.file).write_text(source.replace(edit.old + "\n", edit.new + "\n"))
    return copy


# ------------------------------------------------------------------------------------------------------- one run
def train(arm: Arm, seed: int, tree: Path, *more: str) -> Path:
    """Run the arm's command in `tree`, on one thread; its folder."""
    command = [sys.executable, "train.py", *arm.arguments, "--seed", str(seed), "--out", f"lab/{arm.name}", *more]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return tree / "lab" / arm.name


def read(folder: Path) -> dict:
    """The measures of a run: means over its steps; kl and entropy those of the last three; held-out accuracy after."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = rows[1:]

    def mean(key: str, chosen: list[dict] = steps) -> float:
        values = [row[key] for row in chosen if row[key] is not None]       # null: a step without an update
        return round(fmean(values), 4)
    return {
        "right": mean("accuracy"),
        "code_ran": mean("exec_rate"),
        "signal": mean("signal_share"),
        "kl": mean("kl", rows[-3:]),
        "entropy": mean("entropy", rows[-3:]),
        "off_policy": mean("off_policy"),
        "greedy": rows[-1]["heldout_greedy"],
        "sampled": rows[-1]["heldout_sampled"],
        "online": rows[-1]["online_trajectories"],
        "steps": [round(row["accuracy"], 3) for row in steps],
        "warnings": sorted({text for row in steps for text in row["warnings"]}),
    }


def one_run(arm: Arm, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        began = os.times()
        found = read(train(arm, seed, changed(arm.change, Path(folder) / "tree")))
        ended = os.times()
    cpu = ended.children_user + ended.children_system - began.children_user - began.children_system
    return {"arm": arm.name, "seed": seed, "command": " ".join(arm.arguments), "change": arm.change, **found,
            "cpu_seconds": round(cpu)}


def lines() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


# ------------------------------------------------------------------------------------------------------- figures
def values(name: str, measure: str) -> list[float]:
    """Of the arm's finished runs, by seed."""
    return [line[measure] for line in sorted(lines(), key=lambda line: line["seed"]) if line["arm"] == name]


def effect(first: str, second: str, measure: str = "right") -> tuple[float, float, bool]:
    """(mean of the paired differences second - first, its standard error, whether the effect shows)."""
    differences = [b - a for a, b in zip(values(first, measure), values(second, measure), strict=True)]
    mean, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
    return mean, error, len({d > 0 for d in differences}) == 1 and abs(mean) > 2 * error


def table(lab: int) -> str:
    """Markdown, as it stands in LABS.md. A row per arm; the measures are means over the seeds, `right` also of each."""
    names = [arm.name for arm in arms() if arm.lab == lab]
    rows = ["| `--out` | right, seeds 0, 1, 2 | mean | difference, its standard error | "
            "code ran | signal | KL | greedy | sampled |", "|---" * 9 + "|"]
    for name in names:
        right, difference = values(name, "right"), ""
        if not right:
            continue
        if name != names[0] and len(right) == len(values(names[0], "right")) == len(SEEDS):
            mean, error, shows = effect(names[0], name)
            difference = f"{mean:+.3f}, {error:.3f}: {'shows' if shows else 'does not show'}"
        others = [f"{fmean(values(name, measure)):.{digits}f}" for measure, digits in OTHERS.items()]
        each = ", ".join(f"{x:.3f}" for x in right)
        rows.append("| " + " | ".join([f"`lab/{name}`", each, f"{fmean(right):.3f}", difference, *others]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="-m tests.labs", description=__doc__.splitlines()[0])
    parser.add_argument("labs", type=int, nargs="*", default=[], help="default: all")
    parser.add_argument("--read", type=Path, nargs="+", help="folders of runs: print their measures")
    parser.add_argument("--table", action="store_true", help="print the results; no run")
    args = parser.parse_args()
    for folder in args.read or []:
        print(folder, read(folder))
    labs = args.labs or [1, 2, 3, 5, 6]             # lab 4 trains nothing: tests/lab_losses.py
    if not args.table and not args.read:
        chosen = sorted((arm for arm in arms() if arm.lab in labs), key=lambda arm: labs.index(arm.lab))
        for seed, arm in itertools.product(SEEDS, chosen):              # an arm of two labs runs once
            if (arm.name, seed) not in {(line["arm"], line["seed"]) for line in lines()}:
                began, line = time.time(), one_run(arm, seed)
                with FILE.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(arm.name, seed, f"right {line['right']} in {time.time() - began:.0f} s", flush=True)
    if not args.read:
        print("\n\n".join(f"lab {lab}\n{table(lab)}" for lab in labs))


if __name__ == "__main__":
    main()
