"""Does the sample queue save online samples? Runs the study, one line of results/queue.jsonl per finished run.

    python -m scripts.study_queue                       # goes on where it stopped; minutes per run
    python -m scripts.study_queue --table               # tables out of the file; runs nothing
    python -m scripts.study_queue --figure figures/queue.svg

Owns the arms, the cold model, the loop of a run and the tables. Reading order: this text, ARMS, one_run, table.

Written down before the first run of seeds 3 to 8 (seeds 0 to 2 are for tuning; a rule changed after seeing 3 to 8 needs
new seeds):

* Regimes. *cold*: the built-in model, tuned for 200 steps on demonstrations of which 3 % are right. *dense*: the
  built-in model itself. *slow*: cold, and each call of a tool takes 0.5 s.
* A run samples 1,152 trajectories online: 12 steps of 12 groups of 8, or 36 steps of 4 groups of 8. Learning rate
  1e-3, constant after 2 steps of warm-up, 3 minibatches of whole groups, no sampling again (--resample 0).
* Measured before the first step and after every 96 online trajectories, on held-out tasks of the eight core families
  (the same in all runs): *sampled*, 12 tasks per family at temperature 1; every second time *greedy*, 6 of these.
* Primary measure, regime cold: online samples to sampled 0.5, where the line between two measurements first reaches
  it. A run that never does counts as 1,152 and is named in the table.
* Primary comparison: queue-positive against off-12, the best setting without a queue in an earlier study; paired by
  seed. The ratio is the geometric mean over seeds. Its interval: 95 %, percentile bootstrap over seeds of the mean log
  ratio, 10,000 rounds. The controls that could refute the queue: off-4 (the same groups and epochs, no queue) and
  later-4 (positive trajectories only from epoch 2 on, no queue: what replay does, without the past). Should any arm
  without a queue beat off-12 on seeds 3 to 8, then the ratio to that arm counts, and is given first.
* From tuning (seed 0, 960 samples): off-12 with 12 epochs learned sooner than with 6 and ended no higher (0.40 and
  0.43 sampled); it is run on the fresh seeds, too, after the core arms.
* Secondary: samples to greedy 0.7; sampled and greedy accuracy at the end, at equal samples (the mean of the last two
  measurements); CPU-seconds of sampling and of the update; in the regime slow, wall seconds to sampled 0.5.
"""
import sys

if __package__ != "scripts":
    print("error: start this from the repository's folder as: python -m scripts.study_queue", file=sys.stderr)
    sys.exit(2)

import json
import math
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import train
from executor import Executor
from machinery import console
from machinery.cli import OneLineParser, exit_status
from machinery.statistics import paired_bootstrap
from policy import TINY_DIR
from rollout import Chat
from scripts import warm_start
from tasks import every

SEEDS, BUDGET, INTERVAL, CALL_SECONDS = range(3, 9), 1152, 96, 0.5
COMMON = "--groups 12 --lr 1e-3 --schedule constant --warmup 2 --resample 0 --eval-tasks 12 --steps 1000000"
QUEUE = "--online-groups 4 --epochs 4 --max-uses 8 --max-age 24 --half-life 8"
# arm: (flags beside COMMON, what the study itself changes)
CORE = {
    "off-12": ("--queue-size 0 --epochs 6", ""),
    "off-4": ("--queue-size 0 --groups 4 --epochs 4", ""),
    "later-4": ("--queue-size 0 --groups 4 --epochs 4", "positives later"),
    "queue-all": (f"{QUEUE} --replay all", ""),
    "queue-positive": (f"{QUEUE} --replay positive", ""),
}
OTHERS = {
    "off-12 12 epochs": ("--queue-size 0 --epochs 12", ""),
    "off-4 12 epochs": ("--queue-size 0 --groups 4 --epochs 12", ""),
    "queue-positive no weight": (f"{QUEUE} --replay positive", "no weight"),
    "queue-positive uniform": (f"{QUEUE} --replay positive", "uniform"),
    "off-12 1 epoch": ("--queue-size 0 --epochs 1", ""),
    "off-12 2 epochs": ("--queue-size 0 --epochs 2", ""),
    "off-12 4 epochs": ("--queue-size 0 --epochs 4", ""),
    "shipped": ("--resample 2", ""),
}
ARMS = CORE | OTHERS


def cold_model(folder: Path) -> Path:
    """The built-in model, which now makes the common mistake most of the time; about a minute."""
    if not (folder / "config.json").exists():
        torch.set_num_threads(1)
        tokenizer, model = AutoTokenizer.from_pretrained(TINY_DIR), AutoModelForCausalLM.from_pretrained(TINY_DIR)
        wrong = 1 - warm_start.SHARES[0]
        shares = (0.03, *(0.97 * share / wrong for share in warm_start.SHARES[1:]))
        batches = warm_start.demonstration_batches(Chat(tokenizer), random.Random("cold"), shares)
        warm_start.train(model, batches, "cold model", 200, 1e-3, decay=0.5)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- one run
def later_positives(run: train.Run, fresh: list, replayed: list):
    """One epoch on the whole batch, then the others on its positive trajectories only."""
    epochs, run.cfg.epochs = run.cfg.epochs, 1
    stats = train.update(run, fresh, replayed)
    run.cfg.epochs = epochs - 1
    train.update(run, [group.positive() for group in fresh], [])
    run.cfg.epochs = epochs
    return stats


def without_weight(logp, logp_old, logp_behaviour, *rest):
    """grpo_loss with c = 1."""
    return grpo_loss(logp, logp_old, logp_old, *rest)


grpo_loss = grpo.grpo_loss


def slow(function):
    """The tool's function, with the latency of a tool behind a network."""
    def call(*args, **kwargs):
        time.sleep(CALL_SECONDS)
        return function(*args, **kwargs)
    return call


def measure(run: train.Run, spent: dict, greedy: bool) -> dict:
    """A point of the curve. Accuracies on held-out tasks; the seconds are those of training alone."""
    core = [task for task in run.heldout if task.family not in run.hard]
    point = {"online": run.online, **{name: round(value, 2) for name, value in spent.items()}}
    point["sampled"] = round(fmean(train.solve(run, core, "sampled", 1.0).values()), 4)
    if greedy:
        point["greedy"] = round(fmean(train.solve(run, every(2, core), "greedy", 0.0).values()), 4)
    return point


def one_run(arm: str, seed: int, regime: str, model: str, budget: int) -> dict:
    """train.train's loop without logs and checkpoints, with a curve."""
    flags, change = ARMS[arm]
    spent = {"sampling_cpu": 0.0, "update_cpu": 0.0, "wall": 0.0}
    steps, update = [], later_positives if change == "positives later" else train.update
    grpo.grpo_loss = without_weight if change == "no weight" else grpo_loss
    with tempfile.TemporaryDirectory() as folder, Executor("auto") as executor:
        cfg, given = train.parse_args([*COMMON.split(), *flags.split(), "--model", model, "--seed", str(seed),
                                       "--out", f"{folder}/out"])
        run = train.start(cfg, given, executor)
        if change == "uniform":
            run.queue.priority = lambda entry, step: 1.0
        fast = run.tools
        trained_with = [replace(tool, function=slow(tool.function)) for tool in fast] if regime == "slow" else fast
        curve = [measure(run, spent, True)]
        while run.online < budget:
            run.step, run.clock = run.step + 1, console.Clock()
            began, cpu = time.perf_counter(), time.process_time()
            run.tools = trained_with
            groups = train.judge(run, train.sample(run, run.rank_online))
            fresh = train.advantage(run, groups)
            replayed = train.replay(run, len(fresh))
            for again in range(1, cfg.resample + 1):
                if (missing := run.rank_online - len(fresh) - len(replayed)) > 0:
                    extra = train.judge(run, train.sample(run, missing, again))
                    groups, fresh = groups + extra, fresh + train.advantage(run, extra)
            spent["sampling_cpu"] += time.process_time() - cpu
            cpu = time.process_time()
            stats = update(run, fresh, replayed)
            spent["update_cpu"] += time.process_time() - cpu
            spent["wall"] += time.perf_counter() - began
            trained = sum(len(g.batch()) for g in fresh + [entry.group for entry in replayed]) * cfg.epochs
            steps.append((len(fresh) / len(groups), len(replayed), stats.off_policy or 0.0, trained))
            run.tools = fast                            # measured without the latency
            if run.online // INTERVAL > curve[-1]["online"] // INTERVAL:
                curve.append(measure(run, spent, len(curve) % 2 == 0))
    means = [round(fmean(column), 4) for column in zip(*steps)]
    return {"regime": regime, "arm": arm, "seed": seed, "flags": f"{COMMON} {flags}", "steps": len(steps),
            **dict(zip(("signal", "replayed", "off_policy", "passes"), means)),
            "dropped_off_policy": run.queue.counts["off_policy"], "curve": curve}


# ------------------------------------------------------------------------------------------------------- the tables
def reached(line: dict, name: str, level: float, unit: str = "online") -> tuple[float, bool]:
    """(online samples or seconds until `name` reaches `level`, whether it did); between measurements a line."""
    curve = [point for point in line["curve"] if name in point]
    for a, b in zip(curve, curve[1:]):
        if b[name] >= level:
            share = (level - a[name]) / (b[name] - a[name]) if a[name] < level else 0.0
            return a[unit] + share * (b[unit] - a[unit]), True
    return curve[-1][unit], False


def at_the_end(line: dict, name: str) -> float:
    return fmean([point[name] for point in line["curve"] if name in point][-2:])


def ratio(arm: dict, base: dict, measured) -> str:
    """Geometric mean of the paired ratios, with an interval from 3 pairs on; both: {seed: line}."""
    logs = [math.log(measured(arm[seed]) / measured(base[seed])) for seed in sorted(arm.keys() & base.keys())]
    if not logs:
        return "-"
    low, high = paired_bootstrap(logs)
    interval = f" [{math.exp(low):.2f}, {math.exp(high):.2f}]" if len(logs) > 2 else ""
    return f"{math.exp(fmean(logs)):.2f}{interval}, n {len(logs)}"


def table(lines: list[dict], regime: str, seeds, base_arm: str) -> str:
    """Markdown. One row per arm; the ratios are those to the base on the n seeds that both have."""
    runs = {arm: {x["seed"]: x for x in lines if (x["regime"], x["arm"]) == (regime, arm) and x["seed"] in seeds}
            for arm in ARMS}
    rows = [f"| arm | to sampled .5, seed: value | mean | ratio to {base_arm} | to greedy .7: ratio | "
            "at the end: sampled / greedy | CPU-seconds to sampled .5: sampling + update | signal | off-policy |",
            "|---" * 8 + "|"]
    base, unit = runs[base_arm], "wall" if regime == "slow" else "online"
    for arm, found in runs.items():
        if found:
            ends = {seed: reached(line, "sampled", 0.5, unit) for seed, line in sorted(found.items())}
            rows.append("| " + " | ".join([
                arm, ", ".join(f"{seed}: {x:.0f}{'' if ok else ' (not reached)'}" for seed, (x, ok) in ends.items()),
                f"{fmean(value for value, _ in ends.values()):.0f}",
                ratio(found, base, lambda line: reached(line, "sampled", 0.5, unit)[0]),
                ratio(found, base, lambda line: reached(line, "greedy", 0.7, unit)[0]),
                " / ".join(f"{fmean(at_the_end(x, name) for x in found.values()):.3f}"
                           for name in ("sampled", "greedy")),
                " + ".join(f"{fmean(reached(x, 'sampled', 0.5, name)[0] for x in found.values()):.0f}"
                           for name in ("sampling_cpu", "update_cpu")),
                f"{fmean(x['signal'] for x in found.values()):.2f}",
                f"{fmean(x['off_policy'] for x in found.values()):.3f}"]) + " |")
    return "\n".join(rows)


def figure(lines: list[dict], regime: str, seeds) -> str:
    """SVG: sampled accuracy against online samples; a thin line per seed, a thick one for the mean of each core arm."""
    def path(points) -> str:
        return "M" + " L".join(f"{70 + x / 2:.1f} {370 - 340 * y:.1f}" for x, y in points)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 430" role="img" fill="none" font-size="14" '
             'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
             f"<title>Sampled accuracy against online samples, {regime} start</title>",
             '<rect width="900" height="430" fill="#ffffff"/>']
    for tenth in range(0, 11, 2):
        y = 370 - 34 * tenth
        parts.append(f'<path d="M70 {y} H660" stroke="#d0d7de"/>'
                     f'<text x="60" y="{y + 5}" text-anchor="end" fill="#1f2328">{tenth / 10}</text>')
    for x in range(0, BUDGET + 1, 192):
        parts.append(f'<text x="{70 + x / 2}" y="392" text-anchor="middle" fill="#1f2328">{x}</text>')
    parts.append('<text x="360" y="418" text-anchor="middle" fill="#1f2328">trajectories sampled online</text>'
                 '<text x="70" y="18" fill="#1f2328">held-out accuracy at temperature 1</text>')
    for i, (arm, colour) in enumerate(zip(CORE, ("#57606a", "#0969da", "#8250df", "#bc4c00", "#1a7f37"))):
        curves = [[(p["online"], p["sampled"]) for p in line["curve"]] for line in lines
                  if (line["regime"], line["arm"]) == (regime, arm) and line["seed"] in seeds]
        parts += [f'<path d="{path(curve)}" stroke="{colour}" opacity="0.3"/>' for curve in curves]
        mean = [(points[0][0], fmean(y for _, y in points)) for points in zip(*curves)]
        parts.append(f'<path d="{path(mean)}" stroke="{colour}" stroke-width="3"/>' if curves else "")
        parts.append(f'<text x="680" y="{60 + 26 * i}" fill="{colour}">{arm} ({len(curves)} seeds)</text>')
    return "\n".join([*filter(None, parts), "</svg>\n"])


def main() -> None:
    parser = OneLineParser(prog="-m scripts.study_queue", description="Does the queue save?", allow_abbrev=False)
    parser.add_argument("--file", type=Path, default=Path("results/queue.jsonl"))
    parser.add_argument("--cold", type=Path, default=Path("cold"), help="folder of the cold model; made if not there")
    parser.add_argument("--regime", choices=("cold", "dense", "slow"), default="cold")
    parser.add_argument("--arms", default=",".join(CORE), help="with commas, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--runs", type=int, default=1000, help="end after so many runs")
    parser.add_argument("--budget", type=int, default=BUDGET, help="online trajectories of a run")
    parser.add_argument("--table", action="store_true", help="print the results; no run")
    parser.add_argument("--base", choices=ARMS, default="off-12", help="arm that the table's ratios are to")
    parser.add_argument("--figure", type=Path, help="write the results as SVG; no run")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.file.read_text().splitlines()] if args.file.exists() else []
    if args.table:
        print(table(lines, args.regime, args.seeds, args.base))
    if args.figure:
        args.figure.write_text(figure(lines, args.regime, args.seeds))
    if args.table or args.figure:
        return
    arms = list(ARMS) if args.arms == "all" else args.arms.split(",")
    done = {(line["regime"], line["arm"], line["seed"]) for line in lines}
    left = [(arm, seed) for seed in args.seeds for arm in arms if (args.regime, arm, seed) not in done]
    for arm, seed in left[:args.runs]:
        model = "tiny" if args.regime == "dense" else str(cold_model(args.cold))
        line = one_run(arm, seed, args.regime, model, args.budget)
        args.file.parent.mkdir(exist_ok=True)
        with args.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(arm, seed, "sampled", " ".join(f"{p['sampled']:.2f}" for p in line["curve"]), flush=True)
    print(f"{max(len(left) - args.runs, 0)} runs left")


if __name__ == "__main__":
    sys.exit(exit_status(main))
