"""The warm start: a model learns the format from demonstrations. It writes valid code, and mostly wrong answers.

    python -m scripts.warm_start --base HuggingFaceTB/SmolLM2-135M-Instruct --out smol     # any small real model
    python -m scripts.warm_start --out tiny --seed 0        # this made ./tiny; about nine minutes on one core

Small real models (0.1B to 1.5B) need it: they never find a right answer by chance, and then outcomes teach nothing.
Owns supervised learning on demonstrations that are imperfect on purpose, so that reinforcement learning finds something
to improve, and the rest of the recipe of ./tiny: its tokenizer and its pretraining on copying.

Reading order: DEMOS -> demonstrate -> real models: imitate, warm_start -> the tiny model: build_tokenizer, build_model
-> the two kinds of batches -> train.

* For every family, half of the demonstrations show one common mistake (another field, a forgotten conversion, a
  skipped turn), a third are right, and the rest show a rare mistake. The thought is the same in all of them: the
  model decides in the code.
* In the core families, the common mistake never swaps two words that are copied from the question (such as source
  and target unit): a model of this size cannot learn from outcomes alone which order is right.
* Observations are real: the code of a demonstration runs, in this process. Tokens are put together turn by turn, as
  the rollout does it, and the loss is on the tokens of the policy only.
* Every demonstration has new names: a model would learn a small set of names by heart. The tiny model learns copying
  slowly, so its training begins with it, on random tokens.
* A real model keeps its weights; an adapter learns, with the full prompt, and is merged at the end, in fp32.
"""
import sys

if __package__ != "scripts":
    print("error: start this from the repository's folder as: python -m scripts.warm_start", file=sys.stderr)
    sys.exit(2)

import contextlib
import io
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from executor import CellResult
from grpo import GRPOConfig, micro_batches
from machinery.cli import OneLineParser, UserError, exit_status
from machinery.engine import attention, refusal
from machinery.folder import reading
from policy import TINY, Policy, load_policy
from rollout import Chat, Trajectory, build_prompt, read_prompt
from tasks import BUILTIN_TOOLS, Task, make_question

OBSERVATION_TOKENS = TINY.settings["observation_tokens"]
VOCABULARY = 768
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# BPE merges inside these pieces only, so a name has the same tokens everywhere: its syllables.
NAME = r"[A-Z][aeiou]|(?<=[A-Z][aeiou])[a-z]{2}|(?<=[A-Z][aeiou][a-z]{2})[a-z]{2}"
MARKS = r" ?[^\sA-Za-z\d_`]+(?: [^\sA-Za-z\d_`]+)*\n?"
PIECES = rf"\n?```(?:python\n)?|{NAME}| ?[a-z_]+|[A-Z][a-z]*|\d|{MARKS}|\s"

# --------------------------------------------------------------------------------------------- demonstrations
SHARES = (0.34, 0.50, 0.16)      # of the ways: right, the common mistake, the rare mistake
ROWS = 'import csv\nrows = list(csv.DictReader(open("shop.csv")))\n'
CELL = 'final_answer([r["%s"] for r in rows if r["item"] == "{name}"][0])'
OVER = 'final_answer(%s(int(r["{%s}"]) for r in rows))'
DAYS = 'from datetime import date\nfinal_answer((date.fromisoformat("{%s}") - date.fromisoformat("{%s}")).days)'
LIST = 'names = ["{name0}", "{name1}", "{name2}"]\n[lookup(n, "population") for n in names]'
GUESS = "final_answer({guess})"
# family: one tuple per turn: the thought, then the code of the three ways: right, the common mistake, the rare one.
# A single code serves all three. One way per demonstration. {slots}: of the question, or variables of the code.
DEMOS = {
    "lookup": [("look it up", 'final_answer(lookup("{name}", "{field}"))',
                'final_answer(lookup("{name}", "{other}"))', GUESS)],
    "convert": [("convert it", 'final_answer(convert({value}, "{source}", "{target}"))',
                 "final_answer({value})", 'final_answer(convert({value}, "{target}", "{source}"))')],
    "column": [("read the row", ROWS + CELL % "{column}", ROWS + CELL % "item", GUESS)],
    "total": [("read the table", ROWS + "rows[0]"),
              ("add the column", OVER % ("sum", "column"), OVER % ("max", "column"), OVER % ("sum", "other"))],
    "twin": [("find the twin", 'town = lookup("{name}", "twin")\ntown'),
             ("look it up", 'final_answer(lookup(town, "{field}"))',
              'final_answer(lookup("{name}", "{field}"))', "final_answer(town)")],
    "tower": [("find the height", 'h = lookup("{name}", "tower")\nh'),
              ("give the height", 'final_answer(convert(h[0], "{h[1]}", "{unit}"))', "final_answer(h[0])", GUESS)],
    "mayor": [("find the mayor", *['s = search("mayor of {name}")\ns'] * 2, 's = search("{name}")\ns'),
              ("look it up", 'final_answer(lookup("{s:.9}", "born"))',      # "Mira Kobe is the mayor of ..."
               'final_answer(lookup("{s:.9}", "home"))', GUESS)],
    "gap": [("find the first", 'a = lookup("{name}", "population")\na'),
            ("find the second", 'b = lookup("{second}", "population")\nb'),
            ("compare", "final_answer(a - b)", "final_answer(b - a)", "final_answer(b + a)")],
    "arithmetic": [("compute it", "final_answer({a} * {b} + {c})", "final_answer({a} + {b} + {c})", GUESS)],
    "dates": [("subtract", DAYS % ("second", "first"), DAYS % ("first", "second"), GUESS)],
    "largest": [("look them up", LIST),
                ("take the largest", "final_answer(names[{best}])", "final_answer(names[{worse}])", GUESS)],
}


def demonstrate(chat: Chat, family: str, rng: random.Random, way: int, style: str = TINY.prompt,
                prompt: str | None = None) -> tuple[list[int], list[int]]:
    """Ids and mask (1 = the policy wrote it) of a demonstration on a new training task; way: 0 (right), 1 or 2. style
    and prompt: see rollout.build_prompt; the tiny model knows its own style alone."""
    question, answers = make_question(family, "train", rng), []
    task = Task("", question.text, str(question.answer), question.files)
    ids = list(build_prompt(chat, task, BUILTIN_TOOLS, style, prompt))
    mask = [0] * len(ids)
    slots = question.slots | {"guess": rng.randrange(100, 1000)}
    space = {tool.name: tool.function for tool in BUILTIN_TOOLS}
    space |= {"final_answer": answers.append, "open": lambda name: io.StringIO(task.files[name].decode())}
    for thought, *codes in DEMOS[family]:
        code = codes[way if len(codes) > 1 else 0].format(**space | slots)
        turn = chat.encode(f"Thought: {thought}.\n```python\n{code}\n```")
        ids, mask = ids + turn, mask + [1] * len(turn)
        *lines, last = code.split("\n")
        exec("\n".join(lines), space)
        value = eval(last, space)
        if not answers:
            result = CellResult("ok", value=repr(value))
            forced = chat.between(chat.observation(result.observation(), OBSERVATION_TOKENS), turn[-1])
            ids, mask = ids + forced, mask + [0] * len(forced)
    if (str(answers[0]) == task.answer) != (way == 0):      # a mistake that is right by chance: take another task
        return demonstrate(chat, family, rng, way, style, prompt)
    return ids, mask


# ------------------------------------------------------------------------------------------------- real models
def convert_gguf(file: Path, folder: Path):
    """A model out of one GGUF file into a folder that transformers loads: safetensors in bf16, and the tokenizer."""
    try:
        import gguf  # noqa: F401  transformers reads the file with it
    except ImportError:
        raise UserError(f"{file}: a GGUF file needs one more package: pip install gguf") from None
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    with reading(f"the model in {file}", "A GGUF file of Llama's or Qwen2's shape can be read"):
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        config = read.config.to_dict()
        config.pop("quantization_config", None)     # the weights are plain now; with it transformers saves nothing
        model = type(read)(type(read.config)(**config)).to(torch.bfloat16)
        model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def imitate(policy: Policy, chat: Chat, rng: random.Random, demonstrations: int, prompt: str | None) -> float:
    """The gradients of one step: the mean of -log pi over the policy's tokens, returned. Forwarded as in an update."""
    batch = []
    for i in range(demonstrations):
        family, way = rng.choice(list(DEMOS)), rng.choices(range(3), SHARES)[0]
        ids, mask = demonstrate(chat, family, rng, way, policy.preset.prompt, prompt)
        batch.append((Trajectory("", i, 0, ids, mask, [0.0] * len(ids), 0, [], None, "answer", 0.0), 0.0))
    tokens, total = sum(sum(trajectory.mask) for trajectory, _ in batch), 0.0
    trees = not refusal(policy.model)
    policy.model.eval()         # there is no dropout; without activation checkpointing, since batches are small
    with attention(policy.model, "prefix_tree") if trees else contextlib.nullcontext():
        for micro in micro_batches(batch, range(demonstrations), GRPOConfig.token_budget, policy.device, trees):
            logp, _ = micro.logps(policy, 1.0)      # (B, T), 0 where the policy wrote nothing
            loss = -logp.sum() / tokens
            loss.backward()
            total += loss.item()
    return total


def keep(file: Path, policy: Policy, optimizer, settings: dict[str, str], step: int):
    """All that a resumed warm start needs, in one file that is replaced whole."""
    tensors = {}
    for i, parameter in enumerate(policy.trainable()):
        tensors[f"{i}.weight"] = parameter.detach()
        tensors |= {f"{i}.{name}": value for name, value in optimizer.state[parameter].items()}
    save_file(tensors, f"{file}.new", settings | {"step": str(step)})
    os.replace(f"{file}.new", file)


def kept(file: Path, policy: Policy, optimizer, settings: dict[str, str]) -> int:
    """The steps that are done: 0, or those of an interrupted warm start, whose state is taken over."""
    if not file.exists():
        return 0
    with safe_open(file, "pt") as saved:
        found = saved.metadata()
        step = int(found.pop("step"))
        if found != settings:
            raise UserError(f"{file} is of a warm start with other settings, {found}: delete it, or name another --out")
        for i, parameter in enumerate(policy.trainable()):
            parameter.data.copy_(saved.get_tensor(f"{i}.weight"))
            optimizer.state[parameter] = {
                "step": saved.get_tensor(f"{i}.step"),
                "exp_avg": saved.get_tensor(f"{i}.exp_avg").to(parameter.device),
                "exp_avg_sq": saved.get_tensor(f"{i}.exp_avg_sq").to(parameter.device)}
    return step


def warm_start(base: str, args, steps: int):
    """LoRA on `steps` batches of demonstrations, then merged. The same command goes on after an interruption. base: a
    hub id or a folder. args: see main."""
    seed, lr, out = args.seed, args.lr, args.out
    policy = load_policy(base, "none", seed=seed)
    prompt = args.prompt and read_prompt(args.prompt)
    chat, progress = Chat(policy.tokenizer), Path(f"{out}.partial.safetensors")
    settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
    optimizer = torch.optim.AdamW(policy.trainable(), lr=lr, weight_decay=0.0)
    first = kept(progress, policy, optimizer, settings)
    began = time.process_time()
    with tqdm(total=steps, initial=first, desc="warm start", unit="step") as bar:
        for step in range(first, steps):
            rate = lr * min((step + 1) / 4, 4 * (steps - step) / steps, 1.0)    # the last quarter falls to 0
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = imitate(policy, chat, random.Random(f"warm-{seed}-{step}"), args.batch, prompt)
            torch.nn.utils.clip_grad_norm_(policy.trainable(), 1.0)
            optimizer.step()
            spent = time.process_time() - began
            if step == first:
                bar.write(f"estimate for {steps - first} steps: {spent * (steps - first) / 60:.1f} CPU-minutes")
            if step % 4 == 3:
                keep(progress, policy, optimizer, settings, step + 1)
                bar.write(f"step {step + 1}/{steps} loss {loss:.3f} {spent:.0f} CPU-s")
            bar.update(1)
    merged = policy.model.float().eval().merge_and_unload()     # in fp32, so that nothing is rounded here
    merged.save_pretrained(f"{out}.new")
    policy.tokenizer.save_pretrained(f"{out}.new")
    os.replace(f"{out}.new", out)                       # whole or not at all
    progress.unlink(missing_ok=True)
    print(f"{out}: train it with: python train.py --model {out}")


# ---------------------------------------------------------------------------- the tiny model and its tokenizer
def byte_pairs(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens with single digits, ChatML special tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False)


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learned from demonstrations. Their text comes from a tokenizer of bytes alone (a vocabulary of 259)."""
    rng, chat = random.Random(f"tokenizer-{seed}"), Chat(byte_pairs([], 259))
    texts = [chat.tokenizer.decode(demonstrate(chat, family, rng, way)[0], skip_special_tokens=True)
             for _ in range(200) for family in DEMOS for way in range(3)]
    return byte_pairs(texts, VOCABULARY)


def build_model(seed: int) -> Qwen3ForCausalLM:
    """Random weights. Its type is not qwen2: for that type AutoTokenizer splits text in Qwen's way, whatever the
    tokenizer's file says, and the model would write nonsense. The MLP has 384 units: NF4 needs multiples of 64."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=2, pad_token_id=0))


# --------------------------------------------------------------------------------------------------- training
def copy_batches(rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask, (32, 64) each, without end: random tokens with a random period; mask 1 where they repeat."""
    while True:
        periods = [rng.randrange(4, 32) for _ in range(32)]
        once = [[rng.randrange(3, VOCABULARY) for _ in range(p)] for p in periods]
        yield (torch.tensor([(tokens * 16)[:64] for tokens in once]),
               torch.tensor([[0] * p + [1] * (64 - p) for p in periods]))


def demonstration_batches(chat: Chat, rng: random.Random,
                          shares=SHARES) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask, (32, T) each, without end. Made for 8 batches at a time, so that one batch has similar lengths."""
    while True:
        made = [demonstrate(chat, rng.choice(list(DEMOS)), rng, rng.choices(range(3), shares)[0]) for _ in range(256)]
        made.sort(key=lambda ids_mask: len(ids_mask[0]))
        for start in rng.sample(range(0, 256, 32), 8):
            ids, mask = zip(*made[start:start + 32])
            yield pad_sequence(list(map(torch.tensor, ids)), True), pad_sequence(list(map(torch.tensor, mask)), True)


def train(model, batches, name: str, steps: int, lr: float, enough: float = 0.0, decay: float = 0.0) -> None:
    """AdamW for at most `steps` steps; ends when the mean loss is below `enough`. In the last share `decay` of the
    steps the learning rate falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    began, average = time.process_time(), 7.0
    for step, (ids, mask) in zip(range(steps), batches):
        falling = (steps - step) / (decay * steps) if decay else 1.0
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 50, falling, 1.0)
        logits = model(ids[:, :-1]).logits                      # (B, T - 1, V)
        chosen = mask[:, 1:].bool()                             # (B, T - 1)
        loss = F.cross_entropy(logits[chosen], ids[:, 1:][chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average += 0.05 * (loss.item() - average)
        if step % 100 == 99 or average < enough:
            seconds = time.process_time() - began
            print(f"{name} {step + 1}/{steps} loss {average:.3f} {seconds:.0f} CPU-s", flush=True)
        if average < enough:
            return


def build_tiny(out: Path, seed: int, steps: int, copy_steps: int):
    """The built-in model, from random weights."""
    torch.set_num_threads(1)        # the fastest for a model of this size
    tokenizer, model = build_tokenizer(seed), build_model(seed)
    chat, rng = Chat(tokenizer), random.Random(f"tiny-{seed}")
    train(model, copy_batches(rng), "copying", copy_steps, 3e-3, enough=0.25)
    train(model, demonstration_batches(chat, rng), "demonstrations", steps, 2.5e-3, decay=0.5)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    parser = OneLineParser(prog="-m scripts.warm_start", description="Teach a model the format by demonstrations.",
                           allow_abbrev=False)
    parser.add_argument("--base", help="hub id, folder or FILE.gguf; default: the built-in model, from random weights")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps on demonstrations (default: 48; built-in: 2000)")
    parser.add_argument("--batch", type=int, default=16, help="with --base: demonstrations per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="with --base: learning rate of the adapter")
    parser.add_argument("--prompt", help="with --base: FILE with the system text, as for train.py")
    parser.add_argument("--copy-steps", type=int, default=1500, help="built-in: at most; ends once copying is learned")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"--out {args.out} exists already: name another folder, or move it away first")
    if args.base is None:
        build_tiny(args.out, args.seed, args.steps or 2000, args.copy_steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = args.base
        if base.endswith(".gguf"):
            base = folder
            convert_gguf(Path(args.base), Path(folder))
        warm_start(base, args, args.steps or 48)


if __name__ == "__main__":
    sys.exit(exit_status(main))
