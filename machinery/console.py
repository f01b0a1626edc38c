"""What a training run measures and prints: metrics per step, the estimate, warnings, the probe and the final table.
And the tables of an evaluation. `run` is train.Run, known here by its attributes alone.
"""
import math
import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from machinery.checkpoint import cpu_seconds
from machinery.cli import UserError
from machinery.ranks import everyone


class Clock(dict):
    """Seconds per phase; `tokens` counts what was sampled."""
    def __init__(self):
        super().__init__(sampling=0.0, tools=0.0, judging=0.0, update=0.0, tokens=0)
        self.last = self["begin"] = time.perf_counter()

    def lap(self, phase: str):
        now = time.perf_counter()
        self[phase] += now - self.last
        self.last = now


UPDATE_NUMBERS = ("entropy", "kl", "clip_fraction", "off_policy", "loss", "grad_norm", "mismatch_mean", "mismatch_p99")
NUMBERS = ("reward", "accuracy", "exec_rate", "turns", *UPDATE_NUMBERS, "signal_share", "replayed", "judge_failed",
           "judge_unsure", "cut_share", "queue_size", "queue_age", "lr", "tokens_per_second", "seconds")


def mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return fmean(values) if values else None


def host_failures(trajectories: Sequence) -> list[str]:
    """The warning that some failed on the host. UserError if all did, of several tasks: the next ones would, too."""
    failed = [t.error for t in trajectories if t.stop_reason == "error"]
    if len(failed) == len(trajectories) and len({t.task_id for t in trajectories}) > 1:
        raise UserError(f"all {len(failed)} trajectories failed on the host, not in the policy's code ({failed[0]}): "
                        "mend that, then go on with --resume")
    return [f"{len(failed)} trajectories failed on the host: {failed[0]}"] if failed else []


def show_host_failures(run, groups: Sequence):
    """Those of an evaluation. groups: lists of trajectories."""
    for warning in host_failures(sum(groups, [])):
        run.say(f"  warning: {warning}")


def step_metrics(run, groups: Sequence, fresh: Sequence, replayed: Sequence, stats) -> dict:
    """The step's numbers, averaged over all ranks; behaviour is that of the fresh trajectories, before the update."""
    trajectories = [t for g in groups for t in g.trajectories]
    rewards = [r for g in groups for r in g.rewards]
    judged = [r for r in rewards if r.total is not None]
    mine = {
        "step": run.step,
        "reward": mean(r.total for r in judged),
        "accuracy": mean(float(r.answer == 1) for r in judged),
        "exec_rate": mean(r.execution for r in judged),
        "turns": mean(len(t.turns) for t in trajectories),
        **{name: getattr(stats, name) for name in UPDATE_NUMBERS},
        "signal_share": len(fresh) / len(groups),
        "replayed": len(replayed),
        "judge_failed": len(rewards) - len(judged),
        "judge_unsure": sum(r.unsure for r in rewards),
        "cut_share": mean(t.stop_reason in ("length", "context_limit") for t in trajectories),
        **run.queue.stats(run.step),
        "lr": run.optimizer.param_groups[0]["lr"],
        "tokens_per_second": run.clock["tokens"] / run.clock["sampling"],
        "seconds": time.perf_counter() - run.clock["begin"],
    }
    each = everyone(mine)
    metrics = {key: mean(m[key] for m in each) for key in mine}
    metrics |= {"step": run.step, "online_trajectories": run.online}
    metrics |= {f"seconds_{phase}": run.clock[phase] for phase in ("sampling", "tools", "judging", "update")}
    drawn = [{"task": e.group.task.id, "step": e.step, "seed": e.group.trajectories[0].seed} for e in replayed]
    metrics = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
    metrics["replayed_groups"] = sum(everyone(drawn), [])
    notes = sum(everyone(stats.notes + host_failures(trajectories)), [])
    return metrics | {"warnings": notes + warnings_for([*run.history, metrics])}


def heldout_metrics(run, tasks: Sequence, quick: Sequence, right: dict[str, dict[str, float]]) -> dict:
    """Accuracy on held-out tasks per family, and on core and hard ones. quick: the tasks that decide out/best.
    right: "greedy", "sampled" and perhaps "pass@8" -> task id -> 1.0 or 0.0."""
    def accuracy(name: str, chosen: list) -> float | None:
        value = mean(right[name].get(task.id) for task in chosen)
        return None if value is None else round(value, 4)
    families = {}
    for family in dict.fromkeys(task.family for task in tasks):
        members = [task.id for task in tasks if task.family == family]
        families[family] = {"n": len(members)}
        for name, found in right.items():
            families[family][name] = mean(found.get(task_id) for task_id in members)
    core = [task for task in tasks if task.family not in run.hard]
    hard = [task for task in tasks if task.family in run.hard]
    quick_core = [task for task in quick if task.family not in run.hard]
    found = {
        "heldout_greedy": accuracy("greedy", core),
        "heldout_sampled": accuracy("sampled", core),
        "heldout_hard": accuracy("greedy", hard),
        "heldout_hard_sampled": accuracy("sampled", hard),
        "heldout_n": len(core),
        "heldout_families": families,
        "heldout_quick": accuracy("greedy", quick_core) + accuracy("sampled", quick_core),
    }
    if "pass@8" in right:
        found["heldout_pass8"] = accuracy("pass@8", core)
        found["heldout_hard_pass8"] = accuracy("pass@8", hard)
    return found


# --------------------------------------------------------------------------------------------------- what is printed
STEP_LINE = (
    "step {step:3d} | reward {reward:.3f} accuracy {accuracy:.3f} code ran {exec_rate:.2f} turns {turns:.1f} | "
    "entropy {entropy:.3f} kl {kl:.4f} clip {clip_fraction:.3f} off-policy {off_policy:.3f} | "
    "signal {signal_share:.2f} queue {queue_size:.0f} (age {queue_age:.1f}, {replayed:.0f} replayed) "
    "online {online_trajectories} | {tokens_per_second:.0f} tok/s, seconds: sampling {seconds_sampling:.1f} "
    "tools {seconds_tools:.1f} update {seconds_update:.1f}")


def show_step(run):
    """The step's line, its warnings, the held-out accuracy."""
    m = run.pending
    if run.step:
        line = STEP_LINE.format(**{k: float("nan") if v is None else v for k, v in m.items()})
        run.say(line.replace(" nan", " -"))           # not measured, such as the KL where beta is 0
        for warning in m.get("warnings", []):         # a checkpoint of an older version has none
            run.say(f"  warning: {warning}")
    if "heldout_greedy" in m:
        hard = "" if m["heldout_hard"] is None else f", hard {m['heldout_hard']:.3f}"
        run.say(f"  held-out ({m['heldout_n']} tasks): greedy {m['heldout_greedy']:.3f} "
                f"sampled {m['heldout_sampled']:.3f}{hard}  [{m['evaluation_seconds']:.0f} s]")
    if run.step in (0, 2) and not run.ended:
        estimate(run)


def estimate(run):
    """Hours per phase, from what is measured so far: the first evaluation, or the second step."""
    cfg, evaluation_seconds, left = run.cfg, run.before["evaluation_seconds"], run.cfg.steps - run.step
    if run.step == 0:
        sampling = evaluation_seconds / (3 * len(run.heldout)) * cfg.online_groups * cfg.group_size
        update, update_text = sampling, "update not measured yet, taken as sampling"
    else:
        m = run.history[-1]
        sampling, update = m["seconds_sampling"] + m["seconds_judging"], m["seconds_update"]
        update_text = f"update {left * update / 3600:.2f} h"
    evaluating = evaluation_seconds * (1 + left // cfg.eval_every / 8)
    total = left * (sampling + update) + evaluating
    in_time = f" (ends in time for --max-hours {cfg.max_hours})" if cfg.max_hours else ""
    run.say(f"estimate for {left} steps: sampling {left * sampling / 3600:.2f} h, {update_text}, "
            f"evaluation {evaluating / 3600:.2f} h, in all {total / 3600:.2f} h{in_time}")


def out_of_time(run) -> bool:
    """Would another step and the last evaluation end after --max-hours? All ranks follow rank 0's answer."""
    if run.cfg.max_hours is None or not run.history:
        return False
    spent = time.monotonic() - run.started
    longest = max([m["seconds"] for m in run.history[1:]], default=0)
    needed = longest + run.history[0]["evaluation_seconds"]
    return everyone(spent + 1.2 * needed > run.cfg.max_hours * 3600)[0]


def show_trajectory(run, group):
    """Every show_every-th step: one whole trajectory, as a person reads it."""
    if (run.step - 1) % run.cfg.show_every == 0:
        run.say(as_text(group, 0))


def as_text(group, i: int) -> str:
    """Trajectory i of a group."""
    task, trajectory = group.task, group.trajectories[i]
    lines = [f"--- {task.id}: {task.question}"]
    for turn in trajectory.turns:
        lines.append(turn.text.strip())
        if turn.observation:
            lines.append(f"Observation: {turn.observation.strip()}")
    return "\n".join([*lines, f"--- answer {trajectory.answer!r}, expected {task.answer!r}, stop "
                      f"{trajectory.stop_reason}, reward {group.rewards[i].total}"])


def report(run):
    """Accuracy before and after, per family, and where everything lies."""
    after, before, names = run.history[-1], run.before, ("greedy", "sampled", "pass@8")
    rows = [("family", "n", "greedy", "", "sampled", "", "pass@8", "")]
    for family, new in after["heldout_families"].items():
        old, mark = before["heldout_families"][family], " (hard)" if family in run.hard else ""
        pairs = [x for name in names for x in (old[name], new[name])]
        rows.append(((family or "(no family)") + mark, new["n"], *pairs))
    rows.append(("ALL CORE", after["heldout_n"], before["heldout_greedy"], after["heldout_greedy"],
                 before["heldout_sampled"], after["heldout_sampled"], before["heldout_pass8"], after["heldout_pass8"]))
    run.say("\nheld-out accuracy, before -> after" + ("" if run.cfg.data else " (entities never seen in training)"))
    for row in rows:
        cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in row]
        run.say(f"{cells[0]:24s} {cells[1]:>4s}   {cells[2]:>6s} -> {cells[3]:<6s} {cells[4]:>7s} -> {cells[5]:<6s} "
                f"{cells[6]:>6s} -> {cells[7]:<6s}")
    run.say(f"{run.step} steps, {run.online} trajectories sampled, {run.elapsed() / 60:.1f} minutes of wall time, "
            f"{cpu_seconds(run):.0f} CPU-seconds of the trainer, the sandbox apart")
    run.say(f"adapter {run.out}/  best {run.out}/best/  metrics {run.out}/metrics.jsonl  "
            f"trajectories {run.out}/trajectories.jsonl\n"
            f"look at it: {run.out}/report.html  evaluate it: python eval_gaia.py --ckpt {run.out}")


def show_probe(run, groups: Sequence):
    """How often the untrained model is right, how long a run would take, why it fails, and what to try."""
    cfg, counts = run.cfg, [sum(r.answer == 1 for r in g.rewards) for g in groups]
    run.say(f"\n{cfg.probe} tasks x {cfg.group_size}: trajectories right of {cfg.group_size}, tasks")
    for right in range(cfg.group_size + 1):
        n = counts.count(right)
        run.say(f"  {right:2d}  {n:4d}  {'#' * math.ceil(50 * n / len(counts))}")
    trajectories = [t for g in groups for t in g.trajectories]
    signal = sum(g.advantages is not None for g in groups) / len(groups)
    run.say(f"groups with signal {signal:.2f}, tokens per trajectory "
            f"{fmean(len(t.ids) for t in trajectories):.0f} (sampled {fmean(sum(t.mask) for t in trajectories):.0f})")
    batches = cfg.steps * run.rank_online / cfg.probe
    hours = {phase: run.clock[phase] * batches / 3600 for phase in ("sampling", "judging", "update")}
    hours["update"] *= run.rank_groups / run.rank_online        # the queue fills the rest of a batch
    run.say(f"a run of {cfg.steps} steps: " + ", ".join(f"{phase} {h:.2f} h" for phase, h in hours.items())
            + f", in all {sum(hours.values()):.2f} h, evaluations apart")
    stops = Counter(t.stop_reason for t in trajectories)
    turns = Counter(turn.status or "no code" for t in trajectories for turn in t.turns)
    for what, counter in (("trajectories ended by", stops), ("turns", turns)):
        run.say(f"{what}: " + ", ".join(f"{name} {n}" for name, n in counter.most_common()))
    for right in (True, False):                                  # one of each, where there is one
        found = [(g, i) for g in groups for i, r in enumerate(g.rewards) if (r.answer == 1) == right]
        if found:
            run.say(("\na right one:\n" if right else "\na wrong one:\n") + as_text(*found[0]))
    for advice in advice_for(signal, sum(counts) / len(trajectories), stops, turns):
        run.say(f"to try: {advice}")


def advice_for(signal: float, right: float, stops: Counter, turns: Counter) -> list[str]:
    """What may help an untrained model. signal: the share of groups that carry it. right: the share of trajectories.
    stops: trajectories by stop reason. turns: by status of the executor, or "no code"."""
    if signal >= 0.2:
        return []
    if right > 0.5:
        return ["harder tasks (--difficulty, or your own --data): most answers are right already"]
    stop = {name: n / stops.total() for name, n in stops.items()}
    turn = {name: n / turns.total() for name, n in turns.items()}
    rules = (
        (turn.get("no code", 0) > 0.3, "other words (--prompt FILE): the model often writes no Python block"),
        (turn.get("error", 0) > 0.3, "other words (--prompt FILE, with an example): the code often fails"),
        (stop.get("turn_limit", 0) > 0.3, "more turns (--max-turns): many trajectories end without an answer"),
        (stop.get("length", 0) > 0.3, "longer turns (--turn-tokens): many are stopped inside a turn"),
        (stop.get("context_limit", 0) > 0.3, "more context (--context-tokens): many trajectories fill it"),
        (True, "easier tasks (--difficulty 0, or your own --data) that the model solves sometimes"),
        (True, "a warm start, for models up to 1.5B: python -m scripts.warm_start --base MODEL --out FOLDER"))
    return [text for applies, text in rules if applies]


def evaluation_tables(result: dict) -> str:
    """The tables of eval_gaia.py, of its results.json."""
    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"
    rows = {"all": result} | {f"level {k}": v for k, v in result["levels"].items()}
    rows |= {f"attachment {k}": v for k, v in result["attachments"].items()}
    rows |= {"text-only subset": result["text_only"]}
    lines = [f"  {'questions':<24}    n  official   95 % Wilson    heuristic      LLM"]
    for name, s in rows.items():
        low, high = s["wilson95"]
        llm = percent(s["llm"]) if result["llm_verdicts"] else "-"
        lines.append(f"  {name:<24}{s['n']:5d}{percent(s['accuracy']):>10}  [{100 * low:4.1f}, {100 * high:5.1f}]"
                     f"{percent(s['heuristic']):>12}{llm:>10}")
    for name in ("pass", "maj"):
        lines += [f"  {name}@{k} {percent(v)}" for k, v in result.get(f"{name}_at_k", {}).items()]
    pairs = [f"{pair} {percent(v['agree'])} of {v['n']}" for pair, v in result["agreement"].items()
             if pair != "unsure" and v["n"]]
    lines.append(f"agreement ({result['agreement']['unsure']} unsure): " + "; ".join(pairs))
    lines.append("what became of them: " + ", ".join(f"{name} {n}" for name, n in result["categories"].most_common()))
    means = ", ".join(f"{name} {value:.1f}" for name, value in result["mean"].items())
    return "\n".join([*lines, f"no answer: {result['missing']}; mean {means}"])


# --------------------------------------------------------------------------------------------- early warnings
BOUNDS = (      # (metric, what is wrong about its mean over the last three steps, in words)
    ("exec_rate", lambda now, then: now < then / 2, "tool use collapses: code ran {then:.0%} -> {now:.0%}"),
    ("entropy", lambda now, then: now < then / 10, "entropy collapses: {then:.3f} -> {now:.3f}; lower lr"),
    ("kl", lambda now, then: now > 0.5, "KL to the reference is {now:.2f} per token; raise beta or lower lr"),
    ("clip_fraction", lambda now, then: now > 0.3, "{now:.0%} of tokens are clipped; lower lr"),
    ("mismatch_mean", lambda now, then: now > 0.05, "sampler and scorer differ by {now:.3f} per token"),
    ("signal_share", lambda now, then: now == 0, "no group has both right and wrong answers"),
)


def bad_signs(history: Sequence[dict]) -> dict[str, str]:
    """{metric: what is wrong}; now is the mean of its last three steps, then that of its first three."""
    found = {}
    for key, wrong, text in BOUNDS:
        values = [m[key] for m in history if m.get(key) is not None]
        then, now = sum(values[:3]) / 3, sum(values[-3:]) / 3
        if len(values) >= 3 and wrong(now, then):
            found[key] = text.format(now=now, then=then)
    return found


def warnings_for(history: Sequence[dict]) -> list[str]:
    """What is wrong after the last step of `history` (metrics) and was not yet wrong before it."""
    before = bad_signs(history[:-1])
    return [text for key, text in bad_signs(history).items() if key not in before]
