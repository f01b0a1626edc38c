"""Rollouts: multi-turn trajectories, sampled from the policy, with the exact log-probability of every token.

Owns the prompt, the turn protocol and the definition of sampling. Training and evaluation sample through `rollout`.
Read in this order: Turn, Trajectory, Sampling -> Chat, build_prompt -> Episode (the protocol of one trajectory; it
knows no tensors) -> sample_tokens, sample_plainly -> rollout.

`sample_plainly` defines sampling, one trajectory at a time. machinery/engine.py samples the same tokens, many
trajectories at once; a test compares the two. `rollout` takes the engine, unless --plain is set or the engine
cannot serve the model. The paper does not say how it samples, so the protocol is ours: a turn ends with the closing
fence of its first ```python block, and the observation comes back in the role of the user.
"""
import hashlib
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from machinery.cli import UserError, option
from machinery.engine import Engine, fitting_slots, refusal, sample_in_slots, sampling_mode
from machinery.folder import reading
from tools import ToolContext, prompt_text

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


@dataclass
class Turn:
    """One turn: what the policy wrote, and what came back."""
    text: str
    code: str | None            # of the first complete ```python block
    observation: str            # as the policy reads it: shortened, without the template
    status: str                 # of the executor: "ok", "error", "timeout"...; "" without code
    seconds: float              # for which the code ran, tools included


@dataclass
class Trajectory:
    """`ids`, `mask` and `logps` have one length T. A log-prob is 0.0 where the mask is 0."""
    task_id: str
    sample: int                 # index in its group
    seed: int                   # of the rollout; seed, task_id and sample fix the random stream
    ids: list[int]              # the last one is the last sampled token, if there is one
    mask: list[int]             # 1 = sampled: a closing fence, too; 0 = forced: prompt, observation, template
    logps: list[float]          # log pi(token) of the behaviour policy at the sampling temperature (greedy: at 1)
    prompt_length: int
    turns: list[Turn]
    answer: str | None
    stop_reason: str            # "answer" | "turn_limit" | "context_limit" (the context is full) |
    #                             "length" (a turn was stopped at turn_tokens) | "error" (the host failed: see `error`)
    seconds: float              # from its start to its end
    error: str = ""             # what failed

    def to_dict(self) -> dict:
        values = dict(vars(self))       # asdict() would copy every token
        values["steps"] = [vars(turn) for turn in values.pop("turns")]      # "steps": the name in older files
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Trajectory":
        values = dict(values)
        turns = [Turn(**turn) for turn in values.pop("steps")]
        return cls(**values, turns=turns)


@dataclass
class Sampling:
    """How to sample. There is no top-k and no top-p: the loss scores the full softmax. Temperature 0 is greedy."""
    temperature: float = option(1.0, "of sampling, and of every log-prob in the loss")
    max_turns: int = option(6, "turns per trajectory")
    turn_tokens: int = option(1024, "sampled tokens per turn")
    context_tokens: int = option(8192, "tokens per trajectory")
    observation_tokens: int = option(2000, "tokens per observation")
    slots: int | None = option(None, "trajectories decoded at once (default: by free memory)")
    deterministic: bool = option(False, "one thread, fixed order: bit-equal runs on the CPU")
    prompt: str | None = option(None, "FILE: its text replaces the instructions of the full prompt")
    plain: bool = option(False, "as the method is defined: sample one trajectory at a time, update with padding; slow")


# ------------------------------------------------------------------------------------------ the turn protocol
class Chat:
    """The chat template, taken apart into the tokens that stand between the texts; UserError if that fails. Sampled
    tokens are never decoded and tokenised again. "<|im_end|>" in a question or an observation stays text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        marks = [f"\x02{i}\x03" for i in range(4)]
        messages = [{"role": r, "content": m} for r, m in zip(("system", "user", "assistant", "user"), marks)]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:      # there is no template, or it raises: a template is a program
            raise UserError(f"the model's chat template cannot be used: {error}") from error
        pieces = re.split(f"({'|'.join(marks)})", text)
        if pieces[1::2] != marks:       # some templates move the system's text into the last user's message
            raise UserError("the chat template does not write system, user, assistant and user as they are")
        around = [self.encode(piece, special=True) for piece in pieces[::2]]
        self.before_system, self.before_question, _, self.after_turn, self.before_turn = around
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if not special.intersection(self.after_turn[:1]):   # else text could end a turn, also the text of a tool
            raise UserError("the chat template does not end a turn with a special token")
        self.turn_end = self.after_turn[0]          # <|im_end|>: forced where the turn ended at the fence
        # Qwen's Instruct models may also end a turn with <|endoftext|>, which is their padding token
        self.stops = {self.turn_end, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
        # no other token can end a turn: the engine looks at a turn's text only after one of these
        self.may_end_turn = self.stops.union(i for token, i in tokenizer.get_vocab().items() if "`" in token)

    def encode(self, text: str, special: bool = False) -> list[int]:
        text = text.encode("utf-8", "replace").decode()     # code may print half of a surrogate pair
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def prompt(self, system: str, question: str) -> list[int]:
        return (self.before_system + self.encode(system)
                + self.before_question + self.encode(question) + self.before_turn)

    def observation(self, text: str, limit: int) -> list[int]:
        """Tokens of `text`, at most `limit`: a note replaces the middle of a longer text."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return ids
        keep = limit
        for _ in range(3):              # the note needs tokens too, and its number may grow by a digit
            note = self.encode(f"\n[... {len(ids) - keep} tokens left out ...]\n")[:limit]
            keep = limit - len(note)
        tail = keep // 2
        return ids[:keep - tail] + note + ids[len(ids) - tail:]

    def between(self, observation: list[int], last: int) -> list[int]:
        """The forced tokens between two turns. last: the last sampled token of the first turn."""
        after_turn = self.after_turn[1:] if last == self.turn_end else self.after_turn
        return after_turn + self.encode("Observation:\n") + observation + self.before_turn

    def text(self, turn: list[int]) -> str:
        return self.tokenizer.decode(turn[:-1] if turn[-1] == self.turn_end else turn)


def read_prompt(file: str) -> str:
    """The text that replaces FULL. UserError if the turn protocol could not work with it."""
    with reading(f"--prompt {file}"):
        text = Path(file).read_text("utf-8")
        if missing := [word for word in ("```python", "final_answer") if word not in text]:
            raise UserError(f"it must tell the model of {' and of '.join(missing)}; see rollout.py: FULL")
    return text


def build_prompt(chat: Chat, task, tools: list, style: str, system: str | None = None) -> list[int]:
    """Token ids up to where the policy begins to write. style: "short" (for the tiny model) or "full". system: in place
    of FULL; the tools are documented after it."""
    files = ", ".join(task.files)
    if style == "short":
        if system is not None:
            raise UserError("--prompt: the tiny model knows its own prompt alone")
        return chat.prompt(SHORT, task.question + (f"\nFiles: {files}" if files else ""))
    if style != "full":
        raise UserError(f"the prompt style is short or full, not {style!r}")
    documented = f"\nThe code may call these functions:\n{prompt_text(tools)}\n" if tools else ""
    attached = f"\n\nAttached files, in the working directory: {files}" if files else ""
    return chat.prompt((system or FULL) + documented, task.question + attached)


def check_context(policy, tasks: list, tools: list, sampling: Sampling) -> None:
    """UserError if the context cannot hold even the shortest question's prompt and a turn."""
    shortest = min(tasks, key=lambda task: len(task.question))
    n = len(build_prompt(Chat(policy.tokenizer), shortest, tools, policy.preset.prompt, sampling.prompt))
    if n + sampling.turn_tokens > sampling.context_tokens:
        raise UserError(f"--context-tokens {sampling.context_tokens}: the shortest prompt has {n} tokens, and a turn "
                        f"may take --turn-tokens {sampling.turn_tokens}: raise the one or lower the other")


@dataclass(eq=False)
class Episode:
    """A trajectory while it is sampled. `ended` says if its turn is over, `act` runs the code, `observe` answers."""
    task: object
    sample: int
    seed: int
    group: int                  # episodes of one group share their prompt
    prompt: list[int]
    chat: Chat
    executor: object
    tools: list
    sampling: Sampling
    on_turn: Callable | None = None
    session: object = None      # opened with the first code
    turns: list[Turn] = field(default_factory=list)
    last: int = -1              # the last token of the newest turn
    answer: str | None = None
    stop_reason: str = ""       # "" while the trajectory goes on
    error: str = ""

    @property
    def turn_tokens(self) -> int:
        return self.sampling.turn_tokens

    def uniforms(self, n: int) -> np.ndarray:
        """(n,) in [0, 1), one per position. The random stream belongs to the trajectory, not to the batch."""
        key = hashlib.sha256(f"{self.seed}/{self.task.id}/{self.sample}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(n)

    def ended(self, turn: list[int]) -> bool:
        return turn[-1] in self.chat.stops or CODE.search(self.chat.text(turn)) is not None

    def close_turn(self, turn: list[int], stopped_by: str) -> None:
        """Keep the turn. stopped_by: the limit that ended it ("length", "context_limit"), "" if it ended by itself."""
        text = self.chat.text(turn)
        code = CODE.search(text)
        self.turns.append(Turn(text, code and code[1], "", "", 0.0))
        self.last, self.stop_reason = turn[-1], stopped_by

    def act(self):
        """Run the turn's code; returns the executor's CellResult, or None if there is nothing to run."""
        if self.turns[-1].code is None or self.stop_reason:
            return None
        if self.session is None:
            context = ToolContext(question=self.task.question, files=self.task.files)
            bound = {tool.name: tool.bind(context) for tool in self.tools}
            self.session = self.executor.session(tools=bound, files=self.task.files)
            context.workdir, context.seconds_left = self.session.workdir, self.session.seconds_left
        return self.session.execute(self.turns[-1].code)

    def observe(self, result, space: int) -> list[int]:
        """The forced tokens before the next turn, fewer than `space`; or [], and `stop_reason` says why."""
        turn = self.turns[-1]
        if self.stop_reason:
            return []
        text = NO_CODE
        if result is not None:
            text = result.observation()
            turn.status, turn.seconds, self.answer = result.status, result.seconds, result.answer
        ids = self.chat.observation(text, self.sampling.observation_tokens)
        turn.observation = self.chat.tokenizer.decode(ids)
        if self.on_turn is not None:
            self.on_turn(turn)
        forced = self.chat.between(ids, self.last)
        if self.answer is not None:
            self.stop_reason = "answer"
        elif len(self.turns) >= self.sampling.max_turns:
            self.stop_reason = "turn_limit"
        elif len(forced) >= space:
            self.stop_reason = "context_limit"
        return [] if self.stop_reason else forced

    def fail(self, error: Exception) -> None:
        """The host failed, not the code or a tool: this trajectory ends, no other one."""
        self.stop_reason, self.error = "error", f"{type(error).__name__}: {error}"

    def close(self) -> None:
        if self.session is not None:
            self.session.close()

    def again(self) -> "Episode":
        """The same trajectory from its beginning: after an out-of-memory, which ended it."""
        return replace(self, session=None, turns=[], last=-1, answer=None, stop_reason="", error="")

    def trajectory(self, ids: list[int], mask: list[int], logps: list[float], seconds: float) -> Trajectory:
        return Trajectory(
            self.task.id, self.sample, self.seed,
            ids, mask, logps, len(self.prompt),
            self.turns, self.answer, self.stop_reason, seconds, self.error,
        )


# ------------------------------------------------------------------------------------------------ sampling
def sample_tokens(logits, temperature: float, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V), (n,) -> ids (n,), their fp32 log pi (n,): the inverse CDF of softmax(logits / temperature)."""
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)            # (n, V)
    if temperature == 0:
        ids = logits.argmax(dim=-1, keepdim=True)                                       # (n, 1)
    else:
        cdf = logps.exp().cumsum(dim=-1, dtype=torch.float64)   # in fp32 a token below 6e-8 would never come
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)      # (n, 1)
        ids.clamp_(max=logits.shape[-1] - 1)
    return ids[:, 0], logps.gather(-1, ids)[:, 0]


def sample_plainly(model, episodes: list, context: int, temperature: float):
    """The definition of sampling. Yields (episode, ids, mask, logps, seconds) of each trajectory as it ends."""
    for episode in episodes:
        began = time.perf_counter()
        try:
            columns = sample_trajectory(model, episode, context, temperature)
        finally:                                        # also on Ctrl-C
            episode.close()
        yield episode, *columns, time.perf_counter() - began


def sample_trajectory(model, episode, context: int, temperature: float):
    """ids, mask and logps of one trajectory: at most `context` tokens."""
    uniforms = torch.from_numpy(episode.uniforms(context)).to(model.device)             # (context,)
    ids, mask, logps, forced = [], [], [], episode.prompt       # forced: tokens that the policy does not choose
    cache, cached = None, 0             # the keys and values of the first `cached` tokens
    while forced:
        ids = ids + forced
        mask = mask + [0] * len(forced)
        logps = logps + [0.0] * len(forced)
        start, ended = len(ids), False
        end = min(start + episode.turn_tokens, context)
        while not ended and len(ids) < end:
            new_ids = torch.tensor([ids[cached:]], device=model.device)     # (1, n): forced tokens or the last one
            out = model(input_ids=new_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, cached = out.past_key_values, len(ids)
            token, logp = sample_tokens(out.logits[:, -1], temperature, uniforms[cached:cached + 1])
            ids.append(token.item())
            mask.append(1)                              # the mask is made where the token is made
            logps.append(logp.item())
            ended = episode.ended(ids[start:])
        reached = "context_limit" if len(ids) == context else "length"
        episode.close_turn(ids[start:], "" if ended else reached)
        try:
            forced = episode.observe(episode.act(), context - len(ids))
        except Exception as error:
            episode.fail(error)
            forced = []
    return ids, mask, logps


def sample_all(model, chat: Chat, episodes: list, sampling: Sampling):
    """Yields (episode, ids, mask, logps, seconds) of each trajectory as it ends; with the engine where it can."""
    context = sampling.context_tokens
    fitting = [episode for episode in episodes if len(episode.prompt) < context]
    for episode in episodes:
        if (n := len(episode.prompt)) >= context:
            episode.stop_reason = "context_limit"
            yield episode, episode.prompt, [0] * n, [0.0] * n, 0.0
    refused = "" if sampling.plain else refusal(model)
    if refused:         # Python shows the same warning only once per process
        warnings.warn(f"the batched engine does not serve this model ({refused}): "
                      "sampling one trajectory at a time", stacklevel=2)
    if sampling.plain or refused:
        yield from sample_plainly(model, fitting, context, sampling.temperature)
    else:
        slots = min(sampling.slots or fitting_slots(model, context), len(fitting))

        def engine(slots: int) -> Engine:
            return Engine(model, slots, context, sampling.temperature, chat.may_end_turn, sample_tokens,
                          sampling.deterministic)
        yield from sample_in_slots(engine, slots, fitting, sampling)


def rollout(policy, tasks: list, executor, tools: list, sampling: Sampling, samples: int, seed: int,
            on_end: Callable | None = None, on_turn: Callable | None = None) -> list[list[Trajectory]]:
    """Sample `samples` trajectories per task, one list per task, with the policy as it is now (the reference, inside
    `policy.reference()`). on_end: called with each trajectory as it ends; on_turn: with each turn whose observation is
    known. Raises UserError for a chat template, a prompt style or a context that cannot be used. What fails in one
    trajectory ends that one alone ("error")."""
    model, context = policy.model, sampling.context_tokens
    if context > (positions := model.config.max_position_embeddings):
        raise UserError(f"--context-tokens {context}: the model has positions for {positions} tokens")
    chat = Chat(policy.tokenizer)       # once: it renders the template and reads the whole vocabulary
    episodes, done = [], {}             # done: (group, index in the group) -> trajectory
    seen = Counter()                    # a task that comes twice gets another seed, or its groups would be equal
    for group, task in enumerate(tasks):
        prompt = build_prompt(chat, task, tools, policy.preset.prompt, sampling.prompt)
        for i in range(samples):
            episodes.append(Episode(
                task=task,
                sample=i,
                seed=seed + seen[task.id],
                group=group,
                prompt=prompt,
                chat=chat,
                executor=executor,
                tools=tools,
                sampling=sampling,
                on_turn=on_turn,
            ))
        seen[task.id] += 1
    with (sampling_mode(model, sampling.deterministic),                         # eval mode, no gradients
          closing(sample_all(model, chat, episodes, sampling)) as ended):       # Ctrl-C closes the sessions, too
        for episode, *columns in ended:
            done[episode.group, episode.sample] = trajectory = episode.trajectory(*columns)
            if on_end is not None:
                on_end(trajectory)
    return [[done[group, i] for i in range(samples)] for group in range(len(tasks))]
