"""Evaluation on GAIA; without access to GAIA, on the offline set: 264 built-in held-out tasks.

    python eval_gaia.py --ckpt out/                             # the offline set
    python eval_gaia.py --ckpt out/ --gaia-dir GAIA             # the benchmark: 165 questions of validation
    python eval_gaia.py --model Qwen2.5-7B --gaia-dir GAIA --out base
    python eval_gaia.py --compare base eval_out                 # paired: which questions were gained and lost

Owns the choice of questions and settings, the loop, which can be interrupted, and the figures; `rollout` is that of
training. --out holds settings.json, trajectories.jsonl (a line per question and sample), results.json, and with
--export submission.jsonl for the leaderboard. Read in this order: evaluate, record_of, summary, compare, command.

Rules: the official score decides; heuristic and LLM judge stand beside it. Shares are of all chosen questions. Where
the host failed every time, the answer is missing, and counts as wrong. GAIA's test split has no public answers: it is
exported, not scored.
"""
from machinery.cli import quiet_imports
quiet_imports(__name__)

import hashlib
import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, mode

from tqdm import tqdm

from executor import Executor
from policy import Policy, load_policy
from report import write as write_report
from reward import Judge, check_judge, gaia_score, heuristic_judge
from rollout import Sampling, Trajectory, check_context, rollout
from tasks import BUILTIN_TOOLS, HIDDEN, HUB, Task, builtin_tasks, missing_files, read_gaia
from machinery import console
from machinery.cli import OneLineParser, UserError, exit_status
from machinery.folder import alone_in, append, claim_folder, reading
from machinery.statistics import mcnemar, paired_bootstrap, pass_at_k, wilson
from machinery.text import clean, token_texts
from machinery.versions import warn_of_other_versions
from machinery.web import Web
from tools import NEEDS, Call, Tool, load_tools, open_web, preflight_table, prompt_text

OFFICIAL = {"1": 53, "2": 86, "3": 26}           # questions in GAIA's validation split, by level
RETRIES = 2                                      # further rounds for trajectories that the host broke
WAY_ON = "The records so far are whole: the same command does the rest"
LIMITS = ("max_turns", "turn_tokens", "context_tokens", "observation_tokens")
INHERITED = (*LIMITS, "prompt")                  # from training


# --------------------------------------------------------------------------------------------- one trajectory
def category_of(t: Trajectory, calls: list[Call], official: bool, nearly: bool) -> str:
    """"right", or the first kind of failure that applies. nearly: right by the heuristic or the LLM."""
    observations = [turn.observation for turn in t.turns] or [""]
    statuses = [turn.status for turn in t.turns] or [""]
    outcomes = [call.outcome for call in calls]
    absent = [f"NameError: name '{tool.name}'" for tool, *_ in NEEDS]
    cut = t.stop_reason in ("length", "context_limit")      # perhaps before it could write any code
    repeated = Counter((call.tool, call.arguments) for call in calls)
    applies = {
        "right": official,
        "infrastructure": t.stop_reason == "error",
        "format_only": nearly and t.answer is not None,
        "wrong": t.answer is not None,
        "no_code": not (cut or any(turn.code for turn in t.turns)),
        "cache_miss": "cache_miss" in outcomes,
        "blocked": "blocked" in outcomes,
        "tool_unavailable": any(name in text for name in absent for text in observations),
        "repeated_call": max(repeated.values(), default=0) >= 3,
        "timeout": "timeout" in statuses + outcomes or "killed" in statuses,
        "syntax": "SyntaxError" in observations[-1],
        "runtime": statuses[-1] == "error",
        "length": t.stop_reason == "length",
        "context_limit": t.stop_reason == "context_limit",
        "step_limit": t.stop_reason == "turn_limit"}
    return next((name for name, true in applies.items() if true), "no_answer")


def record_of(task: Task, t: Trajectory, calls: list[Call]) -> dict:
    """One line of trajectories.jsonl, as yet without the LLM's opinion."""
    answer = None if t.stop_reason == "error" else t.answer     # after a failure of the host no answer counts
    official = gaia_score(answer, task.answer) and task.answer != HIDDEN
    heuristic = heuristic_judge(task.question, task.answer, answer)
    return {
        "task_id": task.id, "sample": t.sample, "level": task.level, "question": task.question, "gold": task.answer,
        "attachment": " ".join(sorted({Path(name).suffix.lower() or "other" for name in task.files})) or "none",
        "answer": answer, "official": official, "heuristic": heuristic, "llm": None,
        "category": category_of(t, calls, official, heuristic == "right"),
        "steps": len(t.turns), "tokens": sum(t.mask), "seconds": round(t.seconds, 2),
        "tool_calls": len(calls), "cache_hits": sum(call.hits for call in calls),
        "tool_outcomes": Counter(f"{call.tool} {call.outcome}" for call in calls), "trajectory": t.to_dict()}


# --------------------------------------------------------------------------------------------------- the loop
@dataclass
class Evaluation:
    """What an evaluation works with."""
    args: object                                 # the command line, see parse_args
    tasks: list[Task]
    policy: Policy
    tools: list[Tool]
    log: list[Call]                              # the tools write their calls into it
    web: Web
    judge: Judge
    sampling: Sampling


def evaluate(evaluation: Evaluation, executor: Executor) -> list[dict]:
    """One record per question and sample. Those in the file are kept; the others are sampled, each appended as it ends,
    so in any order. At last a language model, if one judges, gives its opinions."""
    file = evaluation.args.out / "trajectories.jsonl"
    with reading(file):
        records = {(r["sample"], r["task_id"]): r for r in read_records(file, repair=True)}
    wanted = [(s, task) for task in evaluation.tasks for s in range(evaluation.args.samples)]
    missing = [(s, task) for s, task in wanted if (s, task.id) not in records]
    if len(missing) < len(wanted):
        print(f"resumed {file.parent}: {len(wanted) - len(missing)} of {len(wanted)} are done")
    with tqdm(total=len(missing), unit="trajectory", disable=None) as bar:
        def keep(record: dict):
            records[record["sample"], record["task_id"]] = record
            bar.update()
            bar.set_postfix(right=sum(r["official"] for r in records.values()))
            if record["category"] != "infrastructure":
                append(file, [record])

        for _ in range(1 + RETRIES):
            for s, tasks in batches(missing):
                sample_each(evaluation, executor, tasks, s, keep)
            missing = [(s, task) for s, task in missing if records[s, task.id]["category"] == "infrastructure"]
            bar.update(-len(missing))
    if evaluation.judge.spec != "heuristic":
        try:
            ask_llm(evaluation.judge, list(records.values()))
        finally:                                # Ctrl-C: the opinions so far were paid for
            kept = [r for r in records.values() if r["category"] != "infrastructure"]
            file.with_suffix(".partial").write_text("".join(json.dumps(r) + "\n" for r in kept))
            file.with_suffix(".partial").replace(file)
    return [records[s, task.id] for s, task in wanted]


def batches(missing: list[tuple[int, Task]]):
    """(sample, its tasks). No question stands twice in a batch: its calls are found by its text."""
    for sample in sorted({s for s, _ in missing}):
        waiting = [task for s, task in missing if s == sample]
        while waiting:
            batch = list({task.question: task for task in waiting}.values())
            yield sample, batch
            waiting = [task for task in waiting if task not in batch]


def sample_each(evaluation: Evaluation, executor: Executor, tasks: list[Task], sample: int, keep: Callable):
    """One trajectory per task; each is kept as a record when it ends. Each sample has its own seed, so it does not
    depend on other samples."""
    task_of = {task.id: task for task in tasks}
    evaluation.log.clear()

    def ended(t: Trajectory):
        task = task_of[t.task_id]
        calls = [call for call in evaluation.log if call.question == task.question]
        texts = token_texts(evaluation.policy.tokenizer, t.ids)
        record = record_of(task, replace(t, sample=sample), calls)
        keep(record | {"texts": [texts[i] for i in t.ids]})
    rollout(evaluation.policy, tasks, executor, evaluation.tools, evaluation.sampling, 1,
            evaluation.args.seed + sample, ended)


def ask_llm(judge: Judge, records: list[dict]):
    """The LLM's opinion of every answer that it has not judged, not only of those the heuristic is unsure of."""
    waiting = [r for r in records if r["answer"] is not None and r["llm"] is None]
    with ThreadPoolExecutor(8) as pool:         # a judge at a URL gets several questions at a time
        opinions = pool.map(lambda r: judge.ask(r["question"], r["gold"], r["answer"]), waiting)
        for record, opinion in zip(waiting, opinions):
            record["llm"] = opinion
            if opinion and record["category"] == "wrong":
                record["category"] = "format_only"


def read_records(file: Path, repair: bool = False) -> list[dict]:
    """The complete lines of a trajectories.jsonl. A kill may leave half a line at the end; repair: remove it."""
    data = file.read_bytes() if file.exists() else b""
    complete = data[:data.rfind(b"\n") + 1]
    if repair and len(complete) < len(data):
        os.truncate(file, len(complete))
    return [json.loads(line) for line in complete.splitlines()]


# ------------------------------------------------------------------------------------------------ the figures
def share(records: list[dict]) -> dict:
    """The share of right samples, for each judge; a sample without a verdict counts as wrong. Each question has as many
    samples as the others. They are not independent: so the Wilson interval is over questions."""
    questions, samples = len({r["task_id"] for r in records}), max(1, len(records))
    accuracy = sum(r["official"] for r in records) / samples
    return {"accuracy": accuracy, "n": questions, "wilson95": wilson(accuracy * questions, questions),
            "heuristic": sum(r["heuristic"] == "right" for r in records) / samples,
            "llm": sum(r["llm"] is True for r in records) / samples}


def agreement(records: list[dict]) -> dict:
    """How often two judges agree, for each pair, over the records on which both have a verdict."""
    verdicts = {"official": [r["official"] for r in records],
                "heuristic": [{"right": True, "wrong": False, "unsure": None}[r["heuristic"]] for r in records],
                "llm": [r["llm"] for r in records]}
    result = {"unsure": verdicts["heuristic"].count(None)}
    for first, second in itertools.combinations(verdicts, 2):
        same = [a == b for a, b in zip(verdicts[first], verdicts[second]) if a is not None and b is not None]
        result[f"{first} and {second}"] = {"agree": fmean(same) if same else None, "n": len(same)}
    return result


def vote(records: list[dict]) -> bool:
    """maj@k: whether the answer that most samples of a question gave is right; of equally frequent ones, the first."""
    votes = [(clean(r["answer"]), r["official"]) for r in records if r["answer"] is not None]
    if not votes:
        return False
    winner = mode(answer for answer, _ in votes)
    return next(official for answer, official in votes if answer == winner)


def summary(records: list[dict], samples: int) -> dict:
    """The figures in results.json, the official accuracy first. The records of one question stand together."""
    def shares(key: str) -> dict:
        return {value: share([r for r in records if r[key] == value]) for value in sorted({r[key] for r in records})}
    result = {
        **share(records), "levels": shares("level"), "attachments": shares("attachment"),
        "text_only": share([r for r in records if r["attachment"] == "none"]), "agreement": agreement(records),
        "llm_verdicts": sum(r["llm"] is not None for r in records),
        "missing": sum(r["answer"] is None for r in records), "categories": Counter(r["category"] for r in records),
        "mean": {key: fmean(r[key] for r in records)
                 for key in ("steps", "tokens", "seconds", "tool_calls", "cache_hits")}}
    if samples > 1:
        groups = [records[i:i + samples] for i in range(0, len(records), samples)]
        right = [sum(r["official"] for r in group) for group in groups]
        ks = [2 ** i for i in range(10) if 2 ** i < samples] + [samples]
        result["pass_at_k"] = {k: fmean(pass_at_k(samples, n, k) for n in right) for k in ks}
        result["maj_at_k"] = {samples: fmean(map(vote, groups))}
    return result


def evaluation_in(path: Path) -> tuple[dict[str, list[bool]], dict]:
    """(question -> the official score of each sample, settings) of an evaluation's folder or file."""
    file, scores = path / "trajectories.jsonl" if path.is_dir() else path, defaultdict(list)
    with reading(file, "--compare takes folders of eval_gaia.py"):
        for r in sorted(read_records(file), key=lambda r: r["sample"]):     # in the file they stand as they ended
            scores[r["task_id"]].append(r["official"])
    if not scores:
        raise UserError(f"--compare: {file} holds no evaluation")
    with reading(stored := file.with_name("settings.json")):
        return scores, json.loads(stored.read_text()) if stored.is_file() else {}


def compare(base: Path, trained: Path) -> dict:
    """Two evaluations of the same questions, paired. Other settings that differ are named: they may explain it, too."""
    (a, old), (b, new) = evaluation_in(base), evaluation_in(trained)
    if set(a) != set(b):
        raise UserError(f"--compare: the questions differ: {len(set(a) - set(b))} only in {base}, "
                        f"{len(set(b) - set(a))} only in {trained}; both must be complete, with the same flags")
    gained = sorted(t for t in a if b[t][0] and not a[t][0])        # by the first samples
    lost = sorted(t for t in a if a[t][0] and not b[t][0])
    differences = [fmean(b[t]) - fmean(a[t]) for t in sorted(a)]
    changed = [key for key in old if key in new and old[key] != new[key] and key not in ("model", "adapter")]
    return {"n": len(a), "base": fmean(map(fmean, a.values())), "trained": fmean(map(fmean, b.values())),
            "difference": fmean(differences), "bootstrap95": paired_bootstrap(differences),
            "gained": gained, "lost": lost, "mcnemar_p": mcnemar(len(gained), len(lost)),
            "settings_that_differ": changed}


# ------------------------------------------------------------------------------------- settings, command line
def choose_tasks(args, tasks: list[Task]) -> list[Task]:
    """Those that the flags ask for. UserError if none is left, or if one lacks its attachment."""
    if unknown := set(args.ids or []) - {task.id for task in tasks}:
        raise UserError(f"--ids: no question {min(unknown)}")
    chosen = [task for task in tasks if (not args.ids or task.id in args.ids)
              and (not args.levels or task.level in args.levels) and not (args.text_only and task.files)][:args.limit]
    if not chosen:
        raise UserError("no question is left: see --levels, --ids, --text-only, --limit")
    if absent := missing_files(tasks):
        how = "hf download gaia-benchmark/GAIA --repo-type dataset --local-dir GAIA"
        if needed := missing_files(chosen):
            raise UserError(f"{len(needed)} attachments of these questions are missing, {needed[0]} first: {how}, or "
                            "take --text-only")
        print(f"{len(absent)} attachments of other questions are missing; to get them: {how}")
    if args.split == "test":    # never scored here, even if a copy of it holds answers
        chosen = [replace(task, answer=HIDDEN) for task in chosen]
    return chosen


def training_run(ckpt: Path | None) -> dict:
    """The settings of the training run that made an adapter, from run.json beside it; what is not known is None."""
    run = {"model": None, "quantize": None, "tools": None, "sampling": None, "difficulty": 0}
    if ckpt is None:
        return run
    if not ckpt.is_dir():
        raise UserError(f"--ckpt {ckpt}: no such folder")
    if (ckpt / "run.json").is_file():
        with reading(ckpt / "run.json"):
            stored = json.loads((ckpt / "run.json").read_text())
            for file in (stored.get("tools") or "").split(","):
                if Path(file).is_file() and Path(file).resolve().is_relative_to(ckpt.resolve()):
                    raise UserError(f"it would run {file}, which came with it; if you trust that, put it elsewhere "
                                    "and name it with --tools")
            return run | stored | {key: stored["config"][key] for key in ("model", "difficulty")}
    with reading(ckpt / "adapter_config.json", "So there is no adapter in this folder"):
        return run | {"model": json.loads((ckpt / "adapter_config.json").read_text())["base_model_name_or_path"]}


def parse_args(argv=None):
    p = OneLineParser(prog="eval_gaia.py", allow_abbrev=False, description="Evaluate on GAIA, or offline.")
    add = p.add_argument
    add("--ckpt", type=Path, help="folder with the adapter that train.py wrote")
    add("--model", help="model to evaluate; without --ckpt: the untrained base model")
    add("--any-base", action="store_true", help="take the adapter on another base than the one it was trained on")
    add("--gaia-dir", help="folder in GAIA's layout, or hub; default: the offline set")
    add("--allow-outside-files", action="store_true", help="let --gaia-dir attach files from outside its folder")
    add("--split", default="validation", choices=["validation", "test"])
    add("--levels", nargs="+", choices=["1", "2", "3"])
    add("--ids", nargs="+", help="task_ids")
    add("--text-only", action="store_true", help="only the questions without an attachment")
    add("--limit", type=int, help="the first N questions")
    add("--samples", type=int, default=1, help="samples per question")
    add("--temperature", type=float, help="default: 0 for one sample per question, else 1")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("eval_out"))
    add("--quantize", choices=["auto", "none", "nf4"])
    add("--judge", default="heuristic", help="heuristic, local or URL; beside the official score")
    add("--judge-model", help="name of the model at the URL of --judge")
    add("--tools", help="FILE.py with tools, added to the built-in ones; default: as in training")
    add("--cache", default="live", help="live, record[:FILE] or replay[:FILE]; FILE: web.sqlite")
    add("--no-preflight", action="store_true", help="do not call each web tool once before the run")
    add("--sandbox", default="auto", help="auto, bwrap or none")
    add("--export", action="store_true", help="write submission.jsonl for the leaderboard")
    add("--compare", nargs=2, type=Path, metavar=("BASE", "TRAINED"), help="compare two evaluations")
    args = p.parse_args(argv)
    if min(args.samples, args.limit or 1) < 1:
        raise UserError("--samples and --limit: at least 1")
    check_judge(args.judge, args.judge_model)
    return args


def prepare(args, run: dict, tasks: list[Task]) -> Evaluation:
    policy = load_policy(args.model or run["model"] or "tiny", args.quantize or run["quantize"] or "auto", args.ckpt,
                         any_base=args.any_base)
    temperature = float(args.samples > 1) if args.temperature is None else args.temperature
    known = run["sampling"] or policy.preset.settings       # the limits that training had, else the preset's
    sampling = Sampling(**{name: known[name] for name in INHERITED if name in known}, temperature=temperature)
    web, log = open_web(args.cache), []
    offline = args.gaia_dir is None or policy.preset.prompt == "short"     # the tiny model knows no other tools
    builtin = BUILTIN_TOOLS if offline else load_tools("web", web)
    files = [part for part in (args.tools or run["tools"] or "").split(",") if part != "web"]
    tools = [replace(tool, log=log) for tool in load_tools(",".join(files), web, builtin)]
    check_context(policy, tasks, tools, sampling)
    judge = Judge(args.judge if args.split == "validation" else "heuristic", args.judge_model, policy, web.cache)
    return Evaluation(args, tasks, policy, tools, log, web, judge, sampling)


def settings_of(evaluation: Evaluation, run: dict) -> dict:
    """All that a trajectory depends on, for settings.json."""
    def short_hash(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]
    args, policy, cache = evaluation.args, evaluation.policy, evaluation.web.cache
    adapter = short_hash((args.ckpt / "adapter_model.safetensors").read_bytes()) if args.ckpt else ""
    return {
        "model": policy.name, "base_weights": policy.base_weights, "adapter": adapter, "seed": args.seed,
        "sampling": asdict(evaluation.sampling),
        "prompt": policy.preset.prompt, "tools": short_hash(prompt_text(evaluation.tools).encode()),
        "data": args.gaia_dir or run["difficulty"], "split": args.split, "judge": [args.judge, args.judge_model],
        "cache": [cache.mode, cache.digest() if cache.mode == "replay" else ""]}


def announce(evaluation: Evaluation, sandbox: str) -> None:
    """What will be done, before it costs anything."""
    args, web, turns = evaluation.args, evaluation.web, evaluation.sampling.max_turns
    if args.gaia_dir is None:
        print(f"No --gaia-dir: this is the offline set, built-in tasks, NOT GAIA. For GAIA: --gaia-dir hub ({HUB})")
    else:
        print(preflight_table(evaluation.tools, web, not args.no_preflight), end="")
        n, calls = len(evaluation.tasks) * args.samples, "none"
        if web.cache.mode != "replay" and any(tool.web for tool in evaluation.tools):
            calls = f"about {n * turns} if every turn makes one ({n} trajectories of {turns} turns)"
        print(f"  web calls: {calls}")
    print(f"{len(evaluation.tasks)} questions x {args.samples}, model {evaluation.policy.name}, sandbox {sandbox}, "
          f"temperature {evaluation.sampling.temperature}, cache {web.cache.mode}, "
          f"tools {', '.join(tool.name for tool in evaluation.tools)}")


def finish(evaluation: Evaluation, records: list[dict]) -> None:
    """results.json, the tables, the submission."""
    args, web = evaluation.args, evaluation.web
    if args.export:
        lines = [{"task_id": r["task_id"], "model_answer": r["answer"] or "",
                  "reasoning_trace": "\n".join(turn["text"] for turn in r["trajectory"]["steps"])}
                 for r in records if r["sample"] == 0]
        (args.out / "submission.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if any(r["gold"] == HIDDEN for r in records):
        print(f"the answers are hidden, so nothing is scored; --export writes {args.out}/submission.jsonl")
        return                                   # and no page, which would call every answer wrong
    result = {**summary(records, args.samples), "data": "gaia" if args.gaia_dir else "offline",
              "cache": web.cache.digest(), "cache_counts": web.cache.counts,
              "benchmark_pages_dropped": web.counts["benchmark"]}
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    print(console.evaluation_tables(result))
    sizes = {level: s["n"] for level, s in result["levels"].items()}
    if args.gaia_dir and sizes != OFFICIAL:
        print(f"this is not the whole validation split: {sizes}, not {OFFICIAL}")
    print(f"written: {args.out}/results.json, {args.out}/trajectories.jsonl, {write_report(args.out)}")


def command(args) -> None:
    if args.compare:
        print(json.dumps(compare(*args.compare), indent=1))
        return
    warn_of_other_versions()
    run = training_run(args.ckpt)
    if args.gaia_dir:
        tasks = read_gaia(args.gaia_dir, args.split, args.allow_outside_files)
    else:
        tasks = builtin_tasks("heldout", 264, 0, difficulty=run["difficulty"])
    tasks = choose_tasks(args, tasks)
    try:
        with alone_in(args.out), Executor(args.sandbox) as executor:
            evaluation = prepare(args, run, tasks)
            settings, stored = json.dumps(settings_of(evaluation, run), indent=1), args.out / "settings.json"
            if not stored.is_file() or stored.read_bytes() != settings.encode():        # with the same ones it goes on
                claim_folder(args.out, "settings.json", "evaluation")
                stored.write_text(settings)
            announce(evaluation, executor.sandbox)
            finish(evaluation, evaluate(evaluation, executor))
    except OSError as error:
        raise UserError(f"cannot go on ({error}): make room, or mend the folder. {WAY_ON}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(WAY_ON) from None


def main(argv=None) -> int:
    return exit_status(lambda: command(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
