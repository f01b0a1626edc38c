"""Tool-R1 training: sample, judge, advantage, replay, update, log, save.

    python train.py                                    # the built-in tiny model, two CPU cores, some minutes
    python train.py --model Qwen2.5-7B --data FILE     # QLoRA on one GPU

Owns the loop, the evaluation during training, `Config` (all settings) and the command line. Read in this order: `train`
and the verbs as it calls them, `finish_step`, `evaluate`, `Config`; the rest sets up a run, and machinery/ can be
skipped. The mathematics is in grpo.py, sampling in rollout.py, the replay rule in queue.py.

No random generator has a state here. Every random choice follows from (seed, step, ...): a trajectory's stream from its
task and number, the replay from the step, the order of the tasks from the epoch. So a resumed run needs only counters,
and in deterministic mode it equals the run without interruption. Departures from the paper: see README.
"""
from __future__ import annotations

from machinery.cli import quiet_imports
quiet_imports(__name__)

import contextlib
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import report
from executor import Executor
from grpo import Group, GRPOConfig, group_advantages, make_optimizer, update as grpo_update
from machinery import console, ranks
from machinery.checkpoint import begin, keep_best, log_trajectories, restore, resumed, rows_to_keep, save, way_on
from machinery.cli import OneLineParser, UserError, exit_status, option, parse_settings
from machinery.folder import alone_in, append
from machinery.memory import apply_plan
from machinery.preflight import check
from machinery.ranks import everyone
from machinery.sample_queue import Entry, SampleQueue
from machinery.versions import warn_of_other_versions
from machinery.web import Cache
from policy import LORA_RANK, Policy, load_policy, model_config, parameter_counts, preset_for
from reward import Judge, check_judge, compute_rewards
from rollout import Sampling, Trajectory, check_context, read_prompt, rollout
from tasks import BUILTIN_TOOLS, HARD, Task, endless, every, read_jsonl, split_tasks
from tools import load_tools, open_web, preflight_table


# ------------------------------------------------------------------------------------------------------- the loop
def train(run: Run):
    """The method."""
    finish_step(run)                                             # step 0: evaluate; resumed: the saved step
    while not run.ended:
        run.step += 1
        run.clock = console.Clock()
        groups = judge(run, sample(run, run.rank_online))
        fresh = advantage(run, groups)
        replayed = replay(run, len(fresh))
        for again in range(1, run.cfg.resample + 1):             # groups that replay did not supply: sample again
            missing = max(everyone(run.rank_online - len(fresh) - len(replayed)))    # of all ranks
            if missing > 0:
                extra = judge(run, sample(run, missing, again))
                groups += extra
                fresh += advantage(run, extra)
        stats = update(run, fresh, replayed)
        run.pending = console.step_metrics(run, groups, fresh, replayed, stats)
        console.show_trajectory(run, groups[0])
        log_trajectories(run, groups, fresh, replayed, stats)
        save(run)
        finish_step(run)


def sample(run: Run, n: int, again: int = 0) -> list[Group]:
    """Roll out `group_size` trajectories for each of the next n tasks with the current policy."""
    cfg, tasks = run.cfg, run.next_tasks(n)
    seed = random.Random(f"rollout-{cfg.seed}-{run.step}-{again}").getrandbits(62)
    with run.bar(n * cfg.group_size, f"step {run.step}: sampling") as bar:
        sampled = rollout(run.policy, tasks, run.executor, run.tools, cfg, cfg.group_size, seed,
                          lambda _: bar.update())
    run.online += n * cfg.group_size * run.size
    run.clock.lap("sampling")
    for trajectory in [t for group in sampled for t in group]:
        run.clock["tokens"] += sum(trajectory.mask)
        run.clock["tools"] += sum(turn.seconds for turn in trajectory.turns)
    return [Group(task, group, run.step) for task, group in zip(tasks, sampled)]


def judge(run: Run, groups: list[Group]) -> list[Group]:
    """Equation (1): a reward for every trajectory; *unjudged* where the judge or the host failed."""
    tasks, trajectories = [g.task for g in groups], [g.trajectories for g in groups]
    for group, rewards in zip(groups, compute_rewards(tasks, trajectories, run.judge, run.cfg.w_exec)):
        group.rewards = rewards
    run.clock.lap("judging")
    return groups


def advantage(run: Run, groups: list[Group]) -> list[Group]:
    """Equation (2): the groups that carry signal, with their advantages; the others are dropped."""
    signal = []
    for group in groups:
        found = group_advantages(group.rewards, run.cfg)
        if found is not None:
            group.advantages, group.std = found
            signal.append(group)
    return signal


def replay(run: Run, n_fresh: int) -> list[Entry]:
    """Queued groups, for the places that --online-groups leaves free, or those without signal (up to replay_share)."""
    rng = random.Random(f"replay-{run.cfg.seed}-{run.step}-{run.rank}")
    most = max(run.rank_groups - run.rank_online, int(run.cfg.replay_share * run.rank_groups))
    return run.queue.draw(min(most, run.rank_groups - n_fresh), run.step, rng)


def update(run: Run, fresh: list[Group], replayed: list[Entry]):
    """Equations (3) to (8) on one batch of fresh and replayed groups. Then the fresh ones enter the queue."""
    cfg, groups = run.cfg, fresh + [entry.group for entry in replayed]
    for parameter_group in run.optimizer.param_groups:
        parameter_group["lr"] = learning_rate(cfg, run.step)
    batch = [pair for group in groups for pair in group.batch()]
    is_fresh = [group.step == run.step for group in groups for _ in group.batch()]
    with run.bar(len(batch) * cfg.epochs, f"step {run.step}: update") as bar:
        stats = grpo_update(run.policy, run.optimizer, batch, cfg, cfg.temperature, cfg.max_turns * cfg.turn_tokens,
                            is_fresh, run.step, bar, cfg.plain, rows_to_keep(run, fresh, batch))
    cfg.token_budget = stats.token_budget                        # lower after an out-of-memory
    shares = iter(stats.off_policy_each[sum(is_fresh):])         # of the replayed trajectories, group by group
    for entry in replayed:
        run.queue.report_off_policy(entry, fmean(next(shares) for _ in entry.group.batch()))
    for group in fresh:
        kept = group.positive() if cfg.replay == "positive" else group
        run.queue.admit(kept, group.std, any(r.answer == 1 for r in group.rewards), run.step)
    run.clock.lap("update")
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
    """Evaluate if it is time, then write the step's line of metrics.jsonl. The checkpoint was saved before, with the
    step's metrics as `pending`. If a kill comes between, --resume does this again, after it has cut the logs back to
    their length at the checkpoint: so there is exactly one line per step."""
    run.ended = run.step >= run.cfg.steps or console.out_of_time(run)
    full = run.step == 0 or run.ended
    if full or run.step % run.cfg.eval_every == 0:
        run.pending |= evaluate(run, full)
        if run.step == 0:
            run.before = run.pending
        keep_best(run)
    run.pending["seconds_total"] = round(run.elapsed(), 2)
    run.history.append(run.pending)
    if run.main:
        append(run.out / "metrics.jsonl", [run.pending])
    console.show_step(run)
    report.refresh(run)
    run.pending = None


# ---------------------------------------------------------------------------------------------------- evaluation
def solve(run: Run, tasks: list[Task], name: str, temperature: float, samples: int = 1) -> dict[str, float]:
    """task id -> 1.0 if one of `samples` answers is right, else 0.0. Each rank takes its share of the tasks."""
    mine = tasks[run.rank::run.size]
    with run.bar(len(mine) * samples, f"held-out {name}") as bar:
        groups = rollout(run.policy, mine, run.executor, run.tools, replace(run.cfg, temperature=temperature), samples,
                         seed=1, on_end=lambda _: bar.update())
    console.show_host_failures(run, groups)
    judged = zip(mine, compute_rewards(mine, groups, run.judge))
    right = {task.id: float(any(r.answer == 1 for r in rewards)) for task, rewards in judged}
    return {task_id: value for part in everyone(right) for task_id, value in part.items()}


def evaluate(run: Run, full: bool) -> dict:
    """Held-out accuracy: greedy, sampled at temperature 1, and (full) pass@8, per family. Core and hard apart.

    A quick evaluation takes every fourth task of each family; out/best is chosen on those. pass@8: every eighth.
    """
    start = time.perf_counter()
    quick, eighth = every(4, run.heldout), every(8, run.heldout)
    tasks = run.heldout if full else quick
    right = {
        "greedy": solve(run, tasks, "greedy", 0.0),
        "sampled": solve(run, tasks, "sampled", 1.0),
    }
    if full:
        right["pass@8"] = solve(run, eighth, "pass@8", 1.0, 8)
    seconds = round(time.perf_counter() - start, 2)
    return console.heldout_metrics(run, tasks, quick, right) | {"evaluation_seconds": seconds}


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass
class RunConfig:                # defaults are a 7B model's; policy.preset_for says what differs for other sizes
    model: str = option("tiny", "tiny (built in), a Qwen name such as Qwen2.5-7B, a hub id, or a local folder")
    out: str = option("out", "folder of the run")
    resume: bool = option(False, "continue the run in --out")
    steps: int = option(200, "steps after which the run ends; a step trains on one batch", zero=True)
    max_hours: float | None = option(None, "end in time, with evaluation and checkpoint")
    seed: int = option(0, "seed of everything", zero=True)
    check: bool = option(False, "print what this run needs and what of it is missing, before any download, and end")
    probe: int = option(0, "sample N tasks with the untrained model, say if a run is worth it, end", zero=True)
    quantize: str = option("auto", "of the base; auto: nf4 on a GPU from 1e9 parameters on", ("auto", "none", "nf4"))
    vram: float | None = option(None, "GiB of GPU memory: plans context, slots and token budget where not given")
    lr: float = option(1e-5, "learning rate")
    warmup: int = option(8, "steps of linear warm-up", zero=True)
    schedule: str = option("constant", "of the learning rate after the warm-up", ("constant", "cosine"))
    decay_steps: int | None = option(None, "step at which the cosine ends (default: --steps of the model's size)")
    lora_rank: int = option(LORA_RANK, "rank of the adapter; its alpha is twice that", flag=False)


@dataclass
class TaskConfig:
    data: str | None = option(None, "FILE.jsonl with id, question, answer, files, level; default: the built-in tasks")
    allow_outside_files: bool = option(False, "let --data attach files from outside its folder")
    difficulty: int = option(0, "of the built-in tasks: 0 for the tiny model, 1 to 3 for real ones", zero=True)
    tools: str | None = option(None, "web, my_tools.py or both with a comma; the built-in tasks bring theirs")
    no_preflight: bool = option(False, "do not call each web tool once before the run")
    cache: str = option("live", "of the web: live, record[:FILE] or replay[:FILE]")
    judge: str = option("heuristic", "heuristic, local (the base model), or the URL of an OpenAI-compatible server")
    judge_model: str | None = option(None, "model name at the judge's URL")
    sandbox: str = option("auto", "of the model's code: see executor.py", ("auto", "bwrap", "none"))
    groups: int = option(8, "groups (tasks) per step")
    group_size: int = option(8, "trajectories per group")
    resample: int = option(2, "rounds of sampling again for groups without signal that replay did not fill", zero=True)
    w_exec: float = option(0.1, "weight of the share of turns whose code ran, in the reward", zero=True, flag=False)


@dataclass
class QueueConfig:
    queue_size: int = option(64, "groups kept for replay", zero=True)
    online_groups: int | None = option(None, "of --groups so many are sampled, the queue fills the rest (default: all)")
    replay: str = option("all", "of a group: all, or only trajectories with a positive advantage", ("all", "positive"))
    replay_share: float = option(0.5, "at most this share of a batch replaces groups without signal", zero=True)
    half_life: float = option(4.0, "steps in which a queued group's priority halves")
    max_age: int = option(8, "steps after which a queued group is dropped", zero=True)
    max_uses: int = option(4, "updates that a group may take part in", zero=True)
    max_off_policy: float = option(0.3, "a group leaves with more than this share of off-policy tokens", zero=True,
                                   flag=False)


@dataclass
class EvaluationConfig:
    eval_every: int = option(20, "steps between quick held-out evaluations; they also decide out/best")
    eval_tasks: int = option(64, "held-out tasks per family (built-in), or in all (--data)")
    show_every: int = option(10, "steps between whole trajectories printed as text")


@dataclass
class Config(EvaluationConfig, QueueConfig, GRPOConfig, Sampling, TaskConfig, RunConfig):
    """All settings of a run. Each has one definition, in its section. (--help lists the last section first.)"""


def parse_args(argv=None) -> tuple[Config, set[str]]:
    """(configuration, names of the settings that were given). UserError on anything unknown."""
    parser = OneLineParser(prog="train.py", description="Train a tool-using policy with GRPO (Tool-R1).",
                           allow_abbrev=False)
    given = parse_settings(parser, Config, argv)
    cfg = Config(**given)
    if cfg.group_size == 1:
        raise UserError("--group-size 1: an advantage compares trajectories of one task, so it takes at least 2")
    check_judge(cfg.judge, cfg.judge_model)
    cfg.prompt = cfg.prompt and read_prompt(cfg.prompt)         # run.json keeps the text: the file may change
    return cfg, set(given)


# ------------------------------------------------------------------------------------------------------- the state
@dataclass
class Run:
    """What the verbs work on. Of its second half, the run's progress, a checkpoint holds what a resume needs."""
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
    rank_groups: int                                 # groups of a batch on this rank (process)
    rank_online: int                                 # those sampled for it; the queue fills the rest
    rank: int = 0
    size: int = 1                                    # number of ranks: processes that share the work
    started: float = field(default_factory=time.monotonic)
    clock: console.Clock = field(default_factory=console.Clock)      # of the current step

    step: int = 0
    position: int = 0                                # training tasks taken so far, over all ranks
    online: int = 0                                  # trajectories sampled for training so far, over all ranks
    seconds: float = 0.0                             # wall time of earlier processes of this run
    cpu_seconds: float = 0.0
    report_seconds: float = 0.0                      # spent on the page so far
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
        """Families that are reported apart; none in --data, whatever its families are called."""
        return () if self.cfg.data else HARD

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def say(self, text: str):
        if self.main:
            tqdm.write(text)

    def bar(self, total: int, what: str):
        return tqdm(total=total, desc=what, leave=False, disable=None if self.main else True, unit="traj")

    def next_tasks(self, n: int) -> list[Task]:
        """This rank's n of the next n * size training tasks."""
        chosen = endless(self.tasks, self.cfg.seed, self.position, n * self.size)
        self.position += n * self.size
        return chosen[self.rank::self.size]


# --------------------------------------------------------------------------------------------------- the beginning
def settle(cfg: Config, given: set[str]) -> tuple[Config, set[str]]:
    """(the configuration with all that follows from the model's size or from the run resumed, the settled names)."""
    if cfg.resume:
        return resumed(cfg, given), given | {"context_tokens"}
    settings = preset_for(sum(parameter_counts(model_config(cfg.model)))).settings
    if "groups" in given:           # the size's --online-groups fits the size's --groups alone
        given = given | {"online_groups"}
    for name in settings.keys() - given:
        setattr(cfg, name, settings[name])
    cfg.decay_steps = cfg.decay_steps or settings.get("steps", Config.steps)
    return cfg, given | settings.keys()


def start(cfg: Config, given: set[str], executor: Executor) -> Run:
    """Load everything and make the Run, new or resumed. Bad input is refused before the model takes its minutes."""
    rank, size = ranks.world()
    cfg, settled = settle(cfg, given)
    cfg.online_groups = cfg.online_groups or cfg.groups
    if cfg.online_groups > cfg.groups or cfg.groups % size or cfg.online_groups % size:
        raise UserError(f"--groups {cfg.groups} --online-groups {cfg.online_groups}: the first must be the larger one, "
                        f"and both are shared evenly by {size} processes")
    data = read_jsonl(cfg.data, cfg.allow_outside_files) if cfg.data else None
    tasks, heldout = split_tasks(data, cfg.eval_tasks, cfg.seed, cfg.difficulty)
    web = open_web(cfg.cache)
    loaded = load_tools(cfg.tools, web)
    apply_plan(cfg, settled)
    torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    policy = load_policy(cfg.model, cfg.quantize, seed=cfg.seed, lora_rank=cfg.lora_rank)
    if cfg.deterministic:
        torch.set_num_threads(1)
    builtin = BUILTIN_TOOLS if policy.preset.prompt == "short" or not cfg.data else []    # the tiny model knows these
    tools = load_tools(None, beside=builtin + loaded)         # no two of one name
    if rank == 0:
        print(preflight_table(tools, web, not cfg.no_preflight), end="")
    check_context(policy, tasks, tools, cfg)
    verdicts = None                                           # those of an LLM outlive a resume
    if cfg.judge != "heuristic":
        verdicts = Cache(f"{Path(cfg.out)}.judge.sqlite", "record")
    run = Run(
        cfg, policy, make_optimizer(policy, cfg.lr), executor,
        Judge(cfg.judge, cfg.judge_model, policy=policy, cache=verdicts), tools, tasks, heldout,
        SampleQueue(cfg.queue_size // size, cfg.half_life, cfg.max_age, cfg.max_uses, cfg.max_off_policy),
        Path(cfg.out), cfg.groups // size, cfg.online_groups // size, rank, size)
    if cfg.resume:
        restore(run, queued_group)
    elif not cfg.probe:
        sampling = {f.name: getattr(cfg, f.name) for f in fields(Sampling)} | {"temperature": 0.0}
        run.pending = dict.fromkeys(console.NUMBERS) | {"step": 0, "online_trajectories": 0}
        begin(run, {
            "config": asdict(cfg),
            "model": policy.name,
            "base_weights": policy.base_weights,
            "prompt": policy.preset.prompt,
            "tools": cfg.tools,
            "quantize": cfg.quantize,
            "sampling": sampling,
        })
    return run


def queued_group(task_id: str, trajectories: list[dict], step: int, advantages: list[float]) -> Group:
    """A group of the queue as a checkpoint holds it: a replayed group needs no question, answer and rewards."""
    return Group(Task(task_id, "", ""), [Trajectory.from_dict(t) for t in trajectories], step, [], advantages)


def probe(run: Run):
    """Is a run worth its hours? Pass rates of the untrained model, groups with signal, and the hours it would take."""
    cfg, run.clock = run.cfg, console.Clock()
    groups = judge(run, sample(run, cfg.probe))
    batch = [pair for group in advantage(run, groups) for pair in group.batch()]
    grpo_update(run.policy, run.optimizer, batch, cfg, cfg.temperature, cfg.max_turns * cfg.turn_tokens)
    run.clock.lap("update")                                           # this process ends: nothing of it is kept
    console.show_probe(run, groups)


def command(argv=None):
    """The whole command line. UserError for bad input, and for an out-of-memory that the update could not mend."""
    cfg, given = parse_args(argv)
    run = None
    try:
        if cfg.check:
            return check(*settle(cfg, given))
        ranks.join()
        warn_of_other_versions()
        alone = contextlib.nullcontext() if cfg.probe or ranks.world()[0] else alone_in(Path(cfg.out))
        with alone, Executor(cfg.sandbox) as executor:
            run = start(cfg, given, executor)
            run.say("configuration: " + json.dumps(asdict(run.cfg)))
            run.say(f"model {run.policy.name} on {run.policy.device}, {run.policy.model.dtype}, sandbox "
                    f"{executor.sandbox}, {len(run.tasks)} training and {len(run.heldout)} held-out tasks")
            if run.cfg.probe:
                probe(run)
            else:
                train(run)
                console.report(run)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory ({str(error).partition('. ')[0]}). {way_on(run)}, with fewer --slots, a "
                        "smaller --token-budget, or --vram GIB, which plans both") from error
    except OSError as error:
        raise UserError(f"cannot go on ({error}): make room, or mend the folder. {way_on(run)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(way_on(run)) from None


def main(argv=None) -> int:
    """Exit status: 0 done, 2 bad input, 130 interrupted (--resume continues)."""
    status = 1                                                    # of an error that nobody foresaw
    try:
        status = exit_status(lambda: command(argv))
    finally:
        ranks.leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
