"""One whole training step, sampling, scoring and update, beside TRL's GRPOTrainer: `python -m scripts.bench step`.

Owns the two sides and their comparison. Both get the same shape with random weights, the same LoRA, prompts, lengths
and loss (dapo with a KL penalty), in fp32 on one thread. Each runs in a process of its own, so that a peak of memory
is that of one side alone. Read in this order: `bench_step`, `ours`, `trl`.

How TRL does the same, at its best: all trajectories are sampled in one batch, and every turn has the length that the
workload says (`min_new_tokens`), so that in a single turn nothing is sampled or padded in vain. Four turns go through
its `rollout_func`. It calls once per turn the function that TRL's own tool loop calls: it pads the histories on the
left, forwards them from their first token, and goes on to the longest turn. No code runs on either side: an observation
is random tokens. Both sides update in micro-batches, without activation checkpointing and with it: the faster setting
of one side is compared with the faster of the other, the leaner with the leaner.
"""
import importlib.util
import json
import subprocess
import sys
import tempfile
import time

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, PreTrainedModel, TrainerCallback)

import grpo
from machinery.engine import Engine, sampling_mode
from policy import TINY_DIR, Policy, Preset, new_adapter
from reward import Reward
from rollout import Trajectory, sample_tokens
from scripted import Workload, scripted
from scripts.measure import process_gib

SMOLLM2 = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                      num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
# turns -> 2 groups of 8: tokens sampled per turn, observed, of the prompt, of the context. The system prompt with nine
# web tools has 571 tokens in SmolLM2's tokenizer, that with the built-in tools 350
WORKLOADS = {1: Workload(2, 1, (64, 64), (1, 1), 350, 414, system=320),
             4: Workload(2, 4, (20, 150), (50, 300), 640, 2176, system=580)}
MICRO_BATCH = {1: 4, 4: 2}      # trajectories, of TRL: up to 3,200 tokens
TOKEN_BUDGET = {"ours": 4096, "ours, checkpointing": 8192}      # tokens of our micro-batches
SIDES = (*TOKEN_BUDGET, "TRL", "TRL, checkpointing")
BETA = 1e-3


def bench_step(args) -> dict:
    """The sides in turn; with --side that one alone, in this process: its figures are the last line."""
    torch.set_num_threads(1)
    if args.side:
        figures = ours(args) if args.side in TOKEN_BUDGET else trl(args)
        print(json.dumps(figures))
        return figures
    sides = SIDES if importlib.util.find_spec("trl") else tuple(TOKEN_BUDGET)
    print(f"{'tiny' if args.quick else 'SmolLM2-135M'}'s shape, {WORKLOADS[args.turns]}, one thread")
    found = {}
    for side in sides:
        command = [sys.executable, "-m", "scripts.bench", "step", "--side", side, "--turns", str(args.turns)]
        done = subprocess.run(command + ["--quick"] * args.quick, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{side:<20}{found[side]['seconds']:>8.2f} CPU-s{found[side]['gib']:>8.2f} GiB"
              f"{found[side]['sampled']:>8} tokens sampled", flush=True)
    if sides == tuple(TOKEN_BUDGET):
        print("TRL: not measured (python -m pip install 'trl==1.16.*')")
        return found

    def least(whose: str, what: str) -> float:
        return min(found[side][what] for side in sides if side.startswith(whose))
    ratios = {"time_ratio": least("TRL", "seconds") / least("ours", "seconds"),
              "memory_ratio": least("ours", "gib") / least("TRL", "gib")}
    print("  ".join(f"{name} {value:.3g}" for name, value in ratios.items()))
    return found | ratios


class Meter:
    """CPU seconds of each step, and the peak of the process's memory."""

    def __init__(self):
        self.seconds, self.began, self.sampled = [], 0.0, 0

    def begin(self):
        self.began = time.process_time()

    def end(self):
        self.seconds.append(time.process_time() - self.began)

    def figures(self) -> dict:
        """The fastest step, as the first one warms up."""
        return {"seconds": min(self.seconds), "gib": process_gib("VmHWM"), "sampled": self.sampled}


def as_policy(network) -> Policy:
    return Policy(network, None, network.device, "random weights", Preset())


def random_network(quick: bool) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(TINY_DIR) if quick else SMOLLM2
    config.max_position_embeddings = 4096
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def score(sampled: list[int]) -> float:
    """The reward on both sides: the share of even tokens."""
    return sum(token % 2 == 0 for token in sampled) / len(sampled)


# ----------------------------------------------------------------------------------------------------------- ours
def ours(args) -> dict:
    network, work, meter = new_adapter(random_network(args.quick).requires_grad_(False)), WORKLOADS[args.turns], Meter()
    if args.side == "ours, checkpointing":
        network.activation_checkpointing_enable({"use_reentrant": False})
    policy, cfg = as_policy(network.eval()), grpo.GRPOConfig(beta=BETA, token_budget=TOKEN_BUDGET[args.side])
    optimizer = grpo.make_optimizer(policy, 1e-5)
    for _ in range(3 if args.quick else 1):
        meter.begin()
        groups = sample(network, work)
        meter.sampled, batch = sum(sum(t.mask) for group in groups for t in group), []
        for group in groups:
            scores = [score([token for token, m in zip(t.ids, t.mask) if m]) for t in group]
            rewards = [Reward(value, value, 0.0, "heuristic", False, False) for value in scores]
            advantages, _ = grpo.group_advantages(rewards, cfg)
            batch += list(zip(group, advantages))
        grpo.update(policy, optimizer, batch, cfg)
        meter.end()
    return meter.figures()


def sample(network, work: Workload) -> list[list[Trajectory]]:
    """The groups of a workload, with the engine."""
    groups = [[] for _ in range(work.groups)]
    with sampling_mode(network, deterministic=False):
        engine = Engine(network, 8 * work.groups, work.context, 1.0, [], sample_tokens)
        for episode, ids, mask, logps, _ in engine.sample(scripted(work, network.config.vocab_size)):
            groups[episode.group].append(Trajectory(f"task{episode.group}", episode.seed[1], 0, ids, mask, logps,
                                                    work.prompt, [], None, "answer", 0.0))
    return groups


# ------------------------------------------------------------------------------------------------------------ TRL
def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose word "t7" is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t1")


def trl(args) -> dict:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    network, work, meter = random_network(args.quick), WORKLOADS[args.turns], Meter()
    vocabulary, steps, micro = network.config.vocab_size, 3 if args.quick else 1, MICRO_BATCH[args.turns]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.end()

    def reward(completion_ids, **_):
        meter.sampled = meter.sampled or sum(map(len, completion_ids))
        return [score(ids) for ids in completion_ids]

    prompts = [" ".join(f"t{i}" for i in episode.prompt) for episode in scripted(work, vocabulary)[::8]]
    longest = work.sampled[1]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=steps, learning_rate=1e-5, lr_scheduler_type="constant", beta=BETA,
            loss_type="dapo", epsilon=0.2, epsilon_high=0.28, temperature=1.0, top_p=1.0, top_k=0, num_generations=8,
            per_device_train_batch_size=micro, gradient_accumulation_steps=8 * work.groups // micro,
            max_completion_length=longest, generation_kwargs={"min_new_tokens": longest},
            gradient_checkpointing=args.side == "TRL, checkpointing",
            gradient_checkpointing_kwargs={"use_reentrant": False}, shuffle_dataset=False, bf16=False, use_cpu=True,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True)
        trainer = GRPOTrainer(
            network, reward, config, Dataset.from_dict({"prompt": prompts * steps}), processing_class=words(vocabulary),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            rollout_func=rollout_in_turns(work, vocabulary, meter) if work.turns > 1 else None, callbacks=[Clock()])
        trainer.train()
    return meter.figures()


def rollout_in_turns(work: Workload, vocabulary: int, meter: Meter):
    """A `rollout_func` of TRL for trajectories of several turns."""
    def rollout_func(prompts, trainer) -> dict:
        episodes = scripted(work, vocabulary)
        rows, masks = [list(episode.prompt) for episode in episodes], [[] for _ in episodes]
        for _ in range(work.turns):
            longest = max(episode.turn_tokens for episode in episodes)
            trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = longest
            turns, _ = trainer._generate_single_turn(rows, None, {}, 1)
            for episode, row, mask, turn in zip(episodes, rows, masks, turns):
                turn = turn[:episode.turn_tokens]
                episode.close_turn(turn, "")
                observation = episode.observe(None, work.context)
                row += turn + observation
                mask += [1] * len(turn) + [0] * len(observation)
        meter.sampled = sum(map(sum, masks))
        return {"prompt_ids": [row[:work.prompt] for row in rows], "logprobs": None, "env_mask": masks,
                "completion_ids": [row[work.prompt:] for row in rows]}
    return rollout_func
