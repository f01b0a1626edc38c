"""Evaluation on GAIA, or without access to it on an offline set of the same format.

    python eval_gaia.py --ckpt out/                             # the offline set
    python eval_gaia.py --ckpt out/ --gaia-dir GAIA             # the benchmark: 165 questions of validation
    python eval_gaia.py --model Qwen2.5-7B --gaia-dir GAIA --out base
    python eval_gaia.py --compare base eval_out                 # paired: which questions were gained and lost

Owns choosing questions and settings, running them through the very `rollout` that training uses, resuming,
and what is said about the results. --out holds settings.json, trajectories.jsonl (one line a question and
sample), results.json, and with --export the leaderboard's submission.jsonl.

Read in this order: `evaluate` (the loop), `record_of` and `category_of` (what is noted of one trajectory),
`summary` (the figures), `compare`, then the settings and the command line.

Rules: the official score decides; heuristic and LLM stand beside it. Denominators are the questions chosen,
whatever happened to them. What the host broke is retried and never counted as an answer; if it stays broken
it is missing, and wrong. The test split has no answers here: it is exported, not scored.
"""
import hashlib
import json
import math
import os
import random
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from executor import Executor
from policy import Policy, load_policy
from reward import Judge, check_judge, clean, gaia_score, heuristic_judge
from rollout import Sampling, Trajectory, rollout
from tasks import BUILTIN_TOOLS, CORE, HARD, Task, builtin_tasks, export_gaia, read_gaia
from machinery.cli import OneLineParser, UserError, exit_status
from tools import NEEDS, Call, Tool, load_tools, open_web, preflight_table, prompt_text
from machinery.web import Web

OFFICIAL = {"1": 53, "2": 86, "3": 26}           # questions of GAIA's validation split, by level
ACCESS = "https://huggingface.co/datasets/gaia-benchmark/GAIA"
HIDDEN = "?"                                     # stands for the answers of the test split
RETRIES = 2                                      # further rounds for what the host broke


# ------------------------------------------------------------------------------------------------- statistics
def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval for a share (95 %)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, where `right` of n were (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of the pairs that differ: binomial(gained + lost, 1/2)."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n)


def paired_bootstrap(differences: list[float], rounds: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, by drawing questions with replacement."""
    rng, n = random.Random(seed), len(differences)
    means = sorted(fmean(rng.choices(differences, k=n)) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]


# --------------------------------------------------------------------------------------------- one trajectory
def category_of(task: Task, t: Trajectory, calls: list[Call], official: bool, loosely_right: bool) -> str:
    """What became of one trajectory: "right", or the first of the ways to fail that applies."""
    text = "\n".join(turn.observation for turn in t.turns)
    kinds, statuses = {c.outcome for c in calls}, {turn.status for turn in t.turns}
    absent = any(f"NameError: name '{tool.name}'" in text for tool, *_ in NEEDS)
    repeated = Counter((c.tool, c.arguments) for c in calls).most_common(1)
    last = t.turns[-1] if t.turns else None
    ways = [
        ("right", official), ("infrastructure", t.stop_reason == "error"),
        ("format_only", t.answer is not None and loosely_right), ("wrong", t.answer is not None),
        ("no_code", not any(turn.code for turn in t.turns)), ("cache_miss", "cache_miss" in kinds),
        ("blocked", "blocked" in kinds), ("tool_unavailable", absent),
        ("repeated_call", bool(repeated) and repeated[0][1] >= 3),
        ("timeout", bool(statuses & {"timeout", "killed"}) or "timeout" in kinds),
        ("syntax", last is not None and "SyntaxError" in last.observation),
        ("runtime", last is not None and last.status == "error"),
        ("context_limit", t.stop_reason in ("context_limit", "length")), ("step_limit", t.stop_reason == "turn_limit")]
    return next((name for name, applies in ways if applies), "no_answer")


def record_of(task: Task, t: Trajectory, calls: list[Call], judge: Judge) -> dict:
    """One line of trajectories.jsonl. The LLM is asked about every answer: in training it decides where the heuristic
    is unsure, here it stands beside."""
    answer = None if t.stop_reason == "error" else t.answer    # of a broken host, whatever it left behind
    rule = heuristic_judge(task.question, task.answer, answer)
    llm = None if answer is None or judge.spec == "heuristic" else judge.ask(task.question, task.answer, answer)
    official = gaia_score(answer, task.answer) and task.answer != HIDDEN
    return {
        "task_id": task.id, "sample": t.sample, "level": task.level, "question": task.question, "gold": task.answer,
        "attachment": " ".join(sorted({Path(n).suffix.lower() or "other" for n in task.files})) or "none",
        "answer": answer, "official": official, "heuristic": rule, "llm": llm,
        "category": category_of(task, t, calls, official, rule == "right" or bool(llm)),
        "steps": len(t.turns), "tokens": sum(t.mask), "seconds": round(t.seconds, 2),
        "tool_calls": len(calls), "cache_hits": sum(c.hits for c in calls),
        "tool_outcomes": Counter(f"{c.tool} {c.outcome}" for c in calls), "trajectory": t.to_dict()}


# --------------------------------------------------------------------------------------------------- the loop
@dataclass
class Evaluation:
    """What an evaluation works with."""
    policy: Policy
    tasks: list[Task]
    tools: list[Tool]
    log: list[Call]                              # where the tools note their calls
    web: Web
    judge: Judge
    sampling: Sampling
    samples: int
    seed: int
    out: Path
    chunk: int = 64                              # questions that are rolled out, then written, together


def evaluate(run: Evaluation, executor: Executor) -> list[dict]:
    """All records, old and new: each (question, sample) that is not on file is rolled out, and written by the chunk."""
    file = run.out / "trajectories.jsonl"
    records = {(r["task_id"], r["sample"]): r for r in read_records(file, cut=True)}
    missing = [(s, t) for s in range(run.samples) for t in run.tasks if (t.id, s) not in records]
    total = len(run.tasks) * run.samples
    if len(missing) < total:
        print(f"resumed {run.out}: {total - len(missing)} of {total} are done")
    with tqdm(total=len(missing), desc="questions", unit="traj", disable=None) as bar, file.open("a") as out:
        for again in range(1 + RETRIES):
            for s, tasks in chunks(missing, run.chunk):
                for record in roll_out(run, executor, tasks, s, None if again else bar):
                    records[record["task_id"], s] = record
                    if record["category"] != "infrastructure":
                        out.write(json.dumps(record) + "\n")
                out.flush()
                os.fsync(out.fileno())
            missing = [(s, t) for s, t in missing if records[t.id, s]["category"] == "infrastructure"]
    return [records[t.id, s] for t in run.tasks for s in range(run.samples)]


def chunks(missing: list[tuple[int, Task]], size: int):
    """(sample, at most `size` tasks of it) with no question twice: the log tells calls apart by their question."""
    for sample in sorted({s for s, _ in missing}):
        waiting = [t for s, t in missing if s == sample]
        while waiting:
            one_each = {t.question: t for t in reversed(waiting)}
            taken = [t for t in waiting if one_each[t.question] is t][:size]
            yield sample, taken
            waiting = [t for t in waiting if t not in taken]


def roll_out(run: Evaluation, executor: Executor, tasks: list[Task], sample: int, bar) -> list[dict]:
    """One sample of each task -> records. Sample s has a seed of its own, so any one of them can be made alone."""
    run.log.clear()
    groups = rollout(run.policy, tasks, executor, run.tools, run.sampling, 1, run.seed + sample, progress=bar)
    pairs = [(task, replace(group[0], sample=sample)) for task, group in zip(tasks, groups)]
    calls = [[c for c in run.log if c.question == task.question] for task in tasks]
    with ThreadPoolExecutor(8) as pool:                         # a judge at a URL is asked several at a time
        return list(pool.map(lambda pair, called: record_of(*pair, called, run.judge), pairs, calls))


def read_records(file: Path, cut: bool = False) -> list[dict]:
    """The whole lines of a trajectories.jsonl. A last line without its end is a kill's; cut: remove it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if cut and len(whole) < len(data):
        os.truncate(file, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not a file of eval_gaia.py: {error}") from error


# ----------------------------------------------------------------------------------------------- what is said
def right_by(r: dict) -> tuple[bool, bool | None, bool | None]:
    """A record by the official rule, the heuristic and the LLM; None: unsure, or not asked."""
    return r["official"], None if r["heuristic"] == "unsure" else r["heuristic"] == "right", r["llm"]


def share(records: list[dict]) -> dict:
    """Mean over questions of the share of samples that is right: official with a Wilson interval over
    questions, by the heuristic and by the LLM; unsure, unasked and without a verdict count as wrong."""
    by_task = defaultdict(list)
    for r in records:
        by_task[r["task_id"]].append([bool(right) for right in right_by(r)])
    n = len(by_task)
    means = [fmean(fmean(s[i] for s in group) for group in by_task.values()) if n else 0.0 for i in range(3)]
    return {"accuracy": means[0], "n": n, "wilson95": wilson(means[0] * n, n), "heuristic": means[1], "llm": means[2]}


def agreement(records: list[dict]) -> dict:
    """How often each pair of opinions agrees, over the records where both have one."""
    views, names = [right_by(r) for r in records], ("official", "heuristic", "llm")
    result = {"unsure": sum(v[1] is None for v in views)}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = [v[i] == v[j] for v in views if v[i] is not None and v[j] is not None]
        result[f"{names[i]} and {names[j]}"] = {"agree": fmean(both) if both else None, "n": len(both)}
    return result


def vote(records: list[dict]) -> bool:
    """maj@k: whether the answer that most samples of a question gave is right; the earliest among equals."""
    answers = Counter(clean(r["answer"]) for r in records if r["answer"] is not None)
    if not answers:
        return False
    first = answers.most_common(1)[0][0]
    return next(r["official"] for r in records if r["answer"] is not None and clean(r["answer"]) == first)


def summary(records: list[dict], samples: int) -> dict:
    """results.json: the official accuracy first, then everything beside it."""
    def shares(key: str) -> dict:
        return {value: share([r for r in records if r[key] == value]) for value in sorted({r[key] for r in records})}
    result = {
        **share(records), "levels": shares("level"), "attachments": shares("attachment"),
        "text_only": share([r for r in records if r["attachment"] == "none"]), "agreement": agreement(records),
        "llm_verdicts": sum(r["llm"] is not None for r in records),
        "missing": sum(r["answer"] is None for r in records), "categories": Counter(r["category"] for r in records),
        "mean": {k: fmean(r[k] for r in records)
                 for k in ("steps", "tokens", "seconds", "tool_calls", "cache_hits")}}
    if samples > 1:
        by_task = defaultdict(list)
        for r in records:
            by_task[r["task_id"]].append(r)
        right = [sum(r["official"] for r in group) for group in by_task.values()]
        ks = sorted({1, samples, *(2 ** i for i in range(1, 10) if 2 ** i < samples)})
        result["pass_at_k"] = {k: fmean(pass_at_k(samples, c, k) for c in right) for k in ks}
        result["maj_at_k"] = {samples: fmean(vote(group) for group in by_task.values())}
    return result


def printed(result: dict, samples: int) -> str:
    """The tables, as text."""
    def line(name: str, s: dict) -> str:
        low, high = s["wilson95"]
        llm = f"{100 * s['llm']:8.1f} %" if result["llm_verdicts"] else "         -"
        return (f"  {name:<24}{s['n']:5d}{100 * s['accuracy']:8.1f} %  [{100 * low:4.1f}, {100 * high:5.1f}]"
                f"{100 * s['heuristic']:10.1f} %{llm}")
    lines = [f"  {'questions':<24}    n  official   95 % Wilson    heuristic      LLM", line("all", result)]
    lines += [line(f"level {k}", v) for k, v in result["levels"].items()]
    lines += [line(f"attachment {k}", v) for k, v in result["attachments"].items()]
    lines += [line("text-only subset", result["text_only"])]
    if samples > 1:
        lines += [f"  pass@{k} {100 * v:.1f} %" for k, v in result["pass_at_k"].items()]
        lines += [f"  maj@{k} {100 * v:.1f} %" for k, v in result["maj_at_k"].items()]
    pairs = {k: v for k, v in result["agreement"].items() if k != "unsure" and v["n"]}
    categories = Counter(result["categories"]).most_common()
    return "\n".join([
        *lines, f"agreement ({result['agreement']['unsure']} unsure): "
        + "; ".join(f"{k} {100 * v['agree']:.1f} % of {v['n']}" for k, v in pairs.items()),
        "what became of them: " + ", ".join(f"{k} {v}" for k, v in categories),
        f"no answer: {result['missing']}; mean " + ", ".join(f"{k} {v:.1f}" for k, v in result["mean"].items())])


def evaluation_in(path: Path) -> tuple[dict[str, list[bool]], dict]:
    """(question -> the official score of each sample, settings) of an evaluation's folder or file."""
    file = path / "trajectories.jsonl" if path.is_dir() else path
    scores, stored = defaultdict(list), file.with_name("settings.json")
    try:
        for r in sorted(read_records(file), key=lambda r: r["sample"]):    # a retried one was written late
            scores[r["task_id"]].append(r["official"])
    except (KeyError, TypeError) as error:
        raise UserError(f"--compare: {file}: not a file of eval_gaia.py: {error!r}") from error
    if not scores:
        raise UserError(f"--compare: {file} holds no evaluation")
    return scores, json.loads(stored.read_text()) if stored.is_file() else {}


def compare(base: Path, trained: Path) -> dict:
    """Two evaluations, paired. UserError if they are not of the same questions; settings beside the model that
    differ are named, because they may explain a difference, too."""
    (a, old), (b, new) = evaluation_in(base), evaluation_in(trained)
    if set(a) != set(b):
        raise UserError(f"--compare: the questions differ: {len(set(a) - set(b))} only in {base}, "
                        f"{len(set(b) - set(a))} only in {trained}; the command of either does what it lacks")
    gained = sorted(t for t in a if b[t][0] and not a[t][0])
    lost = sorted(t for t in a if a[t][0] and not b[t][0])
    differences = [fmean(b[t]) - fmean(a[t]) for t in sorted(a)]
    return {"n": len(a), "base": fmean(map(fmean, a.values())), "trained": fmean(map(fmean, b.values())),
            "difference": fmean(differences), "bootstrap95": paired_bootstrap(differences),
            "gained": gained, "lost": lost, "mcnemar_p": mcnemar(len(gained), len(lost)),    # of first samples
            "settings_that_differ": [k for k in old.keys() & new if k not in ("model", "adapter") and old[k] != new[k]]}


# ------------------------------------------------------------------------------------- settings, command line
def offline_set(folder: Path, difficulty: int) -> list[Task]:
    """Held-out built-in tasks, written and read in GAIA's format."""
    export_gaia(builtin_tasks("heldout", 264, 0, CORE + HARD, difficulty), folder)
    return read_gaia(folder)


def choose_tasks(args, tasks: list[Task]) -> list[Task]:
    """Those that the flags ask for. UserError where none is left."""
    if args.split == "test":    # never scored here, whatever somebody wrote into a copy of it
        tasks = [replace(t, answer=HIDDEN) for t in tasks]
    if unknown := set(args.ids or []) - {t.id for t in tasks}:
        raise UserError(f"--ids: no question {min(unknown)}")
    tasks = [t for t in tasks if t.level in (args.levels or [t.level]) and t.id in (args.ids or [t.id])
             and not (args.text_only and t.files)][:args.limit]
    if not tasks:
        raise UserError("no question is left: see --levels, --ids, --limit")
    return tasks


def hub_copy() -> str:
    """GAIA from the hub, which wants a token whose owner has accepted the dataset's conditions."""
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download("gaia-benchmark/GAIA", repo_type="dataset")
    except OSError as error:    # refused, not found, no network: the hub's errors are all of this kind
        raise UserError(f"GAIA cannot be fetched ({type(error).__name__}): ask for access at {ACCESS} (given "
                        "at once), then `hf auth login` or HF_TOKEN=...") from error


def inherited(ckpt: Path | None) -> dict:
    """What train.py wrote beside the adapter; of an adapter that comes from elsewhere, its base model."""
    if ckpt is None:
        return {}
    if not ckpt.is_dir():
        raise UserError(f"--ckpt {ckpt}: no such folder")
    if (ckpt / "run.json").is_file():
        return json.loads((ckpt / "run.json").read_text())
    try:
        return {"model": json.loads((ckpt / "adapter_config.json").read_text())["base_model_name_or_path"]}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--ckpt {ckpt}: there is no adapter in it (adapter_config.json)") from error


def file_hash(folder: Path | None) -> str:
    file = folder / "adapter_model.safetensors" if folder else None
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file and file.is_file() else ""


def settle_out(out: Path, settings: dict) -> None:
    """An evaluation with other settings in `out` is moved aside; one with the same settings goes on."""
    stored = out / "settings.json"
    if stored.is_file() and json.loads(stored.read_text()) != settings:
        free = next(i for i in range(1, 10**6) if not Path(f"{out}.{i}").exists())
        out.rename(f"{out}.{free}")
        print(f"{out} held another evaluation: it was moved to {out}.{free}")
    elif out.exists() and not stored.is_file() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty and holds no evaluation: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(settings, indent=1))


def parse_args(argv=None):
    p = OneLineParser(prog="eval_gaia.py", allow_abbrev=False, description="Evaluate on GAIA, or offline.")
    p.add_argument("--ckpt", type=Path, help="folder with the adapter that train.py wrote")
    p.add_argument("--model", help="model to evaluate; without --ckpt the base model, untrained")
    p.add_argument("--gaia-dir", help="folder in GAIA's layout, or hub; default: the offline set")
    p.add_argument("--split", default="validation", choices=["validation", "test"])
    p.add_argument("--levels", nargs="+", choices=["1", "2", "3"])
    p.add_argument("--ids", nargs="+", help="task_ids")
    p.add_argument("--text-only", action="store_true", help="only the questions without an attachment")
    p.add_argument("--limit", type=int, help="the first N questions")
    p.add_argument("--samples", type=int, default=1, help="samples a question")
    p.add_argument("--temperature", type=float, help="default: 0 for one sample, else 1")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("eval_out"))
    p.add_argument("--quantize", choices=["auto", "none", "nf4"])
    p.add_argument("--judge", default="heuristic", help="heuristic, local or URL; beside the official score")
    p.add_argument("--judge-model")
    p.add_argument("--tools", help="my_tools.py: beside the built-in ones; default: what training had")
    p.add_argument("--cache", default="live", help="live, record[:FILE] or replay[:FILE]; FILE: web.sqlite")
    p.add_argument("--sandbox", default="auto", help="auto, bwrap or none")
    p.add_argument("--export", action="store_true", help="write submission.jsonl for the leaderboard")
    p.add_argument("--compare", nargs=2, type=Path, metavar=("BASE", "TRAINED"), help="two evaluations")
    args = p.parse_args(argv)
    if min(args.samples, args.limit or 1) < 1:
        raise UserError("--samples and --limit: at least 1")
    check_judge(args.judge, args.judge_model)
    return args


def prepare(args) -> tuple[Evaluation, dict]:
    """Everything loaded, and the settings that a trajectory depends on."""
    run = inherited(args.ckpt)
    model = args.model or run.get("config", run).get("model", "tiny")
    policy = load_policy(model, args.quantize or run.get("quantize", "auto"), adapter=args.ckpt)
    limits = ("max_turns", "turn_tokens", "context_tokens", "observation_tokens")
    known = run.get("sampling") or {name: getattr(policy.preset, name) for name in limits}
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    sampling = Sampling(**{**known, "temperature": temperature})
    web, log = open_web(args.cache), []
    small = args.gaia_dir is None or policy.preset.prompt == "short"    # the tiny model knows no others
    own = ",".join(part for part in (args.tools or run.get("tools") or "").split(",") if part != "web")
    tools = [replace(t, log=log) for t in load_tools(own, web, BUILTIN_TOOLS if small else load_tools("web", web))]
    settings = {
        "model": policy.name, "adapter": file_hash(args.ckpt), "seed": args.seed, "sampling": asdict(sampling),
        "prompt": policy.preset.prompt, "tools": hashlib.sha256(prompt_text(tools).encode()).hexdigest()[:16],
        "data": args.gaia_dir or run.get("config", {}).get("difficulty", 0), "split": args.split,
        "judge": [args.judge, args.judge_model],
        "cache": [web.cache.mode, web.cache.digest() if web.cache.mode == "replay" else ""]}
    judge = Judge(args.judge if args.split == "validation" else "heuristic", args.judge_model, policy, web.cache)
    evaluation = Evaluation(policy, [], tools, log, web, judge, sampling, args.samples, args.seed, args.out)
    return evaluation, settings


def announce(run: Evaluation, source: str, sandbox: str) -> None:
    """What will be run, before it costs anything."""
    n = len(run.tasks) * run.samples
    if source == "offline":
        print("No --gaia-dir: this is the offline set, held-out built-in tasks in GAIA's format. NOT GAIA.\n"
              f"For GAIA: --gaia-dir hub, with access from {ACCESS}")
    else:
        print(preflight_table(run.web))
        turns, online = run.sampling.max_turns, run.web.cache.mode != "replay" and any(t.web for t in run.tools)
        calls = f"about {n * turns} if every turn makes one ({n} trajectories of {turns} turns)" if online else "none"
        print(f"  web calls: {calls}")
    names = ", ".join(t.name for t in run.tools)
    print(f"{len(run.tasks)} questions x {run.samples}, model {run.policy.name}, sandbox {sandbox}, "
          f"temperature {run.sampling.temperature}, cache {run.web.cache.mode}, tools {names}")


def command(args) -> None:
    if args.compare:
        print(json.dumps(compare(*args.compare), indent=1))
        return
    tasks, source = [], "offline"
    if args.gaia_dir:       # bad data is said before the model takes its minutes, and before anything is moved
        tasks, source = read_gaia(hub_copy() if args.gaia_dir == "hub" else args.gaia_dir, args.split), "gaia"
    with Executor(args.sandbox) as executor:
        run, settings = prepare(args)
        settle_out(args.out, settings)
        run.tasks = choose_tasks(args, tasks or offline_set(args.out / "offline_set", settings["data"]))
        announce(run, source, executor.sandbox)
        try:
            records = evaluate(run, executor)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what is on file stays: the same command goes on") from None
    finish(args, run, records, source)


def finish(args, run: Evaluation, records: list[dict], source: str) -> None:
    """results.json, the tables, the submission."""
    if args.export:
        (args.out / "submission.jsonl").write_text("".join(json.dumps(
            {"task_id": r["task_id"], "model_answer": r["answer"] or "",
             "reasoning_trace": "\n".join(s["text"] for s in r["trajectory"]["steps"])}) + "\n"
            for r in records if r["sample"] == 0))
    if any(r["gold"] == HIDDEN for r in records):
        print(f"this split's answers are hidden, so nothing is scored; --export: {args.out}/submission.jsonl")
        return
    result = {**summary(records, run.samples), "data": source, "cache": run.web.cache.digest(),
              "cache_counts": run.web.cache.counts, "benchmark_pages_dropped": run.web.counts["benchmark"]}
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    print(printed(result, run.samples))
    if source == "gaia" and not (args.levels or args.ids or args.limit or args.text_only):
        if (sizes := {k: v["n"] for k, v in result["levels"].items()}) != OFFICIAL:
            print(f"this is not the whole validation split: {sizes}, not {OFFICIAL}")
    print(f"written: {args.out}/results.json, {args.out}/trajectories.jsonl")


def main(argv=None) -> int:
    return exit_status(lambda: command(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
