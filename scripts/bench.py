"""Benchmarks: `python -m scripts.bench {executor,rollout,update,step} [--quick] [--json FILE]`.

One section per benchmark, in any order. Each has a function `bench_<name>(args) -> dict`, which prints its figures
and returns them for --json; `step` is in scripts/bench_step.py. Both sides of a comparison (but of `step`) run in one
process: machines differ, and the load changes. The naive way is in tests/.
"""
import sys

if __package__ != "scripts":
    print("error: start this from the repository's folder as: python -m scripts.bench", file=sys.stderr)
    sys.exit(2)

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from machinery.memory import memory
from policy import QWEN25, head_size, load_policy, model_config, never_repack, new_adapter
import bitsandbytes as bnb      # after policy, which quiets its import
import grpo
import rollout
from machinery import engine
from machinery.fast_layers import fast_layers
from machinery.head import head_logps
from executor import Executor, Limits
from machinery.cli import OneLineParser, exit_status
from tasks import BUILTIN_TOOLS, builtin_tasks

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from naive_update import naive_logps, naive_update, random_batch, siblings
from oracle import oracle
from scripted import Workload, scripted
from scripts.bench_step import SIDES, SMOLLM2, WORKLOADS as STEPS, as_policy, bench_step
from scripts.measure import cap_memory, machine, measured


# ------------------------------------------------------------------------------------------------ the rollout
# (--workload, --quick) -> groups, turns, tokens sampled and observed, of the prompt, context, slots
WORKLOADS = {("w", False): Workload(8, 4, (20, 150), (50, 300), 700, 2048, (32, 64)),
             ("w", True): Workload(8, 2, (10, 40), (20, 60), 200, 512, (32, 64)),
             ("w2", False): Workload(1, 6, (50, 400), (100, 2000), 1500, 8192, (4, 8)),
             ("w2", True): Workload(1, 3, (20, 100), (50, 500), 400, 2048, (4, 8))}
SMALL = Qwen2Config(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=1024, vocab_size=8192, tie_word_embeddings=True)


def random_model(name: str, device: str):
    """A model with random weights. "small": in fp32; the shape of a Qwen2.5 model: as in training, NF4 and LoRA."""
    config = SMALL if name == "small" else model_config(name)
    dtype = torch.float32 if name == "small" or device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    if name == "small":
        return model
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for key, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(parent, key, quantised(linear, dtype))
    model.is_loaded_in_4bit = True      # peft asks for this
    return new_adapter(model.requires_grad_(False)).eval()


def quantised(linear: torch.nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                            compute_dtype=dtype, quant_type="nf4", device=linear.weight.device)
    new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4",
                                   compress_statistics=True, module=new).to(linear.weight.device)
    new.bias = linear.bias
    return new


def run_engine(model, work: Workload, slots: int, latency=(0.0, 0.0)) -> dict:
    """One pass over the workload with the engine: its figures, and the trajectories under "out"."""
    episodes = scripted(work, model.config.vocab_size, latency)
    with engine.sampling_mode(model, deterministic=False):
        sampler = engine.Engine(model, slots, work.context, 1.0, [], rollout.sample_tokens)
        out, figures = measured(model.device, lambda: list(sampler.sample(episodes)))
    # every token once, a prompt once per group, and the last token of a trajectory never
    minimum = sum(len(ids) - 1 - work.prompt for _, ids, *_ in out) + work.groups * work.prompt
    return figures | {"sampled": sampler.sampled, "tokens_per_s": sampler.sampled / figures["seconds"],
                      "slots": slots, "steps": sampler.ticks, "idle_share": sampler.idle / figures["wall_s"],
                      "forwarded_over_minimum": sampler.forwarded / minimum, "out": out}


def run_oracle(model, work: Workload, batch: int) -> dict:
    episodes, never = scripted(work, model.config.vocab_size), np.zeros(model.config.vocab_size, dtype=bool)
    out, figures = measured(model.device, lambda: list(oracle(model, episodes, work.context, 1.0, never, batch)))
    sampled = sum(sum(mask) for _, _, mask in out)
    return figures | {"sampled": sampled, "tokens_per_s": sampled / figures["seconds"], "batch": batch}


@torch.no_grad()
def largest_logp_difference(model, out: list) -> float:
    """max |log-prob while sampling - log-prob of one forward| over the sampled tokens of every 8th trajectory."""
    largest = 0.0
    for _, ids, mask, logps, _ in out[::8]:
        tokens = torch.tensor([ids], device=model.device)                               # (1, T)
        full = torch.log_softmax(model(tokens).logits[0, :-1].float(), dim=-1)          # (T - 1, V)
        full = full.gather(-1, tokens[0, 1:, None])[:, 0].cpu()                         # (T - 1,)
        sampled = torch.tensor(mask[1:]).bool()                                         # (T - 1,)
        largest = max(largest, (full - torch.tensor(logps[1:]))[sampled].abs().max().item())
    return largest


def roofline_share(model, result: dict) -> float:
    """The share of the seconds that memory alone would take: weights read once per tick, context once per token."""
    big = torch.empty(2**30, dtype=torch.uint8, device=model.device)
    timer = Timer("copy.copy_(big)", globals={"copy": big.clone(), "big": big})
    bandwidth = 2 * 2**30 / timer.timeit(10).mean               # bytes/s, read and write
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * 2   # bytes, bf16
    context = sum(i for _, _, mask, *_ in result["out"] for i, m in enumerate(mask) if m)       # tokens
    return (result["steps"] * weights + context * token) / bandwidth / result["seconds"]


def host_time() -> dict[str, float]:
    """ms per tick of 8 slots in a model so narrow that the time is the host's own: 28 layers, as 7B has, with PEFT's
    LoRA layers and with those of machinery/fast_layers.py."""
    config = Qwen2Config(hidden_size=64, num_hidden_layers=28, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=128, vocab_size=512, tie_word_embeddings=True)
    network = new_adapter(Qwen2ForCausalLM(config).requires_grad_(False)).eval()
    found = {"host_ms_peft": [], "host_ms_fast": []}
    for name in [*found] * 4:
        layers = fast_layers(network) if name == "host_ms_fast" else contextlib.nullcontext()
        with engine.sampling_mode(network, False), engine.attention(network, "rollout"), layers:
            sampler = engine.Engine(network, 8, 64, 1.0, [], rollout.sample_tokens)
            episodes = scripted(Workload(1, 1, (50, 50), (1, 1), 8, 64), 512)
            _, figures = measured(network.device, lambda s=sampler, e=episodes: list(s.decode(e)))
        found[name].append(1000 * figures["seconds"] / sampler.ticks)
    return {name: min(times) for name, times in found.items()}


def works_by_slots(work: Workload, gpu: bool, model_config: str) -> dict[int, Workload]:
    """{slots: what is sampled with them}. On a GPU two trajectories per slot: few slots take long for many."""
    if not gpu:
        return dict.fromkeys(work.slots, work)
    slots = (1, 16, 64, 128) if model_config == "small" else (8, 34, 64)
    return {n: replace(work, groups=max(1, n // 4)) for n in slots}


def bench_rollout(args) -> dict:
    """The same scripted workload with the engine, and with `generate` for each turn."""
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    if gpu and args.vram:
        cap_memory(args.vram)
    work = WORKLOADS[args.workload, args.quick]
    model = random_model(args.model_config, "cuda" if gpu else "cpu")
    print(f"workload {args.workload}: {work}\nmodel {args.model_config}, {model.device}, one thread")
    run_engine(model, WORKLOADS["w", True], 4)          # warms up
    works = works_by_slots(work, gpu and not args.quick, args.model_config)
    results = [run_engine(model, some, n) for n, some in works.items()]
    naive = run_oracle(model, work, 16)                 # the best batch on a CPU of 8, 16, 32 and 64
    late = run_engine(model, work, max(works), latency=(0.1, 1.0))
    for result in results:
        result["speedup"] = result["tokens_per_s"] / naive["tokens_per_s"]
        if gpu:
            result["roofline_share"] = roofline_share(model, result)
    figures = {f"speedup_{result['slots']}": result["speedup"] for result in results} | {
        "forwarded_over_minimum": max(result["forwarded_over_minimum"] for result in results),
        "max_logp_diff": max(largest_logp_difference(model, result["out"]) for result in results),
        "idle_share_with_latency": late["idle_share"], **host_time()}
    for result in [*results, late]:
        del result["out"]
    for result in [naive, *results, late, figures]:
        print_figures(result)
    return figures | {"engine": [*results, late], "oracle": naive}


def print_figures(figures: dict) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


# ------------------------------------------------------------------------------------------------- the update
def bench_update(args) -> dict:
    """Our update and its head against the naive way, at the vocabulary of a 7B model."""
    if args.model_config:
        return bench_real_shape(args)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL.to_dict() | {"vocab_size": 152064})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = Qwen2ForCausalLM(config).to(device).requires_grad_(False)
    policy, cfg = as_policy(new_adapter(base)), grpo.GRPOConfig(beta=0.0, token_budget=1024)
    lengths = np.random.default_rng(1).integers(60, 240, size=4 if args.quick else 12).tolist()
    batch = random_batch(config.vocab_size, lengths)
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)     # the weights stay the same for all measurements
    whole, = grpo.micro_batches(batch, range(len(batch)), 10**9, device)
    hidden = torch.randn(*whole.ids.shape, config.hidden_size, device=device, requires_grad=True)
    head, mask = base.lm_head.weight, whole.mask[:, 1:]
    rows, sampled = mask.nonzero(as_tuple=True), whole.ids[:, 1:][mask]
    ways = {
        "head": lambda: head_logps(base, hidden[rows], sampled, 1.0)[0].sum().backward(),
        "head, naive": lambda: naive_logps(hidden, head, whole.ids)[mask].sum().backward(),
        "update": lambda: grpo.update(policy, optimizer, batch, cfg).loss,
        "update, naive": lambda: naive_update(policy, optimizer, batch, cfg)}
    for way in ways.values():
        measured(device, way)                                   # warms up
    found = {name: [] for name in ways}
    for _ in range(1 if args.quick else 2):
        for name, way in ways.items():
            found[name].append(measured(device, way))
    if abs(found["update"][0][0] - found["update, naive"][0][0]) > 1e-4:
        raise AssertionError("the two updates have different losses")
    gib = {name: max(f["gib"] for _, f in results) for name, results in found.items()}
    seconds = {name: min(f["seconds"] for _, f in results) for name, results in found.items()}
    print(f"{len(batch)} trajectories, {sum(lengths)} tokens, {len(sampled)} sampled, vocabulary 152064, {device}")
    for name in ways:
        print(f"{name:<16}{gib[name]:>7.2f} GiB{seconds[name]:>8.2f} s{sum(lengths) / seconds[name]:>8.0f} tokens/s")
    figures = {"head_memory_ratio": gib["head, naive"] / gib["head"],
               "update_memory_ratio": gib["update, naive"] / gib["update"],
               "time_ratio": seconds["update"] / seconds["update, naive"], **bench_prefix_tree(args.quick)}
    print_figures(figures)
    return figures | {"tokens_per_second": sum(lengths) / seconds["update"], "gib": gib, "seconds": seconds}


def bench_prefix_tree(quick: bool) -> dict:
    """The padded update over the one in which every distinct prefix is computed once: time and memory. At the shape of
    SmolLM2-135M: 4 groups of 8 with a system prompt of 350 tokens, questions of 30, 80 sampled; quick: smaller. And
    with the trajectories that the built-in model samples for a step of `python train.py`."""
    config = SMALL if quick else SMOLLM2
    network = new_adapter(AutoModelForCausalLM.from_config(config).requires_grad_(False))
    network.activation_checkpointing_enable({"use_reentrant": False})
    batch = siblings(config.vocab_size, *((70, 6, 16) if quick else (350, 30, 80)))
    padded, tree = padded_and_tree(as_policy(network.eval()), batch)
    figures = {"prefix_tree_ratio": padded["seconds"] / tree["seconds"], "prefix_tree_seconds": tree["seconds"]}
    if not quick:                                               # small ones are noise
        figures["prefix_tree_memory_ratio"] = padded["gib"] / tree["gib"]
    built_in = [padded_and_tree(*built_in_batch()) for _ in range(3)]
    seconds = [min(found[way]["seconds"] for found in built_in) for way in (0, 1)]
    return figures | {"prefix_tree_ratio_built_in": seconds[0] / seconds[1]}


def padded_and_tree(policy, batch) -> list[dict]:
    """What an update takes in both ways."""
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)     # the weights stay the same
    (padded_loss, padded), (loss, tree) = [measured(policy.device, lambda plain=plain: grpo.update(
        policy, optimizer, batch, grpo.GRPOConfig(), plain=plain).loss) for plain in (True, False)]
    if abs(padded_loss - loss) > 1e-5:
        raise AssertionError("the two updates have different losses")
    return [padded, tree]


def built_in_batch() -> tuple:
    """(the built-in model, trajectories of a step with advantages that sum up to 0)."""
    policy = load_policy("tiny")
    preset = policy.preset.settings
    limits = {f.name: preset[f.name] for f in fields(rollout.Sampling) if f.name in preset}
    with Executor("auto") as executor:
        groups = rollout.rollout(policy, builtin_tasks("train", preset["groups"], 0), executor, BUILTIN_TOOLS,
                                 rollout.Sampling(**limits), samples=8, seed=0)
    return policy, [(trajectory, (-1.0) ** i) for group in groups for i, trajectory in enumerate(group)]


def bench_real_shape(args) -> dict:
    """Sampling, and the update with its reference pass, at the shape of a real model: peak memory beside the plan's,
    without the plan's part for CUDA itself. On the CPU the base computes in fp32, and the memory of weights and adapter
    is taken from the plan: a CPU only shows that it runs."""
    gpu = torch.cuda.is_available()
    if gpu:
        cap_memory(args.vram - 1)       # 1 GiB is for CUDA itself
    network, figures, slots = random_model(args.model_config, "cuda" if gpu else "cpu"), {}, 16 if gpu else 8
    network.activation_checkpointing_enable({"use_reentrant": False})
    never_repack(network)
    policy, vocabulary = as_policy(network), network.config.vocab_size
    optimizer = grpo.make_optimizer(policy, 1e-5)
    grpo.update(policy, optimizer, random_batch(vocabulary, [16]), grpo.GRPOConfig())   # makes the optimiser's states
    for tokens in (256,) if args.quick else (4096, 8192):
        plan = memory(network.config, True, slots, tokens, tokens)
        del plan["runtime: CUDA context, fragmentation"]
        work = Workload(slots // 8, 1, (32, 32), (1, 1), tokens - 64, tokens)
        batch, cfg = random_batch(vocabulary, [tokens] * 2), grpo.GRPOConfig(token_budget=tokens)
        sampling = run_engine(network, work, slots)
        _, updating = measured(network.device, lambda b=batch, cfg=cfg: grpo.update(policy, optimizer, b, cfg).loss)
        held = plan["weights"][0] + plan["adapter, gradients, 8-bit optimiser"][0]          # no gradients yet
        for column, (phase, found) in enumerate({"sampling": sampling, "update": updating}.items()):
            planned, seconds = sum(part[column] for part in plan.values()), found["seconds"]
            gib = found["peak_gib"] if gpu else held + found["gib"]
            figures[f"{phase}_{tokens}"] = {"seconds": seconds, "gib": gib, "planned": planned}
            print(f"{tokens} tokens, {phase}: {seconds:.1f} s, peak {gib:.2f} GiB, planned {planned:.2f}")
    return figures


# ----------------------------------------------------------------------------------------------- the executor
def milliseconds(run, times: int) -> np.ndarray:
    """(times,): how long each call of run took, in ms."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        took.append(1000 * (time.perf_counter() - start))
    return np.array(took)


def tree_pss(pid: int) -> float:
    """MB of a process and its descendants, shared pages divided among those who share them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass                                            # it has ended meanwhile
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    kb = 0
    for process in found:
        try:
            kb += int(Path(f"/proc/{process}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
        except (ProcessLookupError, FileNotFoundError, IndexError):
            pass                                            # it has ended meanwhile
        except PermissionError:                             # root alone may look into the sandbox
            return float("nan")
    return kb / 1024


def bench_executor(args) -> dict:
    """Sessions: start, a cell, a tool call, many at once; ipykernel and smolagents beside them where installed."""
    times, many, loop = (20, 16, 10**5) if args.quick else (200, 256, 10**6)
    code = f"s = 0\nfor i in range({loop}): s += i"
    limits = Limits(tool_calls=10**9)
    with Executor(args.sandbox, limits) as executor:
        figures = {"sandbox": executor.sandbox, "loop_iterations": loop}
        starts = milliseconds(lambda: executor.session().close(), times)
        with executor.session({"same": lambda value: value}) as session:
            cells = milliseconds(lambda: session.execute("x = 1"), times)
            figures["loop_ms"] = float(np.median(milliseconds(lambda: session.execute(code), 5)))
            beside = peers(code, lambda: session.execute("x = 1"))
            calls = milliseconds(lambda: session.execute("for i in range(100): same(i)"), 5)
        figures |= {"session_start_p50_ms": float(np.median(starts)),
                    "session_start_p99_ms": float(np.quantile(starts, 0.99)),
                    "roundtrip_ms": float(np.median(cells)),
                    "tool_call_ms": float(np.median(calls) - np.median(cells)) / 100}

        def trajectory(_):
            with executor.session() as session:
                return session.execute("x = 1").status

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            start = time.perf_counter()
            assert set(pool.map(trajectory, range(times))) == {"ok"}
            figures["sessions_per_s"] = times / (time.perf_counter() - start)
            zygote = executor.zygote.process.pid
            empty, start = tree_pss(zygote), time.perf_counter()
            live = list(pool.map(lambda _: executor.session(), range(many)))
            assert {result.status for result in pool.map(lambda s: s.execute("x = 1"), live)} == {"ok"}
            figures |= {"live_sessions": many, "live_sessions_s": time.perf_counter() - start,
                        "idle_pss_mb": (tree_pss(zygote) - empty) / many}
            for session in live:
                session.close()
    figures |= beside
    if "ipykernel_start_ms" in figures:
        figures["start_over_ipykernel"] = figures["ipykernel_start_ms"] / figures["session_start_p50_ms"]
    for name, value in figures.items():
        print(f"{name:32} {value:10.2f}" if isinstance(value, float) else f"{name:32} {value!s:>10}")
    return figures


def peers(loop: str, cell) -> dict:
    """The same of the peers that are installed: a Jupyter kernel, and smolagents' interpreter in this process.
    `cell` runs one of our cells: the kernel's and ours take turns, because the machine's speed changes in seconds."""
    figures = {}
    try:
        from jupyter_client.manager import start_new_kernel
        begin = time.perf_counter()
        manager, client = start_new_kernel()
        figures["ipykernel_start_ms"] = 1000 * (time.perf_counter() - begin)

        def execute(code):
            return client.execute_interactive(code, store_history=False, output_hook=lambda message: None)
        turns = [(milliseconds(lambda: execute("x = 1"), 10), milliseconds(cell, 10)) for _ in range(20)]
        theirs, ours = np.median(np.array(turns), axis=(0, 2))
        figures |= {"ipykernel_roundtrip_ms": float(theirs), "roundtrip_over_ipykernel": float(theirs / ours)}
        figures["ipykernel_loop_ms"] = float(np.median(milliseconds(lambda: execute(loop), 3)))
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    except (ImportError, RuntimeError) as error:
        print(f"ipykernel: not measured ({error})")
    try:
        from smolagents.local_python_executor import LocalPythonExecutor
        local = LocalPythonExecutor([], timeout_seconds=None)
        local.send_tools({})
        figures["smolagents_roundtrip_ms"] = float(np.median(milliseconds(lambda: local("x = 1"), 20)))
        figures["smolagents_loop_ms"] = float(milliseconds(lambda: local(loop), 1)[0])
    except ImportError as error:
        print(f"smolagents: not measured ({error})")
    return figures


# ------------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = OneLineParser(prog="-m scripts.bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)

    def add(name: str, bench, text: str):
        benchmark = benchmarks.add_parser(name, help=text, allow_abbrev=False)
        benchmark.set_defaults(bench=bench)
        benchmark.add_argument("--quick", action="store_true", help="a small scale, for CI")
        benchmark.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
        return benchmark
    sessions = add("executor", bench_executor, "sessions: start, execution, tool call, memory")
    sessions.add_argument("--sandbox", choices=("auto", "bwrap", "none"), default="auto")
    rollouts = add("rollout", bench_rollout, "the engine against `generate` for each turn")
    rollouts.add_argument("--workload", choices=("w", "w2"), default="w", help="w2: longer, closer to GAIA")
    rollouts.add_argument("--model-config", choices=["small", *QWEN25], default="small", help="shape of the model")
    rollouts.add_argument("--vram", type=float, metavar="GB", help="limit of the GPU's memory")
    updates = add("update", bench_update, "the update against full logits in one padded batch")
    updates.add_argument("--model-config", choices=QWEN25, help="instead: random weights of this shape, and the memory "
                         "of sampling and update beside the plan's")
    updates.add_argument("--vram", type=float, default=24.0, metavar="GB", help="limit of the GPU's memory")
    steps = add("step", bench_step, "a whole training step beside TRL's, where it is installed")
    steps.add_argument("--turns", type=int, choices=STEPS, default=1, help="per trajectory")
    steps.add_argument("--side", choices=SIDES, help="this side alone, in this process")
    args = parser.parse_args()
    figures = args.bench(args) | {"machine": machine()}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(exit_status(main))
