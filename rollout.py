"""Rollouts: many multi-turn trajectories sampled at once, with the exact log-probability of every token.

Owns the prompt, the turn protocol, `Trajectory` and the engine that generates. Training and evaluation both
sample through `rollout`. Read in this order: Step, Trajectory, Sampling -> Chat, build_prompt -> Episode (the
protocol of one trajectory; knows no tensors) -> KVCache, Batch, attend -> Engine (knows no text) -> rollout.

How the engine works. B slots hold one trajectory each; their keys and values lie in one preallocated cache.
A step forwards what each slot has not forwarded yet: the token it sampled, or a chunk of its prompt or of an
observation. All these tokens lie end to end in ONE row of N tokens, so the linear layers see no padding; only
attention knows of slots. It is a function of our own, registered with transformers, and serves all LMs that
look their attention up by name, wrapped by PEFT or not, quantised or not.
* A group's prompt is forwarded once; siblings copy its keys and values and forward only its last token.
* Code and tools run in threads while other slots decode; a free slot is refilled at once.
* Nothing is kept between calls: the policy changes there, and a cached prefix would be the old policy's.

Departures from the paper, which does not say how it samples: the protocol is ours. A turn ends at the closing
fence of its first ```python block; the observation comes back in the user's role.
"""
import contextlib
import hashlib
import itertools
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from policy import head_size
from tools import ToolContext, UserError, prompt_text

CODE = re.compile(r"```(?:python|py)[^\S\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
NO_CODE = "There is no complete ```python block. Write one; call final_answer(...) in it when you know it."
SHORT = "Solve the task with Python code."
FULL = """\
You answer a question in several turns. In each turn write one thought and one Python block, then stop:

Thought: what you know, and what to find out next
```python
# code that finds it out
```

The code is run. What it prints, the value of its last expression and its errors come back to you in the next
message, which begins with "Observation:". Variables, imports and files stay from turn to turn. Print what you
want to see, and never guess what code would print. When you know the answer, call final_answer(answer) in the
code: this ends the task. Give the answer alone, as short as the question allows: a number, a name, or a list
separated by commas.
"""


# --------------------------------------------------------------------------------------------- what comes out
@dataclass
class Step:
    """One turn: what the policy wrote and what came back."""
    text: str
    code: str | None            # of the first complete ```python block
    observation: str            # as the policy reads it: cut, without the template
    status: str                 # of the executor: "ok", "error", "timeout"...; "" without code
    seconds: float              # that the code ran, tools included


@dataclass
class Trajectory:
    """`ids`, `mask`, `logps` have one length; logp is 0.0 where mask is 0: prompt, observation, template."""
    task_id: str
    sample: int                 # index in its group
    seed: int                   # of the rollout; with task_id and sample it fixes the random stream
    ids: list[int]              # ends with the last sampled token
    mask: list[int]             # 1 = sampled by the policy, the token that ends a turn included
    logps: list[float]         # log pi(token) of the behaviour policy at the sampling temperature (greedy: 1)
    prompt_length: int
    steps: list[Step]
    answer: str | None
    stop_reason: str            # "answer" | "turn_limit" | "context_limit" (no room for the next token) |
    #                             "length" (a turn cut at turn_tokens) | "error" (a tool or the host failed)
    seconds: float              # from its admission to its end
    error: str = ""             # what failed

    def to_dict(self) -> dict:      # not asdict: that copies every token
        return {**vars(self), "steps": [vars(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, values: dict) -> "Trajectory":
        return cls(**{**values, "steps": [Step(**step) for step in values["steps"]]})


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0    # 0 = greedy. No top-k, no top-p: the loss scores the full softmax
    max_turns: int = 6
    turn_tokens: int = 1024     # sampled tokens a turn
    context_tokens: int = 8192  # prompt + everything sampled and observed
    observation_tokens: int = 2000      # an observation is cut in the middle to this
    slots: int | None = None    # trajectories in flight; None: as many as fit into memory
    deterministic: bool = False         # one thread; results are admitted a fixed number of steps later


# ------------------------------------------------------------------------------------------ the turn protocol
class Chat:
    """The chat template, taken apart once into the pieces around what people, tools and the policy write.

    What was sampled is never tokenised again, and no question or tool output can become a special token: an
    observation that contains "<|im_end|>" stays text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        marks = [f"\x02{i}\x03" for i in range(4)]
        messages = [{"role": r, "content": m} for r, m in zip(("system", "user", "assistant", "user"), marks)]
        try:
            full, first = (tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
                           for m in (messages, messages[:2]))
        except Exception as error:      # there is none, or it raises: a template is a program
            raise UserError(f"the model's chat template cannot be used: {error}") from error
        pieces = re.split(f"({'|'.join(marks)})", full)
        if pieces[1::2] != marks:       # some put the system's text into the last user's message
            raise UserError("the chat template does not write system, user, assistant and user as they are")
        self.begin, self.middle, _, self.turn, self.end = [self.encode(p, special=True) for p in pieces[::2]]
        self.start = self.encode(first.split(marks[1])[1], special=True)    # of the first turn
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if not special.intersection(self.turn[:1]):     # plain text would end turns, and tools could write it
            raise UserError("the chat template does not end a turn with a special token")
        self.turn_end = self.turn[0]                # <|im_end|>: forced where the turn ended at the fence
        # Qwen's Instruct models may also end with <|endoftext|>, which is their padding token
        self.stops = {self.turn_end, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}

    def encode(self, text: str, special: bool = False) -> list[int]:
        text = text.encode("utf-8", "replace").decode()     # code may print half a surrogate pair
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def prompt(self, system: str, user: str) -> list[int]:
        return self.begin + self.encode(system) + self.middle + self.encode(user) + self.start

    def observation(self, text: str, limit: int) -> list[int]:
        """Tokens of `text`; of more than `limit` the middle is left out, and how much is said there."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return ids
        keep = limit
        for _ in range(3):              # the note takes room itself, and its number may grow by a digit
            note = self.encode(f"\n[... {len(ids) - keep} tokens left out ...]\n")[:limit]
            keep = limit - len(note)
        return ids[:keep - keep // 2] + note + ids[len(ids) - keep // 2:]

    def between(self, observation: list[int], last: int) -> list[int]:
        """The forced tokens from the end of a turn, whose last token was `last`, to the next turn's first."""
        turn = self.turn[1:] if last == self.turn_end else self.turn
        return turn + self.encode("Observation:\n") + observation + self.end

    def text(self, turn: list[int]) -> str:
        return self.tokenizer.decode(turn[:-1] if turn[-1] == self.turn_end else turn)

    def watched(self, vocabulary: int) -> np.ndarray:
        """(V,) bool: the tokens that may end a turn; only after one of these its text is looked at."""
        watch = np.zeros(vocabulary, dtype=bool)
        watch[[i for token, i in self.tokenizer.get_vocab().items() if "`" in token]] = True
        watch[list(self.stops)] = True
        return watch


def build_prompt(chat: Chat, task, tools: list, style: str) -> list[int]:
    """Token ids up to where the policy begins to write. style: "short" (for the tiny model) or "full"."""
    files = ", ".join(task.files)
    if style == "short":
        return chat.prompt(SHORT, task.question + (f"\nFiles: {files}" if files else ""))
    if style != "full":
        raise UserError(f"the prompt style is short or full, not {style!r}")
    documented = f"\nThe code may call these functions:\n{prompt_text(tools)}\n" if tools else ""
    attached = f"\n\nAttached files, in the working directory: {files}" if files else ""
    return chat.prompt(FULL + documented, task.question + attached)


@dataclass(eq=False)
class Episode:
    """A trajectory in the making: its protocol. The engine asks it if a turn has ended and what came back."""
    task: object
    sample: int
    seed: int
    group: int                  # episodes of one group share their prompt
    prompt: list[int]
    chat: Chat
    executor: object
    tools: list
    sampling: Sampling
    session: object = None      # opened with the first code
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)    # held by act and close: they are threads
    steps: list[Step] = field(default_factory=list)
    last: int = -1              # the token that ended the newest turn
    answer: str | None = None
    stop_reason: str = ""
    error: str = ""

    @property
    def turn_tokens(self) -> int:
        return self.sampling.turn_tokens

    def uniforms(self, n: int) -> np.ndarray:
        """(n,) in [0, 1), one a position: the random stream is the trajectory's, whatever the batch."""
        key = hashlib.sha256(f"{self.seed}/{self.task.id}/{self.sample}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(n)

    def ended(self, turn: list[int]) -> bool:
        return turn[-1] in self.chat.stops or CODE.search(self.chat.text(turn)) is not None

    def close_turn(self, turn: list[int], cut: str) -> None:
        """Note what was written. cut: the limit that cut the turn off, "" if it ended by itself."""
        text = self.chat.text(turn)
        code = CODE.search(text)
        self.steps.append(Step(text, code and code[1], "", "", 0.0))
        self.last, self.stop_reason = turn[-1], cut

    def act(self):
        """Run the turn's code, in a worker thread; the executor's result, or None if there is no code."""
        with self.lock:
            if self.steps[-1].code is None or self.stop_reason or self.closed:
                return None
            if self.session is None:
                context = ToolContext(question=self.task.question, files=self.task.files)
                bound = {tool.name: tool.bind(context) for tool in self.tools}
                self.session = self.executor.session(tools=bound, files=self.task.files)
                context.workdir, context.seconds_left = self.session.workdir, self.session.seconds_left
            return self.session.run(self.steps[-1].code)

    def observe(self, result, room: int) -> list[int]:
        """The forced tokens before the next turn, fewer than `room`; or [], and `stop_reason` says why."""
        step = self.steps[-1]
        if self.stop_reason:
            return []
        if result is not None:
            step.status, step.seconds, self.answer = result.status, result.seconds, result.answer
        text = NO_CODE if result is None else result.observation()
        ids = self.chat.observation(text, self.sampling.observation_tokens)
        step.observation = self.chat.tokenizer.decode(ids)
        forced = self.chat.between(ids, self.last)
        self.stop_reason = ("answer" if self.answer is not None else
                            "turn_limit" if len(self.steps) >= self.sampling.max_turns else
                            "context_limit" if len(forced) >= room else "")
        return [] if self.stop_reason else forced

    def close(self) -> None:
        """End the session, once the code that runs in it has returned; no other is opened."""
        with self.lock:
            self.closed = True
            if self.session is not None:
                self.session.close()

    def trajectory(self, ids: list[int], mask: list[int], logps: list[float], seconds: float) -> Trajectory:
        return Trajectory(self.task.id, self.sample, self.seed, ids, mask, logps, len(self.prompt),
                          self.steps, self.answer, self.stop_reason, seconds, self.error)


# --------------------------------------------------------------------------------------- attention with slots
class KVCache:
    """Keys and values of B slots with room for S positions each: (B, Hkv, S, D) a layer."""

    def __init__(self, model, slots: int, context: int):
        weight, config = model.get_input_embeddings().weight, model.config
        shape = (slots, config.num_key_value_heads, context, head_size(config))
        # zeros, not empty: what lies beyond a slot's length is masked, but 0 * NaN would still be NaN
        self.layers = [tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
                       for _ in range(config.num_hidden_layers)]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for tensor in (tensor for layer in self.layers for tensor in layer):
            tensor[target, :, :length] = tensor[source, :, :length]


@dataclass
class Batch:
    """The N tokens of one step, end to end, and how they attend. Slots with a single token come first."""
    cache: KVCache
    ids: torch.Tensor           # (N,)
    positions: torch.Tensor     # (N,) in its trajectory
    slots: torch.Tensor         # (N,)
    singles: int                # tokens that are their slot's only one in this step
    token_of: torch.Tensor      # (B,) index of the slot's single token, 0 for a slot without
    blocks: list[tuple]         # (lo, hi, span, mask): single tokens of slots lo..hi attend `span` positions
    chunks: list[tuple]         # (a, b, slot, span, mask): so do tokens a..b, a chunk of one slot


def attend(module, query, key, value, attention_mask, scaling=None, batch=None, **_):
    """transformers' attention interface: (1, H, N, D), (1, Hkv, N, D) twice -> (1, N, H, D).

    The G query heads that share a key head are rows of one query matrix: keys are never repeated.
    """
    keys, values = batch.cache.layers[module.layer_idx]                                 # (B, Hkv, S, D)
    keys[batch.slots, :, batch.positions] = key[0].transpose(0, 1)                      # (N, Hkv, D)
    values[batch.slots, :, batch.positions] = value[0].transpose(0, 1)
    _, heads, n, size = query.shape
    query = query[0].unflatten(0, (keys.shape[1], -1))                                  # (Hkv, G, N, D)
    out = query.new_empty(n, heads, size)                                               # (N, H, D)
    single = query[:, :, batch.token_of].permute(2, 0, 1, 3)                            # (B, Hkv, G, D)
    mixed = torch.zeros_like(single)
    for lo, hi, span, mask in batch.blocks:
        mixed[lo:hi] = scaled_dot_product_attention(
            single[lo:hi], keys[lo:hi, :, :span], values[lo:hi, :, :span], attn_mask=mask, scale=scaling)
    out[:batch.singles] = mixed[batch.slots[:batch.singles]].flatten(1, 2)              # (n, H, D)
    for a, b, slot, span, mask in batch.chunks:
        rows = query[:, :, a:b].flatten(1, 2)[None]                                     # (1, Hkv, G * T, D)
        rows = scaled_dot_product_attention(
            rows, keys[None, slot, :, :span], values[None, slot, :, :span], attn_mask=mask, scale=scaling)
        # reshape, not view: the memory-efficient kernel of consumer GPUs lays its output out as (1, G * T, Hkv, D)
        out[a:b] = rows.reshape(heads, b - a, size).transpose(0, 1)                     # (T, H, D)
    return out[None], None


AttentionInterface.register("rollout", attend)


@contextlib.contextmanager
def sampling_mode(model, deterministic: bool) -> Iterator[None]:
    """Eval mode, `attend`, no gradients, one thread if deterministic; afterwards all as it was before."""
    config, training, threads = model.config, model.training, torch.get_num_threads()
    other = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if other or getattr(config, "sliding_window", None):
        raise UserError("models with sliding-window or linear attention cannot be sampled here")
    attention = config._attn_implementation
    model.eval()
    config._attn_implementation = "rollout"
    torch.set_num_threads(1 if deterministic else threads)
    try:
        with torch.no_grad():   # not inference_mode: what is cached here must serve a backward pass later
            yield
    finally:
        config._attn_implementation = attention
        torch.set_num_threads(threads)
        model.train(training)


# ------------------------------------------------------------------------------------------------- the engine
def sample(logits, temperature: float, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V), (n,) -> ids (n,), their fp32 log pi (n,): the inverse CDF of softmax(logits / temperature)."""
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)            # (n, V)
    if temperature == 0:
        ids = logits.argmax(dim=-1, keepdim=True)                                       # (n, 1)
    else:
        cdf = logps.exp().cumsum(dim=-1, dtype=torch.float64)     # fp32 could not draw what is below 6e-8
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
        ids = ids.clamp_(max=cdf.shape[-1] - 1)
    return ids[:, 0], logps.gather(-1, ids)[:, 0]


def in_thread(work: Callable) -> Future:
    """work() in a daemon thread: those of a pool, in a slow tool perhaps, would keep the program from ending."""
    future = Future()

    def run():
        try:
            future.set_result(work())
        except BaseException as error:      # whatever it is, it belongs to whoever asks for the result
            future.set_exception(error)
    threading.Thread(target=run, name="rollout", daemon=True).start()
    return future


class Engine:
    """B slots that decode together. All state is in arrays over slots: no loop over tokens in a step."""
    CHUNK = 512                 # tokens of prompts and observations in a step, so that decoding slots go on
    SPAN = 64                   # masked spans are multiples of this: aligned for the GPU's kernels
    LAG = 4                     # deterministic mode: a result is admitted this many steps after its turn

    def __init__(self, model, slots: int, context: int, temperature: float, watch: np.ndarray,
                 deterministic: bool = False):
        self.model, self.context, self.temperature, self.watch = model, context, temperature, watch
        self.deterministic, self.device = deterministic, model.get_input_embeddings().weight.device
        self.cache = KVCache(model, slots, self.round_up(context))
        self.uniforms = torch.zeros(slots, context, dtype=torch.float64, device=self.device)
        self.tokens = np.zeros((slots, context), dtype=np.int64)
        self.mask = np.zeros((slots, context), dtype=np.int64)
        self.logps = np.zeros((slots, context), dtype=np.float32)
        # tokens known; tokens whose keys and values are in the cache; where the turn began; where it is cut
        self.total, self.done, self.turn, self.limit = np.zeros((4, slots), dtype=np.int64)
        self.running = np.zeros(slots, dtype=bool)      # False: free, or waits for a result
        self.group = np.full(slots, -1)     # whose prompt the cache begins with, also while the slot is free
        self.episodes, self.began = [None] * slots, [0.0] * slots
        self.flight: list[tuple] = []       # (step at which it is due, slot, future), oldest first
        self.steps = self.forwarded = self.sampled = 0      # steps, tokens forwarded, tokens sampled
        self.idle = 0.0                     # seconds in which no slot could decode
        # an attention call costs about as much as reading so many positions of a slot (GPU: an estimate)
        position = 2 * self.cache.layers[0][0][0, :, 0].nbytes
        self.call_cost = (60e6 if self.device.type == "cuda" else 2e5) / position

    def run(self, episodes: list) -> Iterator[tuple]:
        """Generate all; yields (episode, ids, mask, logps, seconds) of each as it ends, in any order."""
        waiting, free, closing = deque(episodes), deque(range(len(self.episodes))), []
        try:
            while waiting or len(free) < len(self.episodes):
                while waiting and free and self.admit(waiting[0], free):
                    waiting.popleft()
                for slot in self.collect():
                    n, episode = self.total[slot], self.episodes[slot]
                    closing.append(in_thread(episode.close))
                    self.episodes[slot] = None
                    free.append(slot)
                    columns = [array[slot, :n].tolist() for array in (self.tokens, self.mask, self.logps)]
                    yield episode, *columns, time.perf_counter() - self.began[slot]
                if self.running.any():
                    batch, rows, last = self.plan()
                    ids, logps = self.forward(batch, rows, last)
                    self.flight += [(self.steps + self.LAG, slot, in_thread(self.episodes[slot].act))
                                    for slot in self.record(rows, ids, logps)]
            wait(closing)
        finally:    # also on Ctrl-C: nothing is waited for; what still runs is closed when it returns
            for episode in filter(None, self.episodes):
                in_thread(episode.close)

    def admit(self, episode, free: deque) -> bool:
        """Put it into a free slot; False while its group's prompt is being forwarded in another."""
        n, kin = len(episode.prompt), self.group == episode.group
        ready = np.flatnonzero(kin & (self.done >= n - 1))  # slots whose cache begins with this prompt
        if kin.any() and not len(ready):
            return False
        slot = free.popleft()
        if len(ready):
            self.cache.copy_prefix(ready[0], slot, n - 1)   # the last is forwarded, for its logits
        self.group[slot], self.done[slot] = episode.group, n - 1 if len(ready) else 0
        self.episodes[slot], self.began[slot], self.running[slot] = episode, time.perf_counter(), True
        self.tokens[slot, :n], self.mask[slot], self.logps[slot] = episode.prompt, 0, 0.0
        self.uniforms[slot] = self.tensor(episode.uniforms(self.context))
        self.begin_turn(slot, n)
        return True

    def begin_turn(self, slot: int, at: int) -> None:
        self.total[slot] = self.turn[slot] = at
        self.limit[slot] = min(at + self.episodes[slot].turn_tokens, self.context)

    def collect(self) -> list[int]:
        """Append the observations that are there; returns slots that ended. Waits only if none can decode."""
        began, stuck, ended = time.perf_counter(), not self.running.any(), []
        if self.deterministic:
            ready = [item for item in self.flight if stuck or item[0] <= self.steps]
            wait([future for _, _, future in ready])
        else:
            wait([future for _, _, future in self.flight] * stuck, return_when=FIRST_COMPLETED)
            ready = [item for item in self.flight if item[2].done()]
        self.idle += time.perf_counter() - began
        for item in ready:
            self.flight.remove(item)
            slot, future = item[1:]
            episode, at = self.episodes[slot], self.total[slot]
            try:
                forced = episode.observe(future.result(), self.context - at)
            except Exception as error:      # whatever a tool or the host does wrong ends this trajectory only
                episode.stop_reason, episode.error, forced = "error", f"{type(error).__name__}: {error}", []
            if forced:
                self.tokens[slot, at:at + len(forced)] = forced     # mask and logp are 0 since the admission
                self.begin_turn(slot, at + len(forced))
                self.running[slot] = True
            else:
                ended.append(slot)
        return ended

    def plan(self) -> tuple[Batch, np.ndarray, np.ndarray]:
        """What this step forwards; the slots (n,) that sample after it, their last tokens' indices (n,)."""
        rows = np.flatnonzero(self.running)
        size = np.minimum(self.total[rows] - self.done[rows], self.CHUNK)
        order = np.argsort(size, kind="stable")         # single tokens first, then the shortest chunks
        rows, size = rows[order], size[order]
        fits = np.cumsum(size) <= len(self.episodes) + self.CHUNK
        rows, size = rows[fits], size[fits]
        start, end = self.done[rows], np.cumsum(size)
        slots = np.repeat(rows, size)                                                   # (N,)
        positions = np.arange(len(slots)) + np.repeat(start - (end - size), size)       # (N,)
        n = int((size == 1).sum())
        token_of = np.zeros(len(self.episodes), dtype=np.int64)
        token_of[rows[:n]] = np.arange(n)
        self.done[rows] += size
        chunks = list(zip((end - size)[n:].tolist(), end[n:].tolist(), rows[n:].tolist(), start[n:].tolist()))
        batch = Batch(self.cache, *map(self.tensor, (self.tokens[slots, positions], positions, slots)), n,
                      self.tensor(token_of), self.blocks(rows[:n]), [self.chunk(*c) for c in chunks])
        complete = self.done[rows] == self.total[rows]
        return batch, rows[complete], end[complete] - 1

    def blocks(self, rows: np.ndarray) -> list[tuple]:
        """Neighbouring slots share a call, with the longest's span, where a second call would cost more."""
        found: list[list[int]] = []                                                     # [lo, hi, span]
        for slot, length in zip(rows.tolist(), self.done[rows].tolist()):
            lo, hi, span = found[-1] if found else (slot, slot, 0)
            longest = max(span, length)
            if found and (slot + 1 - lo) * longest - (hi - lo) * span <= length + self.call_cost:
                found[-1] = [lo, slot + 1, longest]
            else:
                found.append([slot, slot + 1, length])
        if len(found) == len(rows):
            return [(lo, hi, span, None) for lo, hi, span in found]
        spans = [self.round_up(span) for _, _, span in found]
        lengths = self.tensor(np.maximum(self.done, 1))                                 # (B,)
        mask = self.additive(torch.arange(max(spans), device=self.device) < lengths[:, None])   # (B, span)
        return [(lo, hi, span, mask[lo:hi, None, None, :span]) for (lo, hi, _), span in zip(found, spans)]

    def chunk(self, a: int, b: int, slot: int, start: int) -> tuple:
        """A chunk of T = b - a tokens attends causally: its mask, (1, 1, G * T, span)."""
        positions = torch.arange(self.round_up(start + b - a), device=self.device)
        mask = self.additive(positions <= positions[start:start + b - a, None])         # (T, span)
        shared = self.model.config.num_attention_heads // self.model.config.num_key_value_heads
        return a, b, slot, len(positions), mask.repeat(shared, 1)[None, None]

    def round_up(self, n: int) -> int:
        return -(-n // self.SPAN) * self.SPAN

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def additive(self, allowed: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(allowed.shape, dtype=self.cache.layers[0][0].dtype, device=self.device)
        return zeros.masked_fill_(~allowed, float("-inf"))

    def forward(self, batch: Batch, rows: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One pass through the model; samples the next token of the slots `rows`: ids (n,), logps (n,)."""
        logits = self.model(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False,
                            logits_to_keep=self.tensor(last), batch=batch).logits[0]    # (n, V)
        uniforms = self.uniforms[self.tensor(rows), self.tensor(self.total[rows])]
        ids, logps = sample(logits, self.temperature, uniforms)
        self.steps += 1
        self.forwarded += len(batch.ids)
        self.sampled += len(rows)
        both = torch.stack([ids.double(), logps.double()]).cpu().numpy()    # the step's only wait
        return both[0].astype(np.int64), both[1]

    def record(self, rows: np.ndarray, ids: np.ndarray, logps: np.ndarray) -> list[int]:
        """Append the sampled tokens, and here the mask is made; returns the slots whose turn is over."""
        at = self.total[rows]
        self.tokens[rows, at], self.mask[rows, at], self.logps[rows, at] = ids, 1, logps
        self.total[rows] += 1
        over = []
        for slot in rows[self.watch[ids] | (self.total[rows] == self.limit[rows])].tolist():
            total, episode = self.total[slot], self.episodes[slot]
            turn = self.tokens[slot, self.turn[slot]:total].tolist()
            ended = episode.ended(turn)
            if ended or total == self.limit[slot]:
                cut = "context_limit" if total == self.context else "length"
                episode.close_turn(turn, "" if ended else cut)
                self.running[slot] = False
                over.append(slot)
        return over


def fitting_slots(model, context: int) -> int:
    """How many slots fit: into 80 % of the free memory of a GPU, or a quarter of the machine's memory."""
    config, weight = model.config, model.get_input_embeddings().weight
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    each = (a_token * weight.element_size() + 8) * context + 24 * config.vocab_size   # + uniforms, logits
    if weight.device.type == "cuda":
        cached = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        room, most = 0.8 * (torch.cuda.mem_get_info(weight.device)[0] + cached), 256
    else:                       # of the total, not of what is free: the same number of slots in every run
        room, most = 0.25 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 128
    return max(1, min(int(room / each), most))


# --------------------------------------------------------------------------------------------------- the call
def make_episodes(chat: Chat, style: str, tasks: list, executor, tools: list, sampling: Sampling, samples: int,
                  seed: int) -> list[Episode]:
    prompts = [build_prompt(chat, task, tools, style) for task in tasks]
    return [Episode(task, i, seed, group, prompts[group], chat, executor, tools, sampling)
            for group, task in enumerate(tasks) for i in range(samples)]


def rollout(policy, tasks: list, executor, tools: list, sampling: Sampling, samples: int, seed: int,
            progress=None) -> list[list[Trajectory]]:
    """Sample `samples` trajectories for each task with the policy as it is now: one list for each task.

    Inside `policy.reference()` it is the reference policy that is sampled. progress: a tqdm bar, one a
    trajectory. Raises UserError for a chat template, a prompt style or a model that cannot be used; what goes
    wrong in one trajectory ends that one, with stop_reason "error".
    """
    model, context, done = policy.model, sampling.context_tokens, {}
    if context > (positions := model.config.max_position_embeddings):
        raise UserError(f"--context-tokens {context}: the model has positions for {positions} tokens")
    chat = Chat(policy.tokenizer)       # once: it renders the template and reads the whole vocabulary
    episodes = make_episodes(chat, policy.preset.prompt, tasks, executor, tools, sampling, samples, seed)
    waiting, ended = [e for e in episodes if len(e.prompt) < context], []
    for episode in episodes:
        if (n := len(episode.prompt)) >= context:
            episode.stop_reason = "context_limit"
            ended.append((episode, episode.prompt, [0] * n, [0.0] * n, 0.0))
    with sampling_mode(model, sampling.deterministic):
        slots = max(1, min(sampling.slots or fitting_slots(model, context), len(waiting)))
        watch = chat.watched(model.config.vocab_size)
        engine = Engine(model, slots, context, sampling.temperature, watch, sampling.deterministic)
        for episode, *columns in itertools.chain(ended, engine.run(waiting)):
            done[episode] = episode.trajectory(*columns)
            if progress is not None:
                progress.update(1)
    return [[done[episode] for episode in episodes[g:g + samples]] for g in range(0, len(episodes), samples)]
