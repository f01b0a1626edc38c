"""What a run writes, so that a kill at any moment loses nothing: checkpoints and logs.

Owns `save` and `restore`, the published adapters (out/, out/best/), the lines of the logs, and how to go on.
`run` is train.Run. Read in this order: `save`, `restore`, the packing of the queue and of the optimiser.

out/state/step-N/ holds all of a step as safetensors and JSON (no pickle); the two newest are kept. A checkpoint is
written into a folder `partial` and then renamed. It holds the lengths of the logs, which `restore` cuts back to them.
"""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from machinery.cli import UserError, flag_name
from machinery.folder import append, claim_folder, reading
from machinery.ranks import barrier, everyone
from machinery.text import token_texts
from policy import check_base, save_adapter

PROGRESS = ("step", "position", "online", "best", "before", "pending")
LOGS = ("metrics.jsonl", "trajectories.jsonl", "tokens.jsonl")
PER_TOKEN = {"ids": torch.int32, "mask": torch.uint8, "logps": torch.float64}    # stored as tensors, not as text


def way_on(run) -> str:
    """How to go on after an end that nobody wanted. run: None while it is loaded."""
    if run is None or run.cfg.probe or not list((run.out / "state").glob("step-*")):
        return "Nothing was trained yet: the same command starts again"
    return f"The last checkpoint is whole: python train.py --resume --out {run.out}"


def light(trajectory) -> dict:
    """A trajectory without what there is per token."""
    return {k: v for k, v in trajectory.to_dict().items() if k not in PER_TOKEN}


def log_trajectories(run, groups: list, fresh: list, replayed: list, stats):
    """Every trajectory as a line of trajectories.jsonl; of some of them the tokens in tokens.jsonl."""
    rows = []
    for group in groups:
        advantages = group.advantages or [None] * len(group.trajectories)
        for t, reward, a in zip(group.trajectories, group.rewards, advantages):
            rows.append({"step": run.step, "task": group.task.id, "family": group.task.family,
                         "question": group.task.question, "expected": group.task.answer, "reward": asdict(reward),
                         "advantage": a, **light(t)})
    for part in everyone(rows):
        if run.main:
            append(run.out / "trajectories.jsonl", part)
    log_tokens(run, groups, fresh, replayed, stats)


def kept_whole(run) -> bool:
    """Whether tokens.jsonl gets all trajectories of this step, not only the best and the worst of its batch."""
    return run.step == 1 or run.step % 10 == 0 or run.step == run.cfg.steps


def rows_to_keep(run, fresh: list, batch: list) -> list[int]:
    """Indices of the trajectories of a batch, fresh groups first, whose tokens go into tokens.jsonl."""
    if kept_whole(run):
        return list(range(len(batch)))
    rated = [(r.total, a) for group in fresh for r, a in zip(group.rewards, group.advantages) if a is not None]
    rows = range(len(rated))
    return sorted({max(rows, key=rated.__getitem__), min(rows, key=rated.__getitem__)}) if rated else []


def log_tokens(run, groups: list, fresh: list, replayed: list, stats):
    """tokens.jsonl: the tokens of some trajectories as they were sampled, and what the loss saw of them."""
    replayed_groups = [entry.group for entry in replayed]
    batch = [(group, t) for group in fresh + replayed_groups for t, _ in group.batch()]
    in_loss = {id(batch[row][1]): columns for row, columns in stats.shown.items()}
    if kept_whole(run):
        chosen = [(group, t) for group in groups + replayed_groups for t in group.trajectories]
    else:
        chosen = [batch[row] for row in rows_to_keep(run, fresh, batch)]
    texts = token_texts(run.policy.tokenizer, {i for _, t in chosen for i in t.ids})
    rows = []
    for group, t in chosen:
        row = {"step": run.step, "task": t.task_id, "sample": t.sample, "seed": t.seed, "sampled": group.step,
               "ids": t.ids, "texts": [texts[i] for i in t.ids], "mask": t.mask, "logps": shorter(t.logps)}
        if id(t) in in_loss:
            row |= {name: values and shorter(values) for name, values in in_loss[id(t)]._asdict().items()}
        rows.append(row)
    for part in everyone(rows):
        if run.main:
            append(run.out / "tokens.jsonl", part)


def shorter(values: list[float]) -> list[float]:
    return [round(value, 7) for value in values]


def write_synced(path: Path, text: str):
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def cpu_seconds(run) -> float:
    t = os.times()
    return run.cpu_seconds + t.user + t.system + t.children_user + t.children_system


# ------------------------------------------------------------------------------------------------- a run's beginning
def begin(run, inherited: dict):
    """The folder of a fresh run, with its first checkpoint. inherited: run.json, which evaluation and --resume need."""
    defaults = asdict(type(run.cfg)()) | run.policy.preset.settings
    inherited["defaults"] = defaults | {"decay_steps": defaults["decay_steps"] or defaults["steps"]}
    if run.main:
        claim_folder(run.out, "run.json", "run")
        (run.out / "best").mkdir()
        for folder in (run.out, run.out / "best"):           # run.json first: claim_folder knows a run by it
            write_synced(folder / "run.json", json.dumps(inherited, indent=1))
            save_adapter(run.policy, folder)
    save(run)


# may differ on --resume; the last three only bound memory
RESUMABLE = {"resume", "check", "steps", "max_hours", "out", "sandbox", "show_every", "vram", "slots", "token_budget"}


def resumed(cfg, given: set[str]):
    """The configuration of the run in --out. UserError if a setting that shapes the run was given another value."""
    latest_state(Path(cfg.out))
    with reading(file := Path(cfg.out) / "run.json"):
        stored = json.loads(file.read_text())["config"]
        old = {name: stored.get(name, default) for name, default in asdict(type(cfg)()).items()}
    for name in sorted(given - RESUMABLE):
        if getattr(cfg, name) != old[name]:
            raise UserError(f"--resume: the run in {cfg.out} was started with {flag_name(name)} {old[name]}, not "
                            f"{getattr(cfg, name)}; only --steps, --max-hours and the like may change")
    if "vram" in given:                                      # another card: what only bounds memory is planned again
        old |= {"slots": None, "token_budget": type(cfg).token_budget}
    return type(cfg)(**{**old, **{name: getattr(cfg, name) for name in given}})


# ------------------------------------------------------------------------------------------------ save and restore
def save(run):
    """Write the checkpoint of run.step into a new folder and rename it. Then the adapter in out/ is replaced by it."""
    states = run.out / "state"
    part, whole = states / "partial", states / f"step-{run.step:06d}"
    try:
        if run.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        barrier()                                   # the folder is there
        tensors, entries = pack_queue(run.queue)
        save_file(tensors, part / f"queue-{run.rank}.safetensors")
        write_synced(part / f"queue-{run.rank}.json", json.dumps(entries))
        if run.main:
            save_shared(run, part)
        barrier()                                   # all is written
    except (OSError, SafetensorError) as error:     # a full disk: give back what little there was
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(error) from error
    if run.main:
        part.rename(whole)
        publish(whole, run.out)
        for old in sorted(states.glob("step-*"))[:-2]:
            shutil.rmtree(old)


def save_shared(run, part: Path):
    """What all ranks share: the adapter, the optimiser, the progress."""
    weights = get_peft_model_state_dict(run.policy.model, save_embedding_layers=False)    # "auto" asks the hub
    save_file(weights, part / "adapter_model.safetensors")
    tensors, scalars = pack_optimizer(run.optimizer)
    save_file(tensors, part / "optimizer.safetensors")
    state = {name: getattr(run, name) for name in PROGRESS}
    state |= {"seconds": run.elapsed(), "cpu_seconds": cpu_seconds(run), "optimizer": scalars, "ranks": run.size,
              "logs": {log: (run.out / log).stat().st_size if (run.out / log).exists() else 0 for log in LOGS}}
    write_synced(part / "state.json", json.dumps(state))


def publish(state: Path, folder: Path):
    """Replace the adapter's weights in `folder` by those of a checkpoint, in one step."""
    shutil.copyfile(state / "adapter_model.safetensors", folder / "adapter.partial")
    os.replace(folder / "adapter.partial", folder / "adapter_model.safetensors")


def keep_best(run):
    """out/best/: the adapter that was best on the quick held-out tasks, greedy and sampled together."""
    if run.pending["heldout_quick"] > run.best:
        run.best = run.pending["heldout_quick"]
        if run.main:
            publish(latest_state(run.out), run.out / "best")


def latest_state(out: Path) -> Path:
    states = sorted((out / "state").glob("step-*"))
    if not states:
        raise UserError(f"--resume: {out} holds no checkpoint; without --resume a new run begins")
    return states[-1]


def metrics_until(run, size: int) -> list[dict]:
    """The lines of metrics.jsonl at the checkpoint. UserError unless they are one for each step of this run so far."""
    file = run.out / "metrics.jsonl"
    with reading(file, "Put that of this run back"):
        history = [json.loads(line) for line in (file.read_bytes()[:size] if file.exists() else b"").splitlines()]
        if [row["step"] for row in history] != list(range(run.step)):
            raise UserError("not one line for each step of this run until its checkpoint: put its own file back")
    return history


def restore(run, make_group):
    """Continue from the newest checkpoint: weights, optimiser, queue, counters; the logs are cut back to it.

    make_group: (task id, trajectories as dicts, step, advantages) -> a group of the queue.
    """
    folder = latest_state(run.out)
    check_base(run.out, run.policy.name, run.policy.base_weights)
    with reading(folder, "Remove it: the checkpoint before it may be whole"):
        state = json.loads((folder / "state.json").read_text())
        if state["ranks"] != run.size:
            raise UserError(f"the run had {state['ranks']} processes, this one has {run.size}; each has its own queue, "
                            f"so use torchrun --nproc-per-node {state['ranks']}")
        set_peft_model_state_dict(run.policy.model, load_file(folder / "adapter_model.safetensors"))
        unpack_optimizer(run.optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        tensors = load_file(folder / f"queue-{run.rank}.safetensors")
        packed = json.loads((folder / f"queue-{run.rank}.json").read_text())
        run.queue.load_state_dict(unpack_queue(tensors, packed, make_group))
        for name in (*PROGRESS, "seconds", "cpu_seconds"):
            setattr(run, name, state[name])
    run.history = metrics_until(run, state["logs"]["metrics.jsonl"])
    barrier()                                       # all have read them
    if run.main:
        for name, size in state["logs"].items():
            if (run.out / name).exists() and (run.out / name).stat().st_size > size:
                os.truncate(run.out / name, size)
        publish(folder, run.out)
    over = run.step >= run.cfg.steps
    run.say(f"resumed {run.out} after step {run.step}" + (", the last one: a larger --steps trains on" if over else ""))


# --------------------------------------------------------------------------------- as tensors (safetensors) and JSON
def pack_queue(sample_queue) -> tuple[dict, dict]:
    """(tensors, JSON). Per group its trajectories' ids, masks and log-probs end to end; everything else as text."""
    state, tensors, entries = sample_queue.state_dict(), {}, []
    for i, entry in enumerate(state["entries"]):
        group = entry.pop("group")
        trajectories, advantages = zip(*group.batch())
        for key, kind in PER_TOKEN.items():
            tensors[f"{i}.{key}"] = torch.tensor([x for t in trajectories for x in getattr(t, key)], dtype=kind)
        entries.append({"task": group.task.id, "trajectories": [light(t) for t in trajectories],
                        "advantages": advantages, "lengths": [len(t.ids) for t in trajectories], **entry})
    return tensors, {"entries": entries, "counts": state["counts"]}


def unpack_queue(tensors: dict, packed: dict, make_group) -> dict:
    """The inverse of pack_queue."""
    entries = []
    for i, entry in enumerate(packed["entries"]):
        lengths, trajectories = entry.pop("lengths"), entry.pop("trajectories")
        for key in PER_TOKEN:
            for t, column in zip(trajectories, tensors[f"{i}.{key}"].split(lengths)):
                t[key] = column.tolist()
        group = make_group(entry.pop("task"), trajectories, entry["step"], entry.pop("advantages"))
        entries.append({"group": group, **entry})
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
    """The inverse of pack_optimizer."""
    state: dict[int, dict] = {}
    for name, value in {**tensors, **scalars}.items():
        parameter, key = name.split(".", 1)
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
