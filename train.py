"""Tool-R1 training: sample, judge, advantage, replay, update, log, save.

    python train.py                                    # the built-in tiny model, two CPU cores, some minutes
    python train.py --model Qwen2.5-7B --data FILE     # QLoRA on one GPU

Owns: `Config` (every flag), the loop, evaluation during training, checkpoints, the command line. The mathematics is
in grpo.py, sampling in rollout.py, the replay rule in queue.py.

Read in this order: `train` (the loop of verbs), the verbs `sample`, `judge`, `advantage`, `replay`, `update`,
`finish_step`; then `evaluate`; then `save` and `restore`; `Config` and the command line last.

Two ideas keep the loop small:

* **No generator has a state.** Every random choice is drawn from (seed, step, ...): a trajectory's stream from its
  task and number, the replay's from the step, the order of tasks from the epoch. A resumed run therefore needs only
  counters, and in deterministic mode it equals the uninterrupted one.
* **A step is saved before it is logged.** The checkpoint after the update holds the step's metrics as `pending`;
  evaluation and the line in metrics.jsonl come after it, and are done again by `--resume` if a kill came between.
  The logs are cut back to the length they had at the checkpoint, so there is exactly one line a step.

Departures from the paper: see README.
"""
import argparse
import contextlib
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import fmean, pstdev
from typing import get_args

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import queue
from executor import Executor
from machinery.memory import plan_memory
from policy import Policy, load_policy, save_adapter
from grpo import GRPOConfig, group_advantages, make_optimizer, update as grpo_update, warnings_for, world
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from reward import Judge, Reward, check_judge, compute_rewards
from rollout import Sampling, Trajectory, rollout
from tasks import BUILTIN_TOOLS, CORE, HARD, Task, builtin_tasks, read_jsonl
from machinery.cli import OneLineParser, UserError, exit_status
from tools import load_tools, open_web, preflight_table
from machinery.web import Cache


def import_sample_queue():
    """SampleQueue, also where the standard library's `queue` was imported before ours (see queue.py)."""
    if not hasattr(queue, "SampleQueue"):
        spec = spec_from_file_location("queue", Path(__file__).with_name("queue.py"))
        spec.loader.exec_module(module_from_spec(spec))
    return queue.SampleQueue


SampleQueue = import_sample_queue()


# ---------------------------------------------------------------------------------------------------- configuration
def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every flag of train.py. None: taken from the preset of the model's size (policy.Preset)."""
    model: str = option("tiny", "tiny (built in), a Qwen name such as Qwen2.5-7B, a hub id, or a local folder")
    data: str | None = option(None, "FILE.jsonl with id, question, answer, files, level; default: the built-in tasks")
    out: str = option("out", "folder of the run")
    resume: bool = option(False, "continue the run in --out")
    steps: int | None = option(None, "optimiser steps after which the run ends")
    seed: int = option(0, "seed of everything")
    quantize: str = option("auto", "of the base; auto: nf4 on a GPU from 1e9 parameters on", ("auto", "none", "nf4"))
    tools: str | None = option(None, "web, my_tools.py or both with a comma; the built-in tasks bring theirs")
    cache: str = option("live", "of the web: live, record[:FILE] or replay[:FILE]")
    judge: str = option("heuristic", "heuristic, local (the base model), or the URL of an OpenAI-compatible server")
    judge_model: str | None = option(None, "model name at the judge's URL")
    sandbox: str = option("auto", "of the model's code: see executor.py", ("auto", "bwrap", "none"))
    deterministic: bool = option(False, "one thread, fixed order: bit-equal runs on the CPU")
    probe: int = option(0, "sample this many tasks with the untrained model, print whether a run is worth it, end")
    max_hours: float | None = option(None, "end in time, with evaluation and checkpoint")
    vram: float | None = option(None, "GiB of GPU memory: plans context, slots and token budget where not given")
    difficulty: int = option(0, "of the built-in tasks: 0 for the tiny model, 1 to 3 for real ones")
    loss: str = option("dapo", "advantage, normaliser and clip: see grpo.py", ("dapo", "grpo", "dr_grpo"))
    lr: float | None = option(None, "learning rate")
    warmup: int | None = option(None, "steps of linear warm-up")
    schedule: str | None = option(None, "after the warm-up", ("constant", "cosine"))
    decay_steps: int | None = option(None, "step at which the cosine ends (default: the preset's number of steps)")
    beta: float | None = option(None, "weight of the KL penalty")
    temperature: float = option(1.0, "of sampling, and of every log-prob in the loss")
    groups: int | None = option(None, "groups (tasks) a step")
    group_size: int | None = option(None, "trajectories a group")
    minibatches: int | None = option(None, "optimiser steps a batch")
    epochs: int = option(1, "passes over a batch")
    token_budget: int | None = option(None, "padded tokens a micro-batch")
    max_turns: int | None = option(None, "turns a trajectory")
    turn_tokens: int | None = option(None, "sampled tokens a turn")
    context_tokens: int | None = option(None, "tokens a trajectory")
    observation_tokens: int | None = option(None, "tokens an observation")
    slots: int | None = option(None, "trajectories decoded at once (default: by free memory)")
    queue_size: int = option(64, "groups kept for replay")
    replay_share: float = option(0.5, "at most this share of a batch is replayed")
    half_life: float = option(4.0, "steps in which a queued group's priority halves")
    max_age: int = option(8, "steps after which a queued group is dropped")
    max_uses: int = option(4, "updates a group may take part in")
    resample: int = option(2, "rounds of sampling again for groups without signal that replay did not fill")
    eval_every: int | None = option(None, "steps between quick held-out evaluations; also decides out/best")
    eval_tasks: int | None = option(None, "held-out tasks a family (built-in), or in all (--data)")
    show_every: int = option(10, "steps between whole trajectories printed as text")


RESUMABLE = {"resume", "steps", "max_hours", "out", "sandbox", "show_every",    # may differ on --resume
             "vram", "slots", "token_budget"}                                   # these only bound memory
MAY_BE_ZERO = {"steps", "seed", "probe", "difficulty", "warmup", "beta", "queue_size", "replay_share", "max_age",
               "max_uses", "resample"}


def parse_args(argv=None) -> tuple[Config, set[str]]:
    """(configuration, names of the flags that were given). UserError on anything unknown."""
    parser = OneLineParser(prog="train.py", description="Train a tool-using policy with GRPO (Tool-R1).",
                           allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        name, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})"
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            kind = f.type if isinstance(f.type, type) else get_args(f.type)[0]
            parser.add_argument(name, type=kind, help=text, choices=f.metadata["choices"])
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, (int, float)) and (value < 0 or value == 0 and name not in MAY_BE_ZERO):
            bound = "0 or more" if name in MAY_BE_ZERO else "more than 0"
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be {bound}")
    cfg = Config(**given)
    if cfg.group_size == 1:
        raise UserError("--group-size 1: an advantage compares trajectories of one task, so it takes at least 2")
    check_judge(cfg.judge, cfg.judge_model)
    return cfg, set(given)


# ------------------------------------------------------------------------------------------------------- the state
@dataclass
class Group:
    """The trajectories of one task, judged. advantages: None without signal; one of them None where unjudged."""
    task: Task
    trajectories: list[Trajectory]
    step: int                                       # optimiser step at which it was sampled
    rewards: list[Reward] = field(default_factory=list)
    advantages: list[float | None] | None = None

    def batch(self) -> list[tuple[Trajectory, float]]:
        return [(t, a) for t, a in zip(self.trajectories, self.advantages) if a is not None]


@dataclass
class Run:
    """What the verbs work on. The second half is the run's progress: all of it is in every checkpoint."""
    cfg: Config
    policy: Policy
    optimizer: torch.optim.Optimizer
    executor: Executor
    judge: Judge
    tools: list
    tasks: list[Task]
    heldout: list[Task]
    queue: SampleQueue
    out: Path
    rank: int = 0
    size: int = 1
    places: int = 1                                  # groups of a batch on this rank
    started: float = field(default_factory=time.monotonic)

    step: int = 0
    position: int = 0                                # training tasks taken so far, over all ranks
    online: int = 0                                  # trajectories sampled for training so far, over all ranks
    seconds: float = 0.0                             # wall time of earlier processes of this run
    cpu_seconds: float = 0.0
    best: float = -1.0
    before: dict | None = None                       # the evaluation before any update
    pending: dict | None = None                      # metrics of `step`, not logged yet
    history: list[dict] = field(default_factory=list)
    ended: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def hard(self) -> tuple[str, ...]:
        """Families reported apart; none in --data, whatever its families are called."""
        return () if self.cfg.data else HARD

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def say(self, text: str):
        if self.main:
            tqdm.write(text)

    def sampling(self, temperature: float) -> Sampling:
        c = self.cfg
        return Sampling(temperature=temperature, max_turns=c.max_turns, turn_tokens=c.turn_tokens,
                        context_tokens=c.context_tokens, observation_tokens=c.observation_tokens, slots=c.slots,
                        deterministic=c.deterministic)

    def bar(self, total: int, what: str):
        return tqdm(total=total, desc=what, leave=False, disable=None if self.main else True, unit="traj")

    def next_tasks(self, n: int) -> list[Task]:
        """This rank's n of the next n * size training tasks; every epoch is a shuffle of its own."""
        chosen = []
        for i in range(self.position, self.position + n * self.size):
            epoch, index = divmod(i, len(self.tasks))
            if not chosen or index == 0:
                order = list(range(len(self.tasks)))
                random.Random(f"order-{self.cfg.seed}-{epoch}").shuffle(order)
            chosen.append(self.tasks[order[index]])
        self.position += n * self.size
        return chosen[self.rank::self.size]


# ------------------------------------------------------------------------------------------------------- the loop
def train(run: Run):
    """The method."""
    finish_step(run)                                             # step 0: the evaluation before any update
    while not run.ended:
        run.step += 1
        clock = Clock()
        groups = judge(run, sample(run, run.places, clock), clock)
        fresh = advantage(run, groups)
        replayed = replay(run, len(fresh))
        for again in range(1, run.cfg.resample + 1):             # places that replay did not fill: sample again
            if missing := max(everyone(run, run.places - len(fresh) - len(replayed))):
                extra = judge(run, sample(run, missing, clock, again), clock)
                groups, fresh = groups + extra, fresh + advantage(run, extra)
        stats = update(run, fresh, replayed, clock)
        run.pending = step_metrics(run, groups, fresh, replayed, stats, clock)
        write_trajectories(run, groups)
        save(run)
        finish_step(run)


class Clock(dict):
    """Seconds by phase; `tokens` counts what was sampled."""
    def __init__(self):
        super().__init__(sampling=0.0, tools=0.0, judging=0.0, update=0.0, tokens=0)
        self.begin = self.last = time.perf_counter()

    def lap(self, phase: str):
        now = time.perf_counter()
        self[phase] += now - self.last
        self.last = now


def sample(run: Run, n: int, clock: Clock, again: int = 0) -> list[Group]:
    """Roll out `group_size` trajectories for each of the next n tasks with the current policy."""
    tasks, size = run.next_tasks(n), run.cfg.group_size
    seed = random.Random(f"rollout-{run.cfg.seed}-{run.step}-{again}").getrandbits(62)
    with run.bar(n * size, f"step {run.step}: sampling") as bar:
        sampled = rollout(run.policy, tasks, run.executor, run.tools, run.sampling(run.cfg.temperature), size, seed,
                          progress=bar)
    run.online += n * size * run.size
    clock.lap("sampling")
    clock["tokens"] += sum(sum(t.mask) for group in sampled for t in group)
    clock["tools"] += sum(s.seconds for group in sampled for t in group for s in t.turns)
    return [Group(task, group, run.step) for task, group in zip(tasks, sampled)]


def judge(run: Run, groups: list[Group], clock: Clock) -> list[Group]:
    """R = r_answer + 0.1 r_exec for every trajectory; None where the judge or the host failed."""
    rewards = iter(compute_rewards([(g.task, t) for g in groups for t in g.trajectories], run.judge))
    for group in groups:
        group.rewards = [next(rewards) for _ in group.trajectories]
    clock.lap("judging")
    return groups


def advantage(run: Run, groups: list[Group]) -> list[Group]:
    """The groups that carry signal, with their advantages; the others are dropped."""
    for group in groups:
        group.advantages = group_advantages(group.rewards, run.cfg.loss)
    return [group for group in groups if group.advantages is not None]


def replay(run: Run, filled: int) -> list[queue.Entry]:
    """Queued groups for the places that are not filled, at most a set share of the batch."""
    rng = random.Random(f"replay-{run.cfg.seed}-{run.step}-{run.rank}")
    places = min(run.places - filled, int(run.cfg.replay_share * run.places))
    return run.queue.draw(places, run.step, rng)


def update(run: Run, fresh: list[Group], replayed: list[queue.Entry], clock: Clock):
    """One batch of new and old groups through GRPO; then the new ones enter the queue, and too old ones leave it."""
    groups = fresh + [entry.group for entry in replayed]
    for parameter_group in run.optimizer.param_groups:
        parameter_group["lr"] = learning_rate(run.cfg, run.step)
    batch = [pair for group in groups for pair in group.batch()]
    is_fresh = [group.step == run.step for group in groups for _ in group.batch()]
    with run.bar(len(batch) * run.cfg.epochs, f"step {run.step}: update") as bar:
        stats = grpo_update(run.policy, run.optimizer, batch, grpo_config(run.cfg), is_fresh, run.step, bar)
    run.cfg.token_budget = stats.token_budget                    # lower after an out-of-memory
    for note in stats.notes:
        tqdm.write(f"  step {run.step}, process {run.rank}: {note}")
    share = dict(zip((id(t) for t, _ in batch), stats.off_policy_each))
    for entry in replayed:
        run.queue.report_off_policy(entry, fmean(share[id(t)] for t, _ in entry.group.batch()))
    for group in fresh:
        spread = pstdev([r.total for r in group.rewards if r.total is not None])
        run.queue.admit(group, spread, any(r.answer == 1 for r in group.rewards), run.step)
    clock.lap("update")
    return stats


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then constant, or a cosine that ends at a tenth at `decay_steps`. step counts from 1."""
    if step <= cfg.warmup:
        return cfg.lr * step / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = min(1.0, (step - cfg.warmup) / max(1, cfg.decay_steps - cfg.warmup))
    return cfg.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def finish_step(run: Run):
    """Evaluate if due, then write the step's one line. Done again on resume if a kill came before the line."""
    run.ended = run.step >= run.cfg.steps or out_of_time(run)
    full = run.step == 0 or run.ended
    if full or run.step % run.cfg.eval_every == 0:
        run.pending |= evaluate(run, full)
        if run.step == 0:
            run.before = run.pending
            estimate(run)
        keep_best(run)
    run.pending["seconds_total"] = round(run.elapsed(), 2)
    run.history.append(run.pending)
    if run.main:
        append(run, "metrics.jsonl", [run.pending])
    show_step(run)
    run.pending = None


def out_of_time(run: Run) -> bool:
    """Would another step and the last evaluation end after --max-hours? All ranks hear rank 0's answer."""
    if run.cfg.max_hours is None or not run.history:
        return False
    spent = time.monotonic() - run.started
    need = max(m["seconds"] for m in run.history[1:] or [{"seconds": 0}]) + run.history[0]["evaluation_seconds"]
    return everyone(run, spent + 1.2 * need > run.cfg.max_hours * 3600)[0]


def everyone(run: Run, value) -> list:
    """`value` of every rank, in the order of ranks."""
    values = [value] * run.size
    if run.size > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------------- measurements
UPDATE_NUMBERS = ("entropy", "kl", "clip_fraction", "off_policy", "loss", "grad_norm", "mismatch_mean", "mismatch_p99")
NUMBERS = ("reward", "accuracy", "exec_rate", "turns", *UPDATE_NUMBERS, "signal_share", "replayed", "judge_failed",
           "judge_unsure", "cut_share", "queue_size", "queue_age", "lr", "tokens_per_second", "seconds")


def step_metrics(run: Run, groups, fresh, replayed, stats, clock: Clock) -> dict:
    """The step's numbers, averaged over all ranks; behaviour is that of the fresh trajectories, before the update."""
    pairs = [(t, r) for g in groups for t, r in zip(g.trajectories, g.rewards)]
    valid = [(t, r) for t, r in pairs if r.total is not None]
    seconds = time.perf_counter() - clock.begin

    def mean(values):
        values = [v for v in values if v is not None]
        return fmean(values) if values else None
    mine = {"step": run.step, "reward": mean(r.total for _, r in valid),
            "accuracy": mean(float(r.answer == 1) for _, r in valid),
            "exec_rate": mean(r.execution for _, r in valid), "turns": mean(len(t.turns) for t, _ in pairs),
            **{name: getattr(stats, name) for name in UPDATE_NUMBERS},
            "signal_share": len(fresh) / len(groups), "replayed": len(replayed),
            "judge_failed": len(pairs) - len(valid), "judge_unsure": sum(r.unsure for _, r in pairs),
            "cut_share": mean(t.stop_reason in ("length", "context_limit") for t, _ in pairs),
            **run.queue.stats(run.step), "lr": learning_rate(run.cfg, run.step),
            "tokens_per_second": clock["tokens"] / clock["sampling"], "seconds": seconds}
    ranks = everyone(run, mine)
    metrics = {key: mean(m[key] for m in ranks) for key in mine} | {"step": run.step, "online_trajectories": run.online}
    metrics |= {f"seconds_{phase}": clock[phase] for phase in ("sampling", "tools", "judging", "update")}
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}


def every(n: int, tasks: list[Task]) -> list[Task]:
    """Of each family the first task and every n-th after it."""
    families = dict.fromkeys(task.family for task in tasks)
    return [task for family in families for task in [t for t in tasks if t.family == family][::n]]


def evaluate(run: Run, full: bool) -> dict:
    """Held-out accuracy: greedy, sampled at temperature 1, and (full) pass@8, per family. Core and hard apart.

    A quick evaluation takes every fourth task of each family, and no pass@8; out/best is chosen on those tasks.
    pass@8 is of every eighth.
    """
    start = time.perf_counter()
    quick, some8 = every(4, run.heldout), every(8, run.heldout)
    tasks = run.heldout if full else quick
    plans = [("greedy", tasks, 0.0, 1), ("sampled", tasks, 1.0, 1)] + [("pass@8", some8, 1.0, 8)] * full
    families = {name: {"n": sum(t.family == name for t in tasks)} for name in dict.fromkeys(t.family for t in tasks)}
    right: dict[str, dict[str, float]] = {}
    for name, some, temperature, samples in plans:
        mine = some[run.rank::run.size]
        with run.bar(len(mine) * samples, f"held-out {name}") as bar:
            groups = rollout(run.policy, mine, run.executor, run.tools, run.sampling(temperature), samples,
                             seed=1, progress=bar)
        rewards = compute_rewards([(task, t) for task, group in zip(mine, groups) for t in group], run.judge)
        scores = {task.id: float(any(r.answer == 1 for r in rewards[i * samples:(i + 1) * samples]))
                  for i, task in enumerate(mine)}
        right[name] = {k: v for part in everyone(run, scores) for k, v in part.items()}
        for family in families:
            families[family][name] = fmean(right[name][t.id] for t in some if t.family == family)

    def mean(name, some, hard=False):
        chosen = [right[name][t.id] for t in some if (t.family in run.hard) == hard]
        return round(fmean(chosen), 4) if chosen else None
    found = {"heldout_greedy": mean("greedy", tasks), "heldout_sampled": mean("sampled", tasks),
             "heldout_hard": mean("greedy", tasks, hard=True), "heldout_hard_sampled": mean("sampled", tasks, True),
             "heldout_n": sum(t.family not in run.hard for t in tasks), "heldout_families": families,
             "heldout_quick": mean("greedy", quick) + mean("sampled", quick)}
    if full:
        found |= {"heldout_pass8": mean("pass@8", some8), "heldout_hard_pass8": mean("pass@8", some8, hard=True)}
    return found | {"evaluation_seconds": round(time.perf_counter() - start, 2)}


def estimate(run: Run):
    """Hours per phase, from what is measured so far: the first evaluation, or the second step."""
    c, e, left = run.cfg, run.before, run.cfg.steps - run.step
    if run.step == 0:
        trajectories = 3 * len(run.heldout)
        sampling, updating = e["evaluation_seconds"] / trajectories * c.groups * c.group_size, None
    else:
        m = run.history[-1]
        sampling, updating = m["seconds_sampling"] + m["seconds_judging"], m["seconds_update"]
    evaluating = e["evaluation_seconds"] * (1 + left // c.eval_every / 8)
    total = left * (sampling + (updating or sampling)) + evaluating
    update_text = f"update {left * updating / 3600:.2f} h" if updating else "update not measured yet, taken as sampling"
    run.say(f"estimate for {left} steps: sampling {left * sampling / 3600:.2f} h, {update_text}, "
            f"evaluation {evaluating / 3600:.2f} h, in all {total / 3600:.2f} h"
            + (f" (ends in time for --max-hours {c.max_hours})" if c.max_hours else ""))


# -------------------------------------------------------------------------------------------------- what is printed
def show_step(run: Run):
    m = run.pending
    if run.step:
        f = {k: float("nan") if m.get(k) is None else m[k] for k in NUMBERS}
        run.say("step {step:3d} | reward {reward:.3f} accuracy {accuracy:.3f} code ran {exec_rate:.2f} "
                "turns {turns:.1f} | entropy {entropy:.3f} kl {kl:.4f} clip {clip_fraction:.3f} "
                "off-policy {off_policy:.3f} | signal {signal_share:.2f} queue {queue_size:.0f} "
                "(age {queue_age:.1f}, {replayed:.0f} replayed) online {online_trajectories} | "
                "{tokens_per_second:.0f} tok/s, seconds: sampling {seconds_sampling:.1f} "
                "tools {seconds_tools:.1f} update {seconds_update:.1f}".format(**m | f))
        for warning in warnings_for(run.history):
            run.say(f"  warning: {warning}")
    if "heldout_greedy" in m:
        hard = "" if m["heldout_hard"] is None else f", hard {m['heldout_hard']:.3f}"
        run.say(f"  held-out ({m['heldout_n']} tasks): greedy {m['heldout_greedy']:.3f} "
                f"sampled {m['heldout_sampled']:.3f}{hard}  [{m['evaluation_seconds']:.0f} s]")
    if run.step == 2:
        estimate(run)


def as_text(task: Task, trajectory: Trajectory, reward: Reward) -> str:
    """A whole trajectory as a person reads it."""
    lines = [f"--- {task.id}: {task.question}"]
    for turn in trajectory.turns:
        lines += [turn.text.strip()] + ([f"Observation: {turn.observation.strip()}"] if turn.observation else [])
    return "\n".join(lines + [f"--- answer {trajectory.answer!r}, expected {task.answer!r}, stop "
                              f"{trajectory.stop_reason}, reward {reward.total}"])


def write_trajectories(run: Run, groups: list[Group]):
    """Every trajectory as a line of JSON; now and then one whole, as text."""
    rows = [{"step": run.step, "task": g.task.id, "question": g.task.question, "expected": g.task.answer,
             "reward": asdict(r), "advantage": g.advantages[i] if g.advantages else None,
             **{k: v for k, v in t.to_dict().items() if k not in PER_TOKEN}}
            for g in groups for i, (t, r) in enumerate(zip(g.trajectories, g.rewards))]
    for part in everyone(run, rows):
        if run.main:
            append(run, "trajectories.jsonl", part)
    if run.step % run.cfg.show_every == 1 or run.cfg.show_every == 1:
        run.say(as_text(groups[0].task, groups[0].trajectories[0], groups[0].rewards[0]))


def report(run: Run):
    """Before and after, per family, and where everything lies."""
    after, before = run.history[-1], run.before
    rows = [("family", "n", "greedy", "", "sampled", "", "pass@8", "")]
    for family, a in after["heldout_families"].items():
        b = before["heldout_families"][family]
        rows.append(((family or "(no family)") + " (hard)" * (family in run.hard), a["n"],
                     *(x for name in ("greedy", "sampled", "pass@8") for x in (b[name], a[name]))))
    rows.append(("ALL CORE", after["heldout_n"], before["heldout_greedy"], after["heldout_greedy"],
                 before["heldout_sampled"], after["heldout_sampled"], before["heldout_pass8"], after["heldout_pass8"]))
    run.say("\nheld-out accuracy, before -> after" + " (entities never seen in training)" * (not run.cfg.data))
    for row in rows:
        cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in row]
        run.say(f"{cells[0]:24s} {cells[1]:>4s}   {cells[2]:>6s} -> {cells[3]:<6s} {cells[4]:>7s} -> {cells[5]:<6s} "
                f"{cells[6]:>6s} -> {cells[7]:<6s}")
    run.say(f"{run.step} steps, {run.online} trajectories sampled, {run.elapsed() / 60:.1f} minutes of wall time, "
            f"{cpu_seconds(run):.0f} CPU-seconds of the trainer, the sandbox apart")
    run.say(f"adapter {run.out}/  best {run.out}/best/  metrics {run.out}/metrics.jsonl  "
            f"trajectories {run.out}/trajectories.jsonl\nevaluate it: python eval_gaia.py --ckpt {run.out}")


def cpu_seconds(run: Run) -> float:
    t = os.times()
    return run.cpu_seconds + t.user + t.system + t.children_user + t.children_system


# ----------------------------------------------------------------------------------------------------- checkpoints
PROGRESS = ("step", "position", "online", "best", "before", "pending")
PER_TOKEN = ("ids", "mask", "logps")                 # of a trajectory: stored as tensors, left out of the text
LOGS = ("metrics.jsonl", "trajectories.jsonl")


@contextlib.contextmanager
def writing(out: Path, part: Path | None = None):
    """What a full disk or a forbidden folder raises, as one line; the unfinished folder `part` is removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if part:
            shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write ({error}); the last checkpoint is whole: make room, then python train.py "
                        f"--resume --out {out}") from error


def append(run: Run, name: str, rows: list[dict]):
    with writing(run.out), (run.out / name).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_synced(path: Path, text: str):
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def save(run: Run):
    """Write the checkpoint of run.step into a new folder and rename it: a kill at any moment leaves a whole one.

    out/state/step-N/ holds everything as safetensors and JSON (no pickle); the two newest are kept. Then the adapter
    in out/ is replaced by this one.
    """
    states = run.out / "state"
    part, whole = states / "partial", states / f"step-{run.step:06d}"
    with writing(run.out, part):
        if run.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        everyone(run, "the folder is there")
        tensors, entries = pack_queue(run.queue)
        save_file(tensors, part / f"queue-{run.rank}.safetensors")
        write_synced(part / f"queue-{run.rank}.json", json.dumps(entries))
        if run.main:
            weights = get_peft_model_state_dict(run.policy.model, save_embedding_layers=False)    # "auto" asks the hub
            save_file(weights, part / "adapter_model.safetensors")
            tensors, scalars = pack_optimizer(run.optimizer)
            save_file(tensors, part / "optimizer.safetensors")
            state = {name: getattr(run, name) for name in PROGRESS}
            state |= {"seconds": run.elapsed(), "cpu_seconds": cpu_seconds(run), "optimizer": scalars,
                      "ranks": run.size, "logs": {path.name: path.stat().st_size if path.exists() else 0
                                                  for path in (run.out / name for name in LOGS)}}
            write_synced(part / "state.json", json.dumps(state))
        everyone(run, "all is written")
        if run.main:
            part.rename(whole)
            publish(run, whole, run.out)
            for old in sorted(states.glob("step-*"))[:-2]:
                shutil.rmtree(old)


def publish(run: Run, state: Path, folder: Path):
    """Replace the adapter's weights in `folder` by those of a checkpoint, in one step."""
    with writing(run.out):
        shutil.copyfile(state / "adapter_model.safetensors", folder / "adapter.partial")
        os.replace(folder / "adapter.partial", folder / "adapter_model.safetensors")


def keep_best(run: Run):
    """out/best/: the adapter that was best on the quick held-out tasks, greedy and sampled together."""
    if run.pending["heldout_quick"] > run.best:
        run.best = run.pending["heldout_quick"]
        if run.main:
            publish(run, latest_state(run.out), run.out / "best")


def pack_queue(sample_queue: SampleQueue) -> tuple[dict, dict]:
    """(tensors, JSON): per trajectory three rows of one int32/fp32 table; everything else as text."""
    state, tensors, entries = sample_queue.state_dict(), {}, []
    for i, entry in enumerate(state["entries"]):
        batch = entry.group.batch()
        for key, kind in (("ids", torch.int32), ("mask", torch.uint8), ("logps", torch.float64)):
            tensors[f"{i}.{key}"] = torch.tensor([x for t, _ in batch for x in getattr(t, key)], dtype=kind)
        light = [{k: v for k, v in t.to_dict().items() if k not in PER_TOKEN} for t, _ in batch]
        entries.append({"task": entry.group.task.id, "trajectories": light, "advantages": [a for _, a in batch],
                        "lengths": [len(t.ids) for t, _ in batch],
                        **{k: getattr(entry, k) for k in ("spread", "step", "order", "uses")}})
    return tensors, {"entries": entries, "counts": state["counts"]}


def unpack_queue(tensors: dict, packed: dict) -> dict:
    """The inverse of pack_queue. A replayed group needs no answers and no rewards any more: they are not kept."""
    entries = []
    for i, e in enumerate(packed["entries"]):
        columns = {k: tensors[f"{i}.{k}"].split(e["lengths"]) for k in PER_TOKEN}
        trajectories = [Trajectory.from_dict(light | {k: columns[k][j].tolist() for k in columns})
                        for j, light in enumerate(e["trajectories"])]
        group = Group(Task(e["task"], "", ""), trajectories, e["step"], [], e["advantages"])
        entries.append(queue.Entry(group, e["spread"], e["step"], e["order"], e["uses"]))
    return {"entries": entries, "counts": packed["counts"]}


def pack_optimizer(optimizer) -> tuple[dict, dict]:
    """(tensors, scalars) of the optimiser's state, named parameter.key; works for torch's and bitsandbytes' AdamW.

    Not of its state_dict(): in that of bitsandbytes the 8-bit tensors are nested. They also share one code book.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    flat = {f"{i}.{k}": v for i, p in enumerate(parameters) for k, v in optimizer.state.get(p, {}).items()}
    tensors = {k: v.cpu().contiguous().clone() for k, v in flat.items() if isinstance(v, torch.Tensor)}
    return tensors, {k: v for k, v in flat.items() if k not in tensors}


def unpack_optimizer(optimizer, tensors: dict, scalars: dict):
    state: dict[int, dict] = {}
    for name, value in {**tensors, **scalars}.items():
        parameter, key = name.split(".", 1)
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def latest_state(out: Path) -> Path:
    states = sorted((out / "state").glob("step-*"))
    if not states:
        raise UserError(f"--resume: {out} holds no checkpoint; without --resume a new run begins")
    return states[-1]


def restore(run: Run):
    """Continue from the newest checkpoint: weights, optimiser, queue, counters; the logs are cut back to it."""
    folder = latest_state(run.out)
    state = json.loads((folder / "state.json").read_text())
    if state["ranks"] != run.size:
        raise UserError(f"--resume: the run had {state['ranks']} processes, this one has {run.size}; each has a queue "
                        f"of its own, so use torchrun --nproc-per-node {state['ranks']}")
    set_peft_model_state_dict(run.policy.model, load_file(folder / "adapter_model.safetensors"))
    unpack_optimizer(run.optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
    run.queue.load_state_dict(unpack_queue(load_file(folder / f"queue-{run.rank}.safetensors"),
                                           json.loads((folder / f"queue-{run.rank}.json").read_text())))
    for name in (*PROGRESS, "seconds", "cpu_seconds"):
        setattr(run, name, state[name])
    if run.main:
        for name, size in state["logs"].items():
            if (run.out / name).exists():
                os.truncate(run.out / name, size)
        publish(run, folder, run.out)
    everyone(run, "the logs are cut")
    if (run.out / "metrics.jsonl").exists():
        run.history = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    run.say(f"resumed {run.out} after step {run.step}")


# --------------------------------------------------------------------------------------------------- the beginning
def resumed(cfg: Config, given: set[str]) -> Config:
    """The configuration of the run in --out. UserError if a flag that shapes the run was given another value."""
    latest_state(Path(cfg.out))
    old = json.loads((Path(cfg.out) / "run.json").read_text())["config"]
    for name in sorted(given - RESUMABLE):
        if getattr(cfg, name) != old[name]:
            raise UserError(f"--resume: the run in {cfg.out} was started with --{name.replace('_', '-')} {old[name]}, "
                            f"not {getattr(cfg, name)}; only --steps, --max-hours and the like may change")
    if "vram" in given:                                      # another card: what only bounds memory is planned again
        old |= {"slots": None, "token_budget": None}
    return Config(**{**old, **{name: getattr(cfg, name) for name in given}})


def make_room(out: Path):
    """Move an older run in `out` aside: nothing is ever overwritten."""
    if out.exists() and any(out.iterdir()):
        if not (out / "run.json").exists():
            raise UserError(f"--out {out} is not empty and holds no run of train.py: name another folder")
        free = next(i for i in range(1, 10**6) if not Path(f"{out}.{i}").exists())
        out.rename(f"{out}.{free}")
        print(f"{out} held another run: it was moved to {out}.{free}")
    (out / "best").mkdir(parents=True)


def split_tasks(cfg: Config, tasks: list[Task] | None) -> tuple[list[Task], list[Task]]:
    """(training, held-out) tasks: built-in ones, or those of --data. Of these a tenth is held out, at most
    eval_tasks, chosen by a fixed shuffle."""
    if tasks is None:
        heldout = [t for family in CORE + HARD
                   for t in builtin_tasks("heldout", cfg.eval_tasks, 0, (family,), cfg.difficulty)]
        return builtin_tasks("train", 3000, cfg.seed, CORE + HARD, cfg.difficulty), heldout
    random.Random("held out").shuffle(tasks)
    n = min(cfg.eval_tasks, len(tasks) // 10 or 1)
    if len(tasks) < 2:
        raise UserError(f"{cfg.data}: {len(tasks)} tasks; at least 2 are needed, one of them held out")
    return tasks[n:], tasks[:n]


def fill_from_preset(cfg: Config, preset):
    """What was not given comes from the model's size."""
    for f in fields(cfg):
        if getattr(cfg, f.name) is None:
            setattr(cfg, f.name, getattr(preset, f.name, None))
    cfg.decay_steps = cfg.decay_steps or preset.steps


def grpo_config(cfg: Config) -> GRPOConfig:
    return GRPOConfig(loss=cfg.loss, beta=cfg.beta, temperature=cfg.temperature, epochs=cfg.epochs,
                      minibatches=cfg.minibatches, token_limit=cfg.max_turns * cfg.turn_tokens,
                      token_budget=cfg.token_budget)


def start(cfg: Config, given: set[str], executor: Executor) -> Run:
    """Load everything and make the Run, fresh or resumed."""
    rank, size = world()
    if cfg.resume:
        cfg = resumed(cfg, given)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    data = read_jsonl(Path(cfg.data)) if cfg.data else None   # bad data is said before the model takes its minutes
    web = open_web(cfg.cache)
    loaded = load_tools(cfg.tools, web)                       # so are bad tools
    if "web" in (cfg.tools or "").split(",") and rank == 0:
        print(preflight_table(web))
    if cfg.vram is not None:
        plan = plan_memory(cfg.model, cfg.vram, cfg.quantize, context=cfg.context_tokens, slots=cfg.slots,
                           token_budget=cfg.token_budget)
        cfg.context_tokens, cfg.slots, cfg.token_budget = plan.context_tokens, plan.slots, plan.token_budget
        if rank == 0:
            print(plan)
    policy = load_policy(cfg.model, cfg.quantize, seed=cfg.seed)
    fill_from_preset(cfg, policy.preset)
    if cfg.deterministic or policy.preset.prompt == "short":
        torch.set_num_threads(1)                              # the tiny model's fastest; leaves the sandbox a core
    if cfg.groups % size:
        raise UserError(f"--groups {cfg.groups} cannot be shared by {size} processes")
    builtin = BUILTIN_TOOLS if not cfg.data or policy.preset.prompt == "short" else []    # the tiny model knows these
    tools = load_tools(None, beside=builtin + loaded)         # no two of one name
    verdicts = None if cfg.judge == "heuristic" else Cache(f"{cfg.out}.judge.sqlite", "record")    # outlives a resume
    judge = Judge(cfg.judge, cfg.judge_model, policy=policy, cache=verdicts)
    run = Run(cfg, policy, make_optimizer(policy, cfg.lr), executor, judge, tools, *split_tasks(cfg, data),
              SampleQueue(cfg.queue_size // size, cfg.half_life, cfg.max_age, cfg.max_uses), Path(cfg.out), rank, size,
              places=cfg.groups // size)
    if cfg.resume:
        restore(run)
    elif not cfg.probe:
        begin(run)
    return run


def begin(run: Run):
    """The folder of a fresh run, with all that evaluation and --resume need; step 0 is its first checkpoint."""
    if run.main:
        with writing(run.out):
            make_room(run.out)
            for folder in (run.out, run.out / "best"):           # run.json first: by it make_room knows a run
                write_synced(folder / "run.json", json.dumps(
                    {"config": asdict(run.cfg), "model": run.policy.name, "prompt": run.policy.preset.prompt,
                     "tools": run.cfg.tools, "quantize": run.cfg.quantize, "sampling": asdict(run.sampling(0.0))},
                    indent=1))
                save_adapter(run.policy, folder)
    run.pending = dict.fromkeys(NUMBERS) | {"step": 0, "online_trajectories": 0}
    save(run)


def probe(run: Run):
    """Is a run worth its night? Pass rates of the untrained model, groups with signal, and the hours it would take."""
    clock = Clock()
    groups = judge(run, sample(run, run.cfg.probe, clock), clock)
    signal = advantage(run, groups)
    counts = [sum(r.answer == 1 for r in g.rewards) for g in groups]
    run.say(f"\n{run.cfg.probe} tasks x {run.cfg.group_size}: trajectories right of {run.cfg.group_size}, tasks")
    for right in range(run.cfg.group_size + 1):
        n = counts.count(right)
        run.say(f"  {right:2d}  {n:4d}  {'#' * math.ceil(50 * n / len(counts))}")
    trajectories = [t for g in groups for t in g.trajectories]
    step_share = run.places / run.cfg.probe
    batch = [pair for g in signal for pair in g.batch()]
    run.say(f"groups with signal {len(signal) / len(groups):.2f}, tokens a trajectory "
            f"{fmean(len(t.ids) for t in trajectories):.0f} (sampled {fmean(sum(t.mask) for t in trajectories):.0f})")
    grpo_update(run.policy, run.optimizer, batch, grpo_config(run.cfg))    # this process ends: nothing is kept
    clock.lap("update")
    hours = {phase: clock[phase] * step_share * run.cfg.steps / 3600 for phase in ("sampling", "judging", "update")}
    run.say(f"a run of {run.cfg.steps} steps: " + ", ".join(f"{k} {v:.2f} h" for k, v in hours.items())
            + f", in all {sum(hours.values()):.2f} h, evaluations apart")
    if len(signal) / len(groups) < 0.2:
        run.say("few groups carry signal: choose tasks that the model solves sometimes (see --difficulty)")


def join_processes():
    """Each process to its own GPU. Gradients travel by nccl; what `everyone` says is on the CPU: gloo. A process that
    fails exits at once, and torchrun then ends the others, who may be waiting for it."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def command(argv=None):
    """All of it. UserError for bad input; an out-of-memory that the update could not mend is one, too."""
    cfg, given = parse_args(argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            join_processes()
        with Executor(cfg.sandbox) as executor:
            run = start(cfg, given, executor)
            run.say("configuration: " + json.dumps(asdict(run.cfg)) + f"\nmodel {run.policy.name}, sandbox "
                    f"{executor.sandbox}, {len(run.tasks)} training and {len(run.heldout)} held-out tasks")
            if cfg.probe:
                probe(run)
            else:
                train(run)
                report(run)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory ({str(error).partition('. ')[0]}); the last checkpoint is whole: python "
                        f"train.py --resume --out {cfg.out} with fewer --slots, a smaller --token-budget, or --vram "
                        "GIB, which plans both") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing is lost: python train.py --resume --out {cfg.out}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None) -> int:
    """Exit status: 0 done, 2 bad input, 130 interrupted (--resume continues)."""
    return exit_status(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
