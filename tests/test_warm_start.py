"""scripts/warm_start.py: the builder makes the files in tiny/, demonstrations look like rollouts, a base is warmed."""
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from scripts import warm_start
from machinery.cli import UserError
from executor import Executor
from policy import TINY, TINY_DIR, load_policy
from rollout import Chat, Sampling, rollout
from tasks import BUILTIN_TOOLS, CORE, PERSON, TOWN, Task, builtin_tasks, make_question, side
from tools import ToolContext

ROOT = Path(__file__).resolve().parent.parent
WAYS = [(family, way) for family in warm_start.DEMOS for way in range(3)]


@pytest.fixture(scope="module")
def chat():
    return Chat(AutoTokenizer.from_pretrained(TINY_DIR))


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """What the builder makes with two steps of each kind of training."""
    out = tmp_path_factory.mktemp("built") / "tiny"
    command = [sys.executable, "-m", "scripts.warm_start", "--out", out, "--copy-steps", "2", "--steps", "2"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return out


def test_the_builder_makes_the_kept_files(rebuilt):
    assert {f.name for f in rebuilt.iterdir()} == {f.name for f in TINY_DIR.iterdir()}
    for file in rebuilt.iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == (TINY_DIR / file.name).read_bytes(), file.name
    new, kept = load_file(rebuilt / "model.safetensors"), load_file(TINY_DIR / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in kept.items()}
    assert (TINY_DIR / "model.safetensors").stat().st_size < 2.1e6


def test_the_builder_overwrites_nothing(rebuilt):
    before = (rebuilt / "model.safetensors").read_bytes()
    command = [sys.executable, "-m", "scripts.warm_start", "--out", rebuilt]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert (rebuilt / "model.safetensors").read_bytes() == before


def test_autotokenizer_gives_the_tokens_the_model_was_trained_with(chat):
    """For the model type qwen2 it would take its own pre-tokenizer: such a model read and wrote garbage."""
    built, loaded = warm_start.build_tokenizer(0), chat.tokenizer
    text = 'How many ft are 37 m?\nfinal_answer(lookup("Kavodu", "area"))\n```'
    assert loaded.tokenize(text) == built.tokenize(text)
    assert loaded.get_chat_template() == built.get_chat_template() == warm_start.TEMPLATE
    assert 700 < len(loaded) <= warm_start.VOCABULARY == AutoConfig.from_pretrained(TINY_DIR).vocab_size
    assert loaded.convert_tokens_to_ids(["<|im_end|>"])[0] == loaded.eos_token_id != loaded.pad_token_id


def test_a_name_has_the_same_three_tokens_wherever_it_stands(chat):
    name = chat.encode("Kavodu")
    assert len(name) == 3
    for text in ("of Kavodu?", '("Kavodu", "area")', "'Kavodu'", "[\"Bibibi\", \"Kavodu\"]"):
        ids = chat.encode(text)
        assert any(ids[i:i + 3] == name for i in range(len(ids))), text
    assert [chat.tokenizer.decode([i]) for i in chat.encode("1024")] == ["1", "0", "2", "4"]


@pytest.mark.parametrize("family, way", WAYS)
def test_a_demonstration_reads_as_a_chat_and_fits_the_preset(chat, family, way):
    ids, mask = warm_start.demonstrate(chat, family, random.Random(5), way)
    text = chat.tokenizer.decode(ids)
    roles = [part.removesuffix("\n").removesuffix("<|im_end|>").split("\n", 1)
             for part in text.split("<|im_start|>")[1:]]
    assert [r for r, _ in roles] == ["system", *["user", "assistant"] * (len(roles) // 2)]
    messages = [{"role": role, "content": content} for role, content in roles]
    rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == text + "<|im_end|>\n"          # the rollout forces what follows the closing fence
    policy = chat.tokenizer.decode([i for i, m in zip(ids, mask) if m])
    assert policy == "".join(c for r, c in roles if r == "assistant") and policy.startswith("Thought: ")
    turns = [chat.encode(c) for r, c in roles if r == "assistant"]
    assert sum(map(len, turns)) == sum(mask)
    assert len(ids) < TINY.settings["context_tokens"] - 64 and len(turns) <= TINY.settings["max_turns"]
    assert max(map(len, turns)) < TINY.settings["turn_tokens"] and TINY.prompt == "short"
    assert "tokens left out" not in text


def test_demonstrations_show_training_names_only_and_mostly_wrong_ways(chat):
    rng = random.Random(9)
    texts = [chat.tokenizer.decode(warm_start.demonstrate(chat, family, rng, way)[0]) for family, way in WAYS]
    names = set(re.findall(rf"\b(?:{PERSON.pattern}|{TOWN.pattern})\b", "".join(texts)))
    assert len(names) > 30 and {side(name) for name in names} == {0}
    right, common, rare = warm_start.SHARES
    assert common > right > rare and sum(warm_start.SHARES) == pytest.approx(1)


def test_the_executor_shows_what_the_demonstrations_show(chat):
    """The builder runs their code in its own process, for speed; here the same code runs in the real sandbox."""
    with Executor(sandbox="auto") as executor:
        for family in warm_start.DEMOS:
            ids, mask = warm_start.demonstrate(chat, family, random.Random(11), 0)
            question = make_question(family, "train", random.Random(11))
            parts = chat.tokenizer.decode(ids).split("<|im_start|>")
            codes = [p.split("```python\n")[1].split("\n```")[0] for p in parts if p.startswith("assistant")]
            seen = [p.split("Observation:\n")[1].split("<|im_end|>")[0] for p in parts if "Observation:" in p]
            tools = {tool.name: tool.bind(ToolContext()) for tool in BUILTIN_TOOLS}
            with executor.session(tools=tools, files=question.files) as session:
                results = [session.execute(code) for code in codes]
            assert [r.observation() for r in results[:-1]] == seen
            assert results[-1].answer == str(question.answer) and all(r.status == "ok" for r in results)


# ------------------------------------------------------------------------------------------- the warm start of a base
def warmed(out: Path, **changes) -> dict:
    args = SimpleNamespace(base="tiny", out=out, seed=3, steps=6, batch=4, lr=1e-3, prompt=None)
    vars(args).update(changes)
    warm_start.warm_start("tiny", args, args.steps)
    return load_file(out / "model.safetensors")


def test_an_interrupted_warm_start_goes_on_and_ends_like_a_whole_one(tmp_path, monkeypatch):
    whole = warmed(tmp_path / "whole")
    imitate, calls = warm_start.imitate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return imitate(*args)
    monkeypatch.setattr(warm_start, "imitate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warmed(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    with pytest.raises(UserError, match="other settings.*delete it"):
        warmed(tmp_path / "parts", lr=1e-2)
    parts = warmed(tmp_path / "parts")
    assert len(calls) == 8                      # five steps, the interrupted one; from step 4 on again: two
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == []


def test_a_warm_start_merges_what_the_adapter_learned(tmp_path):
    """The folder holds a plain model: other weights than the base, and better at demonstrations."""
    before = load_file(TINY_DIR / "model.safetensors")
    after = warmed(tmp_path / "out", steps=8, batch=8)
    assert after.keys() == before.keys()
    linear = [name for name in before if "proj" in name]
    assert linear and all(not torch.equal(after[name], before[name]) for name in linear)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    losses = []
    for model in ("tiny", str(tmp_path / "out")):
        policy = load_policy(model)
        losses.append(warm_start.imitate(policy, Chat(policy.tokenizer), random.Random(8), 16, None))
    assert losses[1] < losses[0]


def test_a_full_prompt_stands_before_a_demonstration(chat):
    ids, mask = warm_start.demonstrate(chat, "lookup", random.Random(5), 0, "full", "Write ```python, final_answer.")
    text = chat.tokenizer.decode(ids[:mask.index(1)])
    assert "Write ```python, final_answer." in text and "convert(value: float" in text


def test_a_missing_gguf_file_is_refused_in_one_line(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="no such file"):
        warm_start.convert_gguf(tmp_path / "no.gguf", tmp_path / "out")


def success(policy, tasks: list[Task], temperature: float) -> tuple[float, float]:
    """(share of right answers, share of turns whose code ran), through the rollout and the executor."""
    limits = ("max_turns", "turn_tokens", "context_tokens", "observation_tokens")
    sampling = Sampling(temperature=temperature, **{name: TINY.settings[name] for name in limits})
    with Executor() as executor:
        found = [group[0] for group in rollout(policy, tasks, executor, BUILTIN_TOOLS, sampling, 1, seed=0)]
    statuses = [turn.status for t in found for turn in t.turns]
    right = [t.answer == task.answer for t, task in zip(found, tasks)]
    return sum(right) / len(right), statuses.count("ok") / len(statuses)


def test_the_kept_model_writes_code_that_runs_and_is_mostly_wrong():
    right, ran = success(load_policy("tiny"), builtin_tasks("heldout", 48, 0, CORE), 0.0)
    assert 0.05 < right < 0.6 and ran > 0.9


@pytest.mark.slow
def test_the_kept_model_leaves_something_to_learn():
    """On 448 held-out core tasks: at most 0.40 right greedy and 0.35 sampled, but enough to reinforce."""
    policy, tasks = load_policy("tiny"), builtin_tasks("heldout", 448, 0, CORE)
    assert 0.10 < success(policy, tasks, 0.0)[0] <= 0.40
    assert 0.20 < success(policy, tasks, 1.0)[0] <= 0.35
