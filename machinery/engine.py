"""Batched sampling: the same tokens as `rollout.sample_plainly`, with many trajectories at once.

Owns the engine, and `refusal`: why it cannot serve a model. Read in this order: Episode -> Tick, attend ->
Engine. It knows episodes by their interface alone.

B slots hold one trajectory each; their keys and values lie in one preallocated cache. A tick is one forward of the
model. It takes from each slot the tokens that are not forwarded yet: the token sampled last, or a chunk of a prompt
or of an observation. All these tokens lie end to end in ONE row of N tokens, so the linear layers see no padding.
Only attention knows of slots: it is the function `attend`, registered with transformers, for all language models
that look their attention up by name, wrapped by PEFT or not, quantised or not.
* Tokens with which several trajectories begin (the system prompt, a group's question) are forwarded once. Other slots
  copy their keys and values.
* Code and tools run in threads while other slots decode. A free slot gets the next trajectory at once.
* Nothing is kept between two calls: the policy changes there, and a cached prompt would be the old policy's.
"""
import contextlib
import itertools
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from policy import head_size                        # before peft, whose import of bitsandbytes it quiets
from machinery.fast_layers import fast_layers


class Episode(Protocol):
    """What the engine asks of a trajectory while it samples it. `rollout.Episode` is one."""
    prompt: list[int]
    turn_tokens: int            # limit of the turn that comes next

    def uniforms(self, n: int) -> np.ndarray: ...       # (n,) in [0, 1): number i chooses the token at position i
    def ended(self, turn: list[int]) -> bool: ...       # whether the turn is over with its last token
    def close_turn(self, turn: list[int], limit: str) -> None: ...  # limit: what stopped it; "" if it ended by itself
    def act(self) -> object: ...                        # runs the turn's code, in a thread
    def observe(self, result, space: int) -> list[int]: ...     # the forced tokens after act, fewer than space;
    def fail(self, error: Exception) -> None: ...       # [] ends the trajectory, and so does an error of act or observe
    def close(self) -> None: ...                        # in a thread, never beside act; no act follows
    def again(self) -> "Episode": ...                   # the same trajectory, not begun


# --------------------------------------------------------------------------------------- attention with slots
def key_value_cache(model, slots: int, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of B slots, for S positions each: two tensors (B, Hkv, S, D) per layer."""
    weight, config = model.get_input_embeddings().weight, model.config
    shape = (slots, config.num_key_value_heads, context, head_size(config))
    # zeros, not empty: what lies beyond a slot's length is masked, but 0 * NaN would still be NaN
    return [tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
            for _ in range(config.num_hidden_layers)]


@dataclass
class Tick:
    """The N tokens of one forward, end to end, and how they attend. Slots with a single token come first."""
    cache: list[tuple]          # keys and values per layer, (B, Hkv, S, D)
    ids: torch.Tensor           # (N,)
    positions: torch.Tensor     # (N,) in its trajectory
    slots: torch.Tensor         # (N,)
    singles: int                # tokens that are the only one of their slot in this tick
    token_of: torch.Tensor      # (B,) index of the slot's single token, 0 for a slot without
    blocks: list[tuple]         # (lo, hi, span, mask): single tokens of slots lo..hi attend to `span` positions
    chunks: list[tuple]         # (a, b, slot, span, mask): so do tokens a..b, a chunk of one slot
    samplers: np.ndarray        # (n,) the slots that sample a token after this tick
    last: np.ndarray            # (n,) the index of their last token


def attend(module, query, key, value, attention_mask, scaling=None, tick=None, **_):
    """transformers' attention interface: (1, H, N, D), (1, Hkv, N, D) twice -> (1, N, H, D).

    The G query heads that share a key head are rows of one query matrix: keys are never repeated.
    """
    keys, values = tick.cache[module.layer_idx]                                         # (B, Hkv, S, D)
    keys[tick.slots, :, tick.positions] = key[0].transpose(0, 1)                        # (N, Hkv, D)
    values[tick.slots, :, tick.positions] = value[0].transpose(0, 1)
    _, heads, n, size = query.shape
    query = query[0].unflatten(0, (keys.shape[1], -1))                                  # (Hkv, G, N, D)
    out = query.new_empty(n, heads, size)                                               # (N, H, D)
    single = query[:, :, tick.token_of].permute(2, 0, 1, 3)                             # (B, Hkv, G, D)
    mixed = torch.zeros_like(single)
    for lo, hi, span, mask in tick.blocks:
        mixed[lo:hi] = scaled_dot_product_attention(
            single[lo:hi], keys[lo:hi, :, :span], values[lo:hi, :, :span], attn_mask=mask, scale=scaling)
    out[:tick.singles] = mixed[tick.slots[:tick.singles]].flatten(1, 2)                 # (singles, H, D)
    for a, b, slot, span, mask in tick.chunks:
        rows = query[:, :, a:b].flatten(1, 2)[None]                                     # (1, Hkv, G * T, D)
        rows = scaled_dot_product_attention(
            rows, keys[None, slot, :, :span], values[None, slot, :, :span], attn_mask=mask, scale=scaling)
        # reshape, not view: the memory-efficient kernel of consumer GPUs lays its output out as (1, G * T, Hkv, D)
        out[a:b] = rows.reshape(heads, b - a, size).transpose(0, 1)                     # (T, H, D)
    return out[None], None


def note_call(module, query, key, value, attention_mask, *, notes, softcap=None, s_aux=None, **_):
    """Stands in for `attend` in `refusal`: it attends to nothing and notes what it is called with."""
    notes.append((module.layer_idx, key.shape, value.shape, softcap, s_aux))
    return query.new_zeros(*query.shape[:-1], value.shape[-1]).transpose(1, 2), None


AttentionInterface.register("rollout", attend)
AttentionInterface.register("rollout-note", note_call)


@contextlib.contextmanager
def attention(model, name: str) -> Iterator[None]:
    """Inside, the model attends with the function that is registered under this name."""
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def sampling_mode(model, deterministic: bool) -> Iterator[None]:
    """Eval mode, no gradients, one thread if deterministic; afterwards all as before. Both ways to sample need it."""
    training, threads = model.training, torch.get_num_threads()
    model.eval()
    torch.set_num_threads(1 if deterministic else threads)
    try:
        with torch.no_grad():   # not inference_mode: what is cached here must serve a backward pass later
            yield
    finally:
        torch.set_num_threads(threads)
        model.train(training)


# ------------------------------------------------------------------------------------------------- the engine
def in_thread(work: Callable) -> Future:
    """work() in a daemon thread: those of a pool, in a slow tool perhaps, would keep the program from ending."""
    future = Future()
    def body():
        try:
            future.set_result(work())
        except BaseException as error:      # whatever it is, it belongs to whoever asks for the result
            future.set_exception(error)
    threading.Thread(target=body, name="rollout", daemon=True).start()
    return future


class Worker:
    """Runs an episode's code in threads: `act` and `close` never at once, and no `act` after `close`."""

    def __init__(self, episode: Episode):
        self.episode, self.lock, self.closed = episode, threading.Lock(), False

    def act(self):
        with self.lock:
            return None if self.closed else self.episode.act()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.episode.close()


class Engine:
    """B slots that decode together. All state is in arrays over slots: no loop over tokens in a tick."""
    CHUNK = 512                 # tokens of prompts and observations per tick, so that decoding slots go on
    SPAN = 64                   # masked spans are multiples of this: aligned for the GPU's kernels
    LAG = 4                     # deterministic mode: a result is taken this many ticks after its turn

    def __init__(self, model, slots: int, context: int, temperature: float, may_end_turn: list[int],
                 sample_tokens: Callable, deterministic: bool = False):
        """may_end_turn: the tokens after which a turn may be over; `Episode.ended` is asked only there.
        sample_tokens: (logits (n, V), temperature, uniforms (n,)) -> ids (n,), their log-probs (n,)."""
        self.model, self.context, self.temperature = model, context, temperature
        self.sample_tokens, self.deterministic = sample_tokens, deterministic
        self.device = model.get_input_embeddings().weight.device
        self.may_end_turn = np.isin(np.arange(model.config.vocab_size), list(may_end_turn))     # (V,) bool
        self.cache = key_value_cache(model, slots, self.round_up(context))
        self.uniforms = torch.zeros(slots, context, dtype=torch.float64, device=self.device)
        self.tokens, self.mask = np.zeros((2, slots, context), dtype=np.int64)
        self.logps = np.zeros((slots, context), dtype=np.float32)
        # tokens of the slot; those whose keys and values are cached; lengths at which its turn began and is stopped
        self.length, self.cached, self.turn_start, self.turn_limit = np.zeros((4, slots), dtype=np.int64)
        self.decoding = np.zeros(slots, dtype=bool)         # False: free, or waits for a result
        self.workers, self.began = [None] * slots, [0.0] * slots
        self.acting: list[tuple] = []       # (tick at which the result is due, slot, future), oldest first
        self.ticks = self.forwarded = self.sampled = self.idle = 0      # ticks, tokens, tokens, seconds
        # an attention call costs about as much as reading this many positions of a slot (GPU: an estimate)
        shape, itemsize = self.cache[0][0].shape, self.cache[0][0].element_size()
        self.call_cost = (150e6 if self.device.type == "cuda" else 2e5) / (2 * shape[1] * shape[3] * itemsize)

    def sample(self, episodes: list[Episode]) -> Iterator[tuple]:
        """Yields (episode, ids, mask, logps, seconds) of each trajectory as it ends, in any order."""
        with fast_layers(self.model), attention(self.model, "rollout"):
            yield from self.decode(episodes)

    def decode(self, episodes: list[Episode]) -> Iterator[tuple]:
        waiting, free, closing = deque(episodes), deque(range(len(self.workers))), []
        try:
            while waiting or len(free) < len(self.workers):
                while waiting and free and self.admit(waiting[0], free):
                    waiting.popleft()
                for slot in self.collect():
                    n, worker = self.length[slot], self.workers[slot]
                    closing.append(in_thread(worker.close))
                    self.workers[slot] = None
                    free.append(slot)
                    columns = [array[slot, :n].tolist() for array in (self.tokens, self.mask, self.logps)]
                    yield worker.episode, *columns, time.perf_counter() - self.began[slot]
                if self.decoding.any():
                    tick = self.plan()
                    ids, logps = self.forward(tick)
                    for slot in self.record(tick.samplers, ids, logps):
                        self.acting.append((self.ticks + self.LAG, slot, in_thread(self.workers[slot].act)))
            wait(closing)
        finally:    # also on Ctrl-C: nothing is waited for; what still runs is closed when it returns
            for worker in filter(None, self.workers):
                in_thread(worker.close)

    def admit(self, episode: Episode, free: deque) -> bool:
        """Put it into a free slot; False while a prefix that it needs is being forwarded in another slot."""
        n = len(episode.prompt)
        agree = self.tokens[:, :n - 1] == episode.prompt[:-1]                               # (B, n - 1)
        same = agree.cumprod(axis=1).sum(axis=1)            # (B,) first tokens that a slot shares with the prompt
        ready = np.minimum(same, self.cached)               # (B,) of these, forwarded; also of free slots
        known = np.minimum(same, np.where(self.decoding, self.length, self.cached))     # (B,) of these, soon ready
        if known.max() > ready.max():
            return False
        slot, source, shared = free.popleft(), ready.argmax(), ready.max()
        if source != slot:
            for tensor in itertools.chain.from_iterable(self.cache):
                tensor[slot, :, :shared] = tensor[source, :, :shared]
        self.cached[slot] = shared          # at most n - 1: the last token is forwarded, for its logits
        self.workers[slot], self.began[slot] = Worker(episode), time.perf_counter()
        self.tokens[slot, :n], self.mask[slot], self.logps[slot] = episode.prompt, 0, 0.0
        self.uniforms[slot] = self.tensor(episode.uniforms(self.context))
        self.begin_turn(slot, n)
        return True

    def begin_turn(self, slot: int, length: int) -> None:
        self.length[slot] = self.turn_start[slot] = length
        self.turn_limit[slot] = min(length + self.workers[slot].episode.turn_tokens, self.context)
        self.decoding[slot] = True

    def collect(self) -> list[int]:
        """Append the observations that are there; returns the slots whose trajectory ended."""
        ended = []
        for item in self.results():
            self.acting.remove(item)
            _, slot, future = item
            episode, start = self.workers[slot].episode, self.length[slot]
            try:
                forced = episode.observe(future.result(), self.context - start)
            except Exception as error:
                episode.fail(error)
                forced = []
            if forced:
                end = start + len(forced)
                self.tokens[slot, start:end] = forced       # mask and logps are 0 since the admission
                self.begin_turn(slot, end)
            else:
                ended.append(slot)
        return ended

    def results(self) -> list[tuple]:
        """The items of `acting` whose results are taken now. Waits only if no slot can decode."""
        began, stuck = time.perf_counter(), not self.decoding.any()
        if self.deterministic:
            ready = [item for item in self.acting if stuck or item[0] <= self.ticks]
            wait([future for _, _, future in ready])
        else:
            if stuck:
                wait([future for _, _, future in self.acting], return_when=FIRST_COMPLETED)
            ready = [item for item in self.acting if item[2].done()]
        self.idle += time.perf_counter() - began
        return ready

    def plan(self) -> Tick:
        """What the next tick forwards."""
        slots = np.flatnonzero(self.decoding)                                           # (n,) of this tick
        size = np.minimum(self.length[slots] - self.cached[slots], self.CHUNK)          # (n,) tokens of each
        order = np.argsort(size, kind="stable")         # single tokens first, then the shortest chunks
        order = order[np.cumsum(size[order]) <= len(self.workers) + self.CHUNK]
        slots, size = slots[order], size[order]
        end = np.cumsum(size)                           # slot i has the tokens begin[i]..end[i] of the row,
        begin, start = end - size, self.cached[slots]   # and of its trajectory those from start[i] on
        slot_of = np.repeat(slots, size)                                                # (N,)
        positions = np.arange(len(slot_of)) + np.repeat(start - begin, size)            # (N,)
        ids = self.tokens[slot_of, positions]                                           # (N,)
        self.cached[slots] += size
        n = int((size == 1).sum())
        token_of = np.zeros(len(self.workers), dtype=np.int64)                          # (B,)
        token_of[slots[:n]] = np.arange(n)
        chunks = [self.chunk(*row) for row in np.stack([begin, end, slots, start], axis=1)[n:].tolist()]
        complete = self.cached[slots] == self.length[slots]
        return Tick(self.cache, self.tensor(ids), self.tensor(positions), self.tensor(slot_of), n,
                    self.tensor(token_of), self.blocks(slots[:n]), chunks, slots[complete], end[complete] - 1)

    def blocks(self, slots: np.ndarray) -> list[tuple]:
        """Neighbouring slots share a call, with the longest's span, where a second call would cost more."""
        found: list[list[int]] = []                                                     # [lo, hi, span]
        for slot, length in zip(slots.tolist(), self.cached[slots].tolist()):
            lo, hi, span = found[-1] if found else (slot, slot, 0)
            longest = max(span, length)
            if found and (slot + 1 - lo) * longest - (hi - lo) * span <= length + self.call_cost:
                found[-1] = [lo, slot + 1, longest]
            else:
                found.append([slot, slot + 1, length])
        if len(found) == len(slots):
            return [(lo, hi, span, None) for lo, hi, span in found]
        spans = [self.round_up(span) for _, _, span in found]
        lengths = self.tensor(np.maximum(self.cached, 1))                               # (B,)
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
        return torch.from_numpy(array).to(self.device, non_blocking=True)       # CUDA takes its own copy first

    def additive(self, allowed: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(allowed.shape, dtype=self.cache[0][0].dtype, device=self.device)
        return zeros.masked_fill_(~allowed, float("-inf"))

    def forward(self, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """One pass through the model; samples the next token of the slots tick.samplers: ids (n,), logps (n,)."""
        # before the model: later, the copies to a GPU would wait for it
        uniforms = self.uniforms[self.tensor(tick.samplers), self.tensor(self.length[tick.samplers])]
        logits = self.model(input_ids=tick.ids[None], position_ids=tick.positions[None], use_cache=False,
                            logits_to_keep=self.tensor(tick.last), tick=tick).logits[0]     # (n, V)
        ids, logps = self.sample_tokens(logits, self.temperature, uniforms)
        self.ticks += 1
        self.forwarded += len(tick.ids)
        self.sampled += len(tick.samplers)
        both = torch.stack([ids.double(), logps.double()]).cpu().numpy()    # one copy, not two
        return both[0].astype(np.int64), both[1]

    def record(self, slots: np.ndarray, ids: np.ndarray, logps: np.ndarray) -> list[int]:
        """Append the sampled tokens, and here the mask is made; returns the slots whose turn is over."""
        at = self.length[slots]
        self.tokens[slots, at], self.mask[slots, at], self.logps[slots, at] = ids, 1, logps
        self.length[slots] += 1
        over = []
        for slot in slots[self.may_end_turn[ids] | (self.length[slots] == self.turn_limit[slots])].tolist():
            length, episode = self.length[slot], self.workers[slot].episode
            turn = self.tokens[slot, self.turn_start[slot]:length].tolist()
            ended = episode.ended(turn)
            if ended or length == self.turn_limit[slot]:
                reached = "context_limit" if length == self.context else "length"
                episode.close_turn(turn, "" if ended else reached)
                self.decoding[slot] = False
                over.append(slot)
        return over


def sample_in_slots(make_engine: Callable[[int], Engine], slots: int, episodes: list[Episode],
                    sampling) -> Iterator[tuple]:
    """As Engine.sample. After an out-of-memory half of the slots go on, and `sampling.slots` says so from then on. What
    had not ended begins anew: its random stream is its own, so it becomes the same trajectory."""
    waiting = list(episodes)
    while waiting:
        torch.cuda.empty_cache()        # blocks that the update, or an attempt that failed, left have other sizes
        try:
            for ended in make_engine(slots).sample(waiting):
                waiting.remove(ended[0])
                yield ended
        except torch.OutOfMemoryError:
            if slots == 1:
                raise
            slots = sampling.slots = slots // 2
            warnings.warn(f"out of memory while sampling: {slots} slots go on", stacklevel=2)
            waiting = [episode.again() for episode in waiting]


@torch.no_grad()
def refusal(model) -> str:
    """Why the engine cannot serve this model, or "". One token goes through it, to see how it calls its attention."""
    config, notes = model.config, []
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if "sliding_attention" in kinds or getattr(config, "sliding_window", None):
        return "sliding-window attention"
    if kinds or model._is_stateful:
        return ", ".join(sorted(kinds)).replace("_", " ") or "recurrent layers"
    shape = (1, getattr(config, "num_key_value_heads", 0), 1, head_size(config))
    try:
        with attention(model, "rollout-note"):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False, notes=notes)
    except TypeError:                   # it does not hand `notes` down to its attention, and so no `tick`
        notes.clear()
    expected = [(layer, shape, shape, None, None) for layer in range(config.num_hidden_layers)]
    return "" if notes == expected else "attention that transformers does not look up by name, once per layer"


def fitting_slots(model, context: int) -> int:
    """How many slots fit: into 80 % of the free memory of a GPU, or a quarter of the machine's memory."""
    config, weight = model.config, model.get_input_embeddings().weight
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    per_slot = (per_token * weight.element_size() + 8) * context + 24 * config.vocab_size     # + uniforms, logits
    if weight.device.type == "cuda":
        reserved = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        memory, most = 0.8 * (torch.cuda.mem_get_info(weight.device)[0] + reserved), 256
    else:                       # of all memory, not of what is free: the same number of slots in every run
        memory, most = 0.25 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 128
    return max(1, min(int(memory / per_slot), most))
