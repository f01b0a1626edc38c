"""Rollouts: many multi-turn trajectories sampled at once, with the exact log-probability of every token.

Owns the prompt, the turn protocol, `Trajectory` and the engine that generates. Training and evaluation both
sample through `rollout`. Read in this order: Turn, Trajectory, Sampling -> Chat, build_prompt -> Episode (the
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
import hashlib
import itertools
import re
import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from machinery.engine import Engine, fitting_slots, sampling_mode
from machinery.cli import UserError, option
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


# --------------------------------------------------------------------------------------------- what comes out
@dataclass
class Turn:
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
    turns: list[Turn]
    answer: str | None
    stop_reason: str            # "answer" | "turn_limit" | "context_limit" (no room for the next token) |
    #                             "length" (a turn cut at turn_tokens) | "error" (a tool or the host failed)
    seconds: float              # from its admission to its end
    error: str = ""             # what failed

    def to_dict(self) -> dict:      # not asdict: that copies every token
        values = {**vars(self), "steps": [vars(turn) for turn in self.turns]}      # "steps": the files' older name
        del values["turns"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Trajectory":
        values = {**values, "turns": [Turn(**turn) for turn in values["steps"]]}
        del values["steps"]
        return cls(**values)


@dataclass
class Sampling:
    """No top-k, no top-p: the loss scores the full softmax. temperature 0 is greedy."""
    temperature: float = option(1.0, "of sampling, and of every log-prob in the loss")
    max_turns: int = option(6, "turns per trajectory")
    turn_tokens: int = option(1024, "sampled tokens per turn")
    context_tokens: int = option(8192, "tokens per trajectory")
    observation_tokens: int = option(2000, "tokens per observation")
    slots: int | None = option(None, "trajectories decoded at once (default: by free memory)")
    deterministic: bool = option(False, "one thread, fixed order: bit-equal runs on the CPU")
    plain: bool = option(False, "the method without machinery/: one trajectory at a time, padded update")


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
    turns: list[Turn] = field(default_factory=list)
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
        self.turns.append(Turn(text, code and code[1], "", "", 0.0))
        self.last, self.stop_reason = turn[-1], cut

    def act(self):
        """Run the turn's code, in a worker thread; the executor's result, or None if there is no code."""
        with self.lock:
            if self.turns[-1].code is None or self.stop_reason or self.closed:
                return None
            if self.session is None:
                context = ToolContext(question=self.task.question, files=self.task.files)
                bound = {tool.name: tool.bind(context) for tool in self.tools}
                self.session = self.executor.session(tools=bound, files=self.task.files)
                context.workdir, context.seconds_left = self.session.workdir, self.session.seconds_left
            return self.session.execute(self.turns[-1].code)

    def observe(self, result, room: int) -> list[int]:
        """The forced tokens before the next turn, fewer than `room`; or [], and `stop_reason` says why."""
        turn = self.turns[-1]
        if self.stop_reason:
            return []
        if result is not None:
            turn.status, turn.seconds, self.answer = result.status, result.seconds, result.answer
        text = NO_CODE if result is None else result.observation()
        ids = self.chat.observation(text, self.sampling.observation_tokens)
        turn.observation = self.chat.tokenizer.decode(ids)
        forced = self.chat.between(ids, self.last)
        self.stop_reason = ("answer" if self.answer is not None else
                            "turn_limit" if len(self.turns) >= self.sampling.max_turns else
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
                          self.turns, self.answer, self.stop_reason, seconds, self.error)


# ------------------------------------------------------------------------------------------------- one token
def sample_tokens(logits, temperature: float, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V), (n,) -> ids (n,), their fp32 log pi (n,): the inverse CDF of softmax(logits / temperature)."""
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)            # (n, V)
    if temperature == 0:
        ids = logits.argmax(dim=-1, keepdim=True)                                       # (n, 1)
    else:
        cdf = logps.exp().cumsum(dim=-1, dtype=torch.float64)     # fp32 could not draw what is below 6e-8
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
        ids = ids.clamp_(max=cdf.shape[-1] - 1)
    return ids[:, 0], logps.gather(-1, ids)[:, 0]


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
        engine = Engine(model, slots, context, sampling.temperature, watch, sample_tokens,
                        sampling.deterministic)
        for episode, *columns in itertools.chain(ended, engine.run(waiting)):
            done[episode] = episode.trajectory(*columns)
            if progress is not None:
                progress.update(1)
    return [[done[episode] for episode in episodes[g:g + samples]] for g in range(0, len(episodes), samples)]
