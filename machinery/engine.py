"""Batched sampling: what `rollout.sample_plainly` does, with many trajectories at once.

Owns the engine that generates: KVCache, Batch, attend -> Engine. It knows episodes by their interface alone.
"""
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from machinery.cli import UserError
from policy import head_size


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
                 sample_tokens: Callable, deterministic: bool = False):
        self.model, self.context, self.temperature, self.watch = model, context, temperature, watch
        self.sample_tokens = sample_tokens
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
        ids, logps = self.sample_tokens(logits, self.temperature, uniforms)
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


def refusal(model) -> str:
    other = set(getattr(model.config, "layer_types", None) or []) - {"full_attention"}
    return "sliding" if other or getattr(model.config, "sliding_window", None) else ""
