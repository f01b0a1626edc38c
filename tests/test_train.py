"""train.py: whole short runs of the real thing (built-in model, sandbox, judge, queue), resume, bad input."""
import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import train
from chat_server import Server
from machinery import checkpoint, console
from policy import TINY_DIR
from tasks import builtin_tasks
from train import Config, learning_rate, parse_args

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--groups", "3", "--group-size", "4", "--eval-tasks", "1", "--eval-every", "2", "--deterministic",
         "--temperature", "1.3"]                            # hotter: more failures, so more groups carry signal
TIMING = re.compile(r"seconds|tokens_per_second")


def run(*arguments) -> int:
    return train.main([*map(str, arguments)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(value):
    """The same without what a clock says, at any depth."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not TIMING.search(k)}
    return [untimed(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Three steps without interruption."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run("--out", out, "--steps", 3, *SMALL) == 0
    return out


def test_a_resumed_run_asks_the_judge_nothing_twice(tmp_path, monkeypatch):  # trap 10: verdicts outlive a process
    with Server(lambda messages: "VERDICT: INCORRECT") as server:
        judged = ["--judge", server.url, "--judge-model", "m", "--out", tmp_path / "out", *SMALL]
        assert run(*judged, "--steps", 1) == 0
        assert run("--resume", "--steps", 2, "--out", tmp_path / "out") == 0
        asked = Counter(json.dumps(body["messages"]) for _, _, body in server.requests)
        assert set(asked.values()) == {1}


# --------------------------------------------------------------------------------------------------- a whole run
def test_one_line_a_step_with_the_promised_keys(finished):
    rows = lines(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    promised = {"step", "reward", "accuracy", "exec_rate", "turns", "entropy", "kl", "clip_fraction", "off_policy",
                "signal_share", "queue_size", "online_trajectories", "seconds"}
    for row in rows:
        assert promised <= row.keys()
    for row in rows[1:]:
        assert all(isinstance(row[key], (int, float)) for key in ("reward", "accuracy", "exec_rate", "turns"))
    for row in (rows[0], rows[2], rows[3]):
        assert {"heldout_greedy", "heldout_sampled", "heldout_hard"} <= row.keys()
    assert rows[0]["heldout_pass8"] is not None and rows[-1]["heldout_pass8"] is not None
    assert rows[-1]["heldout_families"].keys() == rows[0]["heldout_families"].keys()


def test_trajectories_are_readable_and_complete(finished):
    rows, metrics = lines(finished / "trajectories.jsonl"), lines(finished / "metrics.jsonl")
    assert len(rows) == metrics[-1]["online_trajectories"]
    one = rows[0]
    assert {"step", "task", "question", "expected", "reward", "steps", "answer", "stop_reason"} <= one.keys()
    assert {"total", "answer", "execution"} <= one["reward"].keys()
    assert "Thought" in one["steps"][0]["text"] and "ids" not in one


def test_a_stranger_loads_the_adapter(finished):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    for folder in (finished, finished / "best"):
        model = AutoPeftModelForCausalLM.from_pretrained(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        ids = tokenizer("What is 3 * 4?", return_tensors="pt").input_ids
        assert model(input_ids=ids).logits.shape[:2] == ids.shape
    newest = load_file(checkpoint.latest_state(finished) / "adapter_model.safetensors")
    published = load_file(finished / "adapter_model.safetensors")
    assert all(torch.equal(newest[name], published[name]) for name in newest)


def test_the_adapter_moved_and_the_base_did_not(finished):
    weights = load_file(finished / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.abs().max() > 0 for name, tensor in weights.items())
    assert all("lora_" in name for name in weights)


def test_run_json_holds_what_evaluation_inherits(finished):
    for folder in (finished, finished / "best"):
        settings = json.loads((folder / "run.json").read_text())
        assert settings["prompt"] == "short" and settings["sampling"]["max_turns"] == 4


def test_no_pickle_anywhere(finished):
    kinds = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".md", ".jinja", ".html"}


# ------------------------------------------------------------------------------------------------ resume (trap 10)
def same_run(one: Path, two: Path):
    for name in ("metrics.jsonl", "trajectories.jsonl", "tokens.jsonl"):
        assert untimed(lines(one / name)) == untimed(lines(two / name)), name
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "queue-0.safetensors"):
        a, b = (load_file(checkpoint.latest_state(out) / name) for out in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


def test_resumed_equals_uninterrupted(finished, tmp_path):
    out = tmp_path / "out"
    assert run("--out", out, "--steps", 1, *SMALL) == 0
    assert run("--out", out, "--resume", "--steps", 3) == 0           # more steps: allowed, nothing else need be given
    same_run(finished, out)


def test_a_kill_between_checkpoint_and_line_repeats_and_skips_nothing(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(run):
        if run.step == 2:
            raise KeyboardInterrupt
        return real(run)
    real = train.finish_step
    monkeypatch.setattr(train, "finish_step", killed)
    assert run("--out", out, "--steps", 3, *SMALL) == 130
    (out / "metrics.jsonl").open("a").write('{"step": 2, "half a li')    # what a kill in the middle of a write leaves
    monkeypatch.setattr(train, "finish_step", real)
    assert run("--out", out, "--resume") == 0
    same_run(finished, out)


def start(out: Path, *arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "train.py", "--out", out, *map(str, arguments)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # CI may ignore it


def test_ctrl_c_ends_at_once_with_a_way_on(tmp_path):
    out = tmp_path / "out"
    process = start(out, "--steps", 50, *SMALL)
    while not list(out.glob("state/step-000001")):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and f"--resume --out {out}" in errors and "Traceback" not in errors
    assert checkpoint.latest_state(out)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """SIGKILL at 20 random moments; the resumed run's adapter, queue and lines equal the uninterrupted one's."""
    steps, rng = 6, random.Random(0)
    whole, out = tmp_path / "whole", tmp_path / "out"
    began = time.monotonic()
    assert start(whole, "--steps", steps, *SMALL).wait() == 0
    length = time.monotonic() - began
    kills, arguments = 0, ["--steps", steps, *SMALL]
    while kills < 20:
        process = start(out, *arguments)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * length)
            arguments = ["--resume"]                         # it got through: once more over the end, killed or not
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            arguments = ["--resume"] if list(out.glob("state/step-*")) else ["--steps", steps, *SMALL]
    assert start(out, "--resume").wait() == 0
    same_run(whole, out)
    print(f"{kills} kills, a run takes {length:.0f} s")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit])
def test_an_optimiser_goes_on_where_it_was(tmp_path, kind):
    """Also the 8-bit one of the GPU, with a tensor that is in 8 bits and one too small for it."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((80, 64), (80, 64), (8,))]

    def step(optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.sin(1000 * p.detach())
        optimizer.step()
    one, two = (kind([torch.nn.Parameter(p.clone()) for p in start], lr=1e-2) for _ in range(2))
    step(one)
    tensors, scalars = checkpoint.pack_optimizer(one)
    checkpoint.save_file(tensors, tmp_path / "optimizer.safetensors")
    checkpoint.unpack_optimizer(two, load_file(tmp_path / "optimizer.safetensors"), json.loads(json.dumps(scalars)))
    for a, b in zip(one.param_groups[0]["params"], two.param_groups[0]["params"]):
        b.data.copy_(a.data)
    for optimizer in (one, two):
        step(optimizer)
    for a, b in zip(one.param_groups[0]["params"], two.param_groups[0]["params"]):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ several processes
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path, capsys):
    """Queue off, one optimiser step: the same tasks and streams, shared by two ranks, give the same adapter."""
    arguments = ["--steps", "1", "--replay-share", "0", "--resample", "0", "--minibatches", "1", *SMALL,
                 "--groups", "4"]
    assert run("--out", tmp_path / "one", *arguments) == 0
    done = subprocess.run([*TORCHRUN, str(ROOT / "train.py"), "--out", str(tmp_path / "two"), *arguments],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:         # Adam's first step is +-lr / 8 whatever the gradient's size: rounding turns a few signs
        far = (one[name] - two[name]).abs() > 1e-6
        assert far.float().mean() < 0.02, name
    a, b = (lines(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two"))
    for key in ("reward", "accuracy", "exec_rate", "loss", "entropy", "online_trajectories", "heldout_greedy"):
        assert a[key] == pytest.approx(b[key], abs=1e-3), key
    assert "2 processes" in fails(capsys, "--out", tmp_path / "two", "--resume")
    resumed = subprocess.run([*TORCHRUN, str(ROOT / "train.py"), "--out", str(tmp_path / "two"), "--resume", "--steps",
                              "2"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert [row["step"] for row in lines(tmp_path / "two" / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("error", ["UserError('the judge is gone')", "torch.OutOfMemoryError('CUDA out of memory')"])
def test_a_process_that_fails_ends_them_all(tmp_path, error):
    """Only rank 1 fails; rank 0 waits for it in a collective, and must not do so for ever."""
    script = tmp_path / "one_fails.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import os, torch, train\nfrom tools import UserError\n"
                      f"def fails(*_):\n    raise {error}\n"
                      "if os.environ['RANK'] == '1':\n    train.judge = fails\n"
                      "sys.exit(train.main())\n")
    done = subprocess.run([*TORCHRUN, script, "--out", str(tmp_path / "out"), "--steps", "1", *SMALL, "--groups", "2"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "error: " in done.stderr and "local_rank: 1" in done.stderr
    assert checkpoint.latest_state(tmp_path / "out").name == "step-000000"


# ---------------------------------------------------------------------------------------------------- bad input
def fails(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_unknown_flags_and_values(capsys, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "--step" in fails(capsys, *out, "--step", 3)               # no abbreviations either
    assert "--seed" in fails(capsys, *out, "--seed", "x")
    assert "loss" in fails(capsys, *out, "--loss", "ppo")
    assert "no-such" in fails(capsys, *out, "--model", "no-such")
    assert "no-such.jsonl" in fails(capsys, *out, "--data", tmp_path / "no-such.jsonl")
    assert "no checkpoint" in fails(capsys, *out, "--resume")
    for flag, value in (("--groups", 0), ("--eval-every", 0), ("--show-every", -1), ("--temperature", "0"),
                        ("--half-life", "0"), ("--eval-tasks", 0), ("--minibatches", 0), ("--lr", "nan")):
        assert f"{flag} {value}" in fails(capsys, *out, flag, value)
    for flag in ("--quantize", "--schedule", "--sandbox"):
        assert f"{flag}: invalid choice: 'x'" in fails(capsys, *out, flag, "x")
    assert not (tmp_path / "out").exists()


def test_a_forbidden_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "out", "/proc/out", tmp_path / ("x" * 5000)):
        error = fails(capsys, "--out", out, *SMALL)
        assert "cannot go on" in error and "Nothing was trained yet" in error and "checkpoint" not in error


def test_an_end_while_loading_speaks_of_no_checkpoint(capsys, monkeypatch, tmp_path, finished):
    """Neither of this run, which has none, nor of the finished one that lies in --out."""
    def pressed(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "load_policy", pressed)
    for out in (tmp_path / "out", finished):
        assert run("--out", out, *SMALL) == 130
        error = capsys.readouterr().err
        assert "Nothing was trained yet" in error and "--resume" not in error


def test_a_context_that_holds_no_prompt_and_no_turn_is_refused(capsys, tmp_path):
    out = ["--out", tmp_path / "out", *SMALL]
    for tokens in (1, 40, 100):
        assert re.search(rf"--context-tokens {tokens}: the shortest prompt has \d+ tokens, and a turn .* 96",
                         fails(capsys, *out, "--context-tokens", tokens))
    assert not (tmp_path / "out").exists()


def test_resume_takes_only_the_logs_of_its_run(capsys, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    metrics, trajectories = (out / name for name in ("metrics.jsonl", "trajectories.jsonl"))
    whole = {file: file.read_bytes() for file in (metrics, trajectories)}
    rows = whole[metrics].splitlines(keepends=True)
    for wrong in (b"".join([*rows[1:], rows[0]]), b"".join(rows[2:]), b""):
        metrics.write_bytes(wrong)
        assert "metrics.jsonl" in fails(capsys, "--out", out, "--resume", "--steps", 4)
        assert metrics.read_bytes() == wrong and trajectories.read_bytes() == whole[trajectories]
    metrics.unlink()
    assert "metrics.jsonl" in fails(capsys, "--out", out, "--resume", "--steps", 4)
    metrics.write_bytes(whole[metrics])
    trajectories.unlink()                                    # it is long: one may have put it elsewhere
    assert run("--out", out, "--resume", "--steps", 4) == 0
    assert [row["step"] for row in lines(metrics)] == [0, 1, 2, 3, 4]
    assert {row["step"] for row in lines(trajectories)} == {4}


@pytest.mark.parametrize("name", ["state.json", "queue-0.json", "queue-0.safetensors", "adapter_model.safetensors",
                                  "optimizer.safetensors", "run.json"])
def test_a_damaged_checkpoint_is_one_line(capsys, finished, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    file = out / name if name == "run.json" else checkpoint.latest_state(out) / name
    for damage in (b"", b"[]", b"{}", file.read_bytes()[:-9]):
        file.write_bytes(damage)
        assert "cannot be read" in fails(capsys, "--out", out, "--resume", "--steps", 4)


def test_resume_refuses_a_base_with_other_weights(capsys, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(TINY_DIR, model)
    assert run("--model", model, "--out", out, "--steps", 0, *SMALL) == 0
    weights = load_file(model / "model.safetensors")
    checkpoint.save_file({name: tensor * 1.01 for name, tensor in weights.items()}, model / "model.safetensors",
                         {"format": "pt"})
    assert "differs in its weights" in fails(capsys, "--out", out, "--resume", "--steps", 1)


def test_a_slash_at_the_end_of_out_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda run: None)
    monkeypatch.setattr(console, "report", lambda run: None)
    assert run("--out", f"{tmp_path / 'new' / 'out'}/", "--judge", "local", *SMALL) == 0
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"out", "out.judge.sqlite"}


def test_vram_plans_around_what_was_given(capsys, monkeypatch, tmp_path):
    """The plan comes before the model, which is not at hand here."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    big = ["--model", "Qwen2.5-7B", "--vram", 24, "--out", tmp_path / "out"]
    assert run(*big, "--context-tokens", 4096, "--slots", 5) == 2
    output = capsys.readouterr()
    assert "5 slots of 4096 tokens of context, micro-batches of 1" in output.out
    assert torch.cuda.is_available() or "--vram 24 plans for a GPU, and torch" in output.err
    for given, words in ((("--slots", 500), "slots 500.*does not fit 24 GiB; .*slots.*does"),
                         (("--context-tokens", 10**6), "context 1000000.*a context of 8192"),
                         (("--token-budget", 10**6), "token budget 1000000.*micro-batches of")):
        assert re.search(words, fails(capsys, *big, *given))


def test_another_card_on_resume_is_planned_again(finished):
    old = json.loads((finished / "run.json").read_text())["config"]
    cfg = train.resumed(*parse_args(["--resume", "--out", str(finished), "--vram", "16"]))
    assert cfg.slots is None and cfg.token_budget == Config.token_budget
    assert cfg.context_tokens == old["context_tokens"] == 512
    cfg = train.resumed(*parse_args(["--resume", "--out", str(finished), "--vram", "16", "--slots", "3"]))
    assert cfg.slots == 3


def test_out_of_memory_is_one_line_with_a_way_on(capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    monkeypatch.setattr(train, "load_policy", full)
    error = fails(capsys, "--out", tmp_path / "out")
    assert "--vram" in error and "CUDA out of memory)" in error and "Nothing was trained yet" in error


def test_malformed_data_names_file_and_line(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    good = '{"id": "a", "question": "q", "answer": "1"}\n'
    for bad, word in (("{not json\n", "data.jsonl:2"), (good, "data.jsonl:2"),
                      ('{"id": "b", "question": "q", "answer": "1", "files": ["gone.csv"]}\n', "gone.csv")):
        data.write_text(good + bad)
        assert word in fails(capsys, "--out", tmp_path / "out", "--data", data)


def test_resume_refuses_other_settings(capsys, finished):
    assert "--seed" in fails(capsys, "--out", finished, "--resume", "--seed", 7)
    assert "--group-size" in fails(capsys, "--out", finished, "--resume", "--group-size", 8)


def test_nothing_is_overwritten(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(train, "train", lambda run: None)             # only the beginning of a run matters here
    monkeypatch.setattr(console, "report", lambda run: None)
    for _ in range(3):
        assert run("--out", out, *SMALL) == 0
    assert (tmp_path / "out.1" / "run.json").exists() and (tmp_path / "out.2" / "run.json").exists()
    assert "moved to" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "holds no run" in fails(capsys, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_kill_at_the_very_beginning_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_adapter", killed)
        assert run("--out", tmp_path / "out", *SMALL) == 130
    monkeypatch.setattr(train, "train", lambda run: None)
    monkeypatch.setattr(console, "report", lambda run: None)
    assert run("--out", tmp_path / "out", *SMALL) == 0 and (tmp_path / "out.1").exists()


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--out", out, "--steps", 1, *SMALL) == 0
    before = checkpoint.latest_state(out)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))    # no file may grow beyond 100 kB: writes fail
    try:
        code = run("--out", out, "--resume", "--steps", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2 and "make room" in capsys.readouterr().err
    assert checkpoint.latest_state(out) == before and not (out / "state" / "partial").exists()
    assert run("--out", out, "--resume", "--steps", 2) == 0
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------- other ways to run
def test_nf4_with_the_optimiser_of_the_gpu_trains_and_resumes_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_optimizer",
                        lambda policy, lr: bitsandbytes.optim.AdamW8bit(policy.trainable(), lr=lr))
    out = tmp_path / "out"
    assert run("--out", out, "--steps", 1, "--quantize", "nf4", *SMALL) == 0
    assert run("--out", out, "--steps", 2, "--resume") == 0
    assert lines(out / "metrics.jsonl")[-1]["step"] == 2


def few_tasks(folder: Path) -> list:
    """Flags for a few tasks of their own: of 6 tasks one is held out."""
    with (folder / "few.jsonl").open("w") as data:
        for task in builtin_tasks("train", 6, 0, ("lookup", "convert")):
            data.write(json.dumps({"id": task.id, "question": task.question, "answer": task.answer}) + "\n")
    return ["--data", folder / "few.jsonl", "--steps", 2, "--resample", 0, *SMALL]


def test_two_steps_of_the_plain_method(tmp_path):
    out = tmp_path / "out"
    assert run("--out", out, "--plain", *few_tasks(tmp_path)) == 0
    rows = lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["loss"] is not None
    assert json.loads((out / "run.json").read_text())["config"]["plain"] is True


def test_a_model_with_sliding_windows_trains_through_the_plain_sampler(tmp_path, recwarn):
    """The built-in weights under another attention: windows shorter than most trajectories."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(TINY_DIR, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0,
               "layer_types": ["sliding_attention"] * config["num_hidden_layers"]}
    (model / "config.json").write_text(json.dumps(config))
    assert run("--model", model, "--out", out, *few_tasks(tmp_path)) == 0
    rows = lines(out / "metrics.jsonl")
    assert rows[-1]["step"] == 2 and any(row["loss"] is not None for row in rows[1:])
    assert max(row["mismatch_mean"] or 0 for row in rows[1:]) < 1e-4     # sampler and scorer see the same windows
    said = [str(warning.message) for warning in recwarn if "sliding-window" in str(warning.message)]
    assert said and "sampling one trajectory at a time" in said[0]


def test_own_data_with_files(tmp_path):
    tasks = builtin_tasks("train", 6, 0, ("column",))
    with (tmp_path / "data.jsonl").open("w") as data:
        for task in tasks:
            (tmp_path / task.id).mkdir()
            (tmp_path / task.id / "shop.csv").write_bytes(task.files["shop.csv"])
            data.write(json.dumps({"id": task.id, "question": task.question, "answer": task.answer,
                                   "files": [f"{task.id}/shop.csv"], "level": 1}) + "\n")
    out = tmp_path / "out"
    assert run("--out", out, "--steps", 1, "--data", tmp_path / "data.jsonl", *SMALL) == 0
    rows = lines(out / "trajectories.jsonl")
    assert {row["task"] for row in rows} <= {task.id for task in tasks}
    assert any("shop.csv" in (step["code"] or "") and step["status"] == "ok" for row in rows for step in row["steps"])


def test_families_of_own_data_are_never_apart(tmp_path):
    """Whatever they are called: here as the built-in hard ones."""
    with (tmp_path / "data.jsonl").open("w") as data:
        for i in range(4):
            data.write(json.dumps({"id": f"{i}", "question": "q", "answer": "1", "family": "dates"}) + "\n")
    out = tmp_path / "out"
    assert run("--out", out, "--steps", 0, "--data", tmp_path / "data.jsonl", *SMALL) == 0
    row = lines(out / "metrics.jsonl")[-1]
    assert row["heldout_n"] == 1 and row["heldout_greedy"] == 0 and row["heldout_hard"] is None


def test_probe_prints_and_leaves_nothing(tmp_path, capsys):
    assert run("--probe", 4, "--out", tmp_path / "out", "--deterministic") == 0
    text = capsys.readouterr().out
    assert "groups with signal" in text and "in all" in text
    assert re.search(r"trajectories ended by: .*answer \d+", text) and re.search(r"turns: ok \d+", text)
    for which in ("right", "wrong"):            # two whole trajectories: the question, the code, the verdict
        shown = text.partition(f"a {which} one:\n")[2]
        assert re.match(r"--- train-\w+-\d+: .*\nThought: .*\n```python\n(.|\n)*?--- answer .*, expected", shown)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("signal, right, stops, turns, words", [
    (0.5, 0.3, {"answer": 1}, {"ok": 1}, []),
    (0.1, 0.9, {"answer": 1}, {"ok": 1}, ["harder tasks"]),
    (0.0, 0.0, {"turn_limit": 9, "answer": 1}, {"no code": 50, "ok": 4},
     ["no Python block", "--max-turns", "easier", "scripts.warm_start"]),
    (0.0, 0.0, {"length": 5, "context_limit": 5}, {"error": 5, "ok": 5},
     ["--prompt", "--turn-tokens", "--context-tokens", "easier", "scripts.warm_start"]),
])
def test_a_probe_says_what_to_try(signal, right, stops, turns, words):
    found = console.advice_for(signal, right, Counter(stops), Counter(turns))
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found))


def test_a_prompt_that_cannot_work_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Use ```python blocks.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe```python final_answer")
    (tmp_path / "good.txt").write_text("Write ```python blocks and call final_answer(x).")
    for name, words in (("short.txt", "final_answer"), ("bytes.txt", "cannot be read"), ("none.txt", "cannot be read"),
                        ("good.txt", "its own prompt alone")):      # the tiny model takes no other prompt
        assert run("--prompt", tmp_path / name, "--out", tmp_path / "out", "--probe", 1) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: --prompt") and words in error


def test_max_hours_ends_in_time_with_an_evaluation(tmp_path):
    out = tmp_path / "out"
    assert run("--out", out, "--steps", 500, "--max-hours", 8 / 3600, *SMALL) == 0
    rows = lines(out / "metrics.jsonl")
    assert rows[-1]["step"] < 500 and "heldout_pass8" in rows[-1]


def test_what_was_not_measured_is_a_dash_in_the_steps_line():
    said, numbers = [], dict.fromkeys(re.findall(r"{(\w+)", console.STEP_LINE), 0)
    m = numbers | {"step": 3, "kl": None}                   # --beta 0: there is no KL
    console.show_step(SimpleNamespace(step=3, pending=m, history=[m], say=said.append))
    assert "kl - clip 0.000" in said[0] and "nan" not in said[0]


# --------------------------------------------------------------------------------------------------- small parts
def test_every_setting_has_an_effect():
    """Trap 11: each field of Config is read somewhere beyond its definition."""
    read = set()
    for file in [*ROOT.glob("*.py"), *(ROOT / "machinery").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert {f.name for f in fields(Config)} <= read


def test_a_setting_has_one_definition():
    """Sampling and GRPOConfig are sections of Config, not copies; presets name only what differs."""
    from policy import SMALL, TINY, preset_for
    sections = [section for section in Config.__mro__[1:] if section is not object]
    names = [name for section in sections for name in section.__annotations__]
    assert len(names) == len(set(names)) == len(fields(Config)) and len(sections) == 6
    assert {"Sampling", "GRPOConfig"} <= {section.__name__ for section in sections}
    for preset in (TINY, SMALL, preset_for(7_600_000_000)):
        assert preset.settings.keys() <= set(names)


def test_a_given_number_of_groups_replaces_the_sizes_own_share_of_online_groups(tmp_path):
    LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True).save_pretrained(tmp_path)
    for flags, expected in (([], (12, 8)), (["--groups", "4"], (4, None)), (["--online-groups", "2"], (12, 2))):
        cfg, _ = train.settle(*parse_args(["--model", str(tmp_path), *flags]))
        assert (cfg.groups, cfg.online_groups) == expected


def test_choices_without_a_flag_are_set_by_name_and_checked(capsys, tmp_path):
    cfg, given = parse_args(["--set", "dual_clip=5", "--set", "eps_high=0.3", "--set", "lora_rank=8"])
    assert (cfg.dual_clip, cfg.clip, cfg.lora_rank) == (5.0, (0.2, 0.3), 8)
    assert given == {"dual_clip", "eps_high", "lora_rank"}
    for assignment, words in (("dual_clip", "no float"), ("dual_clip=x", "no float"), ("lora_rank=1.5", "no int"),
                              ("std_floor=-1", "--set std_floor -1.0: it must be more than 0"), ("lr=1", "has a flag"),
                              ("truncation=nan", "more than 0"), ("colour=red", "FIELD is one of")):
        assert words in fails(capsys, "--out", tmp_path / "out", "--set", assignment)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def failing_host(monkeypatch):
    """failing_host(every): one of `every` sessions cannot start; the first, which is the executor's own, can."""
    def fail(every: int):
        session, started = train.Executor.session, []

        def failing(self, **arguments):
            started.append(1)
            if len(started) > 1 and len(started) % every == 0:
                raise OSError("the disk is full")
            return session(self, **arguments)
        monkeypatch.setattr(train.Executor, "session", failing)
    return fail


def test_failures_of_the_host_are_said(tmp_path, failing_host, capsys):
    failing_host(5)
    assert run("--out", tmp_path / "out", "--steps", 1, *SMALL) == 0
    warning = r"  warning: \d+ trajectories failed on the host: OSError: the disk is full"
    assert len(re.findall(warning, capsys.readouterr().out)) >= 3    # parts of the two evaluations, and the step
    [said] = [w for w in lines(tmp_path / "out" / "metrics.jsonl")[1]["warnings"] if "host" in w]
    assert re.fullmatch(r"\d+ trajectories failed on the host: OSError: the disk is full", said)


def test_a_host_that_fails_always_ends_the_run_and_one_bad_task_does_not(tmp_path, failing_host, capsys):
    """Its failures would count as wrong answers."""
    failing_host(1)
    assert "all 11 trajectories failed on the host, not in the policy's code (OSError: the disk is full)" in fails(
        capsys, "--out", tmp_path / "out", "--steps", 1, *SMALL)
    bad = [SimpleNamespace(task_id="a", stop_reason="error", error="no file") for _ in range(8)]
    assert console.host_failures(bad) == ["8 trajectories failed on the host: no file"]


def test_given_flags_are_told_from_defaults():
    cfg, given = parse_args(["--steps", "7", "--deterministic"])
    assert given == {"steps", "deterministic"} and cfg.steps == 7 and cfg.model == "tiny"


def test_the_queue_where_nothing_is_said():
    cfg, _ = parse_args([])
    assert (cfg.queue_size, cfg.replay_share, cfg.half_life, cfg.max_age, cfg.max_uses) == (64, 0.5, 4.0, 8, 4)
    assert cfg.max_off_policy == 0.3


def test_learning_rate_by_hand():
    cfg = Config(lr=1.0, warmup=4, schedule="cosine", decay_steps=14)
    assert [learning_rate(cfg, s) for s in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert learning_rate(cfg, 9) == pytest.approx(0.1 + 0.9 * 0.5)    # half of the way from 4 to 14
    assert learning_rate(cfg, 14) == learning_rate(cfg, 99) == pytest.approx(0.1)
    cfg.schedule = "constant"
    assert learning_rate(cfg, 99) == 1.0
