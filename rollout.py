"""Rollouts: many multi-turn trajectories sampled at once, with the exact log-probability of every sampled token.

Owns the prompt, the turn protocol, `Trajectory` and the engine that generates.  Training and evaluation both sample
through `rollout`.  Reading order: Step, Trajectory, Sampling -> build_prompt -> Chat -> Episode (the protocol of one
trajectory, knows nothing of tensors) -> KVCache, Batch, attend -> Engine (tensors, knows nothing of text) -> rollout.

How the engine works.  B slots hold one trajectory each, its keys and values in one preallocated cache.  A step forwards
whatever each slot has not forwarded yet: one sampled token, or a chunk of prompt or observation.  These tokens are laid
end to end in ONE flat row of N tokens, so the linear layers see no padding at all; only attention knows about slots.  It
is an attention function of our own, registered with transformers under the name "rollout", and it works for every causal
LM that asks its attention by name (Qwen, Llama, Mistral...), wrapped by PEFT and quantised or not.
* A group's prompt is forwarded once; its siblings copy the keys and values and forward only the last prompt token.
* Code and tools run in threads while the other slots decode; a finished slot is refilled at once.
* Nothing outlives the call: the policy changes between calls, so a cached prefix would be stale.

Departures from the paper: it does not say how it samples.  The protocol (a turn ends at the closing fence of its first
```python block) and the observation's role (user) are ours.
"""

import contextlib
import hashlib
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from policy import head_size
from tools import ToolContext, UserError, prompt_text

CODE = re.compile(r"```(?:python|py)[^\S\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
NO_CODE = "No complete ```python block was found. Write one, and call final_answer(...) in it when you know the answer."
SHORT = "Solve the task with Python code."
FULL = """\
You answer a question in several turns. In each turn write one thought and one Python block, then stop:

Thought: what you know, and what to find out next
```python
# code that finds it out
```

The code is run. What it prints, the value of its last expression and its errors come back to you as the next message,
which begins with "Observation:". Variables, imports and files stay from turn to turn. Print what you want to see; never
guess what code would print. When you know the answer, call final_answer(answer) in the code: this ends the task. Give
the answer alone, as short as the question allows: a number, a name, or a list separated by commas.
"""


# --------------------------------------------------------------------------------------------------- what comes out


@dataclass
class Step:
    """One turn: what the policy wrote and what came back."""

    text: str
    code: str | None  # of the first complete ```python block
    observation: str  # as the policy reads it: cut, and without the template
    status: str  # of the executor: "ok", "error", "timeout"...; "" without code
    seconds: float  # that the code and its tools took


@dataclass
class Trajectory:
    """`ids`, `mask` and `logps` have the same length; what was not sampled has mask 0 and logp 0.0."""

    task_id: str
    sample: int  # index in its group
    seed: int  # of the rollout; with task_id and sample it fixes the random stream
    ids: list[int]
    mask: list[int]  # 1 = sampled by the policy, the token that ends a turn included
    logps: list[float]  # fp32 log pi(token) at the sampling temperature (at 1 if greedy): the behaviour policy
    prompt_length: int
    steps: list[Step]
    answer: str | None
    # "answer", "turn_limit", "context_limit" (no room for the next token), "length" (a turn cut by its own limit) or
    # "error" (the host or a tool failed; `error` says how).  It ends with the last sampled token.
    stop_reason: str
    seconds: float  # from its first forward to its end
    error: str = ""

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Trajectory":
        return cls(**{**values, "steps": [Step(**step) for step in values["steps"]]})


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0 = greedy; there is no top-k or top-p: the loss scores the full softmax
    max_turns: int = 6
    turn_tokens: int = 1024  # sampled tokens a turn
    context_tokens: int = 8192  # prompt + everything sampled and observed
    observation_tokens: int = 2000  # an observation is cut in the middle to this
    slots: int | None = None  # trajectories in flight; None: from free memory
    deterministic: bool = False  # one thread, and results admitted a fixed number of steps after their turn


# ---------------------------------------------------------------------------------------------- the turn protocol


class Chat:
    """The chat template, taken apart once into the pieces that go around what people, tools and the policy write.

    What was sampled is never tokenised again, and what a question or a tool contains can never become a special token
    (an observation with "<|im_end|>" in it stays text).
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        marks = [f"\x02{i}\x03" for i in range(4)]
        messages = [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant", "user"), marks)]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            first = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
            begin, middle, start, turn, end = re.split("|".join(marks), text)
            start = first.split(marks[1])[1]  # Qwen3 and others: the last turn's opening, not an earlier one's
        except ValueError as error:
            raise UserError("the chat template does not keep system, user, assistant, user as they are") from error
        pieces = (begin, middle, start, turn, end)
        self.begin, self.middle, self.start, self.turn, self.end = [self.encode(p, special=True) for p in pieces]
        self.turn_end = self.turn[0]  # <|im_end|>: ends a turn if the policy samples it, else it is forced
        self.stops = {self.turn_end, tokenizer.eos_token_id} - {None}

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def prompt(self, system: str, user: str) -> list[int]:
        return self.begin + self.encode(system) + self.middle + self.encode(user) + self.start

    def watched(self, vocabulary: int) -> np.ndarray:
        """(V,) bool: the tokens that may end a turn, so that a turn's text is looked at only after one of these."""
        watch = np.zeros(vocabulary, dtype=bool)
        watch[[i for token, i in self.tokenizer.get_vocab().items() if "`" in token]] = True
        watch[list(self.stops)] = True
        return watch

    def text(self, turn: list[int]) -> str:
        return self.tokenizer.decode(turn[:-1] if turn[-1] == self.turn_end else turn)

    def observation(self, text: str, limit: int) -> list[int]:
        """Tokens of `text`, of which the middle is left out if there are more than `limit`."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return ids
        note = self.encode(f"\n[... {len(ids) - limit} tokens left out ...]\n")[:limit]
        keep = limit - len(note)
        return ids[: keep - keep // 2] + note + ids[len(ids) - keep // 2 :]


def build_prompt(tokenizer, task, tools: list, style: str) -> list[int]:
    """Token ids up to where the policy begins to write.  style: "short" (the tiny model's) or "full"."""
    files = ", ".join(task.files)
    if style == "short":
        return Chat(tokenizer).prompt(SHORT, task.question + (f"\nFiles: {files}" if files else ""))
    if style != "full":
        raise UserError(f"unknown prompt style {style!r}: short or full")
    documented = f"\nThese functions can be called from the code:\n{prompt_text(tools)}\n" if tools else ""
    attached = f"\n\nAttached files, in the working directory: {files}" if files else ""
    return Chat(tokenizer).prompt(FULL + documented, task.question + attached)


class Episode:
    """The protocol of one trajectory.  The engine asks: has the turn ended?  what came back?  It knows no tensors."""

    def __init__(self, task, sample: int, seed: int, group: int, prompt: list[int], chat, executor, tools, sampling):
        self.task, self.sample, self.seed, self.group, self.prompt = task, sample, seed, group, prompt
        self.chat, self.executor, self.tools, self.sampling = chat, executor, tools, sampling
        self.turn_tokens = sampling.turn_tokens
        self.context = ToolContext(question=task.question)
        self.session = self.answer = None
        self.steps: list[Step] = []
        self.stop_reason = self.error = ""
        self.last = -1  # the token that ended the newest turn

    def uniforms(self, n: int) -> np.ndarray:
        """(n,) in [0, 1), one for each token position: the stream belongs to the trajectory, whatever the batch."""
        key = hashlib.sha256(f"{self.seed}/{self.task.id}/{self.sample}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(n)

    def ended(self, turn: list[int]) -> bool:
        return turn[-1] in self.chat.stops or CODE.search(self.chat.text(turn)) is not None

    def close_turn(self, turn: list[int], cut: str) -> None:
        """Note what was written.  cut: "" for a turn that ended by itself, else the limit that cut it."""
        text = self.chat.text(turn)
        code = CODE.search(text)
        self.steps.append(Step(text, code and code[1], "", "", 0.0))
        self.stop_reason, self.last = cut, turn[-1]

    def act(self):
        """Run the turn's code; in a thread of its own.  Returns the executor's result, None if there is no code."""
        step, began = self.steps[-1], time.monotonic()
        if step.code is None or self.stop_reason:
            return None
        self.context.seconds_left = lambda: self.executor.limits.seconds - (time.monotonic() - began)
        if self.session is None:
            bound = {tool.name: tool.bind(self.context) for tool in self.tools}
            self.session = self.executor.session(tools=bound, files=self.task.files)
            self.context.workdir = self.session.workdir
        result = self.session.run(step.code)
        step.seconds = time.monotonic() - began
        return result

    def observe(self, result, room: int) -> list[int]:
        """The forced tokens that begin the next turn, or [] with `stop_reason` set.  room: tokens left in the context."""
        step, chat = self.steps[-1], self.chat
        if self.stop_reason:
            return []
        if result is not None:
            step.status = result.status
            self.answer = result.answer if result.answered else None
        ids = chat.observation(NO_CODE if result is None else result.observation(), self.sampling.observation_tokens)
        step.observation = chat.tokenizer.decode(ids)
        if self.answer is not None:
            self.stop_reason = "answer"
        elif len(self.steps) >= self.sampling.max_turns:
            self.stop_reason = "turn_limit"
        turn = chat.turn[1:] if self.last == chat.turn_end else chat.turn
        forced = turn + chat.encode("Observation:\n") + ids + chat.end
        if not self.stop_reason and len(forced) >= room:
            self.stop_reason = "context_limit"
        return [] if self.stop_reason else forced

    def fail(self, error: BaseException) -> None:
        """A tool or the host failed: this trajectory ends, the batch goes on."""
        self.stop_reason, self.error = "error", f"{type(error).__name__}: {error}"

    def close(self) -> None:
        if self.session is not None:
            self.session.close()

    def trajectory(self, ids: list[int], mask: list[int], logps: list[float], seconds: float) -> Trajectory:
        return Trajectory(
            self.task.id, self.sample, self.seed, ids, mask, logps, len(self.prompt), self.steps, self.answer,
            self.stop_reason, seconds, self.error,
        )  # fmt: skip


# ------------------------------------------------------------------------------------- attention with slots


class KVCache:
    """Keys and values of B slots of S positions each, (B, Hkv, S, D) a layer; the engine knows the lengths."""

    def __init__(self, model, slots: int, context: int):
        weight, config = model.get_input_embeddings().weight, model.config
        shape = (slots, config.num_key_value_heads, context, head_size(config))
        # zeros: what is not written yet is masked, but 0 * NaN would still be NaN
        self.layers = [
            tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for pair in self.layers:
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]


@dataclass
class Batch:
    """One step: N tokens laid end to end, and how they attend.  First the single tokens, then the chunks."""

    cache: KVCache
    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,)
    slots: torch.Tensor  # (N,)
    singles: int  # the first n tokens are the only ones of their slots in this step
    token_of_slot: torch.Tensor  # (B,) flat index of a slot's single token; 0 where it has none
    blocks: list[tuple[int, int, int, torch.Tensor | None]]  # slots lo..hi attend their first `span` positions
    chunks: list[tuple[int, int, int, int, torch.Tensor]]  # tokens a..b of a slot attend its first `end` positions


def attend(module, query, key, value, attention_mask, scaling=None, batch: Batch | None = None, **_):
    """transformers' attention interface for a flat batch: (1, H, N, D), (1, Hkv, N, D) twice -> (1, N, H, D).

    Query heads that share a key head are rows of one small query matrix, so keys and values are never repeated.
    """
    keys, values = batch.cache.layers[module.layer_idx]  # (B, Hkv, S, D)
    keys[batch.slots, :, batch.positions] = key[0].transpose(0, 1)  # (N, Hkv, D)
    values[batch.slots, :, batch.positions] = value[0].transpose(0, 1)
    _, heads, n, size = query.shape
    query = query[0].unflatten(0, (keys.shape[1], -1))  # (Hkv, G, N, D)
    out = query.new_empty(n, heads, size)  # (N, H, D)
    if batch.singles:
        single = query[:, :, batch.token_of_slot].permute(2, 0, 1, 3)  # (B, Hkv, G, D)
        mixed = torch.empty_like(single)
        for lo, hi, span, mask in batch.blocks:
            mixed[lo:hi] = F.scaled_dot_product_attention(
                single[lo:hi], keys[lo:hi, :, :span], values[lo:hi, :, :span], attn_mask=mask, scale=scaling
            )
        out[: batch.singles] = mixed[batch.slots[: batch.singles]].flatten(1, 2)  # (n, H, D)
    for a, b, slot, end, mask in batch.chunks:
        part = query[:, :, a:b].flatten(1, 2)[None]  # (1, Hkv, G * T, D)
        mixed = F.scaled_dot_product_attention(
            part, keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end], attn_mask=mask, scale=scaling
        )
        out[a:b] = mixed.view(heads, b - a, size).transpose(0, 1)  # (T, H, D)
    return out[None], None


AttentionInterface.register("rollout", attend)


@contextlib.contextmanager
def sampling_mode(model, deterministic: bool) -> Iterator[None]:
    """Eval mode, our attention, no gradients, one thread if deterministic; everything as before afterwards."""
    config, training, threads = model.config, model.training, torch.get_num_threads()
    attention = config._attn_implementation
    model.eval()
    config._attn_implementation = "rollout"
    torch.set_num_threads(1 if deterministic else threads)
    try:
        with torch.no_grad():  # not inference_mode: what a library caches here must serve a backward pass
            yield
    finally:
        config._attn_implementation = attention
        torch.set_num_threads(threads)
        model.train(training)


# ---------------------------------------------------------------------------------------------------- the engine


@dataclass
class Stats:
    """What a run of the engine cost."""

    steps: int = 0
    forwarded: int = 0  # tokens through the model
    sampled: int = 0
    seconds: float = 0.0
    idle: float = 0.0  # seconds in which no slot could decode: all were waiting for code or tools


def sample(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V), (n,) -> token ids (n,) and their log pi (n,) in fp32: inverse CDF of softmax(logits / temperature)."""
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (n, V)
    if temperature == 0:
        ids = logits.argmax(dim=-1, keepdim=True)  # (n, 1)
    else:
        cdf = logps.exp().cumsum(dim=-1, dtype=torch.float64)  # fp32 would lose tokens below 1e-7
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
        ids = ids.clamp_(max=logits.shape[-1] - 1)
    return ids[:, 0], logps.gather(-1, ids)[:, 0]


class Engine:
    """B slots that decode together.  All per-slot state is in arrays, so that a step costs no Python per slot."""

    CHUNK = 1024  # at most so many tokens of prompts and observations in a step, so that decoding slots go on
    SPAN = 64  # spans are multiples of this
    LAG = 4  # deterministic mode: a result is admitted so many steps after its turn

    def __init__(self, model, slots: int, context: int, temperature: float, watch: np.ndarray, deterministic=False):
        self.model, self.temperature, self.watch, self.deterministic = model, temperature, watch, deterministic
        self.context, self.device = context, model.get_input_embeddings().weight.device
        self.cache = KVCache(model, slots, -(-context // self.SPAN) * self.SPAN)
        self.uniforms = torch.zeros(slots, context, dtype=torch.float64, device=self.device)
        self.tokens = np.zeros((slots, context), dtype=np.int64)
        self.mask = np.zeros((slots, context), dtype=np.int8)
        self.logps = np.zeros((slots, context), dtype=np.float32)
        self.total = np.zeros(slots, dtype=np.int64)  # tokens known
        self.done = np.zeros(slots, dtype=np.int64)  # tokens forwarded, whose keys and values are in the cache
        self.turn = np.zeros(slots, dtype=np.int64)  # where the turn began
        self.limit = np.zeros(slots, dtype=np.int64)  # where it is cut
        self.running = np.zeros(slots, dtype=bool)  # False: free, waiting for a result or for the group's prompt
        self.group = np.full(slots, -1)  # whose prompt the slot's cache begins with, also after the slot was freed
        self.began = np.zeros(slots)
        self.episodes: list = [None] * slots
        self.siblings: list[int] = []  # slots that wait for their group's prompt
        self.flight: deque = deque()  # (step at which it is due, slot, future) in the order of submission
        self.stats = Stats()
        # One attention call costs about as much as reading this many positions of one slot.
        bytes_a_call = 60e6 if self.device.type == "cuda" else 2e5
        row = self.cache.layers[0][0][0, :, 0]
        self.call_cost = bytes_a_call / (2 * row.numel() * row.element_size())

    # -- the life of a slot: admit, collect, finish

    def run(self, episodes: list) -> Iterator[tuple]:
        """Generate all; yields (episode, ids, mask, logps, seconds) for each as it ends, in no promised order."""
        waiting, free, start = deque(episodes), deque(range(len(self.episodes))), time.perf_counter()
        pool = ThreadPoolExecutor(max_workers=len(self.episodes), thread_name_prefix="rollout")
        try:
            while waiting or len(free) < len(self.episodes):
                while waiting and free:
                    self.admit(waiting.popleft(), free.popleft())
                for slot in self.collect():
                    pool.submit(self.episodes[slot].close)
                    yield self.finish(slot)
                    free.append(slot)
                self.share_prompts()
                if self.running.any():
                    batch, sampling, last = self.plan()
                    ids, logps = self.forward(batch, sampling, last)
                    for slot in self.record(sampling, ids, logps):
                        future = pool.submit(self.episodes[slot].act)
                        self.flight.append((self.stats.steps + self.LAG, slot, future))
            pool.shutdown()
        finally:  # also on Ctrl-C: closing the sessions frees the threads that wait for them
            for episode in filter(None, self.episodes):
                episode.close()
            pool.shutdown(wait=False, cancel_futures=True)
            self.stats.seconds += time.perf_counter() - start

    def admit(self, episode, slot: int) -> None:
        n = len(episode.prompt)
        self.episodes[slot], self.began[slot] = episode, time.perf_counter()
        self.tokens[slot, :n], self.mask[slot], self.logps[slot] = episode.prompt, 0, 0.0
        self.uniforms[slot] = torch.from_numpy(episode.uniforms(self.context)).to(self.device)
        again = self.group[slot] == episode.group  # refilled from its own group: the prompt is there already
        kin = (self.group == episode.group).any()
        self.group[slot], self.total[slot], self.done[slot] = episode.group, n, (n - 1) * again
        self.turn[slot], self.limit[slot] = n, min(n + episode.turn_tokens, self.context)
        self.running[slot] = again or not kin
        if not self.running[slot]:
            self.siblings.append(slot)

    def share_prompts(self) -> None:
        """Copy a group's prompt, once it is there, to waiting siblings; its last token they forward for themselves."""
        for slot in list(self.siblings):
            n = self.total[slot] - 1
            ready = np.flatnonzero((self.group == self.group[slot]) & (self.done >= n))
            if len(ready):
                self.cache.copy_prefix(ready[0], slot, n)
                self.done[slot], self.running[slot] = n, True
                self.siblings.remove(slot)

    def collect(self) -> list[int]:
        """Admit the results that are there: slots go on with the observation, or are returned because they ended."""
        if not self.flight:
            return []
        began, stuck, ended = time.perf_counter(), not self.running.any(), []
        if stuck:
            wait([f for _, _, f in self.flight], return_when=ALL_COMPLETED if self.deterministic else FIRST_COMPLETED)
        ready = [
            item for item in self.flight
            if (stuck or item[0] <= self.stats.steps if self.deterministic else item[2].done())
        ]  # fmt: skip
        for item in ready:
            self.flight.remove(item)
            slot, future = item[1:]
            episode, at = self.episodes[slot], self.total[slot]
            try:
                forced = episode.observe(future.result(), self.context - at)
            except Exception as error:  # whatever a tool or the host does wrong, it ends this trajectory only
                episode.fail(error)
                forced = []
            if forced:
                self.tokens[slot, at : at + len(forced)] = forced  # mask 0, logp 0: set when the slot was admitted
                self.turn[slot] = self.total[slot] = at = at + len(forced)
                self.limit[slot] = min(at + episode.turn_tokens, self.context)
                self.running[slot] = True
            else:
                ended.append(slot)
        self.stats.idle += (time.perf_counter() - began) * stuck
        return ended

    def finish(self, slot: int) -> tuple:
        n, episode = self.total[slot], self.episodes[slot]
        self.episodes[slot] = None
        rows = [a[slot, :n].tolist() for a in (self.tokens, self.mask, self.logps)]
        return episode, *rows, time.perf_counter() - self.began[slot]

    # -- one step: plan, forward, record

    def plan(self) -> tuple[Batch, np.ndarray, np.ndarray]:
        """What this step forwards, the slots that sample after it, and the flat index of the token each samples from."""
        rows = np.flatnonzero(self.running)
        need = self.total[rows] - self.done[rows]
        singles = rows[need == 1]
        slots, positions, spans, budget, n = [singles], [self.done[singles]], [], self.CHUNK, len(singles)
        for slot in rows[need > 1].tolist():
            start = int(self.done[slot])
            size = min(int(self.total[slot]) - start, budget)
            if size == 0:
                break
            spans.append((n, n + size, slot, start))
            slots.append(np.full(size, slot))
            positions.append(np.arange(start, start + size))
            n, budget = n + size, budget - size
        slots, positions = np.concatenate(slots), np.concatenate(positions)  # (N,)
        where = np.zeros(len(self.episodes), dtype=np.int64)
        where[singles] = np.arange(len(singles))
        ids, pos, at, token_of_slot = (
            torch.from_numpy(a).to(self.device) for a in (self.tokens[slots, positions], positions, slots, where)
        )
        batch = Batch(self.cache, ids, pos, at, len(singles), token_of_slot, self.blocks(singles), self.chunks(spans))
        self.done[singles] += 1
        for a, b, slot, _ in spans:
            self.done[slot] += b - a
        last = np.append(np.arange(len(singles)), [b - 1 for _, b, _, _ in spans]).astype(np.int64)
        sampling = slots[last]
        complete = self.done[sampling] == self.total[sampling]
        return batch, sampling[complete], last[complete]

    def blocks(self, singles: np.ndarray) -> list[tuple]:
        """Neighbouring slots attend together, in the span of the longest, where that is cheaper than one more call."""
        found = []  # [lo, hi, span]
        for slot, length in zip(singles.tolist(), self.total[singles].tolist()):
            if found:
                lo, hi, span = found[-1]
                together = (slot + 1 - lo) * max(span, length) - (hi - lo) * span
                if together <= length + self.call_cost:
                    found[-1] = (lo, slot + 1, max(span, length))
                    continue
            found.append((slot, slot + 1, length))
        if len(found) == len(singles):
            return [(lo, hi, span, None) for lo, hi, span in found]
        lengths = torch.from_numpy(np.maximum(self.total, 1)).to(self.device)  # (B,)
        widest = self.round_up(max(span for _, _, span in found))
        mask = self.additive(torch.arange(widest, device=self.device) < lengths[:, None])  # (B, S)
        spans = [(lo, hi, self.round_up(span)) for lo, hi, span in found]
        return [(lo, hi, span, mask[lo:hi, None, None, :span]) for lo, hi, span in spans]

    def chunks(self, spans: list[tuple[int, int, int, int]]) -> list[tuple]:
        """Causal masks for chunks that begin at position `start` of their slot: (1, 1, G * T, end)."""
        config, found = self.model.config, []
        shared = config.num_attention_heads // config.num_key_value_heads  # G query heads share a key head
        for a, b, slot, start in spans:
            end = self.round_up(start + b - a)
            keys = torch.arange(end, device=self.device)
            mask = self.additive(keys <= keys[start : start + b - a, None])  # (T, end)
            found.append((a, b, slot, end, mask.repeat(shared, 1)[None, None]))
        return found

    def round_up(self, n: int) -> int:
        return -(-n // self.SPAN) * self.SPAN

    def additive(self, allowed: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(allowed.shape, dtype=self.cache.layers[0][0].dtype, device=self.device)
        return zeros.masked_fill_(~allowed, float("-inf"))

    def forward(self, batch: Batch, sampling: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One pass through the model; samples the next token of the slots in `sampling`: ids (n,), logps (n,)."""
        self.stats.steps += 1
        self.stats.forwarded += len(batch.ids)
        keep, rows, at = (torch.from_numpy(a).to(self.device) for a in (last, sampling, self.total[sampling]))
        logits = self.model(
            input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, logits_to_keep=keep,
            batch=batch,
        ).logits[0]  # fmt: skip  (n, V)
        ids, logps = sample(logits, self.temperature, self.uniforms[rows, at])
        both = torch.stack([ids.double(), logps.double()]).cpu().numpy()  # one transfer: the step's only wait
        return both[0].astype(np.int64), both[1]

    def record(self, rows: np.ndarray, ids: np.ndarray, logps: np.ndarray) -> list[int]:
        """Append the sampled tokens; returns the slots whose turn is over."""
        at = self.total[rows]
        self.tokens[rows, at], self.mask[rows, at], self.logps[rows, at] = ids, 1, logps
        self.total[rows] += 1
        self.stats.sampled += len(rows)
        over = []
        for slot in rows[self.watch[ids] | (self.total[rows] == self.limit[rows])].tolist():
            turn = self.tokens[slot, self.turn[slot] : self.total[slot]].tolist()
            cut = "" if self.episodes[slot].ended(turn) else self.cut(slot)
            if cut is not None:
                self.episodes[slot].close_turn(turn, cut)
                self.running[slot] = False
                over.append(slot)
        return over

    def cut(self, slot: int) -> str | None:
        """The limit that the slot has just reached, if any."""
        if self.total[slot] < self.limit[slot]:
            return None
        return "context_limit" if self.total[slot] == self.context else "length"


def choose_slots(model, trajectories: int, context: int) -> int:
    """As many slots as trajectories, or as fit into 80 % of the free memory with their share of the logits."""
    config, weight = model.config, model.get_input_embeddings().weight
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * weight.element_size()
    each = token * context + 8 * context + 24 * config.vocab_size  # cache, uniforms, logits in fp32 and fp64
    if weight.device.type == "cuda":
        unused = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        fit, most = int(0.8 * (torch.cuda.mem_get_info(weight.device)[0] + unused)) // each, 256
    else:
        fit, most = int(0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // each, 128
    return max(1, min(trajectories, fit, most))


# ------------------------------------------------------------------------------------------------------- the call


def rollout(
    policy, tasks: list, executor, tools: list, sampling: Sampling, samples: int, seed: int, progress=None
) -> list[list[Trajectory]]:
    """Sample `samples` trajectories for each task with the policy as it is now: one list for each task.

    policy: with .model, .tokenizer and .preset.prompt; inside `policy.reference()` the reference policy is sampled.
    progress: a tqdm bar, advanced by one for each trajectory.  Raises UserError for a template, a prompt style or a
    model that cannot be used; what goes wrong in one trajectory ends only that one, with stop_reason "error".
    """
    chat, done = Chat(policy.tokenizer), {}
    episodes = [
        Episode(task, i, seed, g, prompt, chat, executor, tools, sampling)
        for g, task in enumerate(tasks)
        for prompt in [build_prompt(policy.tokenizer, task, tools, policy.preset.prompt)]
        for i in range(samples)
    ]
    fitting = [e for e in episodes if len(e.prompt) < sampling.context_tokens]
    for episode in episodes:
        if len(episode.prompt) >= sampling.context_tokens:
            episode.stop_reason = "context_limit"
            done[episode.group, episode.sample] = episode.trajectory(
                episode.prompt, [0] * len(episode.prompt), [0.0] * len(episode.prompt), 0.0
            )
    with sampling_mode(policy.model, sampling.deterministic):
        slots = sampling.slots or choose_slots(policy.model, len(fitting), sampling.context_tokens)
        engine = Engine(
            policy.model, min(slots, max(1, len(fitting))), sampling.context_tokens, sampling.temperature,
            chat.watched(policy.model.config.vocab_size), sampling.deterministic,
        )  # fmt: skip
        for episode, ids, mask, logps, seconds in engine.run(fitting):
            done[episode.group, episode.sample] = episode.trajectory(ids, mask, logps, seconds)
            if progress is not None:
                progress.update(1)
    return [[done[g, i] for i in range(samples)] for g in range(len(tasks))]
